package main

import (
	"encoding/pem"
	"errors"
	"io"
	"math/rand/v2"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/containernetworking/cni/libcni"

	"github.com/signet-mesh/signet/internal/cniconf"
	"github.com/signet-mesh/signet/internal/incluster"
)

// api is an API server that knows one DaemonSet.
type api struct {
	mu     sync.Mutex
	status int    // guarded by mu
	body   string // guarded by mu
	asked  int    // guarded by mu
}

func (a *api) set(status int, body string) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.status, a.body = status, body
}

func (a *api) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	a.mu.Lock()
	defer a.mu.Unlock()
	a.asked++
	if r.URL.Path != "/apis/apps/v1/namespaces/signet-system/daemonsets/signet-agent" || r.Header.Get("Authorization") != "Bearer secret" {
		w.WriteHeader(http.StatusTeapot)
		return
	}
	w.WriteHeader(a.status)
	_, _ = io.WriteString(w, a.body)
}

// machine is a node's two folders and a program to install in them.
type machine struct {
	t              *testing.T
	program        string
	bin, conf, api string
}

func newMachine(t *testing.T) machine {
	t.Helper()
	dir := t.TempDir()
	m := machine{t: t, program: filepath.Join(dir, cniconf.Plugin), bin: filepath.Join(dir, "bin"), conf: filepath.Join(dir, "net.d")}
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Symlink(own, m.program), os.Mkdir(m.conf, 0o755)); err != nil {
		t.Fatal(err)
	}
	m.network("ptp")
	return m
}

func (m machine) network(plugin string) {
	m.t.Helper()
	text := `{"cniVersion":"1.0.0","name":"kc","plugins":[{"type":"` + plugin + `"}]}`
	aside := filepath.Join(m.conf, "aside")
	if err := errors.Join(os.WriteFile(aside, []byte(text), 0o600), os.Rename(aside, filepath.Join(m.conf, "10-kc.conflist"))); err != nil {
		m.t.Fatal(err)
	}
}

// chain is what the runtime would use.
func (m machine) chain() (types []string) {
	m.t.Helper()
	files, err := libcni.ConfFiles(m.conf, []string{".conf", ".conflist", ".json"})
	if err != nil || len(files) == 0 {
		m.t.Fatalf("%v, %v", files, err)
	}
	slices.Sort(files)
	list, err := libcni.ConfListFromFile(files[0])
	if err != nil {
		m.t.Fatalf("%s: %v", files[0], err)
	}
	for _, p := range list.Plugins {
		types = append(types, p.Network.Type)
	}
	return types
}

func (m machine) installed() bool { return slices.Contains(m.chain(), cniconf.Plugin) }

func (m machine) command(args ...string) *exec.Cmd {
	c := exec.CommandContext(m.t.Context(), m.program, append(args, "--bin-dir="+m.bin, "--conf-dir="+m.conf)...)
	c.Stderr = m.t.Output()
	c.WaitDelay = 10 * time.Second
	if m.api != "" {
		u, err := url.Parse(m.api)
		if err != nil {
			m.t.Fatal(err)
		}
		c.Env = append(os.Environ(), "KUBERNETES_SERVICE_HOST="+u.Hostname(), "KUBERNETES_SERVICE_PORT="+u.Port())
	}
	return c
}

func (m machine) eventually(what string, ok func() bool) {
	m.t.Helper()
	for end := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(end) {
			m.t.Fatalf("never: %s", what)
		}
	}
}

// Defends: whenever the installer is killed, the runtime finds a whole chain,
// from the first success on with signet-cni in it, and a whole program; the
// next installer goes on from there.
func TestKilled(t *testing.T) {
	m := newMachine(t)
	for n := range 30 {
		c := m.command("install", "--watch")
		if err := c.Start(); err != nil {
			t.Fatal(err)
		}
		m.network("ptp" + strings.Repeat("x", n))
		time.Sleep(time.Duration(rand.IntN(60)) * time.Millisecond)
		was := m.installed()
		if err := c.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = c.Wait() // it was killed
		if was && !m.installed() {
			t.Fatalf("round %d: pods would start without signet-cni: %v", n, m.chain())
		}
		if raw, err := os.ReadFile(filepath.Join(m.bin, cniconf.Plugin)); err == nil {
			own, err := os.ReadFile("/proc/self/exe")
			if err != nil || len(own) != len(raw) {
				t.Fatalf("round %d: %d bytes of a program of %d, %v", n, len(raw), len(own), err)
			}
		} else if m.installed() {
			t.Fatalf("round %d: the entry is there before the program: %v", n, err)
		}
	}
	m.network("bridge")
	for range 2 {
		if err := m.command("install").Run(); err != nil {
			t.Fatal(err)
		}
	}
	if got := m.chain(); !slices.Equal(got, []string{"bridge", cniconf.Plugin}) {
		t.Errorf("chain %v", got)
	}
	if err := m.command("remove").Run(); err != nil {
		t.Fatal(err)
	}
	if got := m.chain(); !slices.Equal(got, []string{"bridge"}) {
		t.Errorf("after remove: %v", got)
	}
}

const here = `{"metadata":{"uid":"u1"}}`

func certificate(srv *httptest.Server) []byte {
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: srv.Certificate().Raw})
}

// Defends: an installer that is stopped leaves everything, unless it is sure
// that the release is deleted; then nothing is left.
func TestStopped(t *testing.T) {
	for _, tc := range []struct {
		name  string
		then  int // 0: the API server is away
		owner string
		gone  bool
	}{
		{"restart", 200, "--daemonset=signet-system/signet-agent", false},
		{"deleted", 404, "--daemonset=signet-system/signet-agent", true},
		{"server away", 0, "--daemonset=signet-system/signet-agent", false},
		{"not told of a DaemonSet", 404, "", false},
	} {
		t.Run(tc.name, func(t *testing.T) {
			m := newMachine(t)
			a := &api{status: http.StatusOK, body: here}
			srv := httptest.NewTLSServer(a)
			defer srv.Close()
			m.api = srv.URL
			if err := errors.Join(os.MkdirAll(incluster.Credentials, 0o755), os.WriteFile(incluster.Credentials+"/ca.crt", certificate(srv), 0o600), os.WriteFile(incluster.Credentials+"/token", []byte("secret"), 0o600)); err != nil {
				t.Fatal(err)
			}
			args := []string{"install", "--watch"}
			if tc.owner != "" {
				args = append(args, tc.owner)
			}
			c := m.command(args...)
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			m.eventually("installed", m.installed)
			if tc.owner != "" {
				m.eventually("asked", func() bool { a.mu.Lock(); defer a.mu.Unlock(); return a.asked > 0 })
			}
			if a.set(tc.then, here); tc.then == 0 {
				srv.Close()
			}
			if err := c.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			if err := c.Wait(); err != nil {
				t.Fatal(err)
			}
			if m.installed() == tc.gone {
				t.Errorf("chain %v", m.chain())
			}
			if _, err := os.Stat(filepath.Join(m.bin, cniconf.Plugin)); (err != nil) != tc.gone {
				t.Errorf("program: %v", err)
			}
		})
	}
}

// Bad flags are refused with what to do, before anything is changed.
func TestFlags(t *testing.T) {
	m := newMachine(t)
	for flags, want := range map[string]string{
		"install --socket=cni.sock":               "use an absolute path",
		"install --timeout=1h":                    "use a duration",
		"install --daemonset=a/b":                 "works with --watch only",
		"install --watch --daemonset=a":           "want NAMESPACE/NAME",
		"install --watch --daemonset=a/b":         "in a pod only",
		"install now":                             "takes no arguments",
		"remove --watch":                          "not defined",
		"uninstall":                               "usage: signet-cni",
		"install --bin-dir=bin --conf-dir=/a --x": "not defined",
	} {
		c := exec.CommandContext(t.Context(), m.program, strings.Fields(flags)...)
		if !strings.HasPrefix(flags, "uninstall") && !strings.HasSuffix(flags, "now") {
			c = m.command(strings.Fields(flags)...)
			c.Stderr = nil
		}
		out, err := c.CombinedOutput()
		if err == nil || !strings.Contains(string(out), want) {
			t.Errorf("%s: %v: %s; want %q", flags, err, out, want)
		}
	}
	if m.installed() {
		t.Error("installed")
	}
}
