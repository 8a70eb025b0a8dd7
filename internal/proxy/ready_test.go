package proxy

import (
	"net/http"
	"sync/atomic"
	"testing"

	"github.com/signet-mesh/signet/internal/proxy/instance"
	"github.com/signet-mesh/signet/internal/unixsocket"
)

// TestReadyIsTheNewest: kubelet ends the old proxy when the new one is ready,
// so an old one that serves must not answer for a new one that does not.
func TestReadyIsTheNewest(t *testing.T) {
	run := t.TempDir()
	if err := Ready(t.Context(), run); err == nil {
		t.Error("ready without any proxy")
	}
	start := func() (*instance.Own, *atomic.Int64) {
		t.Helper()
		own, err := instance.Create(run)
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { _ = own.Close() })
		l, err := unixsocket.Listen(own.Admin(), 0o600)
		if err != nil {
			t.Fatal(err)
		}
		var status atomic.Int64
		status.Store(http.StatusOK)
		server := &http.Server{Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/ready" {
				t.Errorf("asked for %s", r.URL.Path)
			}
			w.WriteHeader(int(status.Load()))
		})}
		done := make(chan struct{})
		go func() { defer close(done); _ = server.Serve(l) }()
		t.Cleanup(func() { _ = server.Close(); <-done })
		if err := own.Renew(); err != nil {
			t.Fatal(err)
		}
		return own, &status
	}
	start()
	if err := Ready(t.Context(), run); err != nil {
		t.Errorf("one that serves: %v", err)
	}
	newer, status := start()
	status.Store(http.StatusServiceUnavailable)
	if err := Ready(t.Context(), run); err == nil {
		t.Error("ready although the newest does not serve")
	}
	if err := newer.Drain(); err != nil {
		t.Fatal(err)
	}
	if err := Ready(t.Context(), run); err != nil {
		t.Errorf("the newest drains, the other serves: %v", err)
	}
}
