package e2e

import (
	"context"
	"fmt"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/test/harness"
)

const (
	upgradeRate  = 200 // new connections a second
	upgradeLong  = 100 // long streams opened before, and as many during an upgrade
	upgradeIdles = time.Minute
)

// runningProxy is a signet-proxy that a test started beside a mesh.
type runningProxy struct {
	cmd  *exec.Cmd
	log  harness.Output
	done chan struct{}
}

// startProxy starts a signet-proxy for the mesh's node.
func startProxy(t *testing.T, m *harness.Mesh, args ...string) *runningProxy {
	t.Helper()
	p := &runningProxy{done: make(chan struct{})}
	p.cmd = exec.Command(harness.Bin("signet-proxy"), append([]string{
		"--node", m.Node, "--run-dir", m.RunDir, "--state-dir", filepath.Join(m.StateDir, "agent"), "--envoy", harness.Envoy(t),
	}, args...)...)
	p.cmd.Stderr = &p.log
	if err := p.cmd.Start(); err != nil {
		t.Fatal(err)
	}
	go func() { _ = p.cmd.Wait(); close(p.done) }()
	t.Cleanup(func() {
		_ = p.cmd.Process.Kill() // an error: it has ended
		<-p.done
		if t.Failed() {
			t.Logf("a proxy's log:\n%s", p.log.String())
		}
		if strings.Contains(p.log.String(), "DATA RACE") || strings.Contains(p.log.String(), "panic:") {
			t.Errorf("a proxy's log:\n%s", p.log.String())
		}
	})
	return p
}

func (p *runningProxy) signal(t *testing.T, s syscall.Signal) {
	t.Helper()
	if err := p.cmd.Process.Signal(s); err != nil {
		t.Fatal(err)
	}
}

// ended waits for the program's end and returns its exit code.
func (p *runningProxy) ended(t *testing.T, within time.Duration) int {
	t.Helper()
	select {
	case <-p.done:
		return p.cmd.ProcessState.ExitCode()
	case <-time.After(within):
		t.Fatalf("the proxy has not ended after %s; its log:\n%s", within, p.log.String())
		return 0
	}
}

// upgradable starts a mesh whose proxy the test starts itself.
func upgradable(t *testing.T) (*harness.Mesh, *runningProxy) {
	t.Helper()
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"client": "10.88.0.10", "server": "10.88.0.12"},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "server", "10.88.0.12") +
			harness.Allow("shop", "allow", "server", []int{8080}, "client"), "more.yaml": "---\n"},
		Args: []string{"--no-proxy"}, NoWait: true,
	})
	p := startProxy(t, m)
	m.Eventually(30*time.Second, "the mesh to be ready", func() error { return settledNode(t, m) })
	serve(t, m.Pod("server"), ":8080", echo)
	return m, p
}

// settledNode says why the node does not work with the newest state.
func settledNode(t *testing.T, m *harness.Mesh) error {
	c, err := m.Client.ControlStatus(t.Context())
	if err != nil {
		return err
	}
	s, err := m.Client.AgentStatus(t.Context())
	if err != nil {
		return err
	}
	if s.Revision == "" || s.Revision != c.Revision {
		return fmt.Errorf("the node is at %q, want %q", s.Revision, c.Revision)
	}
	for _, w := range s.Workloads {
		if !w.Captured {
			return fmt.Errorf("%s: %s", w.Workload, w.Problem)
		}
	}
	return nil
}

// load makes new connections at a steady rate until stop, which returns how
// many there were and what failed.
func load(t *testing.T, m *harness.Mesh) (stop func() (int64, []string)) {
	ctx, cancel := context.WithCancel(t.Context())
	var mu sync.Mutex
	var failures []string // guarded by mu
	var calls atomic.Int64
	var wg sync.WaitGroup
	start := time.Now()
	jobs := make(chan struct{})
	client := m.Pod("client")
	for range 64 {
		wg.Go(func() {
			for range jobs {
				if err := callEcho(t.Context(), client, serverAt); err != nil {
					mu.Lock()
					failures = append(failures, time.Since(start).Round(time.Millisecond).String()+": "+err.Error())
					mu.Unlock()
				}
				calls.Add(1)
			}
		})
	}
	wg.Go(func() {
		defer close(jobs)
		for i := 0; ctx.Err() == nil; {
			for due := int(time.Since(start).Seconds() * upgradeRate); i < due; i++ {
				jobs <- struct{}{}
			}
			time.Sleep(time.Second / upgradeRate)
		}
	})
	return func() (int64, []string) {
		cancel()
		wg.Wait()
		return calls.Load(), failures
	}
}

// TestProxyUpgrade: a second proxy starts, the first is told to end, five
// times, under a steady load of new connections and with long streams open.
// Not one connection fails: the old proxy closes its sockets only when the new
// one listens, the kernel hands what waits in them over, tunnels move on by
// notice, and the old proxy ends by itself with its last connection.
func TestProxyUpgrade(t *testing.T) {
	m, old := upgradable(t)
	rounds := 5
	if testing.Short() {
		rounds = 1
	}
	stop := load(t, m)
	total := 0
	for round := range rounds {
		began := time.Now()
		var streams []*held
		open := func() {
			for range upgradeLong {
				streams = append(streams, hold(t, m.Pod("client"), serverAt))
			}
			total += upgradeLong
		}
		alive := func(when string) {
			t.Helper()
			dead := 0
			for _, s := range streams {
				if err := s.ping(); err != nil {
					if dead++; dead == 1 {
						t.Errorf("round %d: a long stream, %s: %v", round, when, err)
					}
				}
			}
			if dead > 0 {
				t.Fatalf("round %d: %d of %d long streams are dead %s", round, dead, len(streams), when)
			}
		}
		open()
		next := startProxy(t, m)
		if round%2 == 0 {
			// Streams of every kind: from the old proxy to the new one and back.
			time.Sleep(time.Second)
			m.Eventually(30*time.Second, "the second proxy to be ready", func() error { return settledNode(t, m) })
			open()
		}
		old.signal(t, syscall.SIGTERM) // else at once: it is for the old proxy to wait
		m.Eventually(30*time.Second, "the old proxy to drain", func() error {
			if !strings.Contains(old.log.String(), "draining: another proxy") {
				return fmt.Errorf("it has not said so")
			}
			return nil
		})
		drains := time.Now()
		alive("when the old proxy drains")
		// Both proxies take an edit, or it would not count as in force.
		m.Edit("more.yaml", harness.Allow("shop", "more", "client", []int{round + 1}, "server"))
		for time.Since(drains) < 7*time.Second { // beyond the notice's five seconds
			alive("while the old proxy drains")
			time.Sleep(100 * time.Millisecond)
		}
		select {
		case <-old.done:
			t.Fatalf("round %d: the old proxy ended with streams open", round)
		default:
		}
		for _, s := range streams {
			s.Close()
		}
		closed := time.Now()
		if code := old.ended(t, upgradeIdles); code != 0 {
			t.Errorf("round %d: the old proxy ended with code %d", round, code)
		}
		t.Logf("round %d: %s until it drained, ended %s after its last stream", round,
			drains.Sub(began).Round(time.Millisecond), time.Since(closed).Round(time.Millisecond))
		old = next
	}
	calls, failures := stop()
	t.Logf("%d new connections, %d failed; %d long streams lived on", calls, len(failures), total)
	for _, f := range failures[:min(10, len(failures))] {
		t.Error(f)
	}
	want := int(calls) + total
	m.Eventually(20*time.Second, "every connection to be in the audit, whole", func() error {
		records := m.Records(adminclient.AuditQuery{Side: audit.Destination})
		for _, r := range records {
			if r.Verdict != audit.Allowed || r.Ended == "proxy-lost" || r.Proxy == "" {
				t.Fatalf("a record: %+v", r)
			}
			if r.End.IsZero() {
				return fmt.Errorf("%s is still open", r.ID)
			}
		}
		if len(records) != want {
			return fmt.Errorf("%d records, want %d", len(records), want)
		}
		return nil
	})
	s, err := m.Client.AgentStatus(t.Context())
	if err != nil || s.Audit.Gaps != 0 {
		t.Errorf("the audit has %d gaps (%v), want none", s.Audit.Gaps, err)
	}
}
