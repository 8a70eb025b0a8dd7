package agent

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/agent/cni"
	"github.com/signet-mesh/signet/agent/netns"
	"github.com/signet-mesh/signet/internal/mesh"
)

// PinDir is where pods' network namespaces are pinned, by pod UID. The proxy
// sees them under the same path.
func PinDir(run string) string { return filepath.Join(run, "netns") }

// pods knows where this node's pods are: in which network namespace, with
// which addresses. A nil pods knows of none: declared workloads name their
// namespaces themselves.
type pods struct {
	log   *slog.Logger
	store *netns.Store
	procs netns.Procfs

	mu      sync.Mutex
	scanned time.Time         // guarded by mu
	missing map[string]string // guarded by mu; UID -> why its namespace is not known
}

// scanEvery is how often processes are looked through for pods that have no
// pinned namespace. For one that had it until now they are at once: the proxy
// would be told to leave it.
const scanEvery = 2 * time.Second

// openPods takes up what is pinned below the run directory.
func openPods(run string, log *slog.Logger) (*pods, error) {
	const host = "/proc/1/ns/net"
	if err := netns.EnsureShared(PinDir(run)); err != nil {
		return nil, err
	}
	store, err := netns.Open(PinDir(run), host)
	if err != nil {
		return nil, err
	}
	root, err := netns.OwnCgroupRoot("/proc")
	if err != nil {
		return nil, err
	}
	return &pods{
		log: log, store: store, missing: map[string]string{},
		procs: netns.Procfs{Proc: "/proc", CgroupRoot: root, Host: host},
	}, nil
}

// place fills in, for the workloads that are pods, what only this node knows.
// A pod whose namespace is not known keeps none, so nothing is built for it.
func (p *pods) place(ctx context.Context, workloads []mesh.Workload) []mesh.Workload {
	out := slices.Clone(workloads)
	if p == nil {
		return out
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	var scan *netns.Scan
	now := time.Now()
	missing := map[string]string{}
	for i := range out {
		w := &out[i]
		if w.UID == "" || w.Capture == nil {
			continue
		}
		lost := w.Capture.NetNS != "" // if there is no pin: a moment ago there was one
		c := &mesh.Capture{Probes: w.Capture.Probes}
		w.Capture = c
		pin, err := p.store.Get(w.UID)
		if errors.Is(err, netns.ErrNotPinned) {
			if scan == nil && (lost || now.Sub(p.scanned) >= scanEvery) {
				p.scanned = now
				if scan, err = p.procs.Scan(ctx); err != nil {
					p.log.Error("looking for pods among the processes", "error", err)
				}
			}
			if scan == nil {
				missing[w.UID] = p.missing[w.UID]
				continue
			}
			pin, err = p.find(scan, w.UID)
		}
		if err == nil {
			c.Addrs, err = netns.Addresses(pin.Path)
		}
		if err != nil {
			missing[w.UID] = err.Error()
			continue
		}
		c.NetNS = pin.Path
	}
	p.missing = missing
	return out
}

// find pins the namespace of a pod that runs already.
func (p *pods) find(scan *netns.Scan, uid string) (netns.Pin, error) {
	found, err := scan.Find(uid)
	if err != nil {
		return netns.Pin{}, err
	}
	defer found.Close()
	pin, err := p.store.Pin(uid, found.Path())
	if err == nil {
		p.log.Info("found the network namespace of a running pod", "uid", uid, "pid", found.PID, "inode", pin.Inode)
	}
	return pin, err
}

// absent says why a pod has no network namespace here.
func (p *pods) absent(uid string) string {
	if p == nil {
		return "it names no network namespace"
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if why := p.missing[uid]; why != "" {
		return "no network namespace yet: " + why
	}
	return "no network namespace yet"
}

// pinned lists the network namespaces that an earlier run held.
func (p *pods) pinned() (paths []string) {
	if p == nil {
		return nil
	}
	pins, err := p.store.List()
	if err != nil {
		p.log.Error("listing pinned network namespaces", "error", err)
	}
	for _, pin := range pins {
		paths = append(paths, pin.Path)
	}
	return paths
}

// release unpins what no workload of the state needs any more. Its rules have
// been removed before.
func (p *pods) release(s *nodeState, held func(path string) bool) {
	if p == nil {
		return
	}
	pins, err := p.store.List()
	if err != nil {
		p.log.Error("listing pinned network namespaces", "error", err)
		return
	}
	for _, pin := range pins {
		if s.pod(pin.UID) != nil || held(pin.Path) {
			continue
		}
		if err := p.store.Unpin(pin.UID); err != nil {
			p.log.Error("letting a network namespace go", "uid", pin.UID, "error", err)
		}
	}
}

// pod returns the workload that is the pod with the UID, or nil.
func (s *nodeState) pod(uid string) *mesh.Workload {
	for i := range s.workloads {
		if s.workloads[i].UID == uid {
			return &s.workloads[i]
		}
	}
	return nil
}

// samePlaces reports whether two placements of one state are equal.
func samePlaces(a, b []mesh.Workload) bool {
	return slices.EqualFunc(a, b, func(x, y mesh.Workload) bool {
		switch {
		case x.Key() != y.Key() || x.UID != y.UID || (x.Capture == nil) != (y.Capture == nil):
			return false
		case x.Capture == nil:
			return true
		}
		return x.Capture.NetNS == y.Capture.NetNS && slices.Equal(x.Capture.Addrs, y.Capture.Addrs)
	})
}

// Enrolment says how a pod stands, by the last known state. A pod of an
// enrolled namespace that the state does not know yet is Unknown: whether it
// opted out is not known either.
func (a *agent) Enrolment(namespace, name, uid string) cni.Verdict {
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	if s == nil {
		return cni.Unknown
	}
	if w := s.pod(uid); w != nil {
		if w.Namespace != namespace || w.Name != name {
			return cni.Unknown
		}
		return cni.Enrolled
	}
	switch {
	case s.excluded[uid]:
		return cni.Excluded
	case s.enrolled[namespace]:
		return cni.Unknown
	}
	return cni.NotEnrolled
}

// Hold takes a pod's network namespace and returns when the pod is captured:
// its rules are in place and the proxy listens inside.
func (a *agent) Hold(ctx context.Context, uid, path string) error {
	pin, err := a.pods.store.Pin(uid, path)
	if err != nil {
		return err
	}
	began := time.Now()
	tick := time.NewTicker(20 * time.Millisecond)
	defer tick.Stop()
	for {
		a.wake()
		problem := a.rules.problem(uid, pin.Inode, began)
		if problem == "" {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("the pod is not captured yet: %s", problem)
		case <-tick.C:
		}
	}
}

// Check says what is missing for a pod that Hold was called for.
func (a *agent) Check(_ context.Context, uid, path string) error {
	pin, err := a.pods.store.Get(uid)
	if err != nil {
		return err
	}
	if inode, err := namespaceID(path); err != nil || inode != pin.Inode {
		return errors.Join(errors.New("another network namespace of the pod is pinned"), err)
	}
	if problem := a.rules.problem(uid, pin.Inode, time.Time{}); problem != "" {
		return errors.New(problem)
	}
	return nil
}

// Release lets a pod's network namespace go when its sandbox is deleted. What
// is not known to be that sandbox's stays until the pod leaves the state.
func (a *agent) Release(_ context.Context, uid, path string) error {
	if path == "" {
		return nil
	}
	if pin, err := a.pods.store.Get(uid); err == nil {
		// Its processes are gone, and soon its interfaces: what the proxy has
		// open there would stay for as long as peers do not end it, and peers
		// that went in the same moment never do.
		if inode, err := namespaceID(path); err == nil && inode == pin.Inode {
			if _, err := capture.End(pin.Path); err != nil {
				a.log.Warn("connections of a pod that is gone could not be ended", "uid", uid, "error", err)
			}
		}
	}
	_, err := a.pods.store.UnpinIf(uid, path)
	a.wake()
	return err
}
