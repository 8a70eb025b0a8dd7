package main

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/kubeclient"
	"github.com/signet-mesh/signet/internal/output"
)

// policyState is what became of one AllowPolicy of a cluster.
type policyState struct {
	Policy string `json:"policy"` // namespace/name
	Target string `json:"target"` // service account, or "*" for all
	// Accepted and Programmed are True, False, or Unknown while the control
	// plane has not spoken about the policy as it is now.
	Accepted        string    `json:"accepted"`
	Programmed      string    `json:"programmed"`
	ProgrammedNodes int32     `json:"programmedNodes"`
	Nodes           int32     `json:"nodes"`
	Message         string    `json:"message,omitempty"` // of the first that is not True
	Since           time.Time `json:"since,omitzero"`    // of the same
}

func stateOfPolicy(p *v1alpha1.AllowPolicy) policyState {
	s := policyState{
		Policy: p.Namespace + "/" + p.Name, Target: p.Spec.Target.ServiceAccount,
		Accepted: "Unknown", Programmed: "Unknown", ProgrammedNodes: p.Status.ProgrammedNodes, Nodes: p.Status.Nodes,
		Since: p.CreationTimestamp.Time,
	}
	if s.Target == "" {
		s.Target = "*"
	}
	for _, c := range []struct {
		name string
		into *string
	}{{v1alpha1.ConditionAccepted, &s.Accepted}, {v1alpha1.ConditionProgrammed, &s.Programmed}} {
		i := slices.IndexFunc(p.Status.Conditions, func(have metav1.Condition) bool { return have.Type == c.name })
		if i < 0 || p.Status.Conditions[i].ObservedGeneration < p.Generation {
			continue
		}
		have := p.Status.Conditions[i]
		*c.into = string(have.Status)
		if have.Status != metav1.ConditionTrue && s.Message == "" {
			s.Message, s.Since = have.Message, have.LastTransitionTime.Time
		}
	}
	return s
}

// fix returns what to do here: on one machine, or in a cluster.
func (d *statusDoc) fix(machine, cluster string) string {
	if d.Mesh != nil {
		return cluster
	}
	return machine
}

// clusterStatus asks the control plane of a cluster, and the API server about
// policies.
func (a *app) clusterStatus(ctx context.Context, l *link) (*statusDoc, error) {
	doc := &statusDoc{Meta: output.NewMeta("Status"), At: a.now().UTC(), Findings: []finding{}}
	control, err := l.ControlStatus(ctx)
	if err != nil {
		return nil, err
	}
	all, err := l.MeshStatus(ctx)
	if err != nil {
		return nil, err
	}
	doc.Control, doc.Mesh = &control, &all
	policies, err := kubeclient.ListOf[v1alpha1.AllowPolicy](ctx, l.kube, "/apis/"+v1alpha1.GroupVersion+"/allowpolicies")
	if err != nil {
		if err := ctx.Err(); err != nil {
			return nil, err
		}
		doc.Notes = append(doc.Notes, "the conditions of policies are not known: "+oneLine(err))
	}
	for i := range policies {
		doc.Policies = append(doc.Policies, stateOfPolicy(&policies[i]))
	}
	slices.SortFunc(doc.Policies, func(a, b policyState) int { return strings.Compare(a.Policy, b.Policy) })
	doc.judge()
	return doc, nil
}

func oneLine(err error) string { return strings.Join(strings.Fields(err.Error()), " ") }

func (d *statusDoc) judgeMesh(m *adminv1.MeshStatus) {
	for _, n := range m.Missing {
		d.find("SIG0306", missingFix, "node %s did not answer, so what it does is not known: %s", n.Node, n.Error)
	}
	for i := range m.Agents {
		d.judgeAgent(&m.Agents[i])
	}
	for _, ns := range m.Namespaces {
		for _, p := range ns.Problems {
			d.find("SIG0403", "kubectl -n "+ns.Namespace+" describe pod "+p.Pod+", and the log of the signet-agent pod on its node, tell more", "pod %s/%s is not enrolled: %s", ns.Namespace, p.Pod, p.Problem)
		}
	}
	for i := range d.Policies {
		p := &d.Policies[i]
		known := slices.ContainsFunc(d.Control.Invalid, func(v authz.Diagnostic) bool { return v.Policy == p.Policy })
		switch {
		case p.Accepted == "False" && !known:
			d.find("SIG0307", "correct the policy; it grants nothing until then", "policy %s is not accepted: %s", p.Policy, p.Message)
		case p.Accepted != "False" && p.Programmed != "True" && d.At.Sub(p.Since) > takeUpTime:
			d.find("SIG0308", "see which nodes are behind above; kubectl describe allowpolicy tells more", "policy %s is in force on %d of %s since %s: %s", p.Policy, p.ProgrammedNodes, plural(int(p.Nodes), "node", "nodes"), instant(p.Since), orDash(p.Message))
		}
	}
}

// meshText writes the part of the status that only a cluster has.
func (d *statusDoc) meshText(t *output.Text) {
	var rows [][]output.Cell
	for i := range d.Mesh.Agents {
		s := &d.Mesh.Agents[i]
		captured := 0
		for _, w := range s.Workloads {
			if w.Captured {
				captured++
			}
		}
		rows = append(rows, []output.Cell{
			output.C(s.Node), output.S(output.Good, "answers"), connected(s.ControlConnected), connected(s.ProxyConnected),
			output.C(fmt.Sprintf("%d of %d", captured, len(s.Workloads))), output.C(s.Audit.Records), output.C(orDash(s.Version)), output.C(d.revision(t, s.Revision)),
		})
	}
	for _, n := range d.Mesh.Missing {
		dash := output.C("-")
		rows = append(rows, []output.Cell{output.C(n.Node), output.S(output.Bad, "does not answer"), dash, dash, dash, dash, dash, dash})
	}
	if len(rows) > 0 {
		t.Line()
		t.Table([]output.Column{{Name: "NODE"}, {Name: "AGENT"}, {Name: "CONTROL PLANE"}, {Name: "PROXY"}, {Name: "CAPTURED"}, {Name: "RECORDS", Wide: true}, {Name: "VERSION", Wide: true}, {Name: "REVISION"}}, rows)
	}
	t.Line()
	if len(d.Mesh.Namespaces) == 0 {
		t.Line("No namespace is in the mesh; annotate one: kubectl annotate namespace NAME signet.dev/mesh=observe")
	} else {
		rows = nil
		for _, ns := range d.Mesh.Namespaces {
			style := output.Good
			if ns.Enrolled < ns.Pods {
				style = output.Bad
			}
			rows = append(rows, []output.Cell{output.C(ns.Namespace), output.C(ns.Mode), output.S(style, fmt.Sprintf("%d of %s enrolled", ns.Enrolled, plural(ns.Pods, "pod", "pods")))})
		}
		t.Table([]output.Column{{Name: "NAMESPACE"}, {Name: "MODE"}, {Name: "PODS"}}, rows)
	}
	if len(d.Policies) > 0 {
		t.Line()
		rows = nil
		for _, p := range d.Policies {
			rows = append(rows, []output.Cell{
				output.C(p.Policy), output.C(p.Target), condition(p.Accepted), condition(p.Programmed), output.C(fmt.Sprintf("%d of %d", p.ProgrammedNodes, p.Nodes)),
			})
		}
		t.Table([]output.Column{{Name: "POLICY"}, {Name: "TARGET"}, {Name: "ACCEPTED"}, {Name: "PROGRAMMED"}, {Name: "NODES"}}, rows)
	}
	if t.Wide {
		for i := range d.Mesh.Agents {
			if s := &d.Mesh.Agents[i]; len(s.Workloads) > 0 {
				t.Line()
				t.Line("on node ", s.Node, ":")
				t.Table([]output.Column{{Name: "WORKLOAD"}, {Name: "MODE"}, {Name: "CAPTURED"}, {Name: "CONNECTIONS"}, {Name: "ID"}}, workloadRows(s.Workloads))
			}
		}
	}
	if len(d.Notes) > 0 {
		t.Line()
	}
	for _, n := range d.Notes {
		t.Line(output.S(output.Warn, "note"), ": ", n)
	}
}

func condition(s string) output.Cell {
	style := output.Good
	switch s {
	case "True":
		return output.S(style, "yes")
	case "False":
		return output.S(output.Bad, "no")
	}
	return output.S(output.Warn, "not known")
}
