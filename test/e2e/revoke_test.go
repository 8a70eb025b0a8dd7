package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// atOnce is how soon after an edit its last trace must be gone.
const atOnce = time.Second

// held is an open echo connection that a test keeps.
type held struct {
	net.Conn
	own string // the client's address, by which the source's record is found
}

// hold opens an echo connection and proves that it works.
func hold(t *testing.T, pod *lab.Pod, addr string) *held {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	h := &held{Conn: c, own: c.LocalAddr().String()}
	if err := h.ping(); err != nil {
		t.Fatalf("%s to %s: %v", pod.Name, addr, err)
	}
	return h
}

// ping sends a word and waits for it.
func (h *held) ping() error {
	if err := h.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return err
	}
	word := []byte("ping-123")
	if _, err := h.Write(word); err != nil {
		return err
	}
	got := make([]byte, len(word))
	if _, err := io.ReadFull(h, got); err != nil {
		return err
	}
	if string(got) != string(word) {
		return fmt.Errorf("sent %q, got %q", word, got)
	}
	return h.SetDeadline(time.Time{})
}

// ending delivers the instant at which the client sees that the connection is
// over, or the zero time if it is not within 30 s.
func (h *held) ending() <-chan time.Time {
	at := make(chan time.Time, 1)
	go func() {
		_ = h.SetReadDeadline(time.Now().Add(30 * time.Second))
		n, err := h.Read(make([]byte, 1))
		if n > 0 || timedOut(err) {
			at <- time.Time{}
			return
		}
		at <- time.Now()
	}()
	return at
}

// callEcho makes one connection for one word. It returns nil when it was echoed,
// errRefused when it was closed without a byte, and what else happened.
func callEcho(ctx context.Context, pod *lab.Pod, addr string) error {
	ctx, cancel := context.WithTimeout(ctx, 30*time.Second)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp", addr)
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(30 * time.Second))
	_, _ = c.Write([]byte("x")) // an error of it is the read's too
	n, err := io.ReadFull(c, make([]byte, 1))
	if n == 0 && err != nil && !timedOut(err) {
		return errRefused
	}
	return err
}

var errRefused = errors.New("closed without a byte")

// revokeBase is a mesh of two clients and two servers, without policies.
func revokeBase(mode string) (pods, documents map[string]string) {
	pods = map[string]string{"web": "10.88.0.10", "batch": "10.88.0.11", "server": "10.88.0.12", "db": "10.88.0.13"}
	return pods, map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", mode) +
		harness.Workload("shop", "web", pods["web"]) + harness.Workload("shop", "batch", pods["batch"]) +
		harness.Workload("shop", "server", pods["server"]) + harness.Workload("shop", "db", pods["db"])}
}

// The documents before and after the grant of web to server:8080 is removed.
func grants(web bool) string {
	text := harness.Allow("shop", "batch-to-server", "server", []int{8080}, "batch") +
		harness.Allow("shop", "web-to-server-admin", "server", []int{9090}, "web") +
		harness.Allow("shop", "web-to-db", "db", []int{8080}, "web")
	if web {
		text += harness.Allow("shop", "web-to-server", "server", []int{8080}, "web")
	}
	return text
}

const (
	idWeb    = "spiffe://mesh.test/ns/shop/sa/web"
	serverAt = "10.88.0.12:8080"
	adminAt  = "10.88.0.12:9090"
	dbAt     = "10.88.0.13:8080"
)

// revocable starts a mesh with the grants above.
func revocable(t *testing.T) *harness.Mesh {
	t.Helper()
	pods, documents := revokeBase("enforce")
	documents["policies.yaml"] = grants(true)
	m := harness.Start(t, harness.Options{Pods: pods, Documents: documents})
	serve(t, m.Pod("server"), ":8080", echo)
	serve(t, m.Pod("server"), ":9090", echo)
	serve(t, m.Pod("db"), ":8080", echo)
	return m
}

// neighbours are connections that the removal of web's grant does not concern.
type neighbours map[string]*held

func holdNeighbours(t *testing.T, m *harness.Mesh) neighbours {
	t.Helper()
	return neighbours{
		"another client of the same server and port": hold(t, m.Pod("batch"), serverAt),
		"the same client at another port":            hold(t, m.Pod("web"), adminAt),
		"the same client at another server":          hold(t, m.Pod("web"), dbAt),
	}
}

func (n neighbours) alive(t *testing.T) {
	t.Helper()
	for who, h := range n {
		if err := h.ping(); err != nil {
			t.Errorf("the connection of %s did not survive: %v", who, err)
		}
	}
}

// removeGrant edits the documents and returns how long it took until the
// client of h saw its end.
func removeGrant(t *testing.T, m *harness.Mesh, h *held) time.Duration {
	t.Helper()
	end := h.ending()
	start := time.Now()
	m.Write("policies.yaml", grants(false))
	at := <-end
	if at.IsZero() {
		t.Fatal("a connection whose grant was removed is still open after 30 s")
	}
	return at.Sub(start)
}

// revokedRecord waits for the destination's record of a connection from an
// identity that was ended by revocation, and checks it.
func revokedRecord(t *testing.T, m *harness.Mesh, from, reason string) audit.Record {
	t.Helper()
	var found audit.Record
	m.Eventually(15*time.Second, "the record of the revoked connection", func() error {
		var revoked []audit.Record
		for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination}) {
			if r.Ended == "revoked" {
				revoked = append(revoked, r)
			}
		}
		if len(revoked) != 1 {
			return fmt.Errorf("%d records say revoked: %+v", len(revoked), revoked)
		}
		found = revoked[0]
		return nil
	})
	if found.Source.ID != from || found.Destination.Address != serverAt || found.End.IsZero() || !strings.Contains(found.Reason, reason) {
		t.Errorf("the record of the revoked connection is %+v; want one from %s to %s whose reason has %q", found, from, serverAt, reason)
	}
	t.Logf("audit: %s, ended %q, reason %q", found.Verdict, found.Ended, found.Reason)
	return found
}

// TestRevokeOpenStream: an edit that removes a grant ends its open connection
// within a second, and no other. The defence is the agent's destruction of
// sockets that the newest policies refuse: the proxy looks at policies only
// when a connection begins.
func TestRevokeOpenStream(t *testing.T) {
	m := revocable(t)
	others := holdNeighbours(t, m)
	victim := hold(t, m.Pod("web"), serverAt)
	took := removeGrant(t, m, victim)
	t.Logf("the open connection ended %s after the edit", took.Round(time.Millisecond))
	if took > atOnce {
		t.Errorf("the open connection ended %s after the edit, want at most %s", took, atOnce)
	}
	revokedRecord(t, m, idWeb, "revoked: ")
	time.Sleep(atOnce) // what the edit would end by mistake has ended by now
	others.alive(t)
	if err := callEcho(t.Context(), m.Pod("web"), serverAt); err != errRefused {
		t.Errorf("a new connection after the removal: %v, want a refusal", err)
	}
	for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Source, From: idWeb}) {
		if r.Source.Address == victim.own && (r.End.IsZero() || r.Verdict != audit.Allowed) {
			t.Errorf("the source's record of the revoked connection is %+v; want it allowed, and ended", r)
		}
	}
}

// TestRevokeIdleTunnel: a tunnel that is already open and idle does not carry
// a connection that the newest policies refuse. The defence is that policies
// are in the route, which a tunnel looks up for each stream, and not in the
// listener, whose tunnels would go on with the old one.
func TestRevokeIdleTunnel(t *testing.T) {
	pods, documents := revokeBase("enforce")
	documents["policies.yaml"] = grants(true)
	m := harness.Start(t, harness.Options{Pods: pods, Documents: documents})
	var reached atomic.Int64
	serve(t, m.Pod("server"), ":8080", func(c net.Conn) { reached.Add(1); echo(c) })
	for range 20 { // each worker of the proxy has a tunnel then
		for _, pod := range []string{"web", "batch"} {
			if err := callEcho(t.Context(), m.Pod(pod), serverAt); err != nil {
				t.Fatal(err)
			}
		}
	}
	stop := make(chan struct{})
	spared := make(chan error, 1)
	go func() { // the other client goes on calling
		for {
			select {
			case <-stop:
				spared <- nil
				return
			case <-time.After(20 * time.Millisecond):
			}
			if err := callEcho(t.Context(), m.Pod("batch"), serverAt); err != nil {
				spared <- err
				return
			}
		}
	}()
	edit := time.Now()
	m.Write("policies.yaml", grants(false))
	var last time.Duration // after the edit, of the last call that was admitted
	refused := 0
	for time.Since(edit) < 3*time.Second {
		began := time.Since(edit)
		switch err := callEcho(t.Context(), m.Pod("web"), serverAt); err {
		case nil:
			last = began
			if refused > 0 {
				t.Errorf("a call %s after the edit was admitted, after an earlier one was refused", began)
			}
		case errRefused:
			refused++
		default:
			t.Fatal(err)
		}
		time.Sleep(5 * time.Millisecond)
	}
	close(stop)
	if err := <-spared; err != nil {
		t.Errorf("a call of the other client failed: %v", err)
	}
	t.Logf("the last admitted call began %s after the edit; %d later ones were refused", last.Round(time.Millisecond), refused)
	if last > atOnce || refused == 0 {
		t.Errorf("the last admitted call began %s after the edit, want at most %s", last, atOnce)
	}
	before := reached.Load()
	if err := callEcho(t.Context(), m.Pod("web"), serverAt); err != errRefused || reached.Load() != before {
		t.Errorf("a refused call: %v, and the server was reached %d times", err, reached.Load()-before)
	}

	// The refused calls travelled in tunnels that had carried admitted ones.
	carried, reused := map[string]bool{}, 0
	for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination, From: idWeb}) {
		switch {
		case r.Verdict == audit.Allowed:
			carried[r.Source.Address] = true
		case carried[r.Source.Address]:
			reused++
		}
	}
	if t.Logf("%d of the refused calls came through a tunnel from before the edit", reused); reused == 0 {
		t.Error("no refused call came through a tunnel from before the edit, so this test showed nothing")
	}
}

// TestRevokeByEnforcing: a namespace goes from observe to enforce. What no
// policy allows ends within a second, what one allows stays.
func TestRevokeByEnforcing(t *testing.T) {
	pods, documents := revokeBase("observe")
	documents["policies.yaml"] = grants(false)
	m := harness.Start(t, harness.Options{Pods: pods, Documents: documents})
	serve(t, m.Pod("server"), ":8080", echo)
	serve(t, m.Pod("server"), ":9090", echo)
	serve(t, m.Pod("db"), ":8080", echo)
	others := holdNeighbours(t, m)
	victim := hold(t, m.Pod("web"), serverAt)
	end := victim.ending()
	edit := time.Now()
	m.Write("mesh.yaml", strings.Replace(documents["mesh.yaml"], `"observe"`, `"enforce"`, 1))
	at := <-end
	if at.IsZero() {
		t.Fatal("a connection that enforce refuses is still open after 30 s")
	}
	took := at.Sub(edit)
	t.Logf("the open connection ended %s after the edit", took.Round(time.Millisecond))
	if took > atOnce {
		t.Errorf("the open connection ended %s after the edit, want at most %s", took, atOnce)
	}
	r := revokedRecord(t, m, idWeb, "revoked: ")
	if r.Verdict != audit.Observed {
		t.Errorf("the verdict of a connection from observe mode is %q, want observed", r.Verdict)
	}
	time.Sleep(atOnce)
	others.alive(t)
}

// TestRevokeByEnforcingPlaintext: what reached a workload without a tunnel in
// observe mode ends within a second when its namespace enforces. The defence
// is the agent's: the proxy alone closes it when it has drained its listener.
func TestRevokeByEnforcingPlaintext(t *testing.T) {
	pods, documents := revokeBase("observe")
	pods["stranger"] = "10.88.0.14"
	documents["policies.yaml"] = grants(true)
	m := harness.Start(t, harness.Options{Pods: pods, Documents: documents})
	serve(t, m.Pod("server"), ":8080", echo)
	admitted := hold(t, m.Pod("web"), serverAt)
	victim := hold(t, m.Pod("stranger"), serverAt)
	end := victim.ending()
	edit := time.Now()
	m.Write("mesh.yaml", strings.Replace(documents["mesh.yaml"], `"observe"`, `"enforce"`, 1))
	at := <-end
	if at.IsZero() {
		t.Fatal("a plaintext connection is still open 30 s after its namespace enforces")
	}
	took := at.Sub(edit)
	t.Logf("the plaintext connection ended %s after the edit", took.Round(time.Millisecond))
	if took > atOnce {
		t.Errorf("the plaintext connection ended %s after the edit, want at most %s", took, atOnce)
	}
	m.Eventually(10*time.Second, "the record of the plaintext connection", func() error {
		for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination}) {
			if r.Source.Address == victim.own && r.Verdict == audit.Observed && r.Ended == "revoked" {
				t.Logf("audit: %s, ended %q, reason %q", r.Verdict, r.Ended, r.Reason)
				return nil
			}
		}
		return fmt.Errorf("no record of %s that was observed and says revoked", victim.own)
	})
	time.Sleep(atOnce)
	if err := admitted.ping(); err != nil {
		t.Errorf("an allowed connection did not survive: %v", err)
	}
	if err := callEcho(t.Context(), m.Pod("stranger"), serverAt); err != errRefused {
		t.Errorf("a plaintext call in enforce mode: %v, want a refusal", err)
	}
}

// TestRevokeAcrossAgentRestart: the agent that ends a connection need not be
// the one that saw it begin, and an edit that was made while no agent ran is
// carried out by the next one.
func TestRevokeAcrossAgentRestart(t *testing.T) {
	t.Run("edit after the restart", func(t *testing.T) {
		m := revocable(t)
		others := holdNeighbours(t, m)
		victim := hold(t, m.Pod("web"), serverAt)
		before := m.Pid("agent")
		m.Kill("agent")
		m.Eventually(30*time.Second, "the agent to be back", func() error {
			s, err := m.Client.AgentStatus(t.Context())
			if err != nil {
				return err
			}
			if m.Pid("agent") == before || !s.ControlConnected || !s.ProxyConnected || s.Revision == "" {
				return fmt.Errorf("not back yet: %+v", s)
			}
			return nil
		})
		if err := victim.ping(); err != nil {
			t.Fatalf("the connection did not survive the death of the agent: %v", err)
		}
		took := removeGrant(t, m, victim)
		t.Logf("the open connection ended %s after the edit", took.Round(time.Millisecond))
		if took > atOnce {
			t.Errorf("the open connection ended %s after the edit, want at most %s", took, atOnce)
		}
		revokedRecord(t, m, idWeb, "revoked: ")
		time.Sleep(atOnce)
		others.alive(t)
	})
	t.Run("edit while it is down", func(t *testing.T) {
		m := revocable(t)
		others := holdNeighbours(t, m)
		victim := hold(t, m.Pod("web"), serverAt)
		m.Kill("agent")
		took := removeGrant(t, m, victim)
		t.Logf("the open connection ended %s after the edit and the death of the agent", took.Round(time.Millisecond))
		revokedRecord(t, m, idWeb, "revoked: ")
		time.Sleep(atOnce)
		others.alive(t)
	})
}

// TestBadEditChangesNothing: an edit that makes no sense is refused as a whole,
// with file, line and field; what is allowed stays so, what is denied stays
// so, and the mended document takes effect.
func TestBadEditChangesNothing(t *testing.T) {
	m := revocable(t)
	stream := hold(t, m.Pod("web"), serverAt)
	// All of these would take web's grant away and give batch one, if a part
	// of them were taken.
	good := grants(false) + harness.Allow("shop", "batch-to-db", "db", []int{8080}, "batch")
	lines := strings.Count(good, "\n")
	for _, c := range []struct {
		name, bad, field string
		line             int
	}{
		{"unknown key", strings.Replace(harness.Allow("shop", "more", "db", nil, "batch"), "target:", "tarte: x, target:", 1), "spec.tarte", 4},
		{"bad identity", strings.Replace(harness.Allow("shop", "more", "db", nil, "batch"), "serviceAccount: batch", `spiffeID: "spiffe://mesh.test/ns//sa/batch"`, 1), "spec.from[0].spiffeID", 4},
		{"duplicate name", harness.Allow("shop", "batch-to-db", "db", nil, "batch"), "metadata.name", 3},
	} {
		m.Write("policies.yaml", good+c.bad)
		where := fmt.Sprintf("%s:%d: %s: ", filepath.Join(m.Dir, "policies.yaml"), lines+c.line, c.field)
		m.Eventually(10*time.Second, "the refusal of the edit: "+c.name, func() error {
			out, code := m.CLI("status")
			if code != 3 || !strings.Contains(out, "SIG0302") || !strings.Contains(out, where) {
				return fmt.Errorf("signet status exits with %d, want 3, and 'SIG0302' and %q in:\n%s", code, where, out)
			}
			return nil
		})
		time.Sleep(atOnce)
		if err := stream.ping(); err != nil {
			t.Fatalf("%s: an allowed stream ended: %v", c.name, err)
		}
		if err := callEcho(t.Context(), m.Pod("web"), serverAt); err != nil {
			t.Errorf("%s: an allowed call: %v", c.name, err)
		}
		if err := callEcho(t.Context(), m.Pod("batch"), dbAt); err != errRefused {
			t.Errorf("%s: a denied call: %v, want a refusal", c.name, err)
		}
	}
	end := stream.ending()
	m.Write("policies.yaml", good)
	if at := <-end; at.IsZero() {
		t.Error("the mended edit did not end the stream whose grant it removes")
	}
	m.Eventually(10*time.Second, "the mended edit to be in force", func() error {
		c, err := m.Client.ControlStatus(t.Context())
		if err != nil {
			return err
		}
		a, err := m.Client.AgentStatus(t.Context())
		if err != nil {
			return err
		}
		if len(c.Rejected) > 0 || a.Revision != c.Revision {
			return fmt.Errorf("refused: %v; revision %s, node at %s", c.Rejected, c.Revision, a.Revision)
		}
		return nil
	})
	if err := callEcho(t.Context(), m.Pod("web"), serverAt); err != errRefused {
		t.Errorf("a call whose grant the mended edit removes: %v, want a refusal", err)
	}
	if err := callEcho(t.Context(), m.Pod("batch"), dbAt); err != nil {
		t.Errorf("a call that the mended edit allows: %v", err)
	}
	m.Eventually(10*time.Second, "a good status after the document was mended", func() error {
		if out, code := m.CLI("status"); code != 0 {
			return fmt.Errorf("signet status exits with %d:\n%s", code, out)
		}
		return nil
	})
}
