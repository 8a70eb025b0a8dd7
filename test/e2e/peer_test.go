package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log"
	"math/big"
	"net"
	"net/http"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// forge signs whatever a test asks for: with the mesh's own intermediate, as
// whoever stole it could, or with a foreign one that looks the same.
type forge struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// stolenForge has the intermediate of a mesh.
func stolenForge(t *testing.T, m *harness.Mesh) *forge {
	t.Helper()
	dir := control.AuthorityDir(m.StateDir)
	read := func(name string) []byte {
		b, err := os.ReadFile(filepath.Join(dir, name))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(b)
		if block == nil {
			t.Fatalf("%s holds no PEM", name)
		}
		return block.Bytes
	}
	cert, err := x509.ParseCertificate(read("intermediate.crt"))
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(read("intermediate.key"))
	if err != nil {
		t.Fatal(err)
	}
	return &forge{cert, key.(*ecdsa.PrivateKey)}
}

// foreignForge has a self-made root with every name of the real intermediate.
func foreignForge(t *testing.T, like *forge) *forge {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: like.cert.SerialNumber, Subject: like.cert.Subject, URIs: like.cert.URIs,
		NotBefore: like.cert.NotBefore, NotAfter: like.cert.NotAfter,
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &forge{cert, key}
}

func newKey(t *testing.T) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

// sign makes a certificate from a minute ago to in an hour, for ids, unless
// change says otherwise.
func (f *forge) sign(t *testing.T, change func(*x509.Certificate), ids ...string) *tls.Certificate {
	t.Helper()
	serial, err := rand.Int(rand.Reader, new(big.Int).Lsh(big.NewInt(1), 120))
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: serial,
		NotBefore:    time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	for _, id := range ids {
		u, err := url.Parse(id)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = append(tmpl.URIs, u)
	}
	if change != nil {
		change(tmpl)
	}
	key := newKey(t)
	der, err := x509.CreateCertificate(rand.Reader, tmpl, f.cert, key.Public(), f.key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der, f.cert.Raw}, PrivateKey: key}
}

func expired(c *x509.Certificate) { c.NotAfter = time.Now().Add(-2 * time.Second) }

func notYet(c *x509.Certificate) { c.NotBefore = time.Now().Add(10 * time.Minute) }

// endpoint is a tunnel server that is no proxy of the mesh: it would echo
// every CONNECT that it is sent.
type endpoint struct {
	mu       sync.Mutex
	config   *tls.Config // guarded by mu
	connects atomic.Int64
	offered  atomic.Int64 // handshakes that began
	done     atomic.Int64 // handshakes that ended well
}

// become changes what the endpoint is from the next connection on.
func (e *endpoint) become(c *tls.Config) {
	e.mu.Lock()
	defer e.mu.Unlock()
	c.NextProtos = []string{"h2"}
	e.config = c
}

func (e *endpoint) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	if r.Method != http.MethodConnect {
		w.WriteHeader(http.StatusMethodNotAllowed)
		return
	}
	e.connects.Add(1)
	w.WriteHeader(http.StatusOK)
	rc := http.NewResponseController(w)
	_ = rc.EnableFullDuplex()
	_ = rc.Flush()
	b := make([]byte, 1024)
	for {
		n, err := r.Body.Read(b)
		if n > 0 {
			_, _ = w.Write(b[:n])
			_ = rc.Flush()
		}
		if err != nil {
			return
		}
	}
}

// start serves on the tunnel port of a pod until the test ends.
func (e *endpoint) start(t *testing.T, pod *lab.Pod) {
	t.Helper()
	l, err := pod.Listen("tcp", ":15008")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{Handler: e, ErrorLog: log.New(io.Discard, "", 0), ReadHeaderTimeout: 10 * time.Second, TLSConfig: &tls.Config{
		NextProtos: []string{"h2"},
		GetConfigForClient: func(*tls.ClientHelloInfo) (*tls.Config, error) {
			e.offered.Add(1)
			e.mu.Lock()
			defer e.mu.Unlock()
			c := e.config.Clone()
			if c.ClientAuth != tls.NoClientCert { // with a certificate, this comes after the client's
				c.VerifyConnection = func(tls.ConnectionState) error { e.done.Add(1); return nil }
			}
			return c, nil
		},
		// Never used: GetConfigForClient answers first.
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return nil, errors.New("none") },
	}}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
	})
}

const (
	idTarget = "spiffe://mesh.test/ns/shop/sa/target"
	idOther  = "spiffe://mesh.test/ns/shop/sa/other"
	targetAt = "10.88.0.20:8080"
)

// TestWrongPeer: what answers at a workload's address must prove that it is
// that workload, or it is sent nothing. The endpoint here is on another node,
// as far as this one knows. The defence is the expected identity of each
// connection (envoy.network.upstream_subject_alt_names), and, for the rest,
// the trust bundle and the TLS version of the tunnel cluster.
func TestWrongPeer(t *testing.T) {
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"client": "10.88.0.10", "rogue": "10.88.0.20"},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "client", "10.88.0.10") +
			strings.Replace(harness.Workload("shop", "target", "10.88.0.20"), "capture:", "node: n2, capture:", 1) +
			harness.Allow("shop", "client-to-target", "target", []int{8080}, "client")},
	})
	mesh := stolenForge(t, m)
	foreign := foreignForge(t, mesh)
	peer := &endpoint{}
	peer.start(t, m.Pod("rogue"))
	server := func(cert *tls.Certificate) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert}
	}
	changed := func(c *tls.Config, f func(*tls.Config)) *tls.Config { f(c); return c }

	for _, c := range []struct {
		name   string
		config *tls.Config
	}{
		{"another identity of the mesh", server(mesh.sign(t, nil, idOther))},
		{"the caller's own identity", server(mesh.sign(t, nil, "spiffe://mesh.test/ns/shop/sa/client"))},
		{"an identity that begins like the right one", server(mesh.sign(t, nil, idTarget+"-2"))},
		{"the right path in another trust domain", server(mesh.sign(t, nil, "spiffe://other.test/ns/shop/sa/target"))},
		{"the right identity as the common name only", server(mesh.sign(t, func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: idTarget} }))},
		{"the right identity, expired", server(mesh.sign(t, expired, idTarget))},
		{"the right identity, not yet valid", server(mesh.sign(t, notYet, idTarget))},
		{"the right identity, of a foreign root", server(foreign.sign(t, nil, idTarget))},
		{"the right identity, for clients only", server(mesh.sign(t, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }, idTarget))},
		{"TLS 1.2 at most", changed(server(mesh.sign(t, nil, idTarget)), func(c *tls.Config) { c.MinVersion, c.MaxVersion = 0, tls.VersionTLS12 })},
		{"another identity that asks for no certificate", changed(server(mesh.sign(t, nil, idOther)), func(c *tls.Config) { c.ClientAuth = tls.NoClientCert })},
	} {
		t.Run(c.name, func(t *testing.T) {
			peer.become(c.config)
			offered, done, connects := peer.offered.Load(), peer.done.Load(), peer.connects.Load()
			conn, err := m.Pod("client").Dial(t.Context(), "tcp", targetAt)
			if err != nil {
				t.Fatal(err)
			}
			defer conn.Close()
			_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
			_, _ = conn.Write([]byte("secret"))
			if n, err := conn.Read(make([]byte, 1)); n != 0 || err == nil || timedOut(err) {
				t.Errorf("the client read %d bytes, %v; want the connection closed", n, err)
			}
			if peer.offered.Load() == offered {
				t.Error("no handshake reached the endpoint, so this test showed nothing")
			}
			if n := peer.connects.Load() - connects; n != 0 {
				t.Errorf("the endpoint saw %d CONNECTs, want 0", n)
			}
			if n := peer.done.Load() - done; n != 0 {
				t.Errorf("%d handshakes ended well for the endpoint, want 0", n)
			}
			r := recordOf(t, m, audit.Source, conn.LocalAddr().String())
			if r.Verdict != audit.Failed || !strings.Contains(r.Reason, "did not prove that it is "+idTarget) || r.BytesReceived != 0 {
				t.Errorf("the audit says %s, %q, %d bytes received; want failed, because the peer did not prove that it is %s", r.Verdict, r.Reason, r.BytesReceived, idTarget)
			}
			t.Logf("audit: %s, %s", r.Verdict, r.Reason)
		})
	}

	// The same endpoint with the right certificate: all else was right.
	peer.become(server(mesh.sign(t, nil, idTarget)))
	h := hold(t, m.Pod("client"), targetAt)
	if peer.connects.Load() != 1 {
		t.Errorf("the endpoint saw %d CONNECTs, want 1", peer.connects.Load())
	}
	h.Close()
	if r := recordOf(t, m, audit.Source, h.own); r.Verdict != audit.Allowed || r.Destination.ID != idTarget {
		t.Errorf("the audit says %s to %q, want allowed to %s", r.Verdict, r.Destination.ID, idTarget)
	}
}

// recordOf waits for one side's ended record of the connection from an address.
func recordOf(t *testing.T, m *harness.Mesh, side audit.Side, from string) audit.Record {
	t.Helper()
	for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
		for _, r := range m.Records(adminclient.AuditQuery{Side: side}) {
			if r.Source.Address == from && !r.End.IsZero() {
				return r
			}
		}
	}
	t.Fatalf("no record of the connection from %s at its %s", from, side)
	return audit.Record{}
}

const idClient = "spiffe://mesh.test/ns/shop/sa/client"

// TestWrongClient: a tunnel is opened only for a caller who proves an identity
// of the mesh, with a certificate that is valid now. The callers here speak to
// the tunnel port themselves, from outside of the mesh, and would be allowed
// if they were believed. The defences are the client certificate that the
// listener requires, its trust bundle and trust domain, and that no TLS
// session is ever resumed: one would outlive its certificate.
func TestWrongClient(t *testing.T) {
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"server": "10.88.0.12", "stranger": "10.88.0.20"},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "server", "10.88.0.12") +
			harness.Allow("shop", "client-to-server", "server", []int{8080}, "client")},
	})
	var reached atomic.Int64
	serve(t, m.Pod("server"), ":8080", func(c net.Conn) { reached.Add(1); echo(c) })
	mesh := stolenForge(t, m)
	foreign := foreignForge(t, mesh)
	client := func(cert *tls.Certificate) *tls.Config {
		c := &tls.Config{InsecureSkipVerify: true, MinVersion: tls.VersionTLS13} //nolint:gosec // a stranger trusts anyone
		if cert != nil {
			// Whether or not the server would like it.
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		}
		return c
	}
	old := client(mesh.sign(t, nil, idClient))
	old.MinVersion, old.MaxVersion = tls.VersionTLS12, tls.VersionTLS12

	for _, c := range []struct {
		name   string
		config *tls.Config
	}{
		{"no certificate", client(nil)},
		{"expired", client(mesh.sign(t, expired, idClient))},
		{"not yet valid", client(mesh.sign(t, notYet, idClient))},
		{"a foreign root", client(foreign.sign(t, nil, idClient))},
		{"another trust domain", client(mesh.sign(t, nil, "spiffe://other.test/ns/shop/sa/client"))},
		{"a trust domain that begins like the right one", client(mesh.sign(t, nil, "spiffe://mesh.test.evil.example/ns/shop/sa/client"))},
		{"no URI name", client(mesh.sign(t, func(c *x509.Certificate) { c.DNSNames = []string{"client.shop"} }))},
		{"two identities of the mesh", client(mesh.sign(t, nil, idOther, idClient))},
		{"two identities, the allowed one first", client(mesh.sign(t, nil, idClient, idOther))},
		{"an identity and a web address", client(mesh.sign(t, nil, idClient, "https://example.com/"))},
		{"the allowed identity as a DNS name", client(mesh.sign(t, func(c *x509.Certificate) { c.DNSNames = []string{idClient} }, idOther))},
		{"the allowed identity as the common name", client(mesh.sign(t, func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: idClient} }))},
		{"for servers only", client(mesh.sign(t, func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] }, idClient))},
		{"TLS 1.2", old},
	} {
		t.Run(c.name, func(t *testing.T) {
			before := reached.Load()
			own, _, err := connect(t.Context(), m.Pod("stranger"), "10.88.0.12", c.config)
			if err == nil {
				t.Error("the connection was accepted")
			}
			if n := reached.Load() - before; n != 0 {
				t.Errorf("the application was reached %d times", n)
			}
			got := recordOf(t, m, audit.Destination, own)
			if got.Verdict != audit.Denied || !strings.Contains(got.Reason, "proved no identity") || got.Policy != "" {
				t.Errorf("the audit says %s, %q; want denied, because the caller proved no identity", got.Verdict, got.Reason)
			}
			t.Logf("the caller: %v; audit: %s, %s", err, got.Verdict, got.Reason)
		})
	}

	// The same caller with a good certificate, twice: all else was right, and
	// the second handshake proves the identity anew.
	good := client(mesh.sign(t, nil, idClient))
	good.ClientSessionCache = &tickets{cache: tls.NewLRUClientSessionCache(8)}
	for range 2 {
		_, state, err := connect(t.Context(), m.Pod("stranger"), "10.88.0.12", good)
		if err != nil {
			t.Fatalf("a caller with a good certificate: %v", err)
		}
		if state.DidResume {
			t.Error("a TLS session was resumed")
		}
	}
	if n := good.ClientSessionCache.(*tickets).put.Load(); n != 0 {
		t.Errorf("%d session tickets were given out, want 0", n)
	}
	if reached.Load() != 2 {
		t.Errorf("the application was reached %d times, want 2", reached.Load())
	}
}

// tickets counts the session tickets that a server gives.
type tickets struct {
	cache tls.ClientSessionCache
	put   atomic.Int64
}

func (s *tickets) Get(k string) (*tls.ClientSessionState, bool) { return s.cache.Get(k) }

func (s *tickets) Put(k string, v *tls.ClientSessionState) {
	if v != nil {
		s.put.Add(1)
	}
	s.cache.Put(k, v)
}

// connect opens a tunnel to a pod's port 8080 from outside of the mesh, and
// has a word echoed through it. own is the caller's address.
func connect(ctx context.Context, pod *lab.Pod, to string, config *tls.Config) (own string, state tls.ConnectionState, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	raw, err := pod.Dial(ctx, "tcp", net.JoinHostPort(to, "15008"))
	if err != nil {
		return "", state, err
	}
	defer raw.Close()
	own = raw.LocalAddr().String()
	config = config.Clone()
	config.NextProtos, config.ServerName = []string{"h2"}, "peer"
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return own, state, err
	}
	transport := &http.Transport{
		ForceAttemptHTTP2: true,
		DialTLSContext:    func(context.Context, string, string) (net.Conn, error) { return conn, nil },
	}
	defer transport.CloseIdleConnections()
	body, send := io.Pipe()
	defer send.Close()
	req := (&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: net.JoinHostPort(to, "15008")},
		Host: net.JoinHostPort(to, "8080"), Header: http.Header{}, Body: body, ContentLength: -1,
	}).WithContext(ctx)
	resp, err := transport.RoundTrip(req)
	if err != nil {
		return own, state, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return own, state, fmt.Errorf("answered with %s", resp.Status)
	}
	if _, err := send.Write([]byte("word")); err != nil {
		return own, state, err
	}
	got := make([]byte, 4)
	if _, err := io.ReadFull(resp.Body, got); err != nil || string(got) != "word" {
		return own, state, fmt.Errorf("sent word, got %q, %w", got, err)
	}
	return own, conn.ConnectionState(), nil
}
