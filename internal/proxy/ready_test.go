package proxy

import (
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/signet-mesh/signet/internal/proxy/instance"
	"github.com/signet-mesh/signet/internal/unixsocket"
)

// bench is a node's run directory with proxies that answer as they are told.
type bench struct {
	*testing.T
	run string
}

func (b *bench) start(owner string) (*instance.Own, *atomic.Int64) {
	b.Helper()
	own, err := instance.Create(b.run, owner)
	if err != nil {
		b.Fatal(err)
	}
	b.Cleanup(func() { _ = own.Close() })
	l, err := unixsocket.Listen(own.Admin(), 0o600)
	if err != nil {
		b.Fatal(err)
	}
	var status atomic.Int64
	status.Store(http.StatusOK)
	server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.URL.Path != "/ready" {
			b.Errorf("asked for %s", r.URL.Path)
		}
		w.WriteHeader(int(status.Load()))
	})}
	done := make(chan struct{})
	go func() { defer close(done); _ = server.Serve(l) }()
	b.Cleanup(func() { _ = server.Close(); <-done })
	if err := own.Renew(); err != nil {
		b.Fatal(err)
	}
	return own, &status
}

// Outside a cluster nobody says which proxy is meant: the newest is.
func TestReadyIsTheNewest(t *testing.T) {
	b := &bench{t, t.TempDir()}
	if err := Ready(t.Context(), b.run, ""); err == nil {
		t.Error("ready without any proxy")
	}
	b.start("")
	if err := Ready(t.Context(), b.run, ""); err != nil {
		t.Errorf("one that serves: %v", err)
	}
	newer, status := b.start("")
	status.Store(http.StatusServiceUnavailable)
	if err := Ready(t.Context(), b.run, ""); err == nil {
		t.Error("ready although the newest does not serve")
	}
	if err := newer.Drain(); err != nil {
		t.Fatal(err)
	}
	if err := Ready(t.Context(), b.run, ""); err != nil {
		t.Errorf("the newest drains, the other serves: %v", err)
	}
}

// Defends a node from losing its only working proxy in an upgrade that fails:
// the DaemonSet's controller deletes the old pod as soon as the new one is
// ready, or the old one is not. So an old proxy that serves must not answer for
// a new one that does not, and not the other way round.
func TestReadyAnswersForItsOwnPod(t *testing.T) {
	b := &bench{t, t.TempDir()}
	old, oldStatus := b.start("old")
	_, newStatus := b.start("new")
	newStatus.Store(http.StatusServiceUnavailable)
	if err := Ready(t.Context(), b.run, "new"); err == nil {
		t.Error("the new pod is ready, though only the old one serves")
	}
	if err := Ready(t.Context(), b.run, "old"); err != nil {
		t.Errorf("the old pod serves, and is not ready because the new one is not: %v", err)
	}
	newStatus.Store(http.StatusOK)
	oldStatus.Store(http.StatusServiceUnavailable)
	if err := Ready(t.Context(), b.run, "old"); err == nil {
		t.Error("the old pod is ready, though only the new one serves")
	}
	if err := Ready(t.Context(), b.run, "new"); err != nil {
		t.Errorf("the new pod serves: %v", err)
	}
	if err := old.Drain(); err != nil {
		t.Fatal(err)
	}
	if err := Ready(t.Context(), b.run, "old"); err == nil {
		t.Error("a pod whose proxy drains is ready")
	}
	if err := Ready(t.Context(), b.run, "third"); err == nil {
		t.Error("a pod without a proxy is ready")
	}
}
