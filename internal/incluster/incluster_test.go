package incluster

import (
	"context"
	"encoding/pem"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"sync/atomic"
	"testing"
	"time"
)

// server is an API server that answers with one status and body, for those who
// have the token.
func server(t *testing.T, status *atomic.Int64, body *atomic.Value) *Client {
	t.Helper()
	s := httptest.NewTLSServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.Header.Get("Authorization") != "Bearer secret" {
			w.WriteHeader(http.StatusUnauthorized)
			return
		}
		w.WriteHeader(int(status.Load()))
		_, _ = io.WriteString(w, body.Load().(string))
	}))
	t.Cleanup(s.Close)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := New(s.URL, token, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: s.Certificate().Raw}))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// TestGoneOnlyWhenCertain: a node's pods are let go when the DaemonSet is known
// to be deleted or replaced, and stay captured whenever that is not certain:
// an agent that is merely restarted must open nothing.
func TestGoneOnlyWhenCertain(t *testing.T) {
	const there = `{"metadata":{"uid":"a"}}`
	for name, c := range map[string]struct {
		status int64
		body   string
		gone   bool
	}{
		"there":         {200, there, false},
		"deleted":       {404, `{}`, true},
		"being deleted": {200, `{"metadata":{"uid":"a","deletionTimestamp":"2026-01-01T00:00:00Z"}}`, true},
		"another":       {200, `{"metadata":{"uid":"b"}}`, true},
		"no rights":     {403, `{}`, true}, // three times, and it was seen before
		"server fails":  {500, `{}`, false},
		"no object":     {200, `{}`, false},
		"no JSON":       {200, `<html>`, false},
	} {
		t.Run(name, func(t *testing.T) {
			var status atomic.Int64
			var body atomic.Value
			status.Store(200)
			body.Store(there)
			d := server(t, &status, &body).DaemonSet("ns", "agent")
			ctx, cancel := context.WithTimeout(t.Context(), 4*time.Second)
			defer cancel()
			log := slog.New(slog.DiscardHandler)
			d.Remember(ctx, log)
			status.Store(c.status)
			body.Store(c.body)
			if why, gone := d.Gone(ctx, log); gone != c.gone {
				t.Errorf("gone %t (%s), want %t", gone, why, c.gone)
			}
		})
	}
}

// TestConfigMap: what is not there is an error and not an empty map.
func TestConfigMap(t *testing.T) {
	var status atomic.Int64
	var body atomic.Value
	status.Store(200)
	body.Store(`{"data":{"bundle.pem":"x"}}`)
	c := server(t, &status, &body)
	if data, err := c.ConfigMap(t.Context(), "ns", "bundle"); err != nil || data["bundle.pem"] != "x" {
		t.Errorf("%v, %v", data, err)
	}
	status.Store(404)
	if data, err := c.ConfigMap(t.Context(), "ns", "bundle"); err == nil {
		t.Errorf("%v and no error for a ConfigMap that is not there", data)
	}
}
