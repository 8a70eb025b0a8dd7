package main

import (
	"fmt"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/output"
)

type refusalsDoc struct {
	output.Meta
	adminv1.Refusals
}

func (d *refusalsDoc) Text(t *output.Text) {
	if len(d.Refused) == 0 {
		t.Line("nothing was refused")
		return
	}
	var rows [][]output.Cell
	for _, r := range d.Refused {
		why := r.Why
		if r.Several {
			why = "several, " + why
		}
		rows = append(rows, []output.Cell{
			output.C(instant(r.First)), output.C(instant(r.Last)), output.C(r.Count), output.C(orDash(r.Node)), output.C(orDash(r.From)),
			output.C(r.Call), output.S(output.Bad, why), output.C(orDash(r.Workload)), output.C(r.Reason),
		})
	}
	t.Table([]output.Column{
		{Name: "FIRST"}, {Name: "LAST", Wide: true}, {Name: "COUNT"}, {Name: "NODE"}, {Name: "FROM"}, {Name: "CALL"}, {Name: "WHY"},
		{Name: "WORKLOAD", Wide: true}, {Name: "REASON"},
	}, rows)
}

func (a *app) newCARefusedCommand() *cobra.Command {
	var since string
	var limit int
	cmd := a.asks(&cobra.Command{
		Use:   "refused",
		Short: "List what the control plane refused nodes, and others who called it",
		Long: `List what the control plane refused nodes, and others who called it, oldest first:
an identity of a workload that the node does not run, or of a pod that is gone, too
many requests, a certificate that is revoked. It is in the issuance log, the first
of a kind at once and the rest as a number within a minute.

NODE is what the caller's certificate proved. Somebody who uses a stolen one is
listed under the name of the node that it was stolen from, with the address that
they called from.

In a cluster this is the log of the replica that answers, since it started; all have
the metric signet_control_refused_total, and say it in their own logs. Processes
that a node's agent refused are in ` + "`signet audit --verdict refused`" + `.`,
		Example: `  signet ca refused --since 1h
  signet ca refused -o json | jq -r '.refused[] | select(.why == "node") | .node'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if limit < 0 {
				return usage(fmt.Errorf("--limit %d: must be 0 or more", limit))
			}
			after, err := a.since(since)
			if err != nil {
				return err
			}
			client, err := a.connect(cmd.Context(), cmd)
			if err != nil {
				return err
			}
			defer client.Close()
			list, err := client.Refused(cmd.Context(), after, limit)
			if err != nil {
				return err
			}
			return a.printer().Print(&refusalsDoc{Meta: output.NewMeta("Refusals"), Refusals: list})
		},
	})
	cmd.Flags().StringVar(&since, "since", "", "only what was refused at or after this: a duration such as 10m, or an RFC 3339 time")
	cmd.Flags().IntVar(&limit, "limit", 1000, "the newest N at most; 0 is all")
	return cmd
}
