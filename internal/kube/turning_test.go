package kube

import (
	"slices"
	"testing"
	"time"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// turning is a cluster in which namespaces join and leave in steps.
type turning struct {
	*cluster
	now      time.Time
	revision string
	others   [][]caserver.Step // what other replicas tell
}

// step advances a while after the last step and describes namespace shop.
func (c *turning) step(after time.Duration, reports ...caserver.NodeReport) string {
	c.now = c.now.Add(after)
	c.advance(c.d, reports, c.others, c.now)
	c.update(c.d)
	c.d = newDirty()
	v := c.view(settings{td: testDomain}, &documents{}, &revocations{})
	c.saw(v)
	c.revision = v.Revision
	s := v.State.Mode("shop").String()
	if v.State.Plain["shop"] {
		s += " plain"
	}
	return s
}

func (c *turning) want(want string, after time.Duration, reports ...caserver.NodeReport) {
	c.t.Helper()
	if got := c.step(after, reports...); got != want {
		c.t.Fatalf("namespace shop is %q, want %q", got, want)
	}
}

// node reports that it acts by the newest view, or by an old one, and what is
// wrong with its pod.
func (c *turning) node(current bool, problem string) caserver.NodeReport {
	r := caserver.NodeReport{Node: "one", Connected: true, Revision: "old",
		Workloads: []*nodev1.WorkloadReport{{Workload: "shop/one", Uid: "u1", Problem: problem}}}
	if current {
		r.Revision = c.revision
	}
	return r
}

func newTurning(t *testing.T) *turning {
	c := &turning{cluster: newCluster(t), now: time.Now()}
	c.put(ns("shop"))
	c.put(podOf("shop", "one", "u1", "10.0.0.1"))
	c.want("off", 0)
	c.gradual = true
	return c
}

// A namespace joins in three steps and leaves in three, and no step is taken
// before every node that is connected acts by the one before, and the pods that
// join are captured.
//
// What it defends: the order without which callers use a tunnel to a pod that
// does not listen for one, or plaintext to one that refuses it.
func TestTurning(t *testing.T) {
	c := newTurning(t)
	c.put(enforced("shop"))
	c.want("observe plain", 0)
	c.now = time.Now()
	c.want("observe plain", 2*leastStep, c.node(false, ""))
	c.want("observe plain", 0, c.node(true, "the proxy does not listen"))
	c.want("observe", 0, c.node(true, ""))
	c.want("observe", leastStep-1, c.node(true, "")) // however fast the nodes are
	c.want("observe", 1, c.node(false, ""))
	c.want("enforce", 0, c.node(true, ""))
	if len(c.turns) != 0 {
		t.Error("the turn has not ended")
	}
	c.put(ns("shop"))
	c.want("observe", 0)
	c.now = time.Now()
	c.want("observe", 2*leastStep, c.node(false, ""))
	c.want("observe plain", 0, c.node(true, ""))
	c.want("off", leastStep, c.node(true, ""))
}

// Nobody is waited for without end, and nodes that are away are not waited for.
func TestTurning_bounds(t *testing.T) {
	c := newTurning(t)
	c.put(enforced("shop"))
	c.want("observe plain", 0)
	c.now = time.Now()
	c.want("observe", mostStep, c.node(false, ""))
	away := c.node(false, "")
	away.Connected = false
	c.want("enforce", leastStep, away)
}

// A replica of the control plane takes no step while another is behind with it,
// whose nodes would be called through tunnels that they do not take yet, or in
// plain when they no longer take that. One that is gone is not waited for.
func TestTurning_replicas(t *testing.T) {
	c := newTurning(t)
	other := func(number int, taken bool) {
		c.others = [][]caserver.Step{{{Namespace: "a", Number: 3, Taken: true}, {Namespace: "shop", Number: number, Taken: taken}, {Namespace: "z", Number: 3, Taken: true}}}
		if number == 0 {
			c.others[0] = slices.Delete(c.others[0], 1, 2)
		}
	}
	told := func(number int, taken bool) {
		t.Helper()
		if got, want := c.steps(), []caserver.Step{{Namespace: "shop", Number: number, Taken: taken}}; !slices.Equal(got, want) {
			t.Fatalf("the others are told %v, want %v", got, want)
		}
	}
	c.put(enforced("shop"))
	c.want("observe plain", 0)
	told(1, false)
	c.now = time.Now()
	other(0, false) // it has not begun
	c.want("observe plain", leastStep, c.node(true, ""))
	told(1, true)
	other(1, false)
	c.want("observe plain", 0, c.node(true, ""))
	other(1, true)
	c.want("observe", 0, c.node(true, ""))
	c.want("observe", leastStep, c.node(true, ""))
	other(2, false)
	c.want("observe", 0, c.node(true, ""))
	other(3, true) // it is further
	c.want("enforce", 0, c.node(true, ""))
	told(3, true)

	c.put(ns("shop"))
	c.want("observe", 0)
	c.now = time.Now()
	c.want("observe", leastStep, c.node(true, "")) // the other is at 3 still
	other(2, true)
	c.want("observe plain", 0, c.node(true, ""))
	c.want("observe plain", leastStep, c.node(true, ""))
	c.others = nil // it has ended
	c.want("off", 0, c.node(true, ""))
	if got := c.steps(); len(got) != 0 {
		t.Errorf("outside: %v", got)
	}
}

// Whoever changes their mind half way goes back by the same steps.
func TestTurning_back(t *testing.T) {
	c := newTurning(t)
	c.put(enforced("shop"))
	c.want("observe plain", 0)
	c.put(ns("shop"))
	c.want("observe plain", 0)
	c.now = time.Now()
	c.want("off", leastStep, c.node(true, ""))
	c.put(enforced("shop"))
	c.want("observe plain", 0)
	c.now = time.Now()
	c.want("observe", leastStep, c.node(true, ""))
	c.put(ns("shop"))
	c.want("observe", 0)
	c.put(enforced("shop"))
	c.want("observe", 0)
	c.now = time.Now()
	c.want("enforce", leastStep, c.node(true, ""))
}

// A namespace without running pods, or one that was annotated before the control
// plane started, is in force at once.
func TestTurning_atOnce(t *testing.T) {
	c := newTurning(t)
	c.put(enforced("empty"))
	c.want("off", 0)
	if m := c.modes["empty"]; m != mesh.ModeEnforce {
		t.Errorf("a namespace without pods is %s", m)
	}
	c.gradual = false
	c.put(enforced("shop"))
	c.want("enforce", 0)
}

// A node acts by a mode once it acts by the view in which that began, or by any
// newer one.
//
// What it defends: a status that says enforce for pods whose proxy still observes.
func TestHistory(t *testing.T) {
	h := &history{}
	view := func(revision string, mode mesh.Mode) *mesh.View {
		return &mesh.View{Revision: revision, State: &mesh.State{Namespaces: map[string]mesh.Mode{"shop": mode}}}
	}
	h = h.add(view("r1", mesh.ModeObserve))
	h = h.add(view("r2", mesh.ModeEnforce))
	h = h.add(view("r3", mesh.ModeEnforce))
	for revision, want := range map[string]bool{"r1": false, "r2": true, "r3": true, "": false, "other": false} {
		if got := h.acts(revision, "shop"); got != want {
			t.Errorf("a node at %q acts by enforce: %v", revision, got)
		}
	}
}
