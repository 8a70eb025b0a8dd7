package fanout

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Status tells the truth: a pod is enrolled when its own node has looked, and
// under no other circumstance. Each row is one way of not being enrolled.
func TestEnrolledMeansLookedAt(t *testing.T) {
	id := func(sa string) spiffeid.ID {
		return spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/" + sa)
	}
	captured := &mesh.Capture{}
	state := &mesh.State{
		Namespaces: map[string]mesh.Mode{"shop": mesh.ModeEnforce, "empty": mesh.ModeObserve, "off": mesh.ModeOff},
		Workloads: []mesh.Workload{
			{Namespace: "off", Name: "pod", ID: id("x"), Node: "n1", Capture: captured},
			{Namespace: "shop", Name: "away", ID: id("web"), Node: "n2", Capture: captured},
			{Namespace: "shop", Name: "good", ID: id("web"), Node: "n1", Capture: captured},
			{Namespace: "shop", Name: "ill", ID: id("web"), Node: "n1", Capture: captured},
			{Namespace: "shop", Name: "moved", ID: id("web"), Node: "n1", Capture: captured},
			{Namespace: "shop", Name: "new", ID: id("web"), Node: "n1", Capture: captured},
			{Namespace: "shop", Name: "no-agent", ID: id("web"), Node: "n3", Capture: captured},
			{Namespace: "shop", Name: "pending", ID: id("web"), Capture: captured},
			{Namespace: "shop", Name: "renamed", ID: id("web"), Node: "n1", Capture: captured},
			{Namespace: "shop", Name: "unseen", ID: id("web"), Node: "n1", Capture: captured},
			{Namespace: "shop", Name: "host-network", ID: id("web"), Node: "n1"},
		},
	}
	web := id("web").String()
	agents := []adminv1.AgentStatus{
		{Node: "n1", Workloads: []adminv1.WorkloadStatus{
			{Workload: "shop/good", ID: web, Captured: true},
			{Workload: "shop/ill", ID: web, Captured: true, Problem: "no rules in the kernel"},
			{Workload: "shop/renamed", ID: id("old").String(), Captured: true},
			{Workload: "shop/unseen", ID: web},
		}},
		{Node: "n4", Workloads: []adminv1.WorkloadStatus{{Workload: "shop/moved", ID: web, Captured: true}}},
	}
	got := Namespaces(state, agents, []adminv1.MissingNode{{Node: "n2", Error: "no answer within 5s"}})
	if len(got) != 2 || got[0].Namespace != "empty" || got[0].Pods != 0 || got[1].Namespace != "shop" || got[1].Mode != "enforce" {
		t.Fatalf("%+v", got)
	}
	if got[1].Pods != 9 || got[1].Enrolled != 1 {
		t.Errorf("%d of %d pods enrolled, want 1 of 9", got[1].Enrolled, got[1].Pods)
	}
	var lines []string
	for _, p := range got[1].Problems {
		lines = append(lines, p.Pod+": "+p.Problem)
	}
	want := `away: not known: node n2 does not answer: no answer within 5s
ill: no rules in the kernel
moved: the agent of node n1 does not know it yet
new: the agent of node n1 does not know it yet
no-agent: node n3 has no agent in the mesh
pending: it has no node yet
renamed: node n1 runs it as spiffe://mesh.example/ns/shop/sa/old still
unseen: it is not captured`
	if strings.Join(lines, "\n") != want {
		t.Errorf("problems:\n%s\nwant\n%s", strings.Join(lines, "\n"), want)
	}
}
