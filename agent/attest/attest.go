// Package attest finds out which workloads a process at the other end of a
// unix socket is, from what the kernel says about it.
//
// The rules of a workload state a user id, an executable (path, content), a
// systemd unit, a cgroup or a pod. How much each of them proves differs. User
// id, unit, cgroup and pod cannot be chosen by an unprivileged process. Path and
// content say which program was started, not that nobody steers it: whoever
// may execute a program can preload a library into it, or debug it, under
// their own user id. A rule with a path or digest should therefore state a
// user id, unit, cgroup or pod too, or name a file that only the right user may
// execute.
//
// A pod is known by the cgroup that the kubelet made for it. Of a static pod
// that names the hash of its file, where the API server has another UID: such
// pods are strangers.
//
// Of /proc, only what the kernel says is believed; see package procfs.
//
// Never consulted: the command line, the command name, the environment, and
// /proc/<pid>/mountinfo, all of which a process can forge.
package attest

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync"

	"github.com/signet-mesh/signet/internal/mesh"
)

// ErrStranger says that no workload's rules match the process.
var ErrStranger = errors.New("no workload's attest rules match the process")

// ErrMoved says that the process was moved to another cgroup while it was
// looked at.
var ErrMoved = errors.New("the process was moved to another cgroup meanwhile")

// maxReasons bounds the workloads that an error says about why they did not
// match.
const maxReasons = 8

// Attestor knows the rules of the node's workloads. It is safe for concurrent
// use.
type Attestor struct {
	digests *digests

	mu      sync.Mutex
	rules   []mesh.Workload // guarded by mu; sorted by key; replaced whole
	changed chan struct{}   // guarded by mu; closed and replaced by SetWorkloads
}

// New returns an Attestor without workloads: it refuses every process.
func New() *Attestor {
	return &Attestor{digests: newDigests(), changed: make(chan struct{})}
}

// SetWorkloads replaces the workloads of the node. Those without rules match
// no process.
func (a *Attestor) SetWorkloads(workloads []mesh.Workload) {
	var rules []mesh.Workload
	for _, w := range workloads {
		if w.Attest != nil {
			rules = append(rules, w)
		}
	}
	slices.SortFunc(rules, func(x, y mesh.Workload) int { return cmp.Compare(x.Key(), y.Key()) })
	a.mu.Lock()
	defer a.mu.Unlock()
	a.rules = rules
	close(a.changed)
	a.changed = make(chan struct{})
}

// Changed returns a channel that is closed when SetWorkloads is called next.
// Take it before Attest, so that no change is missed.
func (a *Attestor) Changed() <-chan struct{} {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.changed
}

// Attest returns the workloads, at least one, that the process is; sorted by
// key. The error is ErrStranger when there is none, and says what differed;
// ErrGone when the process has exited or runs another program than when it
// was looked at first; ErrMoved when it is in another cgroup than it was a moment
// ago. It reads everything anew on each call.
func (a *Attestor) Attest(ctx context.Context, p *Process) ([]mesh.Workload, error) {
	a.mu.Lock()
	rules := a.rules
	a.mu.Unlock()

	p.mu.RLock()
	defer p.mu.RUnlock()
	if err := p.same(); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	f := &facts{ctx: ctx, p: p, digests: a.digests}
	var (
		out     []mesh.Workload
		reasons []string
	)
	for _, w := range rules {
		if err := f.match(w.Attest); err != nil {
			reasons = append(reasons, w.Key()+": "+err.Error())
			continue
		}
		out = append(out, w)
	}
	if err := ctx.Err(); err != nil {
		return nil, fmt.Errorf("attest: process %d: %w", p.PID, err)
	}
	// The facts were read one after the other. They are one process's, and
	// one program's in one place, only if those are the same before and after.
	if err := f.unmoved(); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	if err := p.same(); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	if len(out) == 0 {
		return nil, fmt.Errorf("attest: process %d of uid %d: %w%s", p.PID, p.UID, ErrStranger, because(reasons))
	}
	return out, nil
}

func because(reasons []string) string {
	switch n := len(reasons); {
	case n == 0:
		return " (no workload of this node has any)"
	case n > maxReasons:
		return fmt.Sprintf(": %s; and %d more", strings.Join(reasons[:maxReasons], "; "), n-maxReasons)
	}
	return ": " + strings.Join(reasons, "; ")
}
