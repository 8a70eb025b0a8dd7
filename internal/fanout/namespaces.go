package fanout

import (
	"fmt"
	"maps"
	"slices"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Namespaces counts, for each namespace that is in the mesh, the pods that
// should be enrolled and those that are, and says why each other one is not. A
// pod counts as enrolled only where its own node says that its capture was
// looked at; a node that does not answer vouches for nothing.
func Namespaces(state *mesh.State, agents []adminv1.AgentStatus, missing []adminv1.MissingNode) []adminv1.NamespaceStatus {
	away := map[string]string{}
	for _, m := range missing {
		away[m.Node] = m.Error
	}
	type place struct{ node, workload string }
	answered := map[string]bool{}
	seen := map[place]*adminv1.WorkloadStatus{}
	for i := range agents {
		answered[agents[i].Node] = true
		for j := range agents[i].Workloads {
			w := &agents[i].Workloads[j]
			seen[place{agents[i].Node, w.Workload}] = w
		}
	}
	problem := func(w *mesh.Workload) string {
		if w.Node == "" {
			return "it has no node yet"
		}
		if why, ok := away[w.Node]; ok {
			return fmt.Sprintf("not known: node %s does not answer: %s", w.Node, why)
		}
		if !answered[w.Node] {
			return fmt.Sprintf("node %s has no agent in the mesh", w.Node)
		}
		s := seen[place{w.Node, w.Key()}]
		switch {
		case s == nil:
			return fmt.Sprintf("the agent of node %s does not know it yet", w.Node)
		case s.ID != w.ID.String():
			return fmt.Sprintf("node %s runs it as %s still", w.Node, s.ID)
		case s.Problem != "":
			return s.Problem
		case !s.Captured:
			return "it is not captured"
		}
		return ""
	}
	byName := map[string]*adminv1.NamespaceStatus{}
	for name, mode := range state.Namespaces {
		if mode != mesh.ModeOff {
			byName[name] = &adminv1.NamespaceStatus{Namespace: name, Mode: mode.String()}
		}
	}
	for i := range state.Workloads {
		w := &state.Workloads[i]
		ns := byName[w.Namespace]
		if ns == nil || w.Capture == nil {
			continue
		}
		ns.Pods++
		if p := problem(w); p != "" {
			ns.Problems = append(ns.Problems, adminv1.PodProblem{Pod: w.Name, Node: w.Node, Problem: p})
			continue
		}
		ns.Enrolled++
	}
	out := []adminv1.NamespaceStatus{}
	for _, name := range slices.Sorted(maps.Keys(byName)) {
		out = append(out, *byName[name])
	}
	return out
}
