package e2e

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"sync"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// faultMesh is a mesh under load: allowed clients, denied clients, callers
// without an identity, and long streams.
type faultMesh struct {
	*harness.Mesh
	t       *testing.T
	traffic *traffic
	vault   atomic.Int64 // connections that reached a workload that admits nobody
	mute    bool         // a proxy was killed: see traffic.breaches
	started time.Time    // when the supervisor last restarted something
	end     func()       // stops the load and waits for it
}

// The addresses that the load dials.
const (
	faultService = "10.96.0.1:80"
	faultServer  = "10.88.0.12:8080"
	faultVault   = "10.88.0.13:8080"
	streamCount  = 20
	settledLife  = 10 * time.Second
)

func faultDocuments() map[string]string {
	return map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
		harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "other", "10.88.0.11") +
		harness.Workload("shop", "server", "10.88.0.12") + harness.Workload("shop", "vault", "10.88.0.13") +
		harness.Workload("shop", "friend", "10.88.0.14") +
		harness.Service("shop", "server", "10.96.0.1", 80, 8080, "server") +
		harness.Allow("shop", "allow-client", "server", []int{8080}, "client")}
}

// killAgent kills the agent and waits for the next one.
func killAgent(t *testing.T, m *harness.Mesh) {
	t.Helper()
	before := m.Pid("agent")
	m.Kill("agent")
	m.Eventually(30*time.Second, "another agent", func() error {
		if _, err := m.Client.AgentStatus(t.Context()); err != nil || m.Pid("agent") == before {
			return fmt.Errorf("not yet: %w", err)
		}
		return nil
	})
}

// startFaultMesh starts a mesh and its load. The canary is looked for on the
// wire from the first packet on.
func startFaultMesh(t *testing.T) *faultMesh {
	t.Helper()
	l, err := lab.New(lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	sniff(t, l)
	f := &faultMesh{t: t, traffic: &traffic{}}
	f.Mesh = harness.Start(t, harness.Options{
		Lab: l, Documents: faultDocuments(),
		Pods: map[string]string{
			"client": "10.88.0.10", "other": "10.88.0.11", "server": "10.88.0.12",
			"vault": "10.88.0.13", "friend": "10.88.0.14", "stranger": "10.88.0.99",
		},
	})
	serve(t, f.Pod("server"), ":8080", f.traffic.serve)
	serve(t, f.Pod("vault"), ":8080", func(net.Conn) { f.vault.Add(1) })
	f.load()
	return f
}

// load runs until f.end is called.
func (f *faultMesh) load() {
	ctx, cancel := context.WithCancel(context.Background())
	var wg sync.WaitGroup
	one := func(pod, kind string, class byte, addr string) func() {
		p := f.Pod(pod)
		return func() { f.traffic.exchange(ctx, p, kind, class, addr, 100, 200) }
	}
	every(ctx, &wg, 150, 16, one("client", "allowed", classShort, faultService))
	every(ctx, &wg, 150, 16, one("client", "allowed", classShort, faultServer))
	every(ctx, &wg, 150, 16, one("other", "denied", classWrong, faultService))
	every(ctx, &wg, 75, 8, one("other", "denied", classWrong, faultVault))
	every(ctx, &wg, 75, 8, one("client", "denied", classWrong, faultVault))
	every(ctx, &wg, 50, 8, one("stranger", "plaintext", classPlain, faultServer))
	for range streamCount {
		wg.Go(func() { f.traffic.stream(ctx, f.Pod("client"), faultServer) })
	}
	var once sync.Once
	f.end = func() { once.Do(func() { cancel(); wg.Wait() }) }
	f.t.Cleanup(f.end)
}

// whole reports what keeps the mesh from being whole.
func (f *faultMesh) whole() error {
	c, err := f.Client.ControlStatus(f.t.Context())
	if err != nil {
		return err
	}
	s, err := f.Client.AgentStatus(f.t.Context())
	switch {
	case err != nil:
		return err
	case !s.ControlConnected || !s.ProxyConnected:
		return fmt.Errorf("agent: control connected %t, proxy connected %t", s.ControlConnected, s.ProxyConnected)
	case s.Revision != c.Revision || c.Revision == "":
		return fmt.Errorf("agent at revision %q, control at %q", s.Revision, c.Revision)
	case len(s.Workloads) != 5:
		return fmt.Errorf("%d workloads, want 5", len(s.Workloads))
	}
	for _, w := range s.Workloads {
		if !w.Captured {
			return fmt.Errorf("%s is not captured: %s", w.Workload, w.Problem)
		}
	}
	return nil
}

// try makes one attempt of friend, whom only edits admit.
func (f *faultMesh) try() error {
	return f.traffic.exchange(f.t.Context(), f.Pod("friend"), "friend", classShort, faultServer, 100, 200).err
}

// edits shows that edits are in force: a grant admits, and its removal ends that.
// It returns how long the grant took from the write on.
func (f *faultMesh) edits() time.Duration {
	f.t.Helper()
	if f.try() == nil {
		f.t.Error("friend was admitted without a policy")
	}
	began := time.Now()
	f.Edit("friend.yaml", harness.Allow("shop", "allow-friend", "server", []int{8080}, "friend"))
	f.Eventually(30*time.Second, "friend to be admitted", f.try)
	took := time.Since(began)
	f.Edit("friend.yaml", "")
	f.Eventually(30*time.Second, "friend to be refused", func() error {
		if f.try() == nil {
			return errors.New("friend is still admitted")
		}
		return nil
	})
	return took
}

// checkNothingOpened fails the test if anything denied was served: by what
// the servers saw, and by what the denied clients received.
func (f *faultMesh) checkNothingOpened() {
	f.t.Helper()
	if b := f.traffic.breaches(f.mute); len(b) > 0 {
		f.t.Errorf("the server saw %d connections that it must not have seen; the first: %+v", len(b), b[0])
	}
	if n := f.vault.Load(); n > 0 {
		f.t.Errorf("%d connections reached a workload that admits nobody", n)
	}
	for _, kind := range []string{"denied", "plaintext"} {
		for _, a := range f.traffic.between(kind, time.Time{}, time.Now()) {
			if a.err == nil || a.received > 0 {
				f.t.Errorf("%s: %+v was answered", kind, a)
			}
		}
	}
}

// fault is what was measured of one kind of kill, the worst of its repetitions.
type fault struct {
	what                  string
	names                 []string
	times                 int
	allowed, failed       int
	streams               int
	denied, admitted      int
	outage, stall         time.Duration
	running, whole, edits time.Duration
}

// row is the fault as a line of the table in docs/failures.md.
func (r fault) row() string {
	ms := func(d time.Duration) string { return fmt.Sprintf("%.2f s", d.Seconds()) }
	outage := "-"
	if r.failed > 0 {
		outage = ms(r.outage)
	}
	return fmt.Sprintf("| %s | %d | %d of %d | %s | %d of %d | %s | %d of %d | %s | %s | %s |",
		r.what, r.times, r.failed, r.allowed, outage, r.streams, r.times*streamCount, ms(r.stall),
		r.admitted, r.denied, ms(r.running), ms(r.whole), ms(r.edits))
}

// kill kills the processes of r, waits for all to be whole again, and adds what was
// measured to r.
func (f *faultMesh) kill(r *fault) {
	f.t.Helper()
	// The supervisor waits longer for a process that dies again within 10 s.
	time.Sleep(time.Until(f.started.Add(settledLife)))
	before := map[string]int{}
	for _, n := range r.names {
		before[n] = f.Pid(n)
	}
	began := time.Now()
	for _, n := range r.names {
		f.Kill(n)
	}
	f.Eventually(30*time.Second, "the supervisor to start them again", func() error {
		for n, pid := range before {
			if f.Pid(n) == pid {
				return fmt.Errorf("%s still has process id %d", n, pid)
			}
		}
		return nil
	})
	r.running = max(r.running, time.Since(began))
	f.started = time.Now()
	f.Eventually(60*time.Second, "the mesh to be whole", f.whole)
	r.whole = max(r.whole, time.Since(began))
	r.edits = max(r.edits, f.edits())
	time.Sleep(time.Second)
	ended := time.Now()

	r.times++
	var first, last time.Time
	for _, a := range f.traffic.between("allowed", began, ended) {
		r.allowed++
		if a.err == nil {
			continue
		}
		r.failed++
		if first.IsZero() || a.begin.Before(first) {
			first = a.begin
		}
		if a.end.After(last) {
			last = a.end
		}
	}
	r.outage = max(r.outage, last.Sub(first))
	for _, a := range f.traffic.between("stream", began, ended) {
		if a.err != nil && a.begin.Before(began) {
			r.streams++
		}
	}
	r.stall = max(r.stall, f.traffic.longestStall(began, ended))
	for _, kind := range []string{"denied", "plaintext"} {
		for _, a := range f.traffic.between(kind, began, ended) {
			r.denied++
			if a.err == nil || a.received > 0 {
				r.admitted++
			}
		}
	}
}

// TestKillUnderLoad kills each process, and several at once, with kill -9
// while hundreds of connections a second run, and measures what fails and for
// how long. Without the agent's state on disk, the relay's own copy of the
// configuration, or the capture rules that outlive the processes, rows of the
// table would show failures, or denied connections that were admitted.
func TestKillUnderLoad(t *testing.T) {
	f := startFaultMesh(t)
	f.mute = true
	f.Eventually(30*time.Second, "the mesh to be whole", f.whole)
	time.Sleep(2 * time.Second)
	began := time.Now()
	time.Sleep(3 * time.Second)
	for _, kind := range []string{"allowed", "denied", "plaintext"} {
		n := len(f.traffic.between(kind, began, time.Now()))
		t.Logf("load: %s: %.0f a second", kind, float64(n)/time.Since(began).Seconds())
	}
	faults := []*fault{
		{what: "control plane", names: []string{"control"}},
		{what: "agent", names: []string{"agent"}},
		{what: "Envoy", names: []string{"envoy"}},
		{what: "all three", names: []string{"control", "agent", "envoy"}},
	}
	for range 3 {
		for _, r := range faults {
			f.kill(r)
		}
	}
	var rows []string
	for _, r := range faults {
		rows = append(rows, r.row())
		proxy := slices.Contains(r.names, "envoy")
		if !proxy && (r.failed > 0 || r.streams > 0) {
			t.Errorf("%s: %d connections failed and %d streams broke; want none", r.what, r.failed, r.streams)
		}
		if proxy && r.streams != r.times*streamCount {
			t.Errorf("%s: %d streams broke, want all %d", r.what, r.streams, r.times*streamCount)
		}
	}
	f.end()
	f.checkNothingOpened()
	t.Logf("worst of 3 each:\n%s", strings.Join(rows, "\n"))
}

// TestNodeWithoutControlPlane: the control plane is away for long, and the
// agent and the proxy are killed meanwhile. The node comes back on what it has
// on disk, and enforces the last known policies. Without the state file the
// agent would wait for the control plane with no certificates and no policies;
// without the relay's copy the new proxy would have no listeners.
func TestNodeWithoutControlPlane(t *testing.T) {
	f := startFaultMesh(t)
	f.mute = true
	f.Eventually(30*time.Second, "the mesh to be whole", f.whole)
	// A control plane without documents does not start.
	away := f.Dir + ".away"
	if err := os.Rename(f.Dir, away); err != nil {
		t.Fatal(err)
	}
	f.Kill("control")
	f.Eventually(30*time.Second, "the agent to notice", func() error {
		if s, err := f.Client.AgentStatus(t.Context()); err != nil || s.ControlConnected {
			return fmt.Errorf("control connected %t, %w", s.ControlConnected, err)
		}
		return nil
	})
	// local is the mesh being whole but for the control plane.
	local := func() error {
		s, err := f.Client.AgentStatus(t.Context())
		if err != nil {
			return err
		}
		for _, w := range s.Workloads {
			if !w.Captured {
				return fmt.Errorf("%s: %s", w.Workload, w.Problem)
			}
		}
		if len(s.Workloads) != 5 || !s.ProxyConnected || s.ControlConnected {
			return fmt.Errorf("%d workloads, proxy connected %t, control connected %t", len(s.Workloads), s.ProxyConnected, s.ControlConnected)
		}
		return nil
	}
	for _, names := range [][]string{{"agent"}, {"envoy"}, {"agent", "envoy"}} {
		before, began := map[string]int{}, time.Now()
		for _, n := range names {
			before[n] = f.Pid(n)
			f.Kill(n)
		}
		f.Eventually(60*time.Second, "the node to be back without the control plane", func() error {
			for n, pid := range before {
				if f.Pid(n) == pid {
					return errors.New(n + " is not back")
				}
			}
			return local()
		})
		back := time.Now()
		time.Sleep(2 * time.Second)
		failed, good := 0, 0
		for _, a := range f.traffic.between("allowed", began, back) {
			if a.err != nil {
				failed++
			}
		}
		for _, a := range f.traffic.between("allowed", back, time.Now()) {
			switch {
			case a.err == nil:
				good++
			case a.begin.After(back):
				t.Errorf("with the control plane away and %v restarted: %v", names, a.err)
			}
		}
		if good < 100 {
			t.Errorf("with the control plane away and %v restarted, only %d connections in 2 s", names, good)
		}
		if slices.Equal(names, []string{"agent"}) && failed > 0 {
			t.Errorf("%d connections failed while the agent restarted; want none", failed)
		}
		t.Logf("control plane away, %v killed: back after %.2f s, %d connections failed meanwhile", names, back.Sub(began).Seconds(), failed)
	}
	if f.try() == nil {
		t.Error("friend was admitted while the control plane was away")
	}
	if err := os.Rename(away, f.Dir); err != nil {
		t.Fatal(err)
	}
	f.Eventually(60*time.Second, "the mesh to be whole", f.whole)
	f.edits()
	f.end()
	f.checkNothingOpened()
}

// TestSupervisorKilled: kill -9 of `signet up` ends the whole tree, and opens
// nothing: every connection is refused until another `signet up` on the same
// directories takes over. Without Pdeathsig orphans would go on with no one to
// restart them; without rules that outlive the processes the workloads would
// talk in plain.
func TestSupervisorKilled(t *testing.T) {
	f := startFaultMesh(t)
	f.mute = true
	f.Eventually(30*time.Second, "the mesh to be whole", f.whole)
	time.Sleep(time.Second)
	pids := map[string]int{}
	for _, n := range []string{"control", "agent", "envoy"} {
		pids[n] = f.Pid(n)
	}
	up := parent(t, pids["agent"])
	began := time.Now()
	if err := syscall.Kill(up, syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	f.Eventually(30*time.Second, "the processes to end with their supervisor", func() error {
		for n, pid := range pids {
			if alive(pid) {
				return fmt.Errorf("%s (%d) is still there", n, pid)
			}
		}
		return nil
	})
	gone := time.Now()
	t.Logf("kill -9 of signet up: all gone after %.3f s", gone.Sub(began).Seconds())
	time.Sleep(3 * time.Second)
	dead := time.Now()
	refused := 0
	for _, kind := range []string{"allowed", "denied", "plaintext"} {
		for _, a := range f.traffic.between(kind, gone, dead) {
			if a.begin.Before(gone) {
				continue
			}
			if a.err == nil || a.received > 0 {
				t.Errorf("%s: answered while no mesh ran: %+v", kind, a)
			} else if errors.Is(a.err, syscall.ECONNREFUSED) {
				refused++
			}
		}
	}
	if refused < 100 {
		t.Errorf("only %d connections were refused while no mesh ran", refused)
	}
	// Nobody but the kernel is there to close them: they must be, for data
	// in them would be lost in silence.
	for _, a := range f.traffic.between("stream", began, dead) {
		if a.err == nil {
			t.Errorf("a stream outlived the proxy: %+v", a)
		}
	}

	f.Mesh = harness.Start(t, harness.Options{Lab: f.Lab, Dir: filepath.Dir(f.Dir)})
	f.Eventually(60*time.Second, "the new mesh to be whole", f.whole)
	back := time.Now()
	time.Sleep(2 * time.Second)
	good := 0
	for _, a := range f.traffic.between("allowed", back, time.Now()) {
		if a.err == nil {
			good++
		} else if a.begin.After(back) {
			t.Errorf("after the new start: %v", a.err)
		}
	}
	if good < 100 {
		t.Errorf("only %d connections in 2 s after the new start", good)
	}
	f.edits()
	f.end()
	f.checkNothingOpened()
	t.Logf("kill -9 of signet up: %d connections refused meanwhile, a new signet up is whole %.2f s after its start", refused, back.Sub(dead).Seconds())
}

// parent returns the id of a process's parent.
func parent(t *testing.T, pid int) int {
	t.Helper()
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		t.Fatal(err)
	}
	// The name, in parentheses, may hold anything.
	fields := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	ppid, err := strconv.Atoi(fields[1])
	if err != nil || ppid < 2 {
		t.Fatalf("parent of %d: %q, %v", pid, fields, err)
	}
	return ppid
}

// alive reports whether a process runs; one that only waits to be reaped does not.
func alive(pid int) bool {
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
	if err != nil {
		return false
	}
	rest := strings.Fields(string(b[strings.LastIndexByte(string(b), ')')+1:]))
	return rest[0] != "Z" && rest[0] != "X"
}
