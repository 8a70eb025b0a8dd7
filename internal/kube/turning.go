package kube

import (
	"cmp"
	"slices"
	"time"

	"k8s.io/client-go/tools/cache"

	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// turn is a namespace with running pods on its way into the mesh, or out of
// it. No node does it in the same instant as the next, so it goes in steps, and
// in each of them what one node does fits what another does in the step before
// and after:
//
//	off | captured, called in plain | captured, called through tunnels | as annotated
//
// In the two steps between, pods observe: they take tunnels and plaintext.
// Joining goes from left to right, leaving from right to left. Replicas of the
// control plane keep step: none is two steps from another.
type turn struct {
	leaving bool
	tunnels bool      // callers use tunnels
	since   time.Time // of the step
	taken   bool      // the nodes that are connected here act by the step
	// revisions are the views of this step so far.
	revisions map[string]bool
}

// Bounds of a step. The least is for what nodes do not report: destinations
// that a proxy asked for by name. The most is for nodes that do not come along:
// whoever wrote enforce is not kept waiting by a pod that cannot be captured.
const (
	leastStep = 500 * time.Millisecond
	mostStep  = 10 * time.Second
	// lookAtTurns is how often it is looked whether a step is done.
	lookAtTurns = 50 * time.Millisecond
)

// mode is how the namespace takes part now, and whether it is called in plain.
func (t *turn) mode(wanted mesh.Mode) (now mesh.Mode, plain bool) {
	if t == nil {
		return wanted, false
	}
	return mesh.ModeObserve, !t.tunnels
}

// turned returns the turn of a namespace whose annotation has changed. One that
// is under way turns round where it is.
func (x *index) turned(name string, was, wanted mesh.Mode, t *turn, now time.Time) *turn {
	leaving := wanted == mesh.ModeOff
	switch {
	case !x.gradual, (was == mesh.ModeOff) == leaving:
		return t
	case t != nil:
		return &turn{leaving: leaving, tunnels: t.tunnels, since: now, revisions: map[string]bool{}}
	case !x.runsPods(name):
		return nil
	}
	return &turn{leaving: leaving, tunnels: leaving, since: now, revisions: map[string]bool{}}
}

// runsPods reports whether a namespace has pods that others may be calling.
func (x *index) runsPods(name string) bool {
	pods, _ := x.podStore.ByIndex(cache.NamespaceIndex, name) // the index exists
	for _, obj := range pods {
		if p := obj.(*pod); p.runs() && len(p.addrs) > 0 {
			return true
		}
	}
	return false
}

// inside is the number of the step in which a namespace is as annotated.
const inside = 3

// number is that of the step, from 0, which is outside.
func (t *turn) number() int {
	if t.tunnels {
		return 2
	}
	return 1
}

// steps is how far each namespace has come that is not outside, sorted by name.
func (x *index) steps() []caserver.Step {
	out := make([]caserver.Step, 0, len(x.modes))
	for name := range x.modes {
		s := caserver.Step{Namespace: name, Number: inside, Taken: true}
		if t := x.turns[name]; t != nil {
			s.Number, s.Taken = t.number(), t.taken
		}
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b caserver.Step) int { return cmp.Compare(a.Namespace, b.Namespace) })
	return out
}

// advance takes the turns that are done with their step to the next one, and
// marks their namespaces. A step is done when the nodes that are connected here
// act by it, and every other replica says so of its own, or is further.
func (x *index) advance(d *dirty, reports []caserver.NodeReport, others [][]caserver.Step, now time.Time) {
	for name, t := range x.turns {
		t.taken = x.taken(name, t, reports)
		age := now.Sub(t.since)
		if age < leastStep || age < mostStep && !(t.taken && t.along(name, others)) {
			continue
		}
		d.namespaces.add(name)
		if t.tunnels != t.leaving {
			delete(x.turns, name)
			continue
		}
		x.turns[name] = &turn{leaving: t.leaving, tunnels: !t.tunnels, since: now, revisions: map[string]bool{}}
	}
}

// along reports whether no other replica is behind with a step.
func (t *turn) along(name string, others [][]caserver.Step) bool {
	for _, steps := range others {
		var other caserver.Step // outside
		if i, ok := slices.BinarySearchFunc(steps, name, func(s caserver.Step, name string) int { return cmp.Compare(s.Namespace, name) }); ok {
			other = steps[i]
		}
		ahead := other.Number - t.number()
		if t.leaving {
			ahead = -ahead
		}
		if ahead < 0 || ahead == 0 && !other.Taken {
			return false
		}
	}
	return true
}

// taken reports whether every node that is connected acts by a step, and has
// captured the pods that join.
func (x *index) taken(name string, t *turn, reports []caserver.NodeReport) bool {
	type key struct{ workload, uid string }
	captured := map[key]bool{}
	connected := map[string]bool{}
	for _, r := range reports {
		if !r.Connected {
			continue
		}
		if !t.revisions[r.Revision] {
			return false
		}
		connected[r.Node] = true
		for _, w := range r.Workloads {
			captured[key{w.GetWorkload(), w.GetUid()}] = w.GetProblem() == ""
		}
	}
	if t.leaving {
		return true
	}
	for i := range x.workloads.values {
		w := &x.workloads.values[i]
		if w.Namespace == name && connected[w.Node] && !captured[key{w.Key(), w.UID}] {
			return false
		}
	}
	return true
}

// saw notes the newest view.
func (x *index) saw(view *mesh.View) {
	for _, t := range x.turns {
		t.revisions[view.Revision] = true
	}
}

// history orders views, to tell which nodes act by one of an instant or a newer.
type history struct {
	count  uint64
	number map[string]uint64 // by revision
	since  map[string]uint64 // by namespace: the view in which its mode began
	modes  map[string]mesh.Mode
}

// remembered bounds the history. A node that is further behind is simply old.
const remembered = 4096

// add notes a view. What it returns is not edited later.
func (h *history) add(view *mesh.View) *history {
	out := &history{count: h.count + 1, number: map[string]uint64{}, since: map[string]uint64{}, modes: view.State.Namespaces}
	for revision, n := range h.number {
		if out.count-n < remembered {
			out.number[revision] = n
		}
	}
	out.number[view.Revision] = out.count
	for name, mode := range view.State.Namespaces {
		if since, ok := h.since[name]; ok && h.modes[name] == mode {
			out.since[name] = since
			continue
		}
		out.since[name] = out.count
	}
	return out
}

// acts reports whether a node that is at a revision acts by a namespace's mode.
func (h *history) acts(revision, namespace string) bool {
	n, ok := h.number[revision]
	return ok && n >= h.since[namespace]
}
