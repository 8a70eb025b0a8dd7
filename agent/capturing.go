package agent

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"maps"
	"os"
	"sync"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/internal/mesh"
)

// capturing keeps the rules in every captured namespace as they must be, and
// remembers what it saw when it last looked.
type capturing struct {
	mu      sync.Mutex
	applied map[string]bool   // guarded by mu; namespaces with our rules
	seen    map[string]string // guarded by mu; workload -> problem, "" is captured
	proxy   uint64            // guarded by mu; the relay's generation when that was seen
}

// lookEvery is how often the kernel's rules are read back.
const lookEvery = 500 * time.Millisecond

// capture runs until ctx ends. Rules stay in place then: a restart of the
// agent must not open what is closed.
func (a *agent) capture(ctx context.Context) {
	tick := time.NewTicker(lookEvery)
	defer tick.Stop()
	for {
		a.mu.Lock()
		s := a.state
		a.mu.Unlock()
		if s != nil {
			a.look(s)
			a.report(ctx, s)
		}
		select {
		case <-ctx.Done():
			return
		case <-a.poke:
		case <-tick.C:
		}
	}
}

// look compares every namespace with the state and repairs what differs.
func (a *agent) look(s *nodeState) {
	present := map[string]uint64{}
	seen := map[string]string{}
	wanted := map[string]bool{}
	for i := range s.workloads {
		w := &s.workloads[i]
		if w.Capture == nil {
			continue
		}
		wanted[w.Capture.NetNS] = true
		inode, err := namespaceID(w.Capture.NetNS)
		if err != nil {
			seen[w.Key()] = err.Error()
			continue
		}
		present[w.Capture.NetNS] = inode
		seen[w.Key()] = a.hold(w)
	}
	a.relay.SetNamespaces(present)
	proxy := a.relay.Generation() // before looking at it
	connected, current, refused := a.relay.Proxy()
	a.plain.look(s, current && a.relay.Version() == s.xdsVersion, time.Now())
	for key, problem := range seen {
		switch {
		case problem != "":
		case refused != "":
			seen[key] = "the proxy refused its configuration: " + refused
		case !connected:
			seen[key] = "the proxy is not connected"
		default:
			seen[key] = listening(s.workload(key))
		}
	}

	a.rules.mu.Lock()
	defer a.rules.mu.Unlock()
	for netns := range a.rules.applied {
		if wanted[netns] {
			continue
		}
		if err := capture.Remove(netns); err != nil && !errors.Is(err, fs.ErrNotExist) {
			a.log.Error("releasing a network namespace", "netns", netns, "error", err)
			continue
		}
		a.log.Info("network namespace released", "netns", netns)
		delete(a.rules.applied, netns)
	}
	a.rules.seen, a.rules.proxy = seen, proxy
}

// hold puts one namespace's rules in place if they are not, and returns what
// is wrong, "" if nothing is.
func (a *agent) hold(w *mesh.Workload) string {
	netns := w.Capture.NetNS
	err := capture.Verify(netns)
	if err != nil {
		a.rules.mu.Lock()
		again := a.rules.applied[netns]
		a.rules.mu.Unlock()
		if again {
			a.log.Warn("capture rules were not in place and are repaired", "netns", netns, "found", err)
		}
		if err := capture.Apply(netns); err != nil {
			return "capture rules: " + err.Error()
		}
		if err := capture.Verify(netns); err != nil {
			return "capture rules: " + err.Error()
		}
		if n, err := capture.ResetEstablished(netns); err != nil {
			a.log.Warn("connections from before the capture could not be ended", "netns", netns, "error", err)
		} else if n > 0 {
			a.log.Info("connections from before the capture were ended", "netns", netns, "count", n)
		}
	}
	a.rules.mu.Lock()
	a.rules.applied[netns] = true
	a.rules.mu.Unlock()
	return ""
}

// listening says whether the proxy's three listeners are really there.
func listening(w *mesh.Workload) string {
	sockets, err := capture.Listeners(w.Capture.NetNS)
	if err != nil {
		return err.Error()
	}
	missing := map[uint16]bool{mesh.PortOutbound: true, mesh.PortInbound: true, mesh.PortTunnel: true}
	for _, s := range sockets {
		delete(missing, s.Local.Port())
	}
	for port := range maps.Keys(missing) {
		return fmt.Sprintf("the proxy does not listen on port %d yet", port)
	}
	return ""
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
