// Package harness starts a real mesh in network namespaces of its own: the
// programs as they are built for users (with the race detector), a real Envoy,
// real sockets. Tests and benchmarks share it.
package harness

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
)

// envBin names the directory of the programs under test, built once for all
// tests of a package.
const envBin = "SIGNET_HARNESS_BIN"

// envBuilt names the same directory to who is to remove it: the program that built
// it, or the one that this becomes in lab.Isolate, and none that those start.
const envBuilt = "SIGNET_HARNESS_BUILT"

// Main builds the programs and runs a package's tests in namespaces of their
// own. It is the whole body of a TestMain.
func Main(m *testing.M) {
	if err := Build(true); err != nil {
		fmt.Fprintln(os.Stderr, "building the programs under test:", err)
		os.Exit(1)
	}
	if _, err := lab.Isolate(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	built := os.Getenv(envBuilt)
	_ = os.Unsetenv(envBuilt) // not for what the tests start
	code := m.Run()
	_ = os.RemoveAll(built)
	os.Exit(code)
}

// RemoveBuilt removes what Build made.
func RemoveBuilt() {
	if dir := os.Getenv(envBuilt); dir != "" {
		_ = os.RemoveAll(dir)
		_ = os.Unsetenv(envBuilt)
		_ = os.Unsetenv(envBin)
	}
}

// Build builds the programs that Start runs, unless an outer process already
// has. Call it before lab.Isolate, and RemoveBuilt at the end.
func Build(race bool) error {
	if os.Getenv(envBin) != "" {
		return nil
	}
	dir, err := os.MkdirTemp("", "signet-bin-")
	if err != nil {
		return err
	}
	args := []string{"build", "-buildvcs=false", "-o", dir + "/"}
	if race {
		args = append(args, "-race")
	}
	cmd := exec.Command("go", append(args, "./cmd/...")...)
	cmd.Dir = root()
	cmd.Stdout, cmd.Stderr = os.Stderr, os.Stderr
	if err := cmd.Run(); err != nil {
		return errors.Join(err, os.RemoveAll(dir))
	}
	return errors.Join(os.Setenv(envBin, dir), os.Setenv(envBuilt, dir))
}

// Bin is the path of a program under test.
func Bin(name string) string { return filepath.Join(os.Getenv(envBin), name) }

// root is the project's folder.
func root() string {
	_, file, _, _ := runtime.Caller(0)
	return filepath.Dir(filepath.Dir(filepath.Dir(file)))
}

// Envoy returns the proxy: $SIGNET_ENVOY, or what `make tools` made.
func Envoy(t testing.TB) string {
	t.Helper()
	for _, path := range []string{os.Getenv("SIGNET_ENVOY"), filepath.Join(root(), ".tools", "envoy", "bin", "envoy")} {
		if path == "" {
			continue
		}
		if _, err := os.Stat(path); err == nil {
			return path
		}
	}
	t.Fatal("no Envoy: run `make tools`, or set SIGNET_ENVOY")
	return ""
}

// Options describe a mesh.
type Options struct {
	// Pods are made before the mesh starts; name to address in 10.88.0.0/16.
	Pods map[string]string
	// Documents are file names to YAML.
	Documents map[string]string
	// Args are further arguments of `signet up`.
	Args []string
	// Lab is used instead of a new one, and not closed. Pods are added to it.
	Lab *lab.Lab
	// Node is the node's name; "n1" if empty.
	Node string
	// Dir keeps documents, state and sockets; a new one if empty.
	Dir string
	// NoWait returns as soon as the supervisor runs.
	NoWait bool
}

// Mesh is a running mesh.
type Mesh struct {
	Lab      *lab.Lab
	Dir      string // documents
	RunDir   string
	StateDir string
	Node     string
	Client   *adminclient.Client

	t      testing.TB
	cmd    *exec.Cmd
	done   chan struct{}
	stderr Output
	stdout Output
}

// Start starts a mesh and waits until it is ready. It is stopped, and its log
// searched for data races, when the test ends.
func Start(t testing.TB, o Options) *Mesh {
	t.Helper()
	m := &Mesh{t: t, Lab: o.Lab, Node: o.Node, done: make(chan struct{})}
	if m.Lab == nil {
		l, err := lab.New(lab.Config{})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { l.Close() })
		m.Lab = l
	}
	for name, addr := range o.Pods {
		if _, err := m.Lab.AddPod(name, netip.MustParseAddr(addr)); err != nil {
			t.Fatal(err)
		}
	}
	if m.Node == "" {
		m.Node = "n1"
	}
	base := o.Dir
	if base == "" {
		// Not t.TempDir: socket paths have a small maximum length.
		dir, err := os.MkdirTemp("", "mesh-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		base = dir
	}
	m.Dir, m.RunDir, m.StateDir = filepath.Join(base, "docs"), filepath.Join(base, "run"), filepath.Join(base, "state")
	if err := os.MkdirAll(m.Dir, 0o755); err != nil {
		t.Fatal(err)
	}
	for name, text := range o.Documents {
		m.write(name, text)
	}
	m.Client = adminclient.New(m.RunDir)
	args := append([]string{"up", "-c", m.Dir, "--run-dir", m.RunDir, "--state-dir", m.StateDir, "--node", m.Node, "--envoy", Envoy(t)}, o.Args...)
	m.cmd = exec.Command(Bin("signet"), args...)
	m.cmd.Stdout, m.cmd.Stderr = &m.stdout, &m.stderr
	if err := m.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = m.cmd.Wait(); close(m.done) }()
	t.Cleanup(m.stop)
	if !o.NoWait {
		m.Eventually(30*time.Second, "the mesh to be ready", func() error {
			select {
			case <-m.done:
				t.Fatalf("signet up ended: %v", m.cmd.ProcessState)
			default:
			}
			if !strings.Contains(m.stdout.String(), "mesh is ready") {
				return errors.New("not ready yet")
			}
			return nil
		})
	}
	return m
}

// Stop ends the mesh in the ordinary way and waits for it.
func (m *Mesh) Stop() {
	m.t.Helper()
	select {
	case <-m.done:
		return
	default:
	}
	_ = m.cmd.Process.Signal(syscall.SIGTERM)
	select {
	case <-m.done:
	case <-time.After(30 * time.Second):
		_ = m.cmd.Process.Kill()
		<-m.done
		m.t.Error("signet up did not stop within 30 s of SIGTERM")
	}
}

func (m *Mesh) stop() {
	m.Stop()
	if m.t.Failed() {
		m.t.Logf("log of the mesh (end):\n%s", tail(m.Log()))
	}
	if strings.Contains(m.Log(), "WARNING: DATA RACE") {
		m.t.Errorf("a data race:\n%s", tail(m.Log()))
	}
	for _, bad := range []string{"panic:", "proxy configuration refused"} {
		if strings.Contains(m.Log(), bad) {
			m.t.Errorf("the mesh's log has %q:\n%s", bad, tail(m.Log()))
		}
	}
}

// Log is everything the three processes and their supervisor wrote so far.
func (m *Mesh) Log() string { return m.stderr.String() }

var started = regexp.MustCompile(`msg="process started" process=(\w+) pid=(\d+)`)

// Pid returns the process id of control, agent or envoy as it runs now.
func (m *Mesh) Pid(name string) int {
	m.t.Helper()
	return pidOf(m.t, m.Log(), name)
}

func pidOf(t testing.TB, log, name string) int {
	t.Helper()
	pid := 0
	for _, match := range started.FindAllStringSubmatch(log, -1) {
		if match[1] == name {
			pid, _ = strconv.Atoi(match[2])
		}
	}
	if pid == 0 {
		t.Fatalf("%s was never started", name)
	}
	return pid
}

// Kill sends SIGKILL to control, agent or envoy.
func (m *Mesh) Kill(name string) {
	m.t.Helper()
	if err := syscall.Kill(m.Pid(name), syscall.SIGKILL); err != nil {
		m.t.Fatal(err)
	}
}

// Edit replaces a document and waits until the node's proxy has taken the new
// state in full.
func (m *Mesh) Edit(name, text string) {
	m.t.Helper()
	before, err := m.Client.ControlStatus(m.t.Context())
	if err != nil {
		m.t.Fatal(err)
	}
	m.write(name, text)
	m.Eventually(10*time.Second, "the edit to be in force", func() error {
		c, err := m.Client.ControlStatus(m.t.Context())
		if err != nil {
			return err
		}
		if len(c.Rejected) > 0 {
			m.t.Fatalf("the edit was refused: %v", c.Rejected)
		}
		a, err := m.Client.AgentStatus(m.t.Context())
		if err != nil {
			return err
		}
		if c.Revision == before.Revision || a.Revision != c.Revision {
			return fmt.Errorf("revision %s, node at %s", c.Revision, a.Revision)
		}
		return nil
	})
}

// Write replaces a document, whole, and does not wait.
func (m *Mesh) Write(name, text string) { m.t.Helper(); m.write(name, text) }

func (m *Mesh) write(name, text string) {
	m.t.Helper()
	path := filepath.Join(m.Dir, name)
	if err := os.WriteFile(path+".new", []byte(text), 0o644); err != nil {
		m.t.Fatal(err)
	}
	if err := os.Rename(path+".new", path); err != nil {
		m.t.Fatal(err)
	}
}

// Eventually calls f until it returns nil, and fails the test when it has not
// by the end of d.
func (m *Mesh) Eventually(d time.Duration, what string, f func() error) {
	m.t.Helper()
	deadline := time.Now().Add(d)
	for {
		err := f()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			m.t.Fatalf("waited %s for %s: %v", d, what, err)
		}
		time.Sleep(10 * time.Millisecond)
	}
}

// Records returns the audit records that a query selects.
func (m *Mesh) Records(q adminclient.AuditQuery) []audit.Record {
	m.t.Helper()
	var out []audit.Record
	for r, err := range m.Client.Audit(m.t.Context(), q) {
		if err != nil {
			m.t.Fatal(err)
		}
		out = append(out, r)
	}
	return out
}

// CLI runs `signet` against this mesh and returns its standard output and exit
// code.
func (m *Mesh) CLI(args ...string) (string, int) {
	m.t.Helper()
	ctx, cancel := context.WithTimeout(m.t.Context(), 30*time.Second)
	defer cancel()
	cmd := exec.CommandContext(ctx, Bin("signet"), append(args, "--run-dir", m.RunDir)...)
	var out, errOut bytes.Buffer
	cmd.Stdout, cmd.Stderr = &out, &errOut
	err := cmd.Run()
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		m.t.Fatalf("signet %v: %v\n%s", args, err, errOut.String())
	}
	if errOut.Len() > 0 {
		m.t.Logf("signet %v: %s", args, errOut.String())
	}
	return out.String(), cmd.ProcessState.ExitCode()
}

// TrustBundle returns what `signet ca bundle` prints, as soon as it does.
func (m *Mesh) TrustBundle(args ...string) (out string) {
	m.t.Helper()
	m.Eventually(10*time.Second, "the trust bundle", func() error {
		var code int
		if out, code = m.CLI(append([]string{"ca", "bundle"}, args...)...); code != 0 {
			return fmt.Errorf("signet ca bundle: exit code %d", code)
		}
		return nil
	})
	return out
}

// Pod returns a pod of the lab.
func (m *Mesh) Pod(name string) *lab.Pod {
	m.t.Helper()
	p := m.Lab.Pod(name)
	if p == nil {
		m.t.Fatalf("no pod %q", name)
	}
	return p
}

// tail is the end of a log.
func tail(s string) string {
	const n = 16 << 10
	if len(s) > n {
		return s[len(s)-n:]
	}
	return s
}
