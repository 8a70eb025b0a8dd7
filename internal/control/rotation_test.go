package control

import (
	"crypto/x509"
	"log/slog"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// turntable is a rotation whose nodes and clock a test turns.
type turntable struct {
	*rotation
	at      time.Time
	reports []caserver.NodeReport
}

func newTurntable(t *testing.T) *turntable {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("mesh.example")
	x := &turntable{at: time.Now()}
	authority, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: td, RootTTL: 30 * 24 * time.Hour, Now: func() time.Time { return x.at }, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { authority.Close() })
	view := viewOf("mesh.example", "r1")
	view.State.Workloads = []mesh.Workload{{Namespace: "shop", Name: "web", Node: "two"}}
	x.rotation = &rotation{
		authority: authority, log: slog.New(slog.DiscardHandler),
		view:    func() *mesh.View { return view },
		reports: func() []caserver.NodeReport { return x.reports },
		now:     func() time.Time { return x.at },
	}
	return x
}

// say has both nodes report: which roots they trust, and which they use.
func (x *turntable) say(trusted, used []*x509.Certificate) {
	x.reports = nil
	for _, name := range []string{"one", "two"} {
		roots := &nodev1.Roots{}
		for _, c := range trusted {
			f := ca.FingerprintOf(c)
			roots.Trusted = append(roots.Trusted, f[:])
		}
		for _, c := range used {
			f := ca.FingerprintOf(c)
			roots.Used = append(roots.Used, f[:])
		}
		x.reports = append(x.reports, caserver.NodeReport{Node: name, Connected: true, At: x.at, Roots: roots})
	}
}

// pass lets time go by, with reports that stay fresh.
func (x *turntable) pass(d time.Duration) {
	for end := x.at.Add(d); x.at.Before(end); {
		x.at = x.at.Add(lookAtRoots)
		for i := range x.reports {
			if !x.reports[i].At.IsZero() {
				x.reports[i].At = x.at
			}
		}
		x.step(x.at)
	}
}

func (x *turntable) want(t *testing.T, stage adminv1.RotationStage, when string) {
	t.Helper()
	if got := x.status().Stage; got != stage {
		t.Fatalf("%s: the rotation is %s, want %s (%+v)", when, got, stage, x.status().Nodes)
	}
}

// Defends the rule of rotations: the next root signs only once every node trusts
// it, and the old one goes only once no node uses it. A node that is missing,
// silent, or too old to say is one that does not.
func TestRotationWaits(t *testing.T) {
	good := func(x *turntable) { x.say(x.authority.Bundle(), x.authority.Bundle()[:1]) }
	second := func(change func(*caserver.NodeReport)) func(*turntable) {
		return func(x *turntable) { good(x); change(&x.reports[1]) }
	}
	bad := map[string]struct {
		say      func(*turntable)
		retiring bool // stands against retiring too
	}{
		"nobody has called":          {func(x *turntable) { x.reports = nil }, true},
		"a node has not called":      {func(x *turntable) { good(x); x.reports = x.reports[:1] }, true},
		"a node is not connected":    {second(func(r *caserver.NodeReport) { r.Connected = false }), true},
		"a node has never reported":  {second(func(r *caserver.NodeReport) { r.At = time.Time{} }), true},
		"a node does not say":        {second(func(r *caserver.NodeReport) { r.Roots = nil }), true},
		"a node trusts the old root": {second(func(r *caserver.NodeReport) { r.Roots.Trusted = r.Roots.Trusted[:1] }), false},
		"a node uses both":           {second(func(r *caserver.NodeReport) { r.Roots.Used = r.Roots.Trusted }), true},
	}
	for name, test := range bad {
		t.Run(name, func(t *testing.T) {
			x := newTurntable(t)
			if err := x.rotate(false); err != nil {
				t.Fatal(err)
			}
			if name != "a node uses both" { // both may be used before the switch
				test.say(x)
				x.pass(time.Minute)
				x.want(t, adminv1.RotationPublishing, "while "+name)
				if s := x.status(); s.Nodes[len(s.Nodes)-1].Waits == "" {
					t.Errorf("the status does not say what it waits for: %+v", s.Nodes)
				}
				if err := x.rotate(false); err == nil || !strings.Contains(err.Error(), "under way") {
					t.Errorf("a second rotation: %v", err)
				}
			}
			good(x)
			x.pass(quietTime / 2)
			x.want(t, adminv1.RotationPublishing, "before it has been quiet")
			test.say(x)
			x.pass(lookAtRoots)
			good(x)
			x.pass(quietTime + 2*lookAtRoots)
			x.want(t, adminv1.RotationRetiring, "when every node trusts the next root")
			if test.retiring {
				test.say(x)
				x.pass(time.Minute)
				x.want(t, adminv1.RotationRetiring, "while "+name)
			}
			good(x)
			x.pass(quietTime + 20*time.Minute)
			x.want(t, adminv1.RotationRetiring, "while tunnels may be used that were opened before")
			x.pass(10*time.Minute + 2*lookAtRoots) // certificates live for an hour
			x.want(t, adminv1.RotationIdle, "when no node uses the old root")
		})
	}
}

// Force takes one step, and no more; abandoning is for the time before the switch.
func TestRotationByHand(t *testing.T) {
	x := newTurntable(t)
	if err := x.abandon(); err == nil {
		t.Error("abandoned what has not begun")
	}
	if err := x.rotate(true); err != nil { // nothing to force: it begins
		t.Fatal(err)
	}
	x.pass(time.Minute)
	x.want(t, adminv1.RotationPublishing, "without nodes")
	if err := x.abandon(); err != nil {
		t.Fatal(err)
	}
	x.want(t, adminv1.RotationIdle, "abandoned")
	if err := x.rotate(false); err != nil {
		t.Fatal(err)
	}
	for _, stage := range []adminv1.RotationStage{adminv1.RotationRetiring, adminv1.RotationIdle} {
		if err := x.rotate(true); err != nil {
			t.Fatal(err)
		}
		x.pass(time.Minute)
		x.want(t, stage, "forced once more")
		if stage == adminv1.RotationRetiring && x.abandon() == nil {
			t.Error("abandoned after the switch")
		}
	}
}

// A root that was made before the instant that the MeshConfig names is replaced
// once, when that instant has come.
func TestRotationIsDeclared(t *testing.T) {
	x := newTurntable(t)
	x.declared = true
	for name, f := range map[string]func() error{"rotate": func() error { return x.rotate(false) }, "force": func() error { return x.rotate(true) }, "abandon": x.abandon} {
		if err := f(); err == nil || !strings.Contains(err.Error(), "rootNotBefore") {
			t.Errorf("%s by hand, where nobody checks who may: %v", name, err)
		}
	}
	state := x.view().State
	state.RootNotBefore = x.at.Add(-time.Hour)
	x.pass(time.Second)
	x.want(t, adminv1.RotationIdle, "with a root that is younger")
	state.RootNotBefore = x.at.Add(time.Minute)
	x.pass(50 * time.Second)
	x.want(t, adminv1.RotationIdle, "before the instant")
	x.pass(20 * time.Second)
	x.want(t, adminv1.RotationPublishing, "after it")
	for range 2 {
		x.say(x.authority.Bundle(), x.authority.Bundle()[:1])
		x.pass(time.Hour)
	}
	x.want(t, adminv1.RotationIdle, "an hour after it was replaced")
	// A node that was removed does not hold anything up, one that is away does.
	x.say(x.authority.Bundle(), x.authority.Bundle()[:1])
	x.reports[0].Connected = false
	x.present = func() []string { return []string{"one", "two"} }
	state.RootNotBefore = x.at
	x.pass(time.Minute)
	x.want(t, adminv1.RotationPublishing, "while node one is away")
	x.present = func() []string { return []string{"two"} }
	x.say(x.authority.Bundle(), x.authority.Bundle()[:1])
	x.reports[0].Connected = false
	x.pass(time.Minute)
	x.want(t, adminv1.RotationRetiring, "when node one was removed")
}

// Defends the mesh after a theft: a distrusted root goes, whoever is behind; but
// who answers in time is waited for.
func TestRotationHurries(t *testing.T) {
	x := newTurntable(t)
	stolen := x.authority.Bundle()[0]
	if err := x.distrust(); err != nil {
		t.Fatal(err)
	}
	if s := x.status(); !s.Hurries || x.abandon() == nil {
		t.Errorf("a distrusted root may stay: %+v", s)
	}
	x.pass(hurriedStep - time.Second)
	x.want(t, adminv1.RotationPublishing, "while nodes may still answer")
	x.pass(2 * time.Second)
	x.want(t, adminv1.RotationRetiring, "when they have not")
	x.say(x.authority.Bundle(), x.authority.Bundle()[:1])
	x.pass(hurriedQuiet + 2*lookAtRoots)
	x.want(t, adminv1.RotationIdle, "when nobody uses it, tunnels or not")
	if x.authority.Bundle()[0].Equal(stolen) || x.status().Hurries {
		t.Errorf("%+v", x.status())
	}
	// By the MeshConfig, in the middle of an ordinary rotation.
	if err := x.rotate(false); err != nil {
		t.Fatal(err)
	}
	x.at = x.at.Add(time.Minute)
	x.view().State.RootDistrustedBefore = x.at
	x.pass(time.Second)
	if s := x.status(); !s.Hurries || s.Stage != adminv1.RotationPublishing {
		t.Errorf("%+v", s)
	}
	x.pass(2*hurriedStep + 2*time.Second)
	x.want(t, adminv1.RotationIdle, "without any node")
	x.pass(time.Hour)
	x.want(t, adminv1.RotationIdle, "an hour later")
}

// The root is replaced by itself in time.
func TestRotationIsDue(t *testing.T) {
	x := newTurntable(t)
	x.pass(time.Second)
	x.want(t, adminv1.RotationIdle, "at the start")
	x.at = x.at.Add(20*24*time.Hour + time.Minute)
	x.pass(time.Second)
	x.want(t, adminv1.RotationPublishing, "after two thirds of its life")
}
