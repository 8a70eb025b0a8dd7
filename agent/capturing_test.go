package agent

import (
	"testing"

	"github.com/signet-mesh/signet/internal/mesh"
)

// A look by an older state neither puts rules in place nor takes any away once a
// newer state is being taken.
//
// What it defends: a pod that has just left is not captured again, with nobody
// listening in it, by a look that began before.
func TestOlderStateWritesNoRules(t *testing.T) {
	a := &agent{}
	a.rules.applied = map[string]ruled{"/nowhere/left": {state: captures}}
	older, newer := &nodeState{}, &nodeState{}
	a.rules.begin(older)
	a.rules.begin(newer)
	w := &mesh.Workload{Namespace: "shop", Name: "one", Capture: &mesh.Capture{NetNS: "/nowhere/one"}}
	if why := a.hold(older, w); why != "not looked at yet: a newer state has come" {
		t.Errorf("hold: %q", why)
	}
	a.letGo(older)
	if a.rules.get("/nowhere/left") != captures || a.rules.get("/nowhere/one") != noRules {
		t.Error("an older state changed which namespaces have rules")
	}
}
