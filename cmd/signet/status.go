package main

import (
	"context"
	"errors"
	"fmt"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/output"
)

// takeUpTime is how long a node may stay behind a new revision before that
// is a finding.
const takeUpTime = 10 * time.Second

type statusDoc struct {
	output.Meta
	At time.Time `json:"at"`
	// Control and Agent are absent when that part does not answer.
	Control *adminv1.ControlStatus `json:"control,omitempty"`
	Agent   *adminv1.AgentStatus   `json:"agent,omitempty"`
	// Mesh and Policies are those of a cluster; Agent is absent there.
	Mesh     *adminv1.MeshStatus `json:"mesh,omitempty"`
	Policies []policyState       `json:"policies,omitempty"`
	// Notes say what could not be looked at, and is no fault of the mesh.
	Notes    []string  `json:"notes,omitempty"`
	Findings []finding `json:"findings"`
}

// finding is one thing that is wrong, with a code that stays the same.
type finding struct {
	Code    string `json:"code"`
	Message string `json:"message"`
	Fix     string `json:"fix"`
}

func (d *statusDoc) find(code, fix, format string, args ...any) {
	d.Findings = append(d.Findings, finding{Code: code, Message: fmt.Sprintf(format, args...), Fix: fix})
}

// judge fills the findings.
func (d *statusDoc) judge() {
	if d.Control != nil {
		d.judgeControl(d.Control)
	}
	if d.Agent != nil {
		d.judgeAgent(d.Agent)
	}
	if d.Mesh != nil {
		d.judgeMesh(d.Mesh)
	}
}

func (d *statusDoc) judgeControl(c *adminv1.ControlStatus) {
	for _, r := range c.Rejected {
		d.find("SIG0302", "correct the document; the last good state stays in force until then", "the newest edit was refused: %s", r)
	}
	for _, i := range c.Invalid {
		d.find("SIG0303", "correct the policy; it grants nothing until then", "policy %s grants nothing: %s: %s", i.Policy, i.Field, i.Message)
	}
	for _, n := range c.Nodes {
		switch {
		case !n.Connected:
			d.find("SIG0304", d.fix("see whether its agent runs: `signet status` on that node", "see whether its agent is ready: kubectl get pods -o wide in Signet's namespace"), "node %s is not connected to the control plane since %s", n.Name, instant(n.Since))
		case n.Revision != c.Revision && d.At.Sub(c.Since) > takeUpTime:
			d.find("SIG0305", "look for a refusal of the configuration in the agent's log", "node %s works with revision %s, not with %s", n.Name, orNone(n.Revision), c.Revision)
		}
	}
}

func (d *statusDoc) judgeAgent(s *adminv1.AgentStatus) {
	if !s.ControlConnected {
		d.find("SIG0401", "start the control plane again, or look at why it is away; open and new connections go on with the last good state", "the agent of node %s has no connection to the control plane", s.Node)
	}
	if !s.ProxyConnected {
		d.find("SIG0402", d.fix("look for the proxy's last words in the log of `signet up`", "look at the log of the signet-proxy pod on that node")+"; captured workloads have no network until it is back", "the proxy of node %s is not connected to its agent", s.Node)
	}
	for _, w := range s.Workloads {
		if w.Problem != "" && d.Mesh == nil { // of a cluster, its namespaces tell
			d.find("SIG0403", "`signet check` tells what the machine lacks; the workload's capture names its network namespace", "workload %s is not captured: %s", w.Workload, w.Problem)
		}
	}
	if s.Audit.Gaps > 0 {
		of := ""
		if d.Mesh != nil {
			of = " on node " + s.Node
		}
		d.find("SIG0404", "`signet audit verify` tells whether what is there is intact; the lost records cannot be brought back", "%d audit records are known to be missing%s", s.Audit.Gaps, of)
	}
}

func orNone(s string) string {
	if s == "" {
		return "none"
	}
	return s
}

// truncated keeps as much of a hash as people compare.
func truncated(revision string) string { return revision[:min(len(revision), 12)] }

func (d *statusDoc) Text(t *output.Text) {
	if c := d.Control; c != nil {
		t.Line("control   trust domain ", c.TrustDomain, ", ", plural(c.Policies, "policy", "policies"), ", revision ", d.revision(t, c.Revision), " since ", instant(c.Since))
		for _, n := range c.Nodes {
			state := output.S(output.Good, "connected")
			if !n.Connected {
				state = output.S(output.Bad, "not connected")
			}
			t.Line("node      ", n.Name, " ", state, ", revision ", d.revision(t, n.Revision))
		}
	}
	if d.Mesh != nil {
		d.meshText(t)
	}
	if s := d.Agent; s != nil {
		t.Line("agent     node ", s.Node, ", control plane ", connected(s.ControlConnected), ", proxy ", connected(s.ProxyConnected), ", revision ", d.revision(t, s.Revision))
		t.Line("audit     ", plural(int(s.Audit.Records), "record", "records"), ", ", s.Audit.Open, " open, ", s.Audit.Gaps, " missing")
		if len(s.Workloads) > 0 {
			t.Line()
			t.Table([]output.Column{{Name: "WORKLOAD"}, {Name: "MODE"}, {Name: "CAPTURED"}, {Name: "CONNECTIONS"}, {Name: "ID"}}, workloadRows(s.Workloads))
		}
	}
	if len(d.Findings) > 0 {
		t.Line()
		writeFindings(t, d.Findings)
	}
}

func (d *statusDoc) revision(t *output.Text, r string) string {
	if t.Wide {
		return orNone(r)
	}
	return orNone(truncated(r))
}

func writeFindings(t *output.Text, all []finding) {
	for _, f := range all {
		t.Line(output.S(output.Bad, f.Code), "  ", f.Message)
		t.Line("         fix: ", f.Fix)
	}
}

func workloadRows(workloads []adminv1.WorkloadStatus) [][]output.Cell {
	var rows [][]output.Cell
	for _, w := range workloads {
		captured := output.S(output.Good, "yes")
		switch {
		case w.Problem != "":
			captured = output.S(output.Bad, "no: "+w.Problem)
		case !w.Captured:
			captured = output.C("not asked for")
		}
		rows = append(rows, []output.Cell{output.C(w.Workload), output.C(w.Mode), captured, output.C(w.Connections), output.C(w.ID)})
	}
	return rows
}

func connected(yes bool) output.Cell {
	if yes {
		return output.S(output.Good, "connected")
	}
	return output.S(output.Bad, "not connected")
}

func plural(n int, one, many string) string {
	if n == 1 {
		return fmt.Sprintf("1 %s", one)
	}
	return fmt.Sprintf("%d %s", n, many)
}

// status asks both parts. A part that does not answer is a finding while the
// other does; when none does, there is no mesh to speak of.
func (a *app) status(ctx context.Context, cmd *cobra.Command) (*statusDoc, error) {
	client, err := a.connect(ctx, cmd)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	if client.Cluster() {
		return a.clusterStatus(ctx, client)
	}
	doc := &statusDoc{Meta: output.NewMeta("Status"), At: a.now().UTC(), Findings: []finding{}}
	control, controlErr := client.ControlStatus(ctx)
	agent, agentErr := client.AgentStatus(ctx)
	if controlErr != nil && agentErr != nil {
		return nil, agentErr
	}
	for _, err := range []error{controlErr, agentErr} {
		var down *adminclient.UnreachableError
		if err != nil && !errors.As(err, &down) {
			return nil, err
		}
	}
	if controlErr == nil {
		doc.Control = &control
	} else {
		doc.find("SIG0301", "start it again; `signet up` does that by itself", "%v", controlErr)
	}
	if agentErr == nil {
		doc.Agent = &agent
	} else {
		doc.find("SIG0400", "start it again; `signet up` does that by itself", "%v", agentErr)
	}
	doc.judge()
	return doc, nil
}

func (a *app) newStatusCommand() *cobra.Command {
	return a.asks(&cobra.Command{
		Use:   "status",
		Short: "Tell whether the mesh is well",
		Long: `Tell what the control plane and the agent of this machine, or of every node of
a cluster, are doing: what is in force, which nodes and workloads are in it,
and everything that is wrong. Of a cluster, also how many pods of each namespace
are enrolled, why each other one is not, and what became of each policy.

A workload is called captured only after the kernel's rules were read back
and the proxy took its listeners.

Exit code 3 when something is wrong, such as an edit that was refused, a
workload that is not captured, or a part that does not answer.`,
		Example: `  signet status
  signet status -o json | jq '.findings'
  signet status --context prod -o wide   # a cluster, with every workload
  SIGNET_RUN_DIR=/run/other signet status`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			doc, err := a.status(cmd.Context(), cmd)
			if err != nil {
				return err
			}
			if err := a.printer().Print(doc); err != nil {
				return err
			}
			return findings(len(doc.Findings) > 0)
		},
	})
}
