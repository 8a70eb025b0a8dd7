package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/internal/proxy/instance"
	"github.com/signet-mesh/signet/test/harness"
)

// terminating is a policy that has TLS ended on ports of a target.
func terminating(namespace, name, target string, ports []int, from ...string) string {
	return strings.Replace(harness.Allow(namespace, name, target, ports, from...), ", from:", ", tls: terminate, from:", 1)
}

// named picks an identity of a process that has several.
func named(id string) func([]*x509svid.SVID) *x509svid.SVID {
	return func(all []*x509svid.SVID) *x509svid.SVID {
		for _, s := range all {
			if s.ID.String() == id {
				return s
			}
		}
		return all[0]
	}
}

// spiffeSource is go-spiffe, and nothing else, with one of this process's
// identities.
func spiffeSource(t *testing.T, m *harness.Mesh, id string) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	source, err := workloadapi.NewX509Source(ctx,
		workloadapi.WithClientOptions(workloadapi.WithAddr("unix://"+m.RunDir+"/api/agent.sock")),
		workloadapi.WithDefaultX509SVIDPicker(named(id)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { source.Close() })
	if s, err := source.GetX509SVID(); err != nil || s.ID.String() != id {
		t.Fatalf("this process is %v, %v; want %s", s, err, id)
	}
	return source
}

// spiffeDial speaks mutual TLS from inside a pod, as go-spiffe has it configured.
func spiffeDial(ctx context.Context, pod *lab.Pod, at string, source *workloadapi.X509Source, server string) (*tls.Conn, error) {
	return tlsDial(ctx, pod, at, tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(spiffeid.RequireFromString(server))))
}

func tlsDial(ctx context.Context, pod *lab.Pod, at string, config *tls.Config) (*tls.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	raw, err := pod.Dial(ctx, "tcp", at)
	if err != nil {
		return nil, err
	}
	_ = raw.SetDeadline(time.Now().Add(20 * time.Second))
	c := tls.Client(raw, config)
	if err := c.HandshakeContext(ctx); err != nil {
		raw.Close()
		return nil, err
	}
	return c, nil
}

// holdDirect is hold, by mutual TLS of the caller's own.
func holdDirect(t *testing.T, pod *lab.Pod, at string, source *workloadapi.X509Source, server string) *held {
	t.Helper()
	c, err := spiffeDial(t.Context(), pod, at, source, server)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	h := &held{Conn: c, own: c.LocalAddr().String()}
	if err := h.ping(); err != nil {
		t.Fatalf("%s to %s: %v", pod.Name, at, err)
	}
	return h
}

// directMesh has an unmodified server, a namespace that observes, two identities
// of this process, and a pod that is in no mesh.
func directMesh(t *testing.T, policies string) *harness.Mesh {
	return harness.Start(t, harness.Options{
		Pods: map[string]string{"server": "10.88.0.12", "watched": "10.88.0.13", "stranger": "10.88.0.20"},
		Documents: map[string]string{
			"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") + harness.Namespace("old", "observe") +
				harness.Workload("shop", "server", "10.88.0.12") + harness.Workload("old", "watched", "10.88.0.13") +
				sdkWorkload(t, "web") + sdkWorkload(t, "batch"),
			"policies.yaml": policies,
		},
	})
}

// TestDirectPrograms: a client that has go-spiffe and is in no captured namespace
// talks to unmodified servers that know nothing of TLS, one of which speaks
// first. Whom no policy names gets no byte, and the server does not learn that it
// called.
//
// What it defends: that the verdict about a connection whose TLS was ended is
// reached before the application is contacted (package xds, direct.go).
func TestDirectPrograms(t *testing.T) {
	from := []string{"allowed"}
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"web": "10.88.0.20", "cache": "10.88.0.21", "db": "10.88.0.22", "stranger": "10.88.0.30"},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "web", "10.88.0.20") + harness.Workload("shop", "cache", "10.88.0.21") + harness.Workload("shop", "db", "10.88.0.22") +
			sdkWorkload(t, "allowed") + sdkWorkload(t, "other") +
			terminating("shop", "to-web", "web", []int{8080}, from...) +
			terminating("shop", "to-cache", "cache", []int{6379}, from...) +
			terminating("shop", "to-db", "db", []int{3306}, from...)},
	})
	allowed, other := spiffeSource(t, m, sa("allowed")), spiffeSource(t, m, sa("other"))
	stranger := m.Pod("stranger")
	for i, p := range []struct {
		workload, port string
		start          func(*testing.T, *lab.Pod) server
		call           func(port string) []string
	}{
		{"web", "8080", startNginx, func(port string) []string {
			return []string{"curl", "-sSf", "--max-time", "60", "http://127.0.0.1:" + port + "/"}
		}},
		{"cache", "6379", startRedis, func(port string) []string {
			return []string{"redis-cli", "-e", "-h", "127.0.0.1", "-p", port, "ECHO", serverSays}
		}},
		{"db", "3306", startMariaDB, func(port string) []string {
			return []string{"mariadb", "--no-defaults", "--protocol=tcp", "-h", "127.0.0.1", "-P", port, "-u", "app", "-psecret", "-N", "-e", "SELECT word FROM shop.words", "shop"}
		}},
	} {
		t.Run(p.workload, func(t *testing.T) {
			s := p.start(t, m.Pod(p.workload))
			at := net.JoinHostPort(m.Pod(p.workload).Addr.String(), p.port)
			// Through this the programs' own clients speak mutual TLS.
			through := func(port string, source *workloadapi.X509Source) {
				serve(t, stranger, "127.0.0.1:"+port, func(c net.Conn) {
					out, err := spiffeDial(t.Context(), stranger, at, source, sa(p.workload))
					if err != nil {
						return
					}
					defer out.Close()
					go func() { _, _ = io.Copy(out, c); _ = out.CloseWrite() }()
					_, _ = io.Copy(c, out)
				})
			}
			good, bad := fmt.Sprint(7000+i), fmt.Sprint(7100+i)
			through(good, allowed)
			through(bad, other)

			before := s.seen(t)
			out, err := run(t, stranger, p.call(good)...)
			if err != nil || !strings.Contains(out, s.says) {
				t.Errorf("%v: %v, %q; want %q", p.call(good), err, out, s.says)
			}
			after := s.seen(t)
			for what := range after {
				if after[what] <= before[what] {
					t.Errorf("%s is %d before and after an allowed call, so it shows nothing", what, after[what])
				}
			}
			for range 20 {
				c, err := spiffeDial(t.Context(), stranger, at, other, sa(p.workload))
				if err != nil {
					t.Fatalf("the handshake of a caller that the policies refuse: %v", err)
				}
				if b, err := io.ReadAll(c); len(b) != 0 || timedOut(err) {
					t.Errorf("a denied caller received %d bytes, %v; want 0 and the connection closed", len(b), err)
				}
				c.Close()
			}
			if out, err := run(t, stranger, p.call(bad)...); strings.Contains(out, s.says) || err == nil && strings.TrimSpace(out) != "" {
				t.Errorf("%v by a denied caller: %v, %q; want a failure", p.call(bad), err, out)
			}
			for what, n := range s.seen(t) {
				if n != after[what] {
					t.Errorf("%s went from %d to %d with denied calls only", what, after[what], n)
				}
			}
		})
	}
	m.Eventually(15*time.Second, "the records of all calls", func() error {
		denied, granted := 0, 0
		for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination}) {
			if r.Transport != audit.Direct {
				t.Fatalf("a record of another kind: %+v", r)
			}
			w := strings.TrimPrefix(r.Destination.Workload, "shop/")
			complete := r.Source.Serial != "" && r.Destination.ID == sa(w) && r.Revision != "" && r.TLS != nil && r.TLS.Version == "TLSv1.3" && r.TLS.Group == "X25519MLKEM768"
			switch {
			case complete && r.Verdict == audit.Allowed && r.Source.ID == sa("allowed") && r.Policy == "shop/to-"+w && r.Reason == "allowed by shop/to-"+w:
				granted++
			case complete && r.Verdict == audit.Denied && r.Source.ID == sa("other") &&
				r.Reason == "default deny: 1 policy protects shop/"+w+", it does not admit this caller":
				denied++
			default:
				t.Fatalf("the audit has %+v", r)
			}
		}
		if granted < 3 || denied < 63 {
			return fmt.Errorf("%d allowed, %d denied; want at least 3 and 63", granted, denied)
		}
		return nil
	})
}

// TestDirectRefuses: who proves no identity of the mesh gets nothing, and the
// application does not learn of it. Plain bytes are refused as ever.
//
// What it defends: the client certificate that is asked for, what it is verified
// by, that one with several names is nobody's, and TLS 1.3.
func TestDirectRefuses(t *testing.T) {
	m := directMesh(t, terminating("shop", "web-to-server", "server", []int{8080}, "web"))
	var reached atomic.Int64
	serve(t, m.Pod("server"), ":8080", greet(&reached))
	serve(t, m.Pod("server"), ":9090", greet(&reached))
	mesh := stolenForge(t, m)
	foreign := foreignForge(t, mesh)
	with := func(cert *tls.Certificate) *tls.Config {
		c := &tls.Config{InsecureSkipVerify: true} //nolint:gosec // a stranger trusts anyone
		if cert != nil {
			c.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert, nil }
		}
		return c
	}
	old := with(mesh.sign(t, nil, idWeb))
	old.MaxVersion = tls.VersionTLS12
	for _, c := range []struct {
		name   string
		config *tls.Config // nil: plain
		reason string
	}{
		{"no certificate", with(nil), "the caller proved no identity: "},
		{"a certificate of a foreign root", with(foreign.sign(t, nil, idWeb)), "the caller proved no identity: "},
		{"an expired one", with(mesh.sign(t, expired, idWeb)), "the caller proved no identity: "},
		{"one that is not yet valid", with(mesh.sign(t, notYet, idWeb)), "the caller proved no identity: "},
		{"one of another trust domain", with(mesh.sign(t, nil, "spiffe://other.test/ns/shop/sa/web")), "the caller proved no identity: "},
		{"one of several names", with(mesh.sign(t, nil, idWeb, sa("batch"))), "its certificate has several names"},
		{"TLS 1.2", old, "the caller proved no identity: "},
		{"another identity", with(mesh.sign(t, nil, sa("batch"))), "default deny: 1 policy protects shop/server, it does not admit this caller"},
		{"no TLS", nil, "plaintext: shop/server takes only connections whose caller proves an identity"},
	} {
		t.Run(c.name, func(t *testing.T) {
			raw, err := m.Pod("stranger").Dial(t.Context(), "tcp", serverAt)
			if err != nil {
				t.Fatal(err)
			}
			defer raw.Close()
			_ = raw.SetDeadline(time.Now().Add(20 * time.Second))
			conn := raw
			if c.config != nil {
				conn = tls.Client(raw, c.config)
			}
			_, _ = io.WriteString(conn, "GET / HTTP/1.0\r\n\r\n") // an error of it is the read's too
			if b, err := io.ReadAll(conn); len(b) != 0 && c.config != nil || strings.Contains(string(b), greeting) || timedOut(err) {
				t.Errorf("the caller read %q, %v; want nothing and the connection closed", b, err)
			}
			r := recordOf(t, m, audit.Destination, raw.LocalAddr().String())
			want := audit.Direct
			if c.config == nil {
				want = "plaintext"
			}
			if r.Verdict != audit.Denied || r.Transport != want || !strings.Contains(r.Reason, c.reason) || r.Destination.Address != serverAt || r.Destination.Workload != "shop/server" {
				t.Errorf("the audit has %+v; want it denied: %s", r, c.reason)
			}
		})
	}
	// A port that no policy has TLS ended on, with the best of certificates.
	if c, err := tlsDial(t.Context(), m.Pod("stranger"), adminAt, with(mesh.sign(t, nil, idWeb))); err == nil {
		c.Close()
		t.Error("TLS is ended on a port that no policy names")
	}
	if n := reached.Load(); n != 0 {
		t.Errorf("the application was reached %d times", n)
	}
	// With what all of them lack.
	c, err := tlsDial(t.Context(), m.Pod("stranger"), serverAt, with(mesh.sign(t, nil, idWeb)))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "hello"); err != nil {
		t.Fatal(err)
	}
	_ = c.CloseWrite()
	if b, err := io.ReadAll(c); err != nil || string(b) != greeting+"hello" {
		t.Errorf("an allowed caller got %q, %v", b, err)
	}
	if c.ConnectionState().NegotiatedProtocol != "" {
		t.Errorf("nobody asked for %q", c.ConnectionState().NegotiatedProtocol)
	}
	for _, offer := range [][]string{{"h2", "http/1.1"}, {"h2"}} { // what Go's HTTP and gRPC clients offer
		config := with(mesh.sign(t, nil, idWeb))
		config.NextProtos = offer
		c, err := tlsDial(t.Context(), m.Pod("stranger"), serverAt, config)
		if err != nil {
			t.Fatal(err)
		}
		if got := c.ConnectionState().NegotiatedProtocol; got != offer[len(offer)-1] {
			t.Errorf("of %v %q was agreed on", offer, got)
		}
		c.Close()
	}
}

// TestDirectEnds: an open connection ends when the policy that admitted it goes,
// when its caller is quarantined and when its certificate is revoked; a
// neighbour's stays, also when TLS is ended on another port from now on, and when
// the agent is killed. A revoked certificate is refused.
//
// What it defends: that package agent follows these connections as it does those
// of tunnels, and that it takes none for plaintext; and that inside the proxy none
// travels with the identity of another that is open.
func TestDirectEnds(t *testing.T) {
	grant := terminating("shop", "batch-to-server", "server", []int{8080}, "batch")
	webGrant := terminating("shop", "web-to-server", "server", []int{8080}, "web")
	m := directMesh(t, grant+webGrant)
	serve(t, m.Pod("server"), ":8080", echo)
	serve(t, m.Pod("server"), ":9090", echo)
	web, batch := spiffeSource(t, m, idWeb), spiffeSource(t, m, sa("batch"))
	stranger := m.Pod("stranger")
	neighbour := holdDirect(t, stranger, serverAt, batch, sa("server"))
	stays := func(when string) {
		t.Helper()
		if err := neighbour.ping(); err != nil {
			t.Fatalf("%s, the neighbour's connection: %v", when, err)
		}
	}
	ends := func(what string, h *held, cause func(), within time.Duration, reason string) {
		t.Helper()
		over, began := h.ending(), time.Now()
		cause()
		at := <-over
		if at.IsZero() || at.Sub(began) > within {
			t.Errorf("%s: the open connection ended at %v, want within %s", what, at, within)
		}
		t.Logf("%s: the connection ended after %s", what, at.Sub(began).Round(time.Millisecond))
		if r := recordOf(t, m, audit.Destination, h.own); r.Ended != "revoked" || !strings.HasSuffix(r.Reason, "; revoked: "+reason) || r.Transport != audit.Direct || r.Source.ID != idWeb {
			t.Errorf("%s: the audit has %+v; want it revoked: %s", what, r, reason)
		}
		stays(what)
	}
	// The neighbour is not to be in a proxy's listener that is on its way out:
	// an edit for another port leaves its own as it is.
	m.Edit("policies.yaml", grant+webGrant+terminating("shop", "web-to-admin", "server", []int{9090}, "web"))
	admin := holdDirect(t, stranger, adminAt, web, sa("server"))
	stays("TLS is ended on another port")
	if changed, err := proxyStat(t, m, "listener_manager.listener_in_place_updated"); err != nil || changed == 0 {
		t.Errorf("the listener was replaced as a whole: %d, %v", changed, err)
	}

	ends("policy", holdDirect(t, stranger, serverAt, web, sa("server")), func() {
		m.Write("policies.yaml", grant+terminating("shop", "web-to-admin", "server", []int{9090}, "web"))
	}, 3*time.Second, "default deny: 2 policies protect shop/server, none admits this caller")
	_ = admin.Close()

	m.Edit("policies.yaml", grant+webGrant)
	killAgent(t, m)
	time.Sleep(4 * time.Second) // it looks for plaintext that the namespace refuses
	stays("the agent was killed")

	ends("quarantine", holdDirect(t, stranger, serverAt, web, sa("server")), func() {
		m.Write("quarantine.yaml", `apiVersion: signet.dev/v1alpha1
kind: Quarantine
metadata: {name: incident-7}
spec: {reason: a test, serviceAccounts: [shop/web]}
`)
	}, 3*time.Second, `quarantined by "incident-7": caller `+idWeb+" is cut off")
	m.Edit("quarantine.yaml", "")

	stolen, serial := copied(t, m, idWeb)
	config := &tls.Config{Certificates: []tls.Certificate{*stolen}, InsecureSkipVerify: true} //nolint:gosec // a thief trusts anyone
	c, err := tlsDial(t.Context(), stranger, serverAt, config)
	if err != nil {
		t.Fatal(err)
	}
	thief := &held{Conn: c, own: c.LocalAddr().String()}
	if err := thief.ping(); err != nil {
		t.Fatalf("before the revocation the copy must be of use: %v", err)
	}
	ends("revoked certificate", thief, func() {
		if out, code := m.CLI("ca", "revoke", "--serial", serial, "--reason", "copied"); code != 0 {
			t.Fatalf("signet ca revoke: %d, %s", code, out)
		}
	}, revokedWithin, "the caller's certificate is revoked: copied")
	if c, err = tlsDial(t.Context(), stranger, serverAt, config); err == nil {
		b, err := io.ReadAll(c)
		c.Close()
		if len(b) != 0 || timedOut(err) {
			t.Errorf("a revoked certificate is of use: %q, %v", b, err)
		}
		if r := recordOf(t, m, audit.Destination, c.LocalAddr().String()); r.Verdict != audit.Denied || r.Reason != "the caller's certificate is revoked" || r.Source.Serial != serial {
			t.Errorf("the audit has %+v", r)
		}
	}
	// One that its client resets is one connection, and no failed handshake beside.
	h := holdDirect(t, stranger, serverAt, web, sa("server"))
	_ = h.Conn.(*tls.Conn).NetConn().(*net.TCPConn).SetLinger(0)
	_ = h.Conn.(*tls.Conn).NetConn().Close()
	recordOf(t, m, audit.Destination, h.own)
	stays("at the end")
	for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination}) {
		if r.Verdict == audit.Failed || r.Transport != audit.Direct {
			t.Errorf("the audit has %+v", r)
		}
	}

	out, code := m.CLI("policy", "explain", "--from", "shop/web", "--to", "shop/server", "--port", "8080")
	if code != 0 || !strings.Contains(out, "tls: terminate of shop/batch-to-server") {
		t.Errorf("signet policy explain (%d):\n%s", code, out)
	}
	if out, code := m.CLI("audit", "--to", "shop/server"); code != 0 || !strings.Contains(out, "mtls-direct") {
		t.Errorf("signet audit (%d):\n%s", code, out)
	}
}

// TestDirectObserved: where a namespace observes, a port on which TLS is ended
// goes on to take plain bytes, of clients that speak first and of others; and
// mutual TLS of a caller that enforce would refuse is recorded as observed.
func TestDirectObserved(t *testing.T) {
	m := directMesh(t, terminating("old", "web-to-watched", "watched", []int{8080, 8081}, "shop/web"))
	var reached atomic.Int64
	for _, at := range []string{":8080", ":8081", ":9090"} {
		serve(t, m.Pod("watched"), at, greet(&reached))
	}
	stranger := m.Pod("stranger")
	for _, c := range []struct{ port, word string }{{"8080", "hello"}, {"8081", "hello"}, {"9090", "hello"}, {"8080", ""}, {"9090", ""}} {
		at := "10.88.0.13:" + c.port
		conn, err := stranger.Dial(t.Context(), "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(20 * time.Second))
		_, _ = io.WriteString(conn, c.word)
		began, b := time.Now(), make([]byte, len(greeting)+len(c.word))
		_, err = io.ReadFull(conn, b)
		if string(b) != greeting+c.word {
			t.Errorf("%s, saying %q: %q, %v", at, c.word, b, err)
		}
		t.Logf("%s, saying %q: answered after %s", at, c.word, time.Since(began).Round(time.Millisecond))
		conn.Close()
		if r := recordOf(t, m, audit.Destination, conn.LocalAddr().String()); r.Transport != "plaintext" || r.Verdict != audit.Observed {
			t.Errorf("the audit has %+v", r)
		}
	}
	const server = "spiffe://mesh.test/ns/old/sa/watched"
	for _, c := range []struct {
		id      string
		verdict audit.Verdict
		reason  string
	}{
		{idWeb, audit.Allowed, "allowed by old/web-to-watched"},
		{sa("batch"), audit.Observed, "default deny: 1 policy protects old/watched, it does not admit this caller"},
	} {
		conn, err := spiffeDial(t.Context(), stranger, "10.88.0.13:8081", spiffeSource(t, m, c.id), server)
		if err != nil {
			t.Fatal(err)
		}
		_, _ = io.WriteString(conn, "hello")
		_ = conn.CloseWrite()
		if b, err := io.ReadAll(conn); err != nil || string(b) != greeting+"hello" {
			t.Errorf("%s: %q, %v", c.id, b, err)
		}
		conn.Close()
		if r := recordOf(t, m, audit.Destination, conn.LocalAddr().String()); r.Transport != audit.Direct || r.Verdict != c.verdict || r.Reason != c.reason || r.Source.ID != c.id {
			t.Errorf("the audit has %+v", r)
		}
	}
}

// proxyStat asks the running proxy for one of its counters.
func proxyStat(t *testing.T, m *harness.Mesh, name string) (n int, err error) {
	t.Helper()
	all, err := instance.List(m.RunDir)
	if err != nil || len(all) != 1 {
		return 0, fmt.Errorf("%d proxies: %w", len(all), err)
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{DisableKeepAlives: true,
		DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return (&net.Dialer{}).DialContext(ctx, "unix", all[0].Admin())
		}}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://envoy/stats?filter=^"+name+"$", nil)
	if err != nil {
		return 0, err
	}
	resp, err := client.Do(req)
	if err != nil {
		return 0, err
	}
	defer resp.Body.Close()
	_, err = fmt.Fscanf(resp.Body, name+": %d", &n)
	return n, err
}

// TestDirectSDK: a program with package sdk talks to an unmodified server, and
// both ends are in the audit. From a captured namespace the mesh's tunnel leads
// straight to the application, in which TLS is not ended: there a program dials in
// plain, and one that does not is told so.
func TestDirectSDK(t *testing.T) {
	m := &sdkMesh{Mesh: harness.Start(t, harness.Options{
		Pods: map[string]string{"server": "10.88.0.12", "captured": "10.88.0.14"},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "server", "10.88.0.12") + harness.Workload("shop", "captured", "10.88.0.14") + sdkWorkload(t, "client") +
			terminating("shop", "to-server", "server", []int{8080, 9090}, "client", "captured")},
	})}
	serve(t, m.Pod("server"), ":8080", echo)
	client := m.as(t, "client")
	c, err := client.Dial(t.Context(), "tcp", serverAt, sdkID("server"))
	if err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if err := word(c); err != nil {
		t.Error(err)
	}
	own := c.LocalAddr().String()
	c.Close()
	for side, transport := range map[audit.Side]string{audit.Source: "mtls", audit.Destination: audit.Direct} {
		if r := recordOf(t, m.Mesh, side, own); r.Verdict != audit.Allowed || r.Transport != transport || r.Source.ID != sa("client") || r.Destination.ID != sa("server") || r.BytesSent != 5 || r.BytesReceived != 5 {
			t.Errorf("the %s has %+v", side, r)
		}
	}
	if _, err := client.Dial(t.Context(), "tcp", serverAt, sdkID("other")); err == nil || !strings.Contains(err.Error(), "did not prove that it is") {
		t.Errorf("a server that is not the wanted one: %v", err)
	}

	// What a captured program with the SDK meets: the application itself.
	serve(t, m.Pod("server"), ":9090", func(c net.Conn) { _, _ = io.WriteString(c, greeting) })
	source := spiffeSource(t, m.Mesh, sa("client"))
	var plain tls.RecordHeaderError
	if _, err := spiffeDial(t.Context(), m.Pod("captured"), adminAt, source, sa("server")); !errors.As(err, &plain) {
		t.Errorf("TLS from a captured namespace to an application without: %v", err)
	}
	if err := callEcho(t.Context(), m.Pod("captured"), serverAt); err != nil {
		t.Errorf("in plain from a captured namespace: %v", err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go acceptAll(l, func(c net.Conn) { _, _ = io.WriteString(c, greeting) })
	if _, err := client.Dial(t.Context(), "tcp", l.Addr().String(), sdkID("server")); err == nil || !strings.Contains(err.Error(), "answered without TLS; where this program is captured") {
		t.Errorf("a server without TLS: %v", err)
	}
}
