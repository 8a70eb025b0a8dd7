package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/xds"
)

// capturing keeps the rules in every captured namespace as they must be, and
// remembers what it saw when it last looked.
type capturing struct {
	// work is held while rules are written: what looks at the pods by an older
	// state must not put back what a newer one has taken away.
	work   sync.Mutex
	target *nodeState // guarded by work; the state that rules are written by

	mu      sync.Mutex
	applied map[string]ruled // guarded by mu; namespaces with our rules
	// originals are the settings from before in these namespaces.
	originals map[string]capture.Originals // guarded by mu
	repaired  map[string]time.Time         // guarded by mu; by pod UID; when rules that somebody changed were written again
	seen      map[string]string            // guarded by mu; workload -> problem, "" is captured
	pods      map[string]sight             // guarded by mu; the same by pod UID
	proxy     uint64                       // guarded by mu; the relay's generation when that was seen
	looked    *nodeState                   // guarded by mu; what was compared with then
}

// ruleState is which of our rules a namespace has.
type ruleState uint8

const (
	noRules   ruleState = iota
	captures            // those of package capture
	leftovers           // it has left the mesh, and the proxy has connections of it
)

// ruled is a namespace with rules of ours.
type ruled struct {
	state ruleState
	// home is the namespace of its workload; empty when that is not known.
	home string
	// keepsOpen: connections from before the capture go on.
	keepsOpen bool
}

func (c *capturing) get(netns string) ruleState {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.applied[netns].state
}

// sight is what was seen of one pod.
type sight struct {
	began   time.Time // of the look
	inode   uint64    // of its network namespace
	problem string
}

// problem says what is wrong with a pod in a network namespace, by a look that
// began after an instant; "" if nothing is.
func (c *capturing) problem(uid string, inode uint64, since time.Time) string {
	c.mu.Lock()
	defer c.mu.Unlock()
	switch s, ok := c.pods[uid]; {
	case !ok || s.began.Before(since):
		return "not looked at yet"
	case s.problem == "" && s.inode != inode:
		return "another network namespace of the pod is captured"
	default:
		return s.problem
	}
}

// begin makes a state the one that rules are written by.
func (c *capturing) begin(s *nodeState) {
	c.work.Lock()
	defer c.work.Unlock()
	c.target = s
}

// by reports whether the last look was by this very state.
func (c *capturing) by(s *nodeState) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.looked == s
}

// lookEvery is how often the kernel's rules are read back.
const lookEvery = 500 * time.Millisecond

// capture runs until ctx ends. Rules stay in place then: a restart of the
// agent must not open what is closed.
func (a *agent) capture(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	wait := lookForListeners
	for {
		var soon <-chan time.Time
		if s := a.place(ctx); s != nil && a.look(ctx, s) {
			soon = time.After(wait)
			wait = min(2*wait, lookEvery)
		} else {
			wait = lookForListeners
		}
		select {
		case <-ctx.Done():
			return
		case <-a.poke:
		case <-soon:
		case <-tick.C:
		}
	}
}

// lookForListeners is how soon it is looked again whether the proxy listens in
// a pod that is to be captured then.
const lookForListeners = 20 * time.Millisecond

// look compares every namespace with the state and repairs what differs. It
// reports whether a pod waits for the proxy to listen in it.
func (a *agent) look(ctx context.Context, s *nodeState) (waits bool) {
	began := time.Now()
	present := map[string]uint64{}
	seen := map[string]string{}
	for i := range s.workloads {
		w := &s.workloads[i]
		if w.Capture == nil {
			continue
		}
		if w.Capture.NetNS == "" {
			seen[w.Key()] = a.pods.absent(w.UID)
			continue
		}
		inode, err := namespaceID(w.Capture.NetNS)
		if err != nil {
			seen[w.Key()] = err.Error()
			continue
		}
		present[w.Capture.NetNS] = inode
		if why := a.early(s, w); why != "" {
			seen[w.Key()], waits = why, true
			continue
		}
		seen[w.Key()] = a.hold(s, w)
	}
	a.probes.look(ctx, s.workloads)
	a.relay.SetNamespaces(present)
	proxy := a.relay.Generation() // before looking at it
	connected, settled, refused := a.proxy(s)
	a.plain.look(s, settled, time.Now())
	for key, problem := range seen {
		switch {
		case problem != "":
		case refused != "":
			seen[key] = "the proxy refused its configuration: " + refused
		case !connected:
			seen[key] = "the proxy is not connected"
		default:
			seen[key] = a.listening(s.workload(key))
		}
	}

	a.letGo(s)
	a.rules.mu.Lock()
	defer a.rules.mu.Unlock()
	a.pods.release(s, func(path string) bool { return a.rules.applied[path].state != noRules })
	a.rules.seen, a.rules.proxy, a.rules.looked = seen, proxy, s
	a.rules.pods = map[string]sight{}
	for i := range s.workloads {
		if w := &s.workloads[i]; w.UID != "" && w.Capture != nil {
			a.rules.pods[w.UID] = sight{began: began, inode: present[w.Capture.NetNS], problem: seen[w.Key()]}
		}
	}
	return waits
}

// early says why a pod is not captured yet; "" if it is, or is to be. One that
// runs already and observes keeps its connections to the outside until the proxy
// can take them. Where the namespace enforces, closed comes before open.
func (a *agent) early(s *nodeState, w *mesh.Workload) string {
	if s.modes[w.Namespace] != mesh.ModeObserve || a.rules.get(w.Capture.NetNS) == captures {
		return ""
	}
	return a.listening(w)
}

// letGo takes the rules out of the namespaces that have left the mesh. It is
// done before the proxy is told to listen there no more: what is still
// redirected finds a listener. It reports whether one has left just now.
func (a *agent) letGo(s *nodeState) (left bool) {
	wanted := map[string]bool{}
	for i := range s.workloads {
		if w := &s.workloads[i]; w.Capture != nil {
			wanted[w.Capture.NetNS] = true
			if a.pods != nil { // also one whose namespace cannot be looked at now
				wanted[filepath.Join(PinDir(a.cfg.RunDir), w.UID)] = true
			}
		}
	}
	a.rules.work.Lock()
	defer a.rules.work.Unlock()
	if a.rules.target != s {
		return false
	}
	a.rules.mu.Lock()
	defer a.rules.mu.Unlock()
	for netns, has := range a.rules.applied {
		if wanted[netns] {
			continue
		}
		var open int
		var err error
		if has.home != "" && s.enrolled[has.home] { // not the namespace left, but the pod is gone
			err = capture.Remove(netns)
		} else {
			open, err = capture.Leave(netns)
		}
		switch {
		case err != nil && !errors.Is(err, fs.ErrNotExist):
			a.log.Error("releasing a network namespace", "netns", netns, "error", err)
		case open > 0:
			if has.state == captures {
				left = true
				a.log.Info("network namespace released; the proxy keeps what is open", "netns", netns, "connections", open)
			}
			a.rules.applied[netns] = ruled{state: leftovers, home: has.home}
		default:
			a.log.Info("network namespace released", "netns", netns)
			delete(a.rules.applied, netns)
			delete(a.rules.originals, netns)
		}
	}
	return left
}

// acceptTime is how long a proxy may take to accept a connection.
const acceptTime = 100 * time.Millisecond

// place puts the newest state where its pods are, and gives the proxy what
// follows from that. It returns nil while there is no state.
func (a *agent) place(ctx context.Context) *nodeState {
	a.giving.Lock()
	defer a.giving.Unlock()
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	if s == nil {
		return nil
	}
	if a.pods != nil {
		if places := a.pods.place(ctx, s.workloads); !samePlaces(places, s.workloads) {
			moved := *s
			moved.workloads = places
			s = &moved
			a.mu.Lock()
			a.state = s
			a.mu.Unlock()
			a.live.update(s)
		}
	}
	a.give(s)
	return s
}

// give builds what follows from a state for the proxy, unless that was the last
// it was given. giving is held.
func (a *agent) give(s *nodeState) {
	if a.given == s {
		return
	}
	a.rules.begin(s)
	set, err := a.local(s)
	if err != nil {
		a.log.Error("building the proxy's configuration; it keeps what it has", "error", err)
		return
	}
	if a.letGo(s) {
		// What was redirected a moment ago is to be accepted before the listener
		// goes: the kernel resets what still waits for it then.
		time.Sleep(acceptTime)
	}
	a.relay.SetLocal(set)
	a.given = s
}

// local builds what the proxy needs for a state. giving is held.
func (a *agent) local(s *nodeState) (xds.Set, error) {
	return xds.Local(s.view(), a.cfg.Node, xds.Options{AccessLog: a.accessLog(), IPv6: a.ipv6, Tunnels: a.tunnels})
}

func (a *agent) accessLog() string {
	if a.cfg.NoAudit {
		return ""
	}
	return xds.AuditPipe
}

// wake makes the agent look again now.
func (a *agent) wake() {
	select {
	case a.poke <- struct{}{}:
	default:
	}
}

// hold puts one namespace's rules in place if they are not, and returns what
// is wrong, "" if nothing is. Connections from before are ended as soon as the
// namespace enforces, or a quarantine is to cut the workload off.
func (a *agent) hold(s *nodeState, w *mesh.Workload) string {
	a.rules.work.Lock()
	defer a.rules.work.Unlock()
	if a.rules.target != s {
		return "not looked at yet: a newer state has come"
	}
	netns := w.Capture.NetNS
	_, caller := s.model.Quarantined(w.ID)
	_, target := s.model.QuarantinedTarget(authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount})
	now := ruled{state: captures, home: w.Namespace, keepsOpen: s.modes[w.Namespace] == mesh.ModeObserve && !caller && !target}
	a.rules.mu.Lock()
	originals, known := a.rules.originals[netns]
	a.rules.mu.Unlock()
	o := capture.Options{Probes: w.Capture.Probes, KeepOpen: now.keepsOpen, Originals: originals}
	err := capture.Verify(netns, o)
	known = known && err == nil
	if err != nil {
		a.rules.mu.Lock()
		again := a.rules.applied[netns] == now
		a.rules.mu.Unlock()
		if again {
			a.log.Warn("capture rules were not in place and are repaired", "netns", netns, "found", err)
			a.rules.mu.Lock()
			a.rules.repaired[w.UID] = time.Now()
			a.rules.mu.Unlock()
		}
		if err := capture.Apply(netns, o); err != nil {
			return "capture rules: " + err.Error()
		}
		if err := capture.Verify(netns, o); err != nil {
			return "capture rules: " + err.Error()
		}
		if !o.KeepOpen {
			n, err := capture.ResetEstablished(netns)
			if err != nil {
				a.log.Warn("connections from before the capture could not be ended", "netns", netns, "error", err)
			} else if n > 0 {
				a.log.Info("connections from before the capture were ended", "netns", netns, "count", n)
			}
		}
	}
	if !known {
		if originals, err = capture.OriginalsOf(netns); err != nil {
			a.log.Warn("the settings from before the capture could not be read", "netns", netns, "error", err)
		}
	}
	a.rules.mu.Lock()
	a.rules.applied[netns], a.rules.originals[netns] = now, originals
	a.rules.mu.Unlock()
	return ""
}

// listening says whether the proxy's three listeners are really there, on IPv6
// too where the workload has such an address.
func (a *agent) listening(w *mesh.Workload) string {
	sockets, err := capture.Listeners(w.Capture.NetNS)
	if err != nil {
		return err.Error()
	}
	wrong := missing(sockets, a.ipv6 && slices.ContainsFunc(w.Capture.Addrs, netip.Addr.Is6))
	if why, lacks := a.svids.Missing()[w.ID]; lacks && wrong != "" { // without which it does not
		wrong += ": there is no certificate yet"
		if why != "" {
			wrong += ": " + why
		}
	}
	return wrong
}

// missing names one of the proxy's listeners that is not among the sockets, ""
// if there is none.
func missing(listeners []capture.Socket, six bool) string {
	on := func(addr netip.Addr, port uint16) bool {
		return slices.ContainsFunc(listeners, func(s capture.Socket) bool { return s.Local == netip.AddrPortFrom(addr, port) })
	}
	for _, port := range []uint16{mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel} {
		switch {
		case !on(netip.IPv4Unspecified(), port):
			return fmt.Sprintf("the proxy does not listen on port %d yet", port)
		case six && !on(netip.IPv6Unspecified(), port):
			return fmt.Sprintf("the proxy does not listen on port %d of IPv6 yet", port)
		}
	}
	return ""
}

// hasIPv6 reports whether the machine's kernel has IPv6.
func hasIPv6() bool {
	fd, err := unix.Socket(unix.AF_INET6, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return false
	}
	_ = unix.Close(fd) // nothing was done with it
	return true
}

// namespaceID returns what tells one network namespace from the next at the
// same path.
func namespaceID(path string) (uint64, error) {
	info, err := os.Stat(path)
	if errors.Is(err, fs.ErrNotExist) {
		return 0, fmt.Errorf("network namespace %s does not exist", path)
	}
	if err != nil {
		return 0, err
	}
	st, ok := info.Sys().(*syscall.Stat_t)
	if !ok || st.Ino == 0 {
		return 0, fmt.Errorf("%s: no inode number", path)
	}
	return st.Ino, nil
}
