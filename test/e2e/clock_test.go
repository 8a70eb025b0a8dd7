package e2e

import (
	"context"
	"errors"
	"fmt"
	"os"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/test/clock"
	"github.com/signet-mesh/signet/test/harness"
)

// clocks are the programs of a mesh that read a clock.
var clocks = []string{"control", "agent", "envoy"}

// moveClocks lets the clocks of some programs be off by a time, and all others
// right.
func moveClocks(t *testing.T, m *harness.Mesh, off time.Duration, names ...string) {
	t.Helper()
	for _, name := range clocks {
		by := time.Duration(0)
		for _, moved := range names {
			if name == moved {
				by = off
			}
		}
		if err := clock.Move(m.Pid(name), by); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
	}
}

// pids are the processes of the mesh: one that starts anew has another.
func pids(m *harness.Mesh) string {
	return fmt.Sprintf("control %d, agent %d, envoy %d", m.Pid("control"), m.Pid("agent"), m.Pid("envoy"))
}

// serialOf is the certificate that the agent holds of a workload, and why it got
// no newer one.
func serialOf(t *testing.T, m *harness.Mesh, holder string) (serial, problem string) {
	t.Helper()
	certs, err := m.Client.Certificates(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range certs {
		if c.Holder == holder {
			return c.Serial, c.LastError
		}
	}
	t.Fatalf("the agent does not know %s", holder)
	return "", ""
}

// TestSuspendPastExpiry: the machine sleeps for longer than any certificate lives,
// the node's included: all programs stand still, and when they go on their wall
// clocks are a day ahead and their timers are where they were. Without a restart of
// anything the node joins again, every certificate is made anew, and calls go well
// within seconds; nobody else ever gets in.
//
// What it defends: that renewal, the end of streams, and the token with which a
// node that has nothing left joins again, go by the wall clock and not by timers.
func TestSuspendPastExpiry(t *testing.T) {
	m := rotating(t, time.Hour)
	if err := callEcho(t.Context(), m.Pod("red"), serverAt); err != nil {
		t.Fatal(err)
	}
	long := hold(t, m.Pod("red"), serverAt) // in the tunnel of the call before
	before, _ := serialOf(t, m, "shop/red")
	node, _ := serialOf(t, m, "node")
	running := pids(m)
	suspend(t, m, 25*time.Hour)
	resumed := time.Now()
	for _, what := range []struct{ holder, before string }{{"node", node}, {"shop/red", before}} {
		m.Eventually(resumeWithin, what.holder+" to have a new certificate", func() error {
			serial, problem := serialOf(t, m, what.holder)
			if serial == "" || serial == what.before {
				return fmt.Errorf("serial %q: %s", serial, problem)
			}
			return nil
		})
		t.Logf("%s has a new certificate %s after the machine went on", what.holder, time.Since(resumed).Round(10*time.Millisecond))
	}
	m.Eventually(resumeWithin, "calls to go well", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return callEcho(ctx, m.Pod("blue"), serverAt)
	})
	t.Logf("calls go well %s after the machine went on", time.Since(resumed).Round(10*time.Millisecond))
	callsByNew(t, m, before)
	t.Logf("nobody takes an old tunnel %s after the machine went on", time.Since(resumed).Round(10*time.Millisecond))
	if err := long.ping(); err != nil {
		t.Errorf("a connection that was open before: %v", err)
	}
	if err := callEcho(t.Context(), m.Pod("stranger"), serverAt); err == nil {
		t.Error("a stranger got in")
	}
	if now := pids(m); now != running {
		t.Errorf("a process was started anew: %s, before %s", now, running)
	}
}

// suspend stops a machine and lets it go on, with the wall clock so much later.
func suspend(t *testing.T, m *harness.Mesh, by time.Duration) {
	t.Helper()
	all := []int{parentOf(t, m.Pid("control")), m.Pid("proxy")}
	for _, name := range clocks {
		all = append(all, m.Pid(name))
	}
	each := func(f func(pid int) error) {
		t.Helper()
		for _, pid := range all {
			if err := f(pid); err != nil {
				t.Fatal(err)
			}
		}
	}
	each(func(pid int) error { return syscall.Kill(pid, syscall.SIGSTOP) })
	each(func(pid int) error { return clock.Move(pid, by) })
	each(func(pid int) error { return syscall.Kill(pid, syscall.SIGCONT) })
}

// callsByNew waits until red, which had a tunnel by the certificate before, is called
// by a newer one.
func callsByNew(t *testing.T, m *harness.Mesh, before string) {
	t.Helper()
	m.Eventually(resumeWithin, "red to be called by its new certificate", func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		if err := callEcho(ctx, m.Pod("red"), serverAt); err != nil {
			return err
		}
		var newest audit.Record
		for _, r := range m.Records(adminclient.AuditQuery{}) {
			if r.Side == audit.Destination && strings.HasSuffix(r.Source.ID, "/sa/red") && r.Start.After(newest.Start) {
				newest = r
			}
		}
		if newest.Source.Serial == "" || newest.Source.Serial == before {
			return fmt.Errorf("its newest connection is by the certificate %q", newest.Source.Serial)
		}
		return nil
	})
}

// TestSuspendForMinutes: a machine sleeps for so long that its certificates are
// renewed at once when it goes on, none having expired. The tunnel that was open takes
// no new connections then; the connection that is open in it stays.
//
// What it defends: that a tunnel does not outlive, for new connections, the
// certificate that it was opened with. By the proxy's timers it is as young as before.
func TestSuspendForMinutes(t *testing.T) {
	m := rotating(t, time.Hour)
	if err := callEcho(t.Context(), m.Pod("red"), serverAt); err != nil {
		t.Fatal(err)
	}
	long := hold(t, m.Pod("red"), serverAt) // in the tunnel of the call before
	before, _ := serialOf(t, m, "shop/red")
	suspend(t, m, 40*time.Minute)
	m.Eventually(resumeWithin, "red to have a new certificate", func() error {
		if serial, problem := serialOf(t, m, "shop/red"); serial == "" || serial == before {
			return fmt.Errorf("serial %q: %s", serial, problem)
		}
		return nil
	})
	callsByNew(t, m, before)
	if err := long.ping(); err != nil {
		t.Errorf("a connection that was open before: %v", err)
	}
}

// parentOf is the parent of a process: of those of the mesh, signet up.
func parentOf(t *testing.T, pid int) int {
	t.Helper()
	status, err := os.ReadFile(fmt.Sprintf("/proc/%d/status", pid))
	if err != nil {
		t.Fatal(err)
	}
	parent := 0
	for line := range strings.Lines(string(status)) {
		if _, err := fmt.Sscanf(line, "PPid: %d", &parent); err == nil {
			return parent
		}
	}
	t.Fatalf("process %d: /proc names no parent", pid)
	return 0
}

// resumeWithin bounds how long a mesh takes after a suspend, on a busy machine.
const resumeWithin = 30 * time.Second

// clockCase is a jump and what is to be seen.
type clockCase struct {
	off   time.Duration
	moved []string
	fresh bool   // certificates made meanwhile are taken
	opens bool   // new tunnels are opened with what the proxy has then
	says  string // in the log of the mesh
}

func (c clockCase) String() string { return fmt.Sprintf("%s %s", strings.Join(c.moved, "+"), c.off) }

// TestClockJumps: the clock of a program jumps. Up to ten seconds nothing fails,
// with certificates that are made meanwhile too. By more than that a certificate
// that one side holds to be early is used by nobody, the certificates that are there
// stay, and it is said that a clock is the reason. When the clock is right again all
// is well, and nothing was started anew.
//
// What it defends: that certificates are dated back, that the agent refuses an early
// certificate and keeps the one it has, and that each refusal says why.
func TestClockJumps(t *testing.T) {
	const node, early, differ = "this node's clock is", "is before", "clock and the control plane's differ"
	cases := []clockCase{
		{10 * time.Second, []string{"control"}, true, true, ""},
		{-10 * time.Second, []string{"envoy"}, true, true, ""},
		{-5 * time.Minute, []string{"agent"}, false, true, node},
		{-5 * time.Minute, []string{"envoy"}, true, false, ""},
		{5 * time.Minute, clocks, true, true, ""},
	}
	if os.Getenv("SIGNET_TEST_LONG") != "" {
		cases = append(cases,
			clockCase{-10 * time.Second, []string{"control"}, true, true, ""},
			clockCase{10 * time.Second, []string{"agent"}, true, true, ""},
			clockCase{-10 * time.Second, []string{"agent"}, true, true, ""},
			clockCase{10 * time.Second, []string{"envoy"}, true, true, ""},
			clockCase{10 * time.Second, []string{"agent", "envoy"}, true, true, ""},
			clockCase{-10 * time.Second, []string{"agent", "envoy"}, true, true, ""},
			clockCase{5 * time.Minute, []string{"envoy"}, true, true, ""},
			clockCase{-5 * time.Minute, []string{"agent", "envoy"}, false, false, node},
			clockCase{10 * time.Second, clocks, true, true, ""},
			clockCase{-10 * time.Second, clocks, true, true, ""},
			clockCase{-5 * time.Minute, clocks, false, false, early},
			clockCase{-time.Hour, clocks, false, false, early},
			clockCase{5 * time.Minute, []string{"control"}, false, true, node},
			clockCase{-5 * time.Minute, []string{"control"}, false, true, early},
			clockCase{5 * time.Minute, []string{"agent"}, true, true, differ},
			clockCase{-time.Hour, []string{"control"}, false, true, early},
			clockCase{-time.Hour, []string{"agent"}, false, true, node},
			clockCase{-time.Hour, []string{"envoy"}, true, false, ""},
		)
	}
	for _, c := range cases {
		t.Run(c.String(), func(t *testing.T) { jump(t, c) })
	}
}

// jump tries one case.
func jump(t *testing.T, c clockCase) {
	m := rotating(t, time.Hour)
	running := pids(m)
	call := func(pod string) error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return callEcho(ctx, m.Pod(pod), serverAt)
	}
	long := hold(t, m.Pod("red"), serverAt)
	before, _ := serialOf(t, m, "shop/red")
	isFresh := func() error {
		if serial, problem := serialOf(t, m, "shop/red"); serial == before || serial == "" {
			return fmt.Errorf("serial %q: %s", serial, problem)
		}
		return nil
	}
	moveClocks(t, m, c.off, c.moved...)
	// A shorter life of certificates has all of them made anew.
	m.Write("mesh.yaml", strings.Replace(clockDocuments, ": TTL", ": 40m", 1))
	if c.says != "" {
		m.Eventually(10*time.Second, "the log to say "+c.says, func() error {
			if !strings.Contains(m.Log(), c.says) {
				return errors.New("it does not")
			}
			return nil
		})
	}
	if c.fresh {
		m.Eventually(10*time.Second, "a new certificate", isFresh)
	} else if err := isFresh(); err == nil {
		t.Error("a certificate was taken that is early for one side")
	}
	// The first of blue's calls: nobody has a tunnel for it yet.
	if err := call("blue"); (err == nil) != c.opens {
		t.Errorf("a call over a new tunnel: %v", err)
	}
	if !c.opens {
		m.Eventually(10*time.Second, "the audit to say why", func() error {
			var said []string
			for _, r := range m.Records(adminclient.AuditQuery{}) {
				if said = append(said, r.Reason); strings.Contains(r.Reason, "CERTIFICATE_VERIFY_FAILED") {
					t.Logf("the audit says: %s", r.Reason)
					return nil
				}
			}
			return fmt.Errorf("it says %q", said)
		})
	}
	if err := call("stranger"); err == nil {
		t.Error("a stranger got in")
	}
	if err := long.ping(); err != nil {
		t.Errorf("a connection that was open: %v", err)
	}
	moveClocks(t, m, 0)
	right := time.Now()
	if c.fresh && c.off > 10*time.Second && slices.Contains(c.moved, "control") {
		// Those that were made meanwhile are early now, and of use in tunnels only
		// that were opened meanwhile.
		before, _ = serialOf(t, m, "shop/red")
		m.Write("mesh.yaml", strings.Replace(clockDocuments, ": TTL", ": 30m", 1))
	}
	m.Eventually(resumeWithin, "a new certificate with right clocks", isFresh)
	for _, pod := range []string{"red", "blue"} {
		m.Eventually(resumeWithin, pod+" to be served with right clocks", func() error { return call(pod) })
	}
	t.Logf("all is well %s after the clock was right", time.Since(right).Round(10*time.Millisecond))
	if now := pids(m); now != running {
		t.Errorf("a process was started anew: %s, before %s", now, running)
	}
}

// clockDocuments are those of rotating, with TTL for the life of certificates.
var clockDocuments = harness.Config("TTL") + harness.Namespace("shop", "enforce") +
	harness.Workload("shop", "red", "10.88.0.10") + harness.Workload("shop", "blue", "10.88.0.11") +
	harness.Workload("shop", "server", "10.88.0.12") +
	harness.Allow("shop", "allow", "server", []int{8080}, "red", "blue")
