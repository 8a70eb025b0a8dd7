package e2e

import (
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net/http"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// pose takes tunnels in a pod as if it was another workload, whose certificate it
// shows, and echoes what comes.
func pose(t *testing.T, pod *lab.Pod, cert *tls.Certificate) {
	t.Helper()
	l, err := pod.Listen("tcp", ":15008")
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13, ClientAuth: tls.RequireAnyClientCert},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusOK)
			flush := http.NewResponseController(w)
			b := make([]byte, 1<<10)
			for {
				_ = flush.Flush()
				n, err := r.Body.Read(b)
				if _, werr := w.Write(b[:n]); err != nil || werr != nil {
					return
				}
			}
		}),
	}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.ServeTLS(l, "", "") }()
	t.Cleanup(func() { _ = s.Close(); <-done })
}

// diverted has a pod's tunnels to an address end at another one.
func diverted(t *testing.T, pod *lab.Pod, from, to string) (undo func()) {
	t.Helper()
	nft := func(args ...string) {
		t.Helper()
		if out, err := pod.Command(t.Context(), "nft", args...).CombinedOutput(); err != nil {
			t.Fatalf("nft %q: %v\n%s", args, err, out)
		}
	}
	nft("add table ip divert; add chain ip divert out { type nat hook output priority -150; }; add rule ip divert out ip daddr " + from + " tcp dport 15008 dnat to " + to)
	return func() { nft("delete", "table", "ip", "divert") }
}

// TestRevokedServer: somebody who has a copy of a server's key and certificate, and can
// answer in its place, is taken for the server until the certificate is revoked. Then
// the tunnels that lead to the copy end, and those to the server that it was shown in,
// with what is open in them; the server goes on with another. To the copy no connection
// stays after that, also while the agent is away it is found when that is back; the
// audit says of each why, and by which certificate, and the server is reached as soon
// as nobody stands in its place.
//
// What it defends: that agents end tunnels to servers with a revoked certificate
// (agent/leaving.go), which the proxy takes.
func TestRevokedServer(t *testing.T) {
	pods, documents := revokeBase("enforce")
	pods["thief"] = "10.88.0.20"
	documents["policies.yaml"] = grants(true)
	m := harness.Start(t, harness.Options{Pods: pods, Documents: documents})
	serve(t, m.Pod("server"), ":8080", echo)
	serve(t, m.Pod("db"), ":8080", echo)
	stolen, serial := copied(t, m, "spiffe://mesh.test/ns/shop/sa/server")
	pose(t, m.Pod("thief"), stolen)
	undo := diverted(t, m.Pod("batch"), pods["server"], pods["thief"])

	fooled, own, neighbour := hold(t, m.Pod("batch"), serverAt), hold(t, m.Pod("web"), serverAt), hold(t, m.Pod("web"), dbAt)
	record := func(h *held) (found audit.Record) {
		t.Helper()
		m.Eventually(10*time.Second, "the source's record", func() error {
			for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Source, Serial: serial}) {
				if r.Source.Address == h.own {
					found = r
					return nil
				}
			}
			return errors.New("none has the server's certificate in it")
		})
		return found
	}
	for _, h := range []*held{fooled, own} {
		if r := record(h); r.Destination.Serial != serial || r.Destination.ID != "spiffe://mesh.test/ns/shop/sa/server" || r.Verdict != audit.Allowed {
			t.Errorf("before the revocation the audit has %+v", r)
		}
	}
	calls, failed, stop := callAlways(t, m.Pod("web"))

	ends := map[string]<-chan time.Time{"to the copy": fooled.ending(), "to the server, by the revoked certificate": own.ending()}
	began := time.Now()
	if out, code := m.CLI("ca", "revoke", "--serial", serial, "--reason", "copied from a backup"); code != 0 {
		t.Fatalf("signet ca revoke: %d, %s", code, out)
	}
	for what, end := range ends {
		at := <-end
		t.Logf("the connection %s ended %s after the revocation began", what, at.Sub(began).Round(time.Millisecond))
		if at.IsZero() || at.Sub(began) > revokedWithin {
			t.Errorf("that is later than %s", revokedWithin)
		}
	}
	ended := func(what string, h *held) {
		t.Helper()
		m.Eventually(10*time.Second, "the record of the connection "+what, func() error {
			if r := record(h); r.Ended != "revoked" || !strings.HasSuffix(r.Reason, "; revoked: "+authz.ServerRevoked+": copied from a backup") || r.End.IsZero() {
				return fmt.Errorf("the audit has %+v", r)
			}
			return nil
		})
	}
	ended("to the copy", fooled)
	ended("to the server", own)

	// Each that comes to the copy is cut off.
	const tries = 50
	longest := time.Duration(0)
	for range tries {
		ctx := t.Context()
		c, err := m.Pod("batch").Dial(ctx, "tcp", serverAt)
		if err != nil {
			continue
		}
		at := time.Now()
		_ = c.SetDeadline(at.Add(revokedWithin))
		for err == nil {
			if _, err = c.Write([]byte{42}); err == nil {
				_, err = io.ReadFull(c, make([]byte, 1))
			}
		}
		c.Close()
		if timedOut(err) {
			t.Fatalf("a connection to the copy is open for %s", revokedWithin)
		}
		longest = max(longest, time.Since(at))
	}
	t.Logf("of %d connections to the copy the longest was open for %s", tries, longest.Round(time.Millisecond))

	// One that is opened while the agent is away ends when that is back.
	if err := syscall.Kill(m.Pid("agent"), syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	late := hold(t, m.Pod("batch"), serverAt)
	end := late.ending()
	m.Kill("agent") // and another starts
	if at := <-end; at.IsZero() {
		t.Error("a connection to the copy that was opened while the agent was away stays open")
	}

	undo()
	m.Eventually(10*time.Second, "the server to be reached again", func() error { return callEcho(t.Context(), m.Pod("batch"), serverAt) })
	stop()
	t.Logf("the other caller made %d connections meanwhile, %d failed", calls.Load(), failed.Load())
	// One after another, so no more than one is in the old tunnel when that ends.
	if failed.Load() > 1 || calls.Load() < 20 {
		t.Errorf("%d of %d connections of the other caller failed", failed.Load(), calls.Load())
	}
	if err := neighbour.ping(); err != nil {
		t.Errorf("a connection to another server: %v", err)
	}
}
