package main

import (
	"github.com/spf13/cobra"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/output"
)

type verifyDoc struct {
	output.Meta
	adminv1.AuditVerification
}

func (d *verifyDoc) Text(t *output.Text) {
	if d.Fault != "" {
		t.Line(output.S(output.Bad, "SIG0405"), "  the audit store is not intact: ", d.Fault)
		t.Line("         fix: keep a copy of the store as evidence; restore a backup, or move it away and restart the agent")
		return
	}
	t.Line(output.S(output.Good, "intact"), ": ", plural(int(d.Batches), "batch", "batches"), ", ", plural(int(d.Records), "record", "records"), ", each linked to the one before")
}

func (a *app) newAuditVerifyCommand() *cobra.Command {
	var node string
	cmd := a.asks(&cobra.Command{
		Use:   "verify",
		Short: "Check that no audit record was changed or removed",
		Long: `Read the whole audit store of this machine, or of every node of a cluster, and
check that every batch of records is intact and linked to the one before it.

Exit code 3 when it is not, or when a node did not answer.`,
		Example: "  signet audit verify\n  signet audit verify --context prod --node worker-1",
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := a.connect(cmd.Context(), cmd)
			if err != nil {
				return err
			}
			defer client.Close()
			v, err := client.VerifyMeshAudit(cmd.Context(), node)
			if err != nil {
				return err
			}
			if client.Cluster() {
				return a.printVerifications(v)
			}
			one := v.Nodes[0].AuditVerification
			if err := a.printer().Print(&verifyDoc{output.NewMeta("AuditVerification"), one}); err != nil {
				return err
			}
			return findings(one.Fault != "")
		},
	})
	cmd.Flags().StringVar(&node, "node", "", "only the store of this node")
	return cmd
}

// verificationsDoc is what became of the stores of a cluster's nodes.
type verificationsDoc struct {
	output.Meta
	Nodes []adminv1.NodeVerification `json:"nodes"`
	missingNodes
}

func (d *verificationsDoc) Text(t *output.Text) {
	for _, n := range d.Nodes {
		t.Line("node ", n.Node, ":")
		(&verifyDoc{AuditVerification: n.AuditVerification}).Text(t)
	}
	d.tell(t)
}

func (a *app) printVerifications(v adminv1.MeshVerification) error {
	doc := &verificationsDoc{output.NewMeta("AuditVerifications"), v.Nodes, missingNodes{v.Missing}}
	if err := a.printer().Print(doc); err != nil {
		return err
	}
	bad := len(v.Missing) > 0
	for _, n := range v.Nodes {
		bad = bad || n.Fault != ""
	}
	return findings(bad)
}
