package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/health"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/sdk"
	"github.com/signet-mesh/signet/test/harness"
)

// TestSDKThroughFaults: connections are made, under a certificate that is
// replaced every few seconds, while the agent is killed. None fails, and the audit
// has both ends of each, once.
//
// What it defends: that the last rules stay in force while the agent is away, and
// that events wait for it, and are not stored twice.
func TestSDKThroughFaults(t *testing.T) {
	m := startSDK(t, "8s")
	l := m.serve(t)
	m.allow(t, l).Close()
	began := time.Now()
	var (
		calls   atomic.Int64
		wg      sync.WaitGroup
		stop    = make(chan struct{})
		mu      sync.Mutex
		serials = map[string]bool{}
	)
	for range 4 {
		wg.Go(func() {
			for {
				select {
				case <-stop:
					return
				case <-time.After(20 * time.Millisecond):
				}
				c, err := m.open(t.Context(), m.client, l)
				if err != nil {
					t.Errorf("after %v: %v", time.Since(began), err)
					return
				}
				mu.Lock()
				serials[c.ConnectionState().PeerCertificates[0].SerialNumber.String()] = true
				mu.Unlock()
				c.Close()
				calls.Add(1)
			}
		})
	}
	for range 2 {
		time.Sleep(4 * time.Second)
		m.Kill("agent")
	}
	time.Sleep(6 * time.Second)
	close(stop)
	wg.Wait()
	if len(serials) < 2 || calls.Load() < 20 {
		t.Fatalf("%d calls saw %d certificates; this shows nothing", calls.Load(), len(serials))
	}
	t.Logf("%d calls under %d certificates of the server", calls.Load(), len(serials))
	m.Eventually(20*time.Second, "both ends of every connection in the audit, once", func() error {
		count := map[audit.Side]int64{}
		for _, r := range m.Records(adminclient.AuditQuery{Since: began, Verdicts: []audit.Verdict{audit.Allowed}}) {
			if r.Start.After(began) && !r.End.IsZero() {
				count[r.Side]++
			}
		}
		if want := calls.Load(); count[audit.Source] != want || count[audit.Destination] != want {
			return fmt.Errorf("%v records of %d calls", count, want)
		}
		return nil
	})
}

// TestSDKOutlivesProxy: a proxy that dies has nothing to do with the connections
// of programs with the SDK.
//
// What it defends: that the agent does not close their records with the proxy's.
func TestSDKOutlivesProxy(t *testing.T) {
	m := startSDK(t, "1h")
	l := m.serve(t)
	c := m.allow(t, l)
	defer c.Close()
	open := func() error {
		n := 0
		for _, r := range m.Records(adminclient.AuditQuery{Verdicts: []audit.Verdict{audit.Allowed}}) {
			if r.End.IsZero() {
				n++
			}
		}
		if n != 2 {
			return fmt.Errorf("%d records are open; want 2", n)
		}
		return nil
	}
	m.Eventually(5*time.Second, "both ends to be open in the audit", open)
	m.Kill("envoy")
	for end := time.Now().Add(3 * time.Second); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
		if err := open(); err != nil {
			t.Fatal(err)
		}
	}
	if err := word(c); err != nil {
		t.Error(err)
	}
}

// TestSDKServers: HTTP and gRPC, whose servers know who calls, and whose callers
// whom no policy names get no answer.
func TestSDKServers(t *testing.T) {
	m := startSDK(t, "1h")
	web, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	calls, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var wg sync.WaitGroup
	wg.Go(func() {
		if err := m.server.ServeHTTP(ctx, web, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			id, _ := sdk.PeerFromRequest(r)
			fmt.Fprint(w, "hello ", id)
		})); err != nil {
			t.Error(err)
		}
	})
	srv := grpc.NewServer(grpc.Creds(m.server.GRPCServer()), grpc.UnaryInterceptor(
		func(ctx context.Context, req any, _ *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
			if id, ok := sdk.PeerFromContext(ctx); !ok || id != sdkID("client") {
				t.Errorf("a call of %s", id)
			}
			return next(ctx, req)
		}))
	healthpb.RegisterHealthServer(srv, health.NewServer())
	wg.Go(func() { _ = srv.Serve(calls) })
	defer func() { cancel(); srv.Stop(); wg.Wait() }()
	m.Edit("mesh.yaml", m.base+harness.Allow("shop", "allow-client", "server", []int{sdkPort(web), sdkPort(calls)}, "client"))

	get := func(as *sdk.Mesh) (string, error) {
		client := as.HTTPClient(sdkID("server"))
		client.Timeout = 5 * time.Second
		defer client.CloseIdleConnections()
		resp, err := client.Get("https://" + web.Addr().String() + "/")
		if err != nil {
			return "", err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		return string(b), err
	}
	check := func(as *sdk.Mesh) error {
		conn, err := grpc.NewClient(calls.Addr().String(), grpc.WithTransportCredentials(as.GRPCClient(sdkID("server"))))
		if err != nil {
			return err
		}
		defer conn.Close()
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		_, err = healthpb.NewHealthClient(conn).Check(ctx, &healthpb.HealthCheckRequest{})
		return err
	}
	m.Eventually(10*time.Second, "the policy to be in force", func() error { _, err := get(m.client); return err })
	if got, err := get(m.client); err != nil || got != "hello "+sa("client") {
		t.Errorf("HTTP: %q, %v", got, err)
	}
	if err := check(m.client); err != nil {
		t.Errorf("gRPC: %v", err)
	}
	if got, err := get(m.other); err == nil || !strings.Contains(err.Error(), "refused by the destination") {
		t.Errorf("HTTP of a caller whom no policy names: %q, %v", got, err)
	}
	if err := check(m.other); err == nil {
		t.Error("gRPC of a caller whom no policy names got through")
	}
}
