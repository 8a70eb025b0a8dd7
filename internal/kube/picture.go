package kube

import (
	"fmt"
	"time"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// fresh is how old a node's report may be. A pod counts as enrolled only while
// somebody has just looked.
const fresh = 15 * time.Second

// picture is what nodes say, beside what should be.
type picture struct {
	view     *mesh.View
	current  map[string]bool           // nodes of the mesh -> acts by the newest revision
	targets  map[string]map[string]set // namespace -> service account -> nodes
	counts   map[string]*count
	problems []problem
}

// count is how many pods of a namespace there are and are in the mesh.
type count struct{ pods, enrolled int }

// problem is what somebody who looks after a pod should know, or, without a
// pod's name, one who looks after a node.
type problem struct {
	namespace, name, uid, node, reason, text string
}

// Reasons of events.
const (
	notEnrolled     = "NotEnrolled"
	captureRepaired = "CaptureRepaired"
	clockOff        = "ClockOff"
)

// clockProblem is that of a node whose clock and the control plane's differ.
func clockProblem(node string, ahead time.Duration) problem {
	than, precise := "ahead of", 10*time.Second
	if ahead < 0 {
		than = "behind"
	}
	if ahead.Abs() > 2*time.Minute {
		precise = time.Minute // so that the text stays the same
	}
	return problem{uid: node, node: node, reason: clockOff, text: fmt.Sprintf("the node's clock is about %s %s the control plane's; set the one that is wrong right. "+
		"Until then new certificates may be refused; nothing is opened", ahead.Abs().Round(precise), than)}
}

func newPicture(snap *snapshot, reports []caserver.NodeReport, now time.Time) *picture {
	p := &picture{view: snap.view, current: map[string]bool{}, targets: map[string]map[string]set{}, counts: map[string]*count{}}
	type key struct{ node, workload, uid string }
	said, repaired := map[key]string{}, map[string]bool{}
	acting, revision := map[string]bool{}, map[string]string{}
	for _, r := range reports {
		if !r.Connected || now.Sub(r.At) > fresh {
			continue
		}
		if r.Clock != 0 {
			p.problems = append(p.problems, clockProblem(r.Node, r.Clock))
		}
		acting[r.Node] = r.Revision == snap.view.Revision
		revision[r.Node] = r.Revision
		for _, w := range r.Workloads {
			said[key{r.Node, w.GetWorkload(), w.GetUid()}] = w.GetProblem()
			repaired[w.GetUid()] = w.GetRepaired()
		}
	}
	for i := range snap.view.State.Workloads {
		w := &snap.view.State.Workloads[i]
		p.current[w.Node] = acting[w.Node]
		accounts := p.targets[w.Namespace]
		if accounts == nil {
			accounts = map[string]set{}
			p.targets[w.Namespace], p.counts[w.Namespace] = accounts, &count{}
		}
		for _, account := range []string{w.ServiceAccount, ""} {
			if accounts[account] == nil {
				accounts[account] = set{}
			}
			accounts[account].add(w.Node)
		}
		c := p.counts[w.Namespace]
		c.pods++
		text, reported := said[key{w.Node, w.Key(), w.UID}]
		switch {
		case reported && text == "":
			// Captured, but perhaps not yet in the mode that the status names.
			if snap.history.acts(revision[w.Node], w.Namespace) {
				c.enrolled++
			}
		case reported:
			p.problems = append(p.problems, problem{w.Namespace, w.Name, w.UID, w.Node, notEnrolled, text})
		}
		if repaired[w.UID] {
			p.problems = append(p.problems, problem{w.Namespace, w.Name, w.UID, w.Node, captureRepaired,
				"something other than Signet changed the packet filter rules in its network namespace; they were written again, and without them it was cut off and not open"})
		}
	}
	return p
}

// nodesOf counts the nodes that run the target, and those of them that act by
// the newest revision, or by an older one that says the same for them. An empty
// service account is the whole namespace.
func (p *picture) nodesOf(t authz.Target) (on, of int) {
	for node := range p.targets[t.Namespace][t.ServiceAccount] {
		of++
		if p.current[node] {
			on++
		}
	}
	return on, of
}

func (p *picture) allNodes() (on, of int) {
	for _, current := range p.current {
		of++
		if current {
			on++
		}
	}
	return on, of
}

// namespace is the text of its annotation; empty for one that takes no part.
func (p *picture) namespace(name string, snap *snapshot) string {
	mode := p.view.State.Mode(name)
	if mode == mesh.ModeOff {
		return ""
	}
	var c count
	if have := p.counts[name]; have != nil {
		c = *have
	}
	if next, ok := snap.changing[name]; ok {
		if next == mesh.ModeOff {
			return fmt.Sprintf("off: %d pods are leaving", c.pods)
		}
		mode, c.enrolled = next, 0 // whoever calls them, calls in plain
	}
	out := fmt.Sprintf("%s: %d of %d pods enrolled", mode, c.enrolled, c.pods)
	if unknown := snap.notices[name]; unknown != "" {
		out += fmt.Sprintf("; %q is no mode (enforce, observe or off) and is taken as enforce", unknown)
	}
	return out
}
