package adminclient

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
)

// serve answers on a real socket of the run directory.
func serve(t *testing.T, dir, socket string, h http.HandlerFunc) {
	t.Helper()
	l, err := net.Listen("unix", filepath.Join(dir, socket))
	if err != nil {
		t.Fatal(err)
	}
	s := &http.Server{Handler: h, ReadHeaderTimeout: time.Second}
	done := make(chan struct{})
	go func() { defer close(done); _ = s.Serve(l) }()
	t.Cleanup(func() { _ = s.Close(); <-done })
}

func newClient(t *testing.T, dir string) *Client {
	c := New(dir)
	t.Cleanup(c.Close)
	return c
}

func TestExplainAsksTheControlPlane(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, ControlSocket, func(w http.ResponseWriter, r *http.Request) {
		if got := r.Method + " " + r.URL.String(); got != "GET /v1/explain?from=spiffe%3A%2F%2Fx%2Fa&port=80&to=spiffe%3A%2F%2Fx%2Fb" {
			t.Errorf("asked %s", got)
		}
		_, _ = io.WriteString(w, `{"verdict":"allowed","reason":"because","fieldOfALaterVersion":1}`)
	})
	e, err := newClient(t, dir).Explain(t.Context(), "spiffe://x/a", "spiffe://x/b", 80)
	if err != nil || e.Verdict != "allowed" || e.Reason != "because" {
		t.Errorf("%+v, %v", e, err)
	}
}

func TestAuditStreams(t *testing.T) {
	dir := t.TempDir()
	serve(t, dir, AgentSocket, func(w http.ResponseWriter, r *http.Request) {
		q := r.URL.Query()
		if q.Get("since") != "2026-01-02T03:04:05.0000006Z" || q.Get("verdict") != "denied" || q.Get("side") != "source" || q.Get("limit") != "7" || q.Has("from") {
			t.Errorf("asked %v", q)
		}
		_, _ = io.WriteString(w, "{\"seq\":1}\n\n{\"seq\":2}\n")
	})
	var seqs []uint64
	for r, err := range newClient(t, dir).Audit(t.Context(), AuditQuery{
		Since:    time.Date(2026, 1, 2, 4, 4, 5, 600, time.FixedZone("", 3600)),
		Verdicts: []audit.Verdict{audit.Denied}, Side: audit.Source, Limit: 7,
	}) {
		if err != nil {
			t.Fatal(err)
		}
		seqs = append(seqs, r.Seq)
	}
	if len(seqs) != 2 || seqs[1] != 2 {
		t.Errorf("records %v", seqs)
	}
}

// An agent that dies, or finds damage, in the middle of an answer must not look like one that
// had no more records to tell.
func TestCutAuditIsAnError(t *testing.T) {
	for name, body := range map[string]string{
		"cut":      "{\"seq\":1}\n{\"seq\":",
		"garbage":  "{\"seq\":1}\nhello\n",
		"given up": "{\"seq\":1}\n{\"error\":\"segment 3 is damaged\"}\n",
		"too long": "{\"seq\":1}\n" + strings.Repeat("x", maxRecord+1) + "\n",
	} {
		dir := t.TempDir()
		serve(t, dir, AgentSocket, func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, body) })
		var n int
		var last error
		for _, err := range newClient(t, dir).Audit(t.Context(), AuditQuery{}) {
			if last = err; err == nil {
				n++
			}
		}
		if n != 1 || last == nil {
			t.Errorf("%s: %d records, then %v", name, n, last)
		}
	}
	dir := t.TempDir()
	serve(t, dir, AgentSocket, func(w http.ResponseWriter, r *http.Request) {
		_, _ = io.WriteString(w, "{\"seq\":1}\n")
		_ = http.NewResponseController(w).Flush()
		panic(http.ErrAbortHandler)
	})
	var last error
	for _, err := range newClient(t, dir).Audit(t.Context(), AuditQuery{}) {
		last = err
	}
	if last == nil {
		t.Error("a connection that was reset ended the records without an error")
	}
}

func TestErrorsSayWhatToDo(t *testing.T) {
	dir := t.TempDir()
	c := newClient(t, dir)
	_, err := c.AgentStatus(t.Context())
	var u *UnreachableError
	if !errors.As(err, &u) || u.Part != "agent" || !strings.Contains(err.Error(), "signet up") || !strings.Contains(err.Error(), "--run-dir") {
		t.Errorf("no socket: %v", err)
	}

	l, err := net.Listen("unix", filepath.Join(dir, AgentSocket))
	if err != nil {
		t.Fatal(err)
	}
	l.(*net.UnixListener).SetUnlinkOnClose(false)
	_ = l.Close()
	if _, err := c.Certificates(t.Context()); err == nil || !strings.Contains(err.Error(), "nobody listens") {
		t.Errorf("dead socket: %v", err)
	}
	if err := (&UnreachableError{Part: "agent", Socket: "s", Err: &os.SyscallError{Syscall: "connect", Err: os.ErrPermission}}).Error(); !strings.Contains(err, "as root") {
		t.Errorf("no permission: %v", err)
	}

	serve(t, dir, ControlSocket, func(w http.ResponseWriter, r *http.Request) {
		switch r.URL.Path {
		case "/v1/explain":
			w.WriteHeader(http.StatusBadRequest)
			_, _ = io.WriteString(w, `{"error":"port: must be 1 to 65535"}`)
		default:
			http.Redirect(w, r, "http://elsewhere.example/", http.StatusFound)
		}
	})
	_, err = c.Explain(t.Context(), "", "", 0)
	var a *AnswerError
	if !errors.As(err, &a) || a.Status != 400 || err.Error() != "control plane: port: must be 1 to 65535" {
		t.Errorf("refused: %v", err)
	}
	if _, err := c.ControlStatus(t.Context()); !errors.As(err, &a) || a.Status != 302 {
		t.Errorf("redirect: %v", err)
	}

	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := c.ControlStatus(ctx); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
