package hostile

import (
	"bufio"
	"bytes"
	"cmp"
	"context"
	"crypto/tls"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/agent/accesslog"
	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/test/harness"
	"github.com/signet-mesh/signet/xds"
	"github.com/signet-mesh/signet/xds/xdsserver"
)

func TestMain(m *testing.M) { lab.Main(m) }

// The workloads of the node. In the first one's namespace all that proves an
// identity is let in, in the other's what policies allow.
const (
	openAddr   = "10.88.0.10"
	shopAddr   = "10.88.0.20"
	remoteAddr = "10.88.0.30"
	portNamed  = 8080 // open to idWeb by name
	portSet    = 8081 // open to the service accounts of namespace shop by a pattern
)

// node is a node's proxy, a real one, with the configuration that this project
// gives it, and the workloads behind it.
type node struct {
	*pki
	lab  *lab.Lab
	view *mesh.View
	log  string // the audit lines
	set  xds.Set
	// crls are lists of revoked certificates for tunnels that leave, which this
	// project's nodes have none of.
	crls [][]byte
	// ttl is for how long workloads' certificates are said to live; zero: an hour.
	ttl time.Duration
	// foreign are the trust domains that the mesh is federated with.
	foreign []xds.Trust
	// change makes another configuration of the node's; nil: it is as nodes have it.
	change func(xds.Set)
}

func startNode(t *testing.T, p *pki, crls ...[]byte) *node {
	t.Helper()
	return (&node{pki: p, crls: crls}).start(t)
}

// start starts the proxy, with what was set before.
func (n *node) start(t *testing.T) *node {
	t.Helper()
	l, err := lab.New(lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	dir, err := os.MkdirTemp("", "hostile-") // not t.TempDir: socket paths have a small maximum length
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n.lab, n.log = l, filepath.Join(dir, "audit.log")
	n.view = &mesh.View{Revision: "1", Model: policies(), State: &mesh.State{
		TrustDomain: spiffeid.RequireTrustDomainFromString(trustDomain), SVIDTTL: cmp.Or(n.ttl, time.Hour),
		Namespaces: map[string]mesh.Mode{"open": mesh.ModeObserve, "shop": mesh.ModeEnforce},
		Workloads: []mesh.Workload{
			n.workload(t, "open", "open", "open", openAddr, "n1"),
			n.workload(t, "shop", "remote", "web", remoteAddr, "n2"),
			n.workload(t, "shop", "server", "server", shopAddr, "n1"),
		},
	}}
	n.set = n.resources(t)
	if n.change != nil {
		n.change(n.set)
	}
	socket := filepath.Join(dir, "ads.sock")
	n.serve(t, socket)
	n.envoy(t, dir, socket)
	for _, name := range []string{"open", "server"} {
		for _, port := range []int{portNamed, portSet} {
			echo(t, n.lab.Pod(name), port)
		}
	}
	return n
}

func (n *node) workload(t *testing.T, namespace, name, account, addr, node string) mesh.Workload {
	t.Helper()
	pod, err := n.lab.AddPod(name, netip.MustParseAddr(addr))
	if err != nil {
		t.Fatal(err)
	}
	return mesh.Workload{
		Namespace: namespace, Name: name, ServiceAccount: account, Node: node,
		ID:      spiffeid.RequireFromString("spiffe://" + trustDomain + "/ns/" + namespace + "/sa/" + account),
		Capture: &mesh.Capture{NetNS: pod.NetNS, Addrs: []netip.Addr{pod.Addr}},
	}
}

// policies: one that names a caller, and one with a pattern.
func policies() *authz.Model {
	named := func(name, from string, port uint16) authz.Policy {
		return authz.Policy{Namespace: "shop", Name: name, TargetServiceAccount: "server", Ports: []uint16{port}, From: []authz.Pattern{must(authz.ParsePattern(from))}}
	}
	return authz.NewModel([]authz.Policy{named("by-name", idWeb, portNamed), named("by-pattern", "spiffe://mesh.test/ns/shop/sa/*", portSet)})
}

// resources are what the node's agent gives the proxy: the node's own part of
// the configuration and the secrets.
func (n *node) resources(t *testing.T) xds.Set {
	t.Helper()
	set, err := xds.Local(n.view, "n1", xds.Options{AccessLog: n.log})
	if err != nil {
		t.Fatal(err)
	}
	put := func(name string, s *tlsv3.Secret) {
		s.Name = name
		if err := set.Add(name, s); err != nil {
			t.Fatal(err)
		}
	}
	inline := func(kind string, ders ...[]byte) *corev3.DataSource {
		var b bytes.Buffer
		for _, der := range ders {
			_ = pem.Encode(&b, &pem.Block{Type: kind, Bytes: der}) // a buffer does not fail
		}
		return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b.Bytes()}}
	}
	roots := &tlsv3.CertificateValidationContext{TrustedCa: inline("CERTIFICATE", n.root.der)}
	if len(n.crls) > 0 {
		roots.Crl, roots.OnlyVerifyLeafCertCrl = inline("X509 CRL", n.crls...), true
	}
	put(xds.BundleSecret, &tlsv3.Secret{Type: &tlsv3.Secret_ValidationContext{ValidationContext: roots}})
	put(xds.InboundSecret, &tlsv3.Secret{Type: &tlsv3.Secret_ValidationContext{ValidationContext: xds.InboundTrust(
		xds.Trust{Domain: n.view.State.TrustDomain, PEM: inline("CERTIFICATE", n.root.der).GetInlineBytes()}, n.foreign)}})
	for _, w := range n.view.State.OnNode("n1") {
		for _, name := range []string{xds.ClientSecret(w.ID), xds.ServerSecret(w.ID)} {
			put(name, &tlsv3.Secret{Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
				CertificateChain: inline("CERTIFICATE", n.leaf(n.intermediate, w.ID.String()), n.intermediate.der),
				PrivateKey:       inline("PRIVATE KEY", pkcs8(n.keys.p256)),
			}}})
		}
	}
	return set
}

// Resources implements xdsserver.Source.
func (n *node) Resources() (xds.Set, <-chan struct{}) { return n.set, nil }

// Lookup implements xdsserver.Source: the destination of every captured
// connection is the remote workload. Nothing is captured here; callers dial the
// proxy's own port, which is never a destination.
func (n *node) Lookup(typeURL, name string) (xds.Resource, xdsserver.Answer) {
	if typeURL != xds.TypeCluster {
		return xds.Resource{}, xdsserver.Pending
	}
	r, ok := xds.Destination(n.view, "n1", xds.DestinationName(netip.AddrPortFrom(netip.MustParseAddr(remoteAddr), portNamed)))
	if !ok {
		return xds.Resource{}, xdsserver.Absent
	}
	var c clusterv3.Cluster
	if err := r.Body.UnmarshalTo(&c); err != nil {
		return xds.Resource{}, xdsserver.Absent
	}
	c.Name = name
	r, err := xds.NewResource(name, &c)
	if err != nil {
		return xds.Resource{}, xdsserver.Absent
	}
	return r, xdsserver.Found
}

func (n *node) serve(t *testing.T, socket string) {
	t.Helper()
	l, err := net.Listen("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(server, &xdsserver.Server{
		Log:  slog.New(slog.NewTextHandler(testLog{t}, nil)),
		Open: func(context.Context) (xdsserver.Source, xdsserver.Subscriber, error) { return n, nil, nil },
	})
	served := make(chan error, 1)
	go func() { served <- server.Serve(l) }()
	t.Cleanup(func() {
		server.Stop()
		<-served
	})
}

type testLog struct{ t *testing.T }

func (l testLog) Write(p []byte) (int, error) {
	l.t.Logf("%s", p)
	return len(p), nil
}

// envoy starts the proxy and waits until it takes tunnels.
func (n *node) envoy(t *testing.T, dir, socket string) {
	t.Helper()
	haste := filepath.Join(dir, "haste", "value")
	if err := os.MkdirAll(filepath.Dir(haste), 0o700); err != nil {
		t.Fatal(err)
	}
	config, err := xds.Bootstrap(xds.Proxy{Node: "n1", Instance: "1", ADS: socket, Admin: filepath.Join(dir, "admin.sock"), Haste: haste})
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string][]byte{filepath.Join(dir, "envoy.json"): config, haste: []byte("0")} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, harness.Envoy(t), "--config-path", filepath.Join(dir, "envoy.json"), //nolint:gosec // the proxy under test
		"--disable-hot-restart", "--concurrency", "2", "--log-level", "error", "--file-flush-interval-msec", "20")
	var out bytes.Buffer
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("the proxy: %s", out.String())
		}
	})
	for _, addr := range []string{openAddr, shopAddr} {
		for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(20 * time.Millisecond) {
			c, err := net.DialTimeout("tcp", net.JoinHostPort(addr, "15008"), time.Second)
			if err == nil {
				c.Close()
				break
			}
			if time.Now().After(deadline) {
				t.Fatalf("the proxy does not listen at %s: %v", addr, err)
			}
		}
	}
}

// echo answers every byte on a port of a pod.
func echo(t *testing.T, pod *lab.Pod, port int) {
	t.Helper()
	l, err := pod.Listen("tcp", fmt.Sprint(":", port))
	if err != nil {
		t.Fatal(err)
	}
	var all sync.WaitGroup
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer c.Close()
				_ = c.SetDeadline(time.Now().Add(20 * time.Second))
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		l.Close()
		all.Wait()
	})
}

var nextPort atomic.Int32

func init() { nextPort.Store(16000) }

// tunnel is one attempt to get a byte through the proxy.
type tunnel struct {
	from string // the caller's address
	err  error
}

// dial opens a tunnel to a workload with a certificate, and has a byte echoed
// by what listens at the port.
func dial(ctx context.Context, cert *tls.Certificate, addr string, port int) tunnel {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	// No port is used twice: by its address a caller is found in the audit.
	from := &net.TCPAddr{Port: int(nextPort.Add(1))}
	raw, err := (&net.Dialer{LocalAddr: from}).DialContext(ctx, "tcp", net.JoinHostPort(addr, "15008"))
	if err != nil {
		return tunnel{err: err}
	}
	defer raw.Close()
	out := tunnel{from: raw.LocalAddr().String()}
	conn := tls.Client(raw, &tls.Config{
		MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, CurvePreferences: []tls.CurveID{tls.X25519},
		InsecureSkipVerify:   true, //nolint:gosec // a stranger trusts anyone
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil },
	})
	out.err = through(ctx, conn, fmt.Sprintf("%s:%d", addr, port))
	return out
}

func through(ctx context.Context, conn *tls.Conn, authority string) error {
	if err := conn.HandshakeContext(ctx); err != nil {
		return err
	}
	// In TLS 1.3 the client is done before the server has looked at its
	// certificate. A read tells.
	h2 := &http.Transport{ForceAttemptHTTP2: true, DialTLSContext: func(context.Context, string, string) (net.Conn, error) { return conn, nil }}
	defer h2.CloseIdleConnections()
	r, w := io.Pipe()
	defer w.Close()
	req := (&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority,
		Header: http.Header{}, Body: r, ContentLength: -1,
	}).WithContext(ctx)
	resp, err := h2.RoundTrip(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		b, _ := io.ReadAll(io.LimitReader(resp.Body, 256))
		return fmt.Errorf("status %d: %s", resp.StatusCode, strings.TrimSpace(string(b)))
	}
	if _, err := w.Write([]byte{42}); err != nil {
		return err
	}
	b := make([]byte, 1)
	if _, err := io.ReadFull(resp.Body, b); err != nil {
		return fmt.Errorf("no byte came back: %w", err)
	}
	if b[0] != 42 {
		return errors.New("another byte came back")
	}
	return nil
}

// records reads what the audit would say of every caller, by its address, until
// all that are wanted are there.
func (n *node) records(t *testing.T, want []tunnel) map[string][]audit.Record {
	t.Helper()
	for deadline := time.Now().Add(20 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		out := n.readLog(t)
		missing := 0
		for _, w := range want {
			if w.from != "" && len(out[w.from]) == 0 {
				missing++
			}
		}
		if missing == 0 {
			return out
		}
		if time.Now().After(deadline) {
			t.Fatalf("%d of %d connections have no audit line", missing, len(want))
		}
	}
}

func (n *node) readLog(t *testing.T) map[string][]audit.Record {
	t.Helper()
	b, err := os.ReadFile(n.log)
	if err != nil {
		t.Fatal(err)
	}
	out := map[string][]audit.Record{}
	lines := bufio.NewScanner(bytes.NewReader(b[:bytes.LastIndexByte(b, '\n')+1]))
	lines.Buffer(nil, 1<<20)
	for lines.Scan() {
		e, ok, err := accesslog.Decode(lines.Bytes())
		if err != nil {
			t.Errorf("an audit line cannot be read: %v\n%s", err, lines.Bytes())
		}
		if ok && e.Final {
			out[e.Record.Source.Address] = append(out[e.Record.Source.Address], e.Record)
		}
	}
	return out
}
