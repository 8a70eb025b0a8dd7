package cni

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"log/slog"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"

	v1 "github.com/signet-mesh/signet/api/cni/v1"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// node is an agent with settable answers.
type node struct {
	mu      sync.Mutex
	verdict Verdict         // guarded by mu
	err     error           // guarded by mu; of Hold, Check and Release
	block   bool            // guarded by mu; Hold waits for its context
	calls   map[string]int  // guarded by mu
	last    map[string]bool // guarded by mu; netns paths that were seen
}

func (n *node) set(v Verdict, err error, block bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.verdict, n.err, n.block = v, err, block
}

func (n *node) count(name string) int {
	n.mu.Lock()
	defer n.mu.Unlock()
	return n.calls[name]
}

func (n *node) Enrolment(_, _, _ string) Verdict {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls["enrolment"]++
	return n.verdict
}

func (n *node) call(name, netns string) (block bool, err error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.calls[name]++
	n.last[netns] = true
	return n.block, n.err
}

func (n *node) Hold(ctx context.Context, _, netns string) error {
	block, err := n.call("hold", netns)
	if block {
		<-ctx.Done()
		return ctx.Err()
	}
	return err
}

func (n *node) Check(_ context.Context, _, netns string) error {
	_, err := n.call("check", netns)
	return err
}

func (n *node) Release(_ context.Context, _, netns string) error {
	_, err := n.call("release", netns)
	return err
}

// start serves and returns how to ask and how to stop.
func start(t *testing.T, cfg Config) (n *node, ask func(path string, p any) (int, v1.Answer), stop func()) {
	t.Helper()
	n = &node{calls: map[string]int{}, last: map[string]bool{}}
	cfg.Socket = filepath.Join(t.TempDir(), "cni.sock")
	cfg.Log = slog.New(slog.NewTextHandler(t.Output(), nil))
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- New(cfg, n).Run(ctx) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	mode := os.FileMode(0)
	for end := time.Now().Add(5 * time.Second); mode != 0o600 && time.Now().Before(end); time.Sleep(time.Millisecond) {
		if st, err := os.Stat(cfg.Socket); err == nil {
			mode = st.Mode().Perm()
		}
	}
	if mode != 0o600 { // who may ask may have namespaces pinned
		t.Fatalf("socket mode %o; want 600", mode)
	}
	ask = func(path string, p any) (int, v1.Answer) {
		t.Helper()
		body, err := json.Marshal(p)
		if err != nil {
			t.Fatal(err)
		}
		tr := &http.Transport{DisableKeepAlives: true, DialContext: func(ctx context.Context, _, _ string) (net.Conn, error) {
			return new(net.Dialer).DialContext(ctx, "unix", cfg.Socket)
		}}
		req, err := http.NewRequestWithContext(t.Context(), http.MethodPost, "http://agent"+path, bytes.NewReader(body))
		if err != nil {
			t.Fatal(err)
		}
		resp, err := tr.RoundTrip(req)
		if err != nil {
			return 0, v1.Answer{Error: err.Error()}
		}
		defer resp.Body.Close()
		var a v1.Answer
		if err := json.NewDecoder(resp.Body).Decode(&a); err != nil {
			return resp.StatusCode, v1.Answer{Error: err.Error()}
		}
		if (resp.StatusCode == http.StatusOK) != (a.Error == "" && a.Result != "") {
			t.Errorf("status %d with %+v", resp.StatusCode, a)
		}
		return resp.StatusCode, a
	}
	return n, ask, stop
}

var shop = v1.Pod{ContainerID: "0123abc", NetNS: "/run/netns/x", Namespace: "shop", Name: "web-0", UID: "0b8e7d0e-3f6c-4b0e-9a53-5a1f0a4c2f11"}

// Defends: a pod starts only when it is captured, or when the agent knows
// that it does not belong into the mesh.
func TestAnswers(t *testing.T) {
	n, ask, _ := start(t, Config{OwnNamespace: "signet-system", Wait: 200 * time.Millisecond, Poll: 10 * time.Millisecond})
	broken := errors.New("nft: no such device")
	own := shop
	own.Namespace = "signet-system"
	gone := shop
	gone.NetNS = ""
	for _, tc := range []struct {
		name    string
		path    string
		pod     v1.Pod
		verdict Verdict
		err     error
		block   bool
		want    v1.Result
		text    string
	}{
		{"captured", v1.PathAdd, shop, Enrolled, nil, false, v1.Captured, ""},
		{"not enrolled", v1.PathAdd, shop, NotEnrolled, broken, false, v1.NotEnrolled, ""},
		{"excluded", v1.PathAdd, shop, Excluded, broken, false, v1.Excluded, ""},
		{"never seen", v1.PathAdd, shop, Unknown, nil, false, "", "does not know this pod yet"},
		{"no such verdict", v1.PathAdd, shop, 99, nil, false, "", "does not know this pod yet"},
		{"hold fails", v1.PathAdd, shop, Enrolled, broken, false, "", "nft: no such device; it waits and is tried again (see the log"},
		{"hold hangs", v1.PathAdd, shop, Enrolled, nil, true, "", "cannot be captured yet"},
		{"own namespace, nothing known", v1.PathAdd, own, Unknown, broken, true, v1.Excluded, ""},
		{"check", v1.PathCheck, shop, Enrolled, nil, false, v1.Captured, ""},
		{"check fails", v1.PathCheck, shop, Enrolled, broken, false, "", "not captured: nft"},
		{"check of one that is not enrolled", v1.PathCheck, shop, NotEnrolled, broken, false, v1.NotEnrolled, ""},
		{"check of one that opted out", v1.PathCheck, shop, Excluded, broken, false, v1.Excluded, ""},
		{"check of a stranger", v1.PathCheck, shop, Unknown, nil, false, "", "does not know"},
		{"check in own namespace", v1.PathCheck, own, Unknown, broken, false, v1.Excluded, ""},
		{"del", v1.PathDel, shop, Unknown, nil, false, v1.Released, ""},
		{"del without namespace", v1.PathDel, gone, Enrolled, nil, false, v1.Released, ""},
		{"del fails", v1.PathDel, shop, Enrolled, broken, false, "", "cannot be released: nft"},
	} {
		n.set(tc.verdict, tc.err, tc.block)
		begin := time.Now()
		status, a := ask(tc.path, tc.pod)
		if a.Result != tc.want || (tc.text != "" && (status != http.StatusServiceUnavailable || !strings.Contains(a.Error, tc.text))) {
			t.Errorf("%s: %d %+v; want %q %q", tc.name, status, a, tc.want, tc.text)
		}
		if took := time.Since(begin); took > 2*time.Second {
			t.Errorf("%s: took %s", tc.name, took)
		}
	}
	if n.count("hold") < 3 {
		t.Errorf("Hold was called %d times; it should be tried again within the wait", n.count("hold"))
	}
}

// Defends: what becomes known within the wait lets the pod start, without
// another round through kubelet.
func TestLater(t *testing.T) {
	n, ask, _ := start(t, Config{Wait: 20 * time.Second, Poll: 5 * time.Millisecond})
	n.set(Unknown, nil, false)
	go func() {
		time.Sleep(100 * time.Millisecond)
		n.set(Enrolled, errors.New("not yet"), false)
		time.Sleep(100 * time.Millisecond)
		n.set(Enrolled, nil, false)
	}()
	if status, a := ask(v1.PathAdd, shop); a.Result != v1.Captured {
		t.Errorf("%d %+v", status, a)
	}
}

// Defends: an agent that stops answers those who wait, with no leave to
// start.
func TestStop(t *testing.T) {
	n, ask, stop := start(t, Config{Wait: time.Minute})
	n.set(Enrolled, nil, true)
	go func() {
		for n.count("hold") == 0 {
			time.Sleep(time.Millisecond)
		}
		stop()
	}()
	begin := time.Now()
	if status, a := ask(v1.PathAdd, shop); status != http.StatusServiceUnavailable || a.Result != "" {
		t.Errorf("%d %+v", status, a)
	}
	if took := time.Since(begin); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
}

// Defends: fields that would become paths or names elsewhere are refused
// before the agent sees them.
func TestForged(t *testing.T) {
	n, ask, _ := start(t, Config{Wait: 100 * time.Millisecond})
	n.set(Enrolled, nil, false)
	for name, change := range map[string]func(p *v1.Pod){
		"uid is a path":         func(p *v1.Pod) { p.UID = "../../etc" },
		"uid is empty":          func(p *v1.Pod) { p.UID = "" },
		"uid is ..":             func(p *v1.Pod) { p.UID = ".." },
		"uid has a line feed":   func(p *v1.Pod) { p.UID = shop.UID + "\n" },
		"uid is long":           func(p *v1.Pod) { p.UID = strings.Repeat("a", 64) },
		"netns is relative":     func(p *v1.Pod) { p.NetNS = "run/netns/x" },
		"netns climbs":          func(p *v1.Pod) { p.NetNS = "/run/netns/../../proc/1/ns/net" },
		"netns is empty":        func(p *v1.Pod) { p.NetNS = "" },
		"namespace is empty":    func(p *v1.Pod) { p.Namespace = "" },
		"namespace is a path":   func(p *v1.Pod) { p.Namespace = "a/b" },
		"name has a line feed":  func(p *v1.Pod) { p.Name = "a\nb" },
		"container is a path":   func(p *v1.Pod) { p.ContainerID = "../x" },
		"container is no field": func(p *v1.Pod) { p.ContainerID = "" },
	} {
		p := shop
		change(&p)
		if status, a := ask(v1.PathAdd, p); status != http.StatusBadRequest || a.Result != "" {
			t.Errorf("%s: %d %+v", name, status, a)
		}
	}
	for name, body := range map[string]any{
		"unknown field": map[string]any{"containerID": "x", "netns": "/x", "namespace": "a", "name": "a", "uid": "a", "captured": true},
		"no object":     "x",
		"too long":      map[string]any{"uid": strings.Repeat("a", 100<<10)},
	} {
		if status, a := ask(v1.PathAdd, body); status != http.StatusBadRequest || a.Result != "" {
			t.Errorf("%s: %d %+v", name, status, a)
		}
	}
	if c := n.count("hold") + n.count("enrolment"); c != 0 {
		t.Errorf("the agent was asked %d times", c)
	}
	if status, _ := ask("/v1/else", shop); status != http.StatusNotFound {
		t.Errorf("another path: %d", status)
	}
}
