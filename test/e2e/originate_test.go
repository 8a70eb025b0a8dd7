package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/sdk"
	"github.com/signet-mesh/signet/test/harness"
)

// originating is a policy that says that a target speaks mutual TLS itself on ports;
// alpn may be empty.
func originating(name, target string, ports []int, alpn string, from ...string) string {
	tls := ", tls: originate"
	if alpn != "" {
		tls += ", alpn: " + alpn
	}
	return strings.Replace(harness.Allow("shop", name, target, ports, from...), ", from:", tls+", from:", 1)
}

// capturedProgram is a captured workload that is what runs an executable as well.
func capturedProgram(name, address, exe string) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: %[1]s, namespace: shop}
spec:
  serviceAccount: %[1]s
  capture: {networkNamespace: %[1]s, addresses: [%[2]s]}
  attest: {uid: %[3]d, path: %[4]q}
---
`, name, address, os.Geteuid(), exe)
}

// self is the executable of this very test.
func self(t *testing.T) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return exe
}

// speaker is a service in front of a program at an address that speaks mutual TLS
// itself and is not captured.
func speaker(name, vip, address, id string) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: ServiceEntry
metadata: {name: %s, namespace: shop}
spec:
  vips: [%s]
  ports: [{port: 80, targetPort: 8443}, {port: 81, targetPort: 9443}]
  endpoints: [{address: %s, spiffeID: %q, tls: originate}]
---
`, name, vip, address, id)
}

// guests are those who a server knows to have called it.
type guests struct {
	mu   sync.Mutex
	ids  map[string]int // guarded by mu
	said int            // guarded by mu; bytes that came
}

func (g *guests) welcome(id string, c net.Conn) {
	g.mu.Lock()
	if g.ids == nil {
		g.ids = map[string]int{}
	}
	g.ids[id]++
	g.mu.Unlock()
	_, _ = io.WriteString(c, greeting)
	n, _ := io.Copy(c, c)
	g.mu.Lock()
	g.said += int(n)
	g.mu.Unlock()
}

func (g *guests) of(id string) (calls, all, said int) {
	g.mu.Lock()
	defer g.mu.Unlock()
	for _, n := range g.ids {
		all += n
	}
	return g.ids[id], all, g.said
}

// withSDK has a workload of package sdk listen in a pod.
func (m *sdkMesh) withSDK(t *testing.T, pod, port, name string) *guests {
	t.Helper()
	inner, err := m.Pod(pod).Listen("tcp", ":"+port)
	if err != nil {
		t.Fatal(err)
	}
	l := m.as(t, name).NewListener(inner)
	t.Cleanup(func() { l.Close() })
	g := &guests{}
	go acceptAll(l, func(c net.Conn) { g.welcome(c.(*sdk.Conn).PeerID().String(), c) })
	return g
}

// withSPIFFE has a workload of go-spiffe, and nothing else, listen in a pod.
func withSPIFFE(t *testing.T, pod *lab.Pod, port string, config *tls.Config) *guests {
	t.Helper()
	inner, err := pod.Listen("tcp", ":"+port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { inner.Close() })
	g := &guests{}
	go acceptAll(inner, func(raw net.Conn) {
		c := tls.Server(raw, config)
		defer c.Close()
		if c.Handshake() == nil {
			g.welcome(c.ConnectionState().PeerCertificates[0].URIs[0].String(), c)
		}
	})
	return g
}

// echoTLS answers whoever proves an identity, on port 9443 of a pod.
func echoTLS(t *testing.T, pod *lab.Pod, source *workloadapi.X509Source) {
	t.Helper()
	inner, err := pod.Listen("tcp", ":9443")
	if err != nil {
		t.Fatal(err)
	}
	l := tls.NewListener(inner, tlsconfig.MTLSServerConfig(source, source, tlsconfig.AuthorizeAny()))
	t.Cleanup(func() { l.Close() })
	go acceptAll(l, echo)
}

// greeted calls from a pod in plain, and wants the greeting and an echo.
func greeted(ctx context.Context, pod *lab.Pod, at string) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp", at)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := c.Write(canary); err != nil {
		return err
	}
	b := make([]byte, len(greeting)+len(canary))
	if n, err := io.ReadFull(c, b); err != nil || string(b) != greeting+string(canary) {
		return fmt.Errorf("%q %w", b[:n], err)
	}
	return nil
}

const (
	atServer  = "10.88.0.12:8443" // captured, package sdk
	atSPIFFE  = "10.88.0.12:9443" // captured, go-spiffe
	vipDirect = "10.96.0.2"       // neither: port 80 package sdk, port 81 go-spiffe
)

// TestOriginate: captured programs that speak no TLS call programs that do, by package
// sdk and by go-spiffe alone, captured and not, while certificates are replaced. Each
// server knows who called, whom it does not admit gets nothing from it, and the audit
// has both ends.
//
// What it defends: that the caller's proxy shows the certificate of the very caller
// (package xds, originate.go): with one pool or certificate for two callers, a server
// would take one for the other.
func TestOriginate(t *testing.T) {
	m := &sdkMesh{Mesh: harness.Start(t, harness.Options{
		Pods: map[string]string{"client": "10.88.0.10", "other": "10.88.0.11", "server": "10.88.0.12", "bare": "10.88.0.20"},
		Documents: map[string]string{"mesh.yaml": harness.Config("8s") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "other", "10.88.0.11") +
			capturedProgram("server", "10.88.0.12", self(t)) + sdkWorkload(t, "direct") +
			originating("to-server", "server", []int{8443, 9443}, "", "client") +
			originating("to-direct", "direct", []int{8443}, "", "client") +
			originating("by-grpc", "server", []int{7443}, "h2", "client") +
			speaker("direct", vipDirect, "10.88.0.20", sa("direct"))},
	})}
	server, direct := spiffeSource(t, m.Mesh, sa("server")), spiffeSource(t, m.Mesh, sa("direct"))
	onlyClient := tlsconfig.AuthorizeID(sdkID("client"))
	servers := map[string]*guests{
		atServer:          m.withSDK(t, "server", "8443", "server"),
		atSPIFFE:          withSPIFFE(t, m.Pod("server"), "9443", tlsconfig.MTLSServerConfig(server, server, onlyClient)),
		vipDirect + ":80": m.withSDK(t, "bare", "8443", "direct"),
		vipDirect + ":81": withSPIFFE(t, m.Pod("bare"), "9443", tlsconfig.MTLSServerConfig(direct, direct, onlyClient)),
	}
	client, other := m.Pod("client"), m.Pod("other")
	calls := 0
	for began := time.Now(); calls < 3 || time.Since(began) < 10*time.Second; calls++ { // a certificate's life, and more
		for at := range servers {
			if err := greeted(t.Context(), client, at); err != nil {
				t.Fatalf("%s, %s on: %v", at, time.Since(began).Round(time.Millisecond), err)
			}
			if err := greeted(t.Context(), other, at); err == nil || timedOut(err) {
				t.Errorf("%s: a caller that is not admitted: %v", at, err)
			}
		}
	}
	for at, g := range servers {
		m.Eventually(5*time.Second, "a server to have heard all", func() error {
			if n, all, said := g.of(sa("client")); n != calls || all != calls || said != calls*len(canary) {
				return fmt.Errorf("%s was called %d times by the client, and %d in all, with %d bytes; want %d", at, n, all, said, calls)
			}
			return nil
		})
	}

	// What one end says of who the other is, the other says of itself.
	type end struct{ at, side, transport, witness, verdict, from, to string }
	want := map[end]bool{
		{atServer, "source", "mtls", "proxy", "allowed", "client", "server"}:      true,
		{atServer, "destination", "mtls", "proxy", "allowed", "client", "server"}: true,
		{atServer, "destination", "mtls", "sdk", "allowed", "client", "server"}:   true,
		{atSPIFFE, "source", "mtls", "proxy", "allowed", "client", "server"}:      true,
		{atSPIFFE, "destination", "mtls", "proxy", "allowed", "client", "server"}: true,
		{atServer, "source", "mtls", "proxy", "denied", "other", "server"}:        true,
		{atServer, "destination", "mtls", "proxy", "denied", "other", "server"}:   true,
		{atSPIFFE, "source", "mtls", "proxy", "denied", "other", "server"}:        true,
		{atSPIFFE, "destination", "mtls", "proxy", "denied", "other", "server"}:   true,

		{vipDirect + ":80", "source", audit.Direct, "proxy", "allowed", "client", "direct"}: true,
		{"10.88.0.20:8443", "destination", "mtls", "sdk", "allowed", "client", "direct"}:    true,
		{vipDirect + ":81", "source", audit.Direct, "proxy", "allowed", "client", "direct"}: true,
		{"10.88.0.20:8443", "destination", "mtls", "sdk", "denied", "other", "direct"}:      true,
		{vipDirect + ":80", "source", audit.Direct, "proxy", "allowed", "other", "direct"}:  true, // decided by the application
		{vipDirect + ":81", "source", audit.Direct, "proxy", "allowed", "other", "direct"}:  true,
	}
	m.Eventually(15*time.Second, "the records of all calls", func() error {
		got := map[end]int{}
		for _, r := range m.Records(adminclient.AuditQuery{}) {
			e := end{r.Destination.Address, string(r.Side), r.Transport, "proxy", string(r.Verdict), strings.TrimPrefix(r.Source.ID, sa("")), strings.TrimPrefix(r.Destination.ID, sa(""))}
			if r.Proxy == "sdk" {
				e.witness = "sdk"
			}
			if !want[e] {
				t.Fatalf("a record that nothing explains: %+v", r)
			}
			if r.Verdict == audit.Allowed && (r.TLS == nil || r.TLS.Group != "X25519MLKEM768") {
				t.Fatalf("TLS %+v: %+v", r.TLS, r)
			}
			if !r.End.IsZero() {
				got[e]++
			}
		}
		for e := range want {
			if got[e] != calls {
				return fmt.Errorf("%d records of %+v, want %d", got[e], e, calls)
			}
		}
		return nil
	})

	// A server that has to agree on a protocol.
	inner, err := m.Pod("server").Listen("tcp", ":7443")
	if err != nil {
		t.Fatal(err)
	}
	srv := grpc.NewServer(grpc.Creds(m.as(t, "server").GRPCServer()))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	t.Cleanup(srv.Stop)
	go func() { _ = srv.Serve(inner) }()
	for pod, admitted := range map[*lab.Pod]bool{client: true, other: false} {
		conn, err := grpc.NewClient("passthrough:///10.88.0.12:7443", grpc.WithTransportCredentials(insecure.NewCredentials()),
			grpc.WithContextDialer(func(ctx context.Context, at string) (net.Conn, error) { return pod.Dial(ctx, "tcp", at) }))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		cancel()
		if (err == nil) != admitted {
			t.Errorf("gRPC in plain from %s: %v", pod.Name, err)
		}
	}
	out, code := m.CLI("policy", "explain", "--from", "shop/client", "--to", "shop/server", "--port", "7443")
	if code != 0 || !strings.Contains(out, "tls: originate of shop/by-grpc") {
		t.Errorf("signet policy explain (%d):\n%s", code, out)
	}
}

// TestOriginateNobodyElse: an application that proves another identity than the wanted
// one, by the mesh's root or another, or speaks no TLS, gets not one byte of what the
// caller says; the audit says whom the proxy wanted.
//
// What it defends: that the name of the application is compared with the one that is
// wanted there, and not with any of the mesh (insideTunnels, originator).
func TestOriginateNobodyElse(t *testing.T) {
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"client": "10.88.0.10", "server": "10.88.0.12", "bare": "10.88.0.20"},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "client", "10.88.0.10") +
			capturedProgram("server", "10.88.0.12", self(t)) + sdkWorkload(t, "direct") + sdkWorkload(t, "wrong") +
			originating("to-server", "server", []int{8443, 9443, 7443, 6443}, "", "client") +
			speaker("direct", vipDirect, "10.88.0.20", sa("direct"))},
	})
	wrong, right := spiffeSource(t, m, sa("wrong")), spiffeSource(t, m, sa("server"))
	forge := foreignForge(t, stolenForge(t, m))
	anybody := func(cert *tls.Certificate) *tls.Config {
		return &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert}
	}
	wrongConfig := tlsconfig.MTLSServerConfig(wrong, wrong, tlsconfig.AuthorizeAny())
	var plain guests
	serve(t, m.Pod("server"), ":7443", func(c net.Conn) {
		b := make([]byte, 1<<16)
		_, _ = io.WriteString(c, greeting)
		for {
			n, err := c.Read(b)
			if strings.Contains(string(b[:n]), string(canary)) {
				t.Error("what the caller says reached an application without TLS")
			}
			if err != nil {
				return
			}
		}
	})
	servers := map[string]*guests{
		atServer:          withSPIFFE(t, m.Pod("server"), "8443", wrongConfig),
		atSPIFFE:          withSPIFFE(t, m.Pod("server"), "9443", anybody(forge.sign(t, nil, sa("server")))),
		"10.88.0.12:7443": &plain,
		vipDirect + ":80": withSPIFFE(t, m.Pod("bare"), "8443", wrongConfig),
		vipDirect + ":81": withSPIFFE(t, m.Pod("bare"), "9443", anybody(forge.sign(t, nil, sa("direct")))),
	}
	// So what is below shows something.
	good := withSPIFFE(t, m.Pod("server"), "6443", tlsconfig.MTLSServerConfig(right, right, tlsconfig.AuthorizeAny()))
	if err := greeted(t.Context(), m.Pod("client"), "10.88.0.12:6443"); err != nil {
		t.Fatal(err)
	}
	if n, _, _ := good.of(sa("client")); n != 1 {
		t.Errorf("the right server was called %d times", n)
	}
	for at, g := range servers {
		if err := greeted(t.Context(), m.Pod("client"), at); err == nil || timedOut(err) {
			t.Errorf("%s: %v; want the connection closed", at, err)
		}
		if _, all, said := g.of(""); said != 0 || all != 0 {
			t.Errorf("%s: %d calls, %d bytes reached it", at, all, said)
		}
		to := sa("direct")
		if !strings.HasPrefix(at, vipDirect) {
			to = sa("server")
		}
		m.Eventually(10*time.Second, "the audit of "+at, func() error {
			for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Source, Verdicts: []audit.Verdict{audit.Failed}}) {
				if r.Destination.Address == at && r.Source.ID == sa("client") && r.Destination.ID == "" && r.BytesSent == 0 &&
					strings.Contains(r.Reason, "the application did not prove by mutual TLS that it is "+to+": ") {
					return nil
				}
			}
			return errors.New("no record says that it did not prove who it is")
		})
	}
}

// TestOriginateEnds: a connection that the caller's proxy made to an application in no
// namespace of the mesh ends when either of the two is quarantined, also one from before
// the agent was killed, and there is no other until that is over, and when the
// application's certificate is revoked; one inside a tunnel
// ends when its policy goes. An edit that says that an application speaks TLS, or not
// any more, holds for the next connection.
//
// What it defends: that the agent ends what it alone can end (package agent, live.go):
// a program with plain go-spiffe hears of no quarantine.
func TestOriginateEnds(t *testing.T) {
	base := harness.Config("1h") + harness.Namespace("shop", "enforce") +
		harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "second", "10.88.0.11") +
		capturedProgram("server", "10.88.0.12", self(t)) + sdkWorkload(t, "direct") +
		speaker("direct", vipDirect, "10.88.0.20", sa("direct"))
	grant := originating("to-server", "server", []int{9443}, "", "client")
	m := harness.Start(t, harness.Options{
		Pods:      map[string]string{"client": "10.88.0.10", "second": "10.88.0.11", "server": "10.88.0.12", "bare": "10.88.0.20"},
		Documents: map[string]string{"mesh.yaml": base, "policies.yaml": grant},
	})
	direct, server := spiffeSource(t, m, sa("direct")), spiffeSource(t, m, sa("server"))
	echoTLS(t, m.Pod("bare"), direct)
	echoTLS(t, m.Pod("server"), server)
	const at = vipDirect + ":81"
	neighbour := hold(t, m.Pod("second"), at)
	ends := func(what string, h *held, cause func(), reason string) {
		t.Helper()
		over, began := h.ending(), time.Now()
		cause()
		ended := <-over
		if ended.IsZero() || ended.Sub(began) > revokedWithin {
			t.Errorf("%s: the open connection ended at %v, want within %s", what, ended, revokedWithin)
		}
		t.Logf("%s: the connection ended after %s", what, ended.Sub(began).Round(time.Millisecond))
		if reason == "" {
			return
		}
		if r := recordOf(t, m, audit.Source, h.own); r.Ended != "revoked" || !strings.HasSuffix(r.Reason, "; revoked: "+reason) || r.Transport != audit.Direct || r.Source.ID != sa("client") || r.Destination.ID != sa("direct") {
			t.Errorf("%s: the audit has %+v", what, r)
		}
	}
	quarantine := func(who string) {
		m.Write("quarantine.yaml", fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: Quarantine
metadata: {name: incident-7}
spec: {reason: a test, serviceAccounts: [%s]}
`, who))
	}
	again := func() {
		t.Helper()
		m.Edit("quarantine.yaml", "")
		m.Eventually(10*time.Second, "calls after the quarantine", func() error { return callEcho(t.Context(), m.Pod("client"), at) })
	}

	h := hold(t, m.Pod("client"), at)
	killAgent(t, m)
	ends("the caller", h, func() { quarantine("shop/client") }, `quarantined by "incident-7": caller `+sa("client")+" is cut off")
	m.Eventually(5*time.Second, "who is quarantined to call nobody", func() error {
		if callEcho(t.Context(), m.Pod("client"), at) == nil {
			return errors.New("it does")
		}
		return nil
	})
	if err := neighbour.ping(); err != nil {
		t.Errorf("the neighbour's connection: %v", err)
	}
	again()
	ends("the application", hold(t, m.Pod("client"), at), func() { quarantine("shop/direct") }, `quarantined by "incident-7": application `+sa("direct")+" is cut off")
	m.Eventually(5*time.Second, "an application that is quarantined not to be called", func() error {
		if callEcho(t.Context(), m.Pod("client"), at) == nil {
			return errors.New("it is")
		}
		return nil
	})
	again()
	h = hold(t, m.Pod("client"), at)
	_, serial := copied(t, m, sa("direct"))
	ends("the application's certificate", h, func() {
		if out, code := m.CLI("ca", "revoke", "--serial", serial, "--reason", "copied"); code != 0 {
			t.Fatalf("signet ca revoke: %d, %s", code, out)
		}
	}, authz.ServerRevoked+": copied")
	if r := recordOf(t, m, audit.Source, h.own); r.Destination.Serial != serial {
		t.Errorf("by which certificate the application proved itself: %+v", r)
	}
	m.Eventually(10*time.Second, "calls by the application's next certificate", func() error { return callEcho(t.Context(), m.Pod("client"), at) })

	// Inside a tunnel.
	ends("policy", hold(t, m.Pod("client"), atSPIFFE), func() { m.Write("policies.yaml", "") }, "")
	m.Edit("policies.yaml", harness.Allow("shop", "to-server", "server", []int{9443}, "client"))
	m.Eventually(10*time.Second, "plain bytes to be what arrives", func() error {
		if callEcho(t.Context(), m.Pod("client"), atSPIFFE) == nil {
			return errors.New("TLS is still spoken for the caller")
		}
		c, err := spiffeDial(t.Context(), m.Pod("client"), atSPIFFE, direct, sa("server"))
		if err != nil {
			return err
		}
		return c.Close()
	})
	m.Edit("policies.yaml", grant)
	m.Eventually(10*time.Second, "TLS to be spoken for the caller", func() error { return callEcho(t.Context(), m.Pod("client"), atSPIFFE) })
}
