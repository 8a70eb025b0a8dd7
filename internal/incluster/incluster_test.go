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
	"sync"
	"testing"
	"time"
)

// server is an API server that answers one path with one status and body, for
// those who have the token.
type server struct {
	mu     sync.Mutex
	path   string
	status int    // guarded by mu
	body   string // guarded by mu
}

func (s *server) set(status int, body string) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.status, s.body = status, body
}

func (s *server) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if r.URL.Path != s.path || r.Header.Get("Authorization") != "Bearer secret" {
		w.WriteHeader(http.StatusTeapot)
		return
	}
	w.WriteHeader(s.status)
	_, _ = io.WriteString(w, s.body)
}

// connect starts s and returns a client of it.
func (s *server) connect(t *testing.T) *Client {
	t.Helper()
	srv := httptest.NewTLSServer(s)
	t.Cleanup(srv.Close)
	token := filepath.Join(t.TempDir(), "token")
	if err := os.WriteFile(token, []byte("secret\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := New(srv.URL, token, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw}))
	if err != nil {
		t.Fatal(err)
	}
	return c
}

const here = `{"metadata":{"uid":"u1"}}`

// Defends: the release counts as deleted only when that is certain. An agent or
// an installer that is merely restarted must open nothing.
func TestGone(t *testing.T) {
	for _, tc := range []struct {
		name        string
		first, then int
		body        string
		gone        bool
	}{
		{"restart", 200, 200, here, false},
		{"deleted", 200, 404, "", true},
		{"deleted before it was seen", 500, 404, "", true},
		{"being deleted", 200, 200, `{"metadata":{"uid":"u1","deletionTimestamp":"2026-01-01T00:00:00Z"}}`, true},
		{"another one", 200, 200, `{"metadata":{"uid":"u2"}}`, true},
		{"its right was deleted", 200, 403, "", true},
		{"it never had the right", 403, 403, "", false},
		{"its token is no longer good", 200, 401, "", false},
		{"the witness's account was deleted", 200, 401, "witness", true},
		{"server in trouble", 200, 500, "", false},
		{"no object", 200, 200, `{}`, false},
		{"no JSON", 200, 200, `<html>`, false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			t.Parallel()
			s := &server{path: "/apis/apps/v1/namespaces/signet-system/daemonsets/signet-agent", status: tc.first, body: here}
			c := s.connect(t)
			if tc.body == "witness" {
				c.witness = c.token
			}
			d := c.DaemonSet("signet-system", "signet-agent")
			log := slog.New(slog.NewTextHandler(t.Output(), nil))
			ctx, cancel := context.WithTimeout(t.Context(), time.Second)
			defer cancel()
			d.Remember(ctx, log)
			s.set(tc.then, tc.body)
			ctx, cancel = context.WithTimeout(t.Context(), 3*time.Second)
			defer cancel()
			if why, gone := d.Gone(ctx, log); gone != tc.gone || (why != "") != gone {
				t.Errorf("%v %q; want %v", gone, why, tc.gone)
			}
		})
	}
}

// TestConfigMap: what is not there is an error and not an empty map.
func TestConfigMap(t *testing.T) {
	s := &server{path: "/api/v1/namespaces/ns/configmaps/bundle", status: 200, body: `{"data":{"bundle.pem":"x"}}`}
	c := s.connect(t)
	if data, err := c.ConfigMap(t.Context(), "ns", "bundle"); err != nil || data["bundle.pem"] != "x" {
		t.Errorf("%v, %v", data, err)
	}
	s.set(404, `{}`)
	if data, err := c.ConfigMap(t.Context(), "ns", "bundle"); err == nil {
		t.Errorf("%v and no error for a ConfigMap that is not there", data)
	}
}
