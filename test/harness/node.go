package harness

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/control"
)

// Node is a further node of a mesh: an agent and a proxy of its own, which see no
// other part of the mesh but over the control plane's socket.
type Node struct {
	Client *adminclient.Client

	t            testing.TB
	stderr       *Output
	agent, proxy *exec.Cmd
}

// Join has a further node join the mesh. It ends with the test.
func (m *Mesh) Join(name string) *Node {
	m.t.Helper()
	base, err := os.MkdirTemp("", "node-") // not t.TempDir: socket paths have a small maximum length
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(func() { os.RemoveAll(base) })
	tokens, err := caserver.OpenTokens(control.TokenDir(m.StateDir))
	if err != nil {
		m.t.Fatal(err)
	}
	token, err := tokens.Create(name, time.Minute)
	if err != nil {
		m.t.Fatal(err)
	}
	run, state, file := filepath.Join(base, "run"), filepath.Join(base, "state"), filepath.Join(base, "token")
	if err := os.WriteFile(file, []byte(token), 0o600); err != nil {
		m.t.Fatal(err)
	}
	n := &Node{t: m.t, Client: adminclient.New(run), stderr: &Output{}}
	n.agent = n.start("signet-agent", "--node", name, "--trust-domain", "mesh.test", "--state-dir", state, "--run-dir", run,
		"--bundle", control.RootFile(m.StateDir), "--join-token", file, "--control", "unix://"+filepath.Join(m.RunDir, "control.sock"))
	n.proxy = n.start("signet-proxy", "--node", name, "--state-dir", state, "--run-dir", run, "--envoy", Envoy(m.t), "--threads", "1", "--drain-limit", "0")
	m.t.Cleanup(func() {
		if m.t.Failed() {
			m.t.Logf("log of node %s (end):\n%s", name, tail(n.stderr.String()))
		}
		for _, bad := range []string{"WARNING: DATA RACE", "panic:", "proxy configuration refused"} {
			if strings.Contains(n.stderr.String(), bad) {
				m.t.Errorf("the log of node %s has %q:\n%s", name, bad, tail(n.stderr.String()))
			}
		}
	})
	return n
}

// start runs a program until the test ends.
func (n *Node) start(program string, args ...string) *exec.Cmd {
	n.t.Helper()
	cmd := exec.Command(Bin(program), args...)
	cmd.Stderr = n.stderr
	if err := cmd.Start(); err != nil {
		n.t.Fatal(err)
	}
	done := make(chan struct{})
	go func() { _ = cmd.Wait(); close(done) }()
	n.t.Cleanup(func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-done:
		case <-time.After(20 * time.Second):
			_ = cmd.Process.Kill()
			<-done
			n.t.Errorf("%s did not stop within 20 s of SIGTERM", program)
		}
	})
	return cmd
}

// Pids are the processes of the node as they run now.
func (n *Node) Pids() []int {
	n.t.Helper()
	return []int{n.agent.Process.Pid, n.proxy.Process.Pid, pidOf(n.t, n.stderr.String(), "envoy")}
}
