package main

import (
	"fmt"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/internal/output"
)

func (a *app) newPolicyCommand() *cobra.Command {
	cmd := group("policy", "Check, explain and generate policies", `Check documents before they are in force, ask who may reach whom and why, and
have policies written from what was observed.`, `  signet policy check policies/
  signet policy explain --from shop/web --to pay/ledger --port 8443
  signet policy generate --since 24h > policies.yaml`)
	cmd.AddCommand(a.newPolicyCheckCommand(), a.newPolicyExplainCommand(), a.newPolicyGenerateCommand())
	return cmd
}

type policyCheckDoc struct {
	output.Meta
	Findings []manifest.Finding `json:"findings"`
}

func (d *policyCheckDoc) Text(t *output.Text) {
	if len(d.Findings) == 0 {
		t.Line(output.S(output.Good, "ok"), ": no findings")
		return
	}
	for _, f := range d.Findings {
		place := f.File
		if f.Line > 0 {
			place = fmt.Sprintf("%s:%d", place, f.Line)
		}
		if f.Field != "" {
			place += ":" + f.Field
		}
		t.Line(place, "  ", output.S(output.Bad, f.Code), "  ", f.Message)
	}
	t.Line(plural(len(d.Findings), "finding", "findings"))
}

func (a *app) newPolicyCheckCommand() *cobra.Command {
	return a.answers(&cobra.Command{
		Use:   "check FILE|DIR...",
		Short: "Check documents before they are put in force",
		Long: `Read the documents of files and directories together, as strictly as the
control plane does, and say what is wrong with them: unknown fields, bad
identities, duplicates, references to nothing.

A part of a mesh is enough: a file of policies alone needs no MeshConfig.

Exit code 3 when there are findings.`,
		Example: `  signet policy check examples/quickstart
  signet policy check mesh.yaml pay.yaml
  signet policy check policies/ -o json | jq -r '.findings[].message'`,
		Args: args(cobra.MinimumNArgs(1)),
		RunE: func(_ *cobra.Command, paths []string) error {
			doc := &policyCheckDoc{Meta: output.NewMeta("PolicyCheck"), Findings: []manifest.Finding{}}
			doc.Findings = append(doc.Findings, manifest.Check(paths)...)
			if err := a.printer().Print(doc); err != nil {
				return err
			}
			return findings(len(doc.Findings) > 0)
		},
	})
}
