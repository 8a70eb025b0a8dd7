package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"net/url"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"golang.org/x/net/http2"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// revokedWithin is how soon nobody takes a revoked certificate any more; docs/identity.md.
const revokedWithin = 5 * time.Second

// copied is what somebody who reads the node's disk has: a workload's certificate
// and key.
func copied(t *testing.T, m *harness.Mesh, id string) (*tls.Certificate, string) {
	t.Helper()
	cert, serial, err := harness.Held(filepath.Join(m.StateDir, "agent"), id)
	if err != nil {
		t.Fatal(err)
	}
	return cert, serial
}

// keep opens a connection through the tunnel and delivers the instant of its end.
func (u *tunnel) keep(t *testing.T, authority string) <-chan time.Time {
	t.Helper()
	body, feed := io.Pipe()
	t.Cleanup(func() { feed.Close() })
	resp, err := u.conn.RoundTrip((&http.Request{ //nolint:bodyclose // closed below, when it is over
		Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: authority}, Host: authority, Body: body, ContentLength: -1,
		Header: http.Header{},
	}).WithContext(t.Context()))
	if err != nil || resp.StatusCode != http.StatusOK {
		t.Fatalf("the connection that was to stay open: %v, %v", resp, err)
	}
	over := make(chan time.Time, 1)
	go func() {
		defer resp.Body.Close()
		_, _ = io.Copy(io.Discard, resp.Body)
		over <- time.Now()
	}()
	return over
}

// resumingTunnel is openTunnel by a client that resumes a session if it can.
func resumingTunnel(t *testing.T, pod *lab.Pod, to string, cert *tls.Certificate, sessions tls.ClientSessionCache) (u *tunnel, resumed bool) {
	t.Helper()
	raw, err := pod.Dial(t.Context(), "tcp", net.JoinHostPort(to, "15008"))
	if err != nil {
		t.Fatal(err)
	}
	conn := tls.Client(raw, &tls.Config{
		Certificates: []tls.Certificate{*cert}, NextProtos: []string{"h2"}, MinVersion: tls.VersionTLS13,
		ServerName: "server", ClientSessionCache: sessions,
		InsecureSkipVerify: true, //nolint:gosec // who answers is not what is tested
	})
	if err := conn.HandshakeContext(t.Context()); err != nil {
		t.Fatal(err)
	}
	c, err := (&http2.Transport{}).NewClientConn(conn) //nolint:staticcheck // see tunnel
	if err != nil {
		t.Fatal(err)
	}
	return &tunnel{conn: c, own: raw.LocalAddr().String()}, conn.ConnectionState().DidResume
}

// TestRevokedCertificate: a copy of a workload's key and certificate, in somebody
// else's hands, opens tunnels until the certificate is revoked; then they end, with
// what is open in them, and no new one is of use, in 1,000 tries with a cache of TLS
// sessions, nor after the control plane was killed. The workload itself goes on with
// another certificate, and its neighbour notices nothing. What is no certificate's
// serial number revokes nothing.
//
// What it defends: the rule of revoked serial numbers ahead of the policies (package
// xds), that tunnels end (agent/revoked.go) and that holders renew first.
func TestRevokedCertificate(t *testing.T) {
	pods, documents := revokeBase("enforce")
	pods["thief"] = "10.88.0.20"
	documents["policies.yaml"] = grants(true)
	m := harness.Start(t, harness.Options{Pods: pods, Documents: documents})
	serve(t, m.Pod("server"), ":8080", echo)
	neighbour := hold(t, m.Pod("batch"), serverAt)
	own := hold(t, m.Pod("web"), serverAt)
	stolen, serial := copied(t, m, idWeb)

	thief := openTunnel(t, m.Pod("thief"), pods["server"], stolen)
	idle := openTunnel(t, m.Pod("thief"), pods["server"], stolen)
	asks := func(u *tunnel) (int, string) {
		t.Helper()
		status, _, got, err := u.ask(t.Context(), http.MethodConnect, serverAt, http.Header{})
		if err != nil {
			return 0, err.Error()
		}
		return status, got
	}
	for _, bad := range [][]string{{"--serial", "deadbeef", "--reason", "test"}, {"--serial", "wrong", "--reason", "test"}, {"--serial", serial}, {"--reason", "test"}} {
		if out, code := m.CLI(append([]string{"ca", "revoke"}, bad...)...); code == 0 {
			t.Errorf("signet ca revoke %v is taken: %s", bad, out)
		}
	}
	if out, code := m.CLI("ca", "revoked"); code != 0 || !strings.Contains(out, "no certificate is revoked") {
		t.Errorf("after bad input: %d, %s", code, out)
	}
	if status, got := asks(thief); status != http.StatusOK || got != "hello" {
		t.Fatalf("before the revocation the copy must be of use: %d %q", status, got)
	}
	sessions := tls.NewLRUClientSessionCache(0)
	for range 10 { // would there be tickets, they would be kept
		u, _ := resumingTunnel(t, m.Pod("thief"), pods["server"], stolen, sessions)
		if status, got := asks(u); status != http.StatusOK {
			t.Fatalf("with a session cache, before the revocation: %d %q", status, got)
		}
		_ = u.conn.Close()
	}
	over := thief.keep(t, serverAt)
	calls, failed, stop := callAlways(t, m.Pod("web"))

	began := time.Now()
	if out, code := m.CLI("ca", "revoke", "--serial", strings.ToUpper(serial), "--reason", "copied from a backup"); code != 0 {
		t.Fatalf("signet ca revoke: %d, %s", code, out)
	}
	select {
	case at := <-over:
		t.Logf("the thief's connection ended %s after the revocation began", at.Sub(began).Round(time.Millisecond))
		if at.Sub(began) > revokedWithin {
			t.Errorf("that is later than %s", revokedWithin)
		}
	case <-time.After(2 * revokedWithin):
		t.Fatal("the thief's connection stays open")
	}
	time.Sleep(500 * time.Millisecond)
	caught := failed.Load()
	time.Sleep(time.Until(began.Add(revokedWithin)))
	if status, got := asks(idle); status == http.StatusOK {
		t.Errorf("an idle tunnel with the revoked certificate is of use: %q", got)
	}
	refused := func(when string, tries int) {
		t.Helper()
		for range tries {
			u, resumed := resumingTunnel(t, m.Pod("thief"), pods["server"], stolen, sessions)
			if resumed {
				t.Fatalf("%s a session was resumed", when)
			}
			if status, got := asks(u); status == http.StatusOK {
				t.Fatalf("%s the copy is of use: %q", when, got)
			}
			_ = u.conn.Close()
		}
	}
	refused("after the revocation", 1000)
	if err := neighbour.ping(); err != nil {
		t.Errorf("the neighbour's connection: %v", err)
	}
	if err := own.ping(); err == nil {
		t.Error("a connection that was opened with the revoked certificate goes on")
	}
	stop()
	t.Logf("the workload made %d connections meanwhile, %d failed", calls.Load(), failed.Load())
	// One after another, so no more than one is in the old tunnel when that ends.
	if caught > 1 || failed.Load() != caught || calls.Load() < 20 {
		t.Errorf("%d of %d connections of the workload itself failed, %d of them when the old tunnels ended", failed.Load(), calls.Load(), caught)
	}
	if _, now := copied(t, m, idWeb); now == serial {
		t.Error("the workload has the revoked certificate still")
	}
	m.Kill("control")
	m.Eventually(20*time.Second, "the list after the control plane was killed", func() error {
		if out, code := m.CLI("ca", "revoked"); code != 0 || !strings.Contains(out, serial) || !strings.Contains(out, "copied from a backup") {
			return errors.New(out)
		}
		return nil
	})
	refused("after the control plane was killed", 20)
	m.Eventually(5*time.Second, "records that say why", func() error {
		for _, r := range m.Records(adminclient.AuditQuery{Verdicts: []audit.Verdict{audit.Denied}}) {
			if r.Source.Serial == serial && strings.Contains(r.Reason, "revoked") {
				return nil
			}
		}
		return io.ErrNoProgress
	})
}

// callAlways opens connections one after another until stop is called.
func callAlways(t *testing.T, pod *lab.Pod) (calls, failed *atomic.Int64, stop func()) {
	t.Helper()
	calls, failed = new(atomic.Int64), new(atomic.Int64)
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() {
		defer close(done)
		for ctx.Err() == nil {
			if err := callEcho(context.WithoutCancel(ctx), pod, serverAt); err != nil {
				failed.Add(1)
				t.Logf("call %d at %s: %v", calls.Load(), time.Now().Format("05.000"), err)
			}
			calls.Add(1)
			time.Sleep(20 * time.Millisecond)
		}
	}()
	stop = func() { cancel(); <-done }
	t.Cleanup(stop)
	return calls, failed, stop
}
