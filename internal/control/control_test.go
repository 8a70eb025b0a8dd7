package control

import (
	"context"
	"io"
	"log/slog"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/unixsocket"
)

// scripted is a Source that a test speaks through.
type scripted struct {
	views    chan *mesh.View
	rejected chan []string
}

func (s *scripted) Run(ctx context.Context, accept func(*mesh.View), reject func(lines ...string)) error {
	for {
		select {
		case v := <-s.views:
			accept(v)
		case lines := <-s.rejected:
			reject(lines...)
		case <-ctx.Done():
			return nil
		}
	}
}

// lateRoots is a ca.RootStore in memory that is there when opened is closed.
type lateRoots struct {
	opened <-chan struct{}
	files  map[string][]byte
}

func (r *lateRoots) Load(context.Context) (map[string][]byte, string, error) {
	<-r.opened
	return r.files, "", nil
}

func (r *lateRoots) Save(_ context.Context, files map[string][]byte, _ string) error {
	r.files = files
	return nil
}

func (r *lateRoots) String() string { return "memory" }

func viewOf(domain, revision string) *mesh.View {
	return &mesh.View{Revision: revision, Model: authz.NewModel(nil), State: &mesh.State{
		TrustDomain: spiffeid.RequireTrustDomainFromString(domain), SVIDTTL: time.Hour,
	}}
}

// get asks for a path until the answer has a status and a text in it.
func get(t *testing.T, client *http.Client, url string, code int, text string) {
	t.Helper()
	var last string
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
		r, err := client.Get(url)
		if err != nil {
			last = err.Error()
			continue
		}
		body, _ := io.ReadAll(r.Body)
		r.Body.Close()
		if last = string(body); r.StatusCode == code && strings.Contains(last, text) {
			return
		}
	}
	t.Fatalf("%s: no %d with %q; last %q", url, code, text, last)
}

// The control plane is alive at once, ready when it has a state and its
// authority is open, keeps its trust domain, and ends cleanly.
func TestReadiness(t *testing.T) {
	dir := t.TempDir()
	free, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	health := free.Addr().String()
	free.Close()
	source := &scripted{make(chan *mesh.View), make(chan []string)}
	opened := make(chan struct{})
	attended := make(chan struct{})
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	admin := filepath.Join(dir, "admin.sock")
	go func() {
		done <- Run(ctx, Config{
			Source: source, StateDir: filepath.Join(dir, "state"),
			Listen: "127.0.0.1:0", AdminListen: admin, HealthListen: health,
			Roots: &lateRoots{opened: opened},
			Attend: func(ctx context.Context, facts Facts) error {
				if roots, _ := facts.Bundle(); len(roots) != 1 || facts.Reports() == nil {
					t.Errorf("facts: %d roots, reports %v", len(roots), facts.Reports())
				}
				close(attended)
				<-ctx.Done()
				return nil
			},
			Log: slog.New(slog.DiscardHandler),
		})
	}()
	get(t, http.DefaultClient, "http://"+health+"/healthz", 200, "ok")
	get(t, http.DefaultClient, "http://"+health+"/readyz", 503, "waiting for the source")
	source.rejected <- []string{"MeshConfig is missing"}
	get(t, http.DefaultClient, "http://"+health+"/readyz", 503, "MeshConfig is missing")
	first := viewOf("mesh.example", "r1")
	first.State.Revoked = []mesh.Revocation{{Serial: "0c", Reason: "from before"}}
	source.views <- first
	get(t, http.DefaultClient, "http://"+health+"/readyz", 503, "authority")
	close(opened)
	get(t, http.DefaultClient, "http://"+health+"/readyz", 200, "ok")
	get(t, http.DefaultClient, "http://"+health+"/metrics", 200, "signet_control_policies 0")
	<-attended

	operator := &http.Client{Transport: &http.Transport{DialContext: unixsocket.Dialer(admin), DisableKeepAlives: true}}
	get(t, operator, "http://control/v1/status", 200, `"r1"`)
	get(t, operator, "http://control/v1/ca/revoked", 200, `"from before"`) // what the first view says is revoked, too
	source.views <- viewOf("other.example", "r2")
	get(t, operator, "http://control/v1/status", 200, "a trust domain cannot be edited")
	get(t, operator, "http://control/v1/status", 200, `"r1"`)
	third := viewOf("mesh.example", "r3")
	third.State.Revoked = []mesh.Revocation{{Serial: "0a1b", Reason: "stolen"}}
	source.views <- third
	get(t, operator, "http://control/v1/status", 200, `"r3"`)
	get(t, operator, "http://control/v1/ca/revoked", 200, `"certificates":[{"serial":"0a1b"`)
	http.DefaultClient.CloseIdleConnections()
	cancel()
	select {
	case err := <-done:
		if err != nil {
			t.Error(err)
		}
	case <-time.After(10 * time.Second):
		t.Fatal("did not end")
	}
}

// Documents that are not valid end the start at once.
func TestRunFailsAtOnce(t *testing.T) {
	err := Run(t.Context(), Config{Source: Files(filepath.Join(t.TempDir(), "none.yaml"), "one", slog.New(slog.DiscardHandler)), Log: slog.New(slog.DiscardHandler)})
	if err == nil || !strings.Contains(err.Error(), "none.yaml") {
		t.Errorf("%v", err)
	}
}
