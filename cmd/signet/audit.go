package main

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/output"
)

type auditDoc struct {
	output.Meta
	// Issued is set when one certificate was asked for.
	Issued  *adminv1.Issuance `json:"issued,omitempty"`
	Records []audit.Record    `json:"records"`
	missingNodes
}

// recordDoc is one record of a stream.
type recordDoc struct {
	output.Meta
	audit.Record
}

func (d *auditDoc) Text(t *output.Text) {
	if d.Issued != nil {
		d.tellIssued(t)
	}
	if len(d.Records) == 0 {
		t.Line("No records.")
	} else {
		t.Table(recordColumns, recordRows(d.Records...))
	}
	d.tell(t)
}

// tellIssued says what the certificate is whose connections follow.
func (d *auditDoc) tellIssued(t *output.Text) {
	i := d.Issued
	if !i.Found {
		t.Line("Nobody here is known to have issued it: no issuance log of the control plane has it, and no audit of a node.")
		t.Line("")
		return
	}
	of := ""
	if i.Workload != "" {
		of = " for " + i.Workload
	}
	if i.Node != "" {
		of += " on node " + i.Node
	}
	what := "certificate "
	if i.Kind == adminv1.IssuanceJWT {
		what = "token "
	}
	by := ""
	if i.Evidence == adminv1.EvidenceNode {
		by = " (says the audit of that node)"
	}
	t.Line(what, i.Serial, " of ", i.ID, of, ": ", i.Outcome, " at ", instant(i.At), ", valid until ", instant(i.NotAfter), by)
	t.Line("")
}

func (d *recordDoc) Text(t *output.Text) { t.Table(recordColumns, recordRows(d.Record)) }

var recordColumns = []output.Column{
	{Name: "START", Min: 20}, {Name: "SIDE", Min: 11}, {Name: "VERDICT", Min: 8}, {Name: "FROM", Min: 16}, {Name: "TO", Min: 16},
	{Name: "ADDRESS", Min: 16}, {Name: "TRANSPORT", Min: 9},
	{Name: "NODE", Wide: true, Min: 8}, {Name: "GROUP", Wide: true, Min: 14}, {Name: "SENT", Wide: true, Min: 8}, {Name: "RECEIVED", Wide: true, Min: 8},
	{Name: "DURATION", Wide: true, Min: 10}, {Name: "ENDED", Wide: true, Min: 8}, {Name: "REVISION", Wide: true, Min: 12}, {Name: "ID", Wide: true, Min: 12},
	{Name: "REASON"},
}

func recordRows(records ...audit.Record) [][]output.Cell {
	var rows [][]output.Cell
	for _, r := range records {
		duration, group := "open", "-"
		if !r.End.IsZero() {
			duration = r.End.Sub(r.Start).Round(time.Millisecond).String()
		}
		if r.TLS != nil {
			group = orDash(r.TLS.Group)
		}
		from, to, reason := party(r.Source), party(r.Destination), orDash(r.Reason)
		if r.Refusal != nil {
			from, to, reason = refused(&r)
		} else if r.Issuance != nil {
			from, to, reason = issuedRow(&r)
		}
		rows = append(rows, []output.Cell{
			output.C(instant(r.Start)), output.C(orDash(string(r.Side))), output.S(verdictStyle(r.Verdict), r.Verdict),
			output.C(from), output.C(to), output.C(orDash(r.Destination.Address)), output.C(orDash(r.Transport)),
			output.C(orDash(r.Node)), output.C(group), output.C(r.BytesSent), output.C(r.BytesReceived), output.C(duration), output.C(orDash(r.Ended)),
			output.C(orDash(truncated(r.Revision))), output.C(orDash(r.ID)), output.C(reason),
		})
	}
	return rows
}

// refused says who was refused what identity, and why. Nothing of it was proven.
func refused(r *audit.Record) (from, to, reason string) {
	f := r.Refusal
	var who []string
	if r.Source.Workload != "" {
		who = append(who, r.Source.Workload)
	} else if f.PodUID != "" {
		who = append(who, "pod "+f.PodUID)
	}
	if f.UID != nil {
		who = append(who, fmt.Sprintf("uid %d", *f.UID))
	}
	if f.Executable != "" {
		who = append(who, f.Executable)
	}
	from = "(" + strings.Join(who, " ") + ")"
	if len(who) == 0 {
		from = "-"
	}
	to = f.Call
	if f.ID != "" {
		to = shortID(f.ID, "")
	}
	reason = f.Kind + ": " + r.Reason
	if f.Count > 1 {
		reason = fmt.Sprintf("%d times: %s", f.Count, reason)
	}
	if f.Several {
		reason = "several callers, " + reason
	}
	return from, to, reason
}

// party names one end by what was proven; what was only seen is bracketed.
func party(p audit.Party) string {
	switch {
	case p.ID != "":
		return shortID(p.ID, "")
	case p.Workload != "":
		return "(" + p.Workload + ")"
	case p.Address != "":
		return "(" + p.Address + ")"
	}
	return "-"
}

func orDash(s string) string {
	if s == "" {
		return "-"
	}
	return s
}

func verdictStyle(v audit.Verdict) output.Style {
	switch v {
	case audit.Allowed, audit.Issued:
		return output.Good
	case audit.Observed:
		return output.Warn
	}
	return output.Bad
}

// auditFlags are the filters as they were given.
type auditFlags struct {
	since, from, to, verdict, side, node, serial string
	limit                                        int
	follow                                       bool
}

func (a *app) newAuditCommand() *cobra.Command {
	var f auditFlags
	cmd := a.asks(&cobra.Command{
		Use:   "audit",
		Short: "Show the connections that were allowed and denied",
		Long: `Show the audit records of this machine, or of every node of a cluster, oldest
first: one for each connection and side, with both identities, the verdict and
the policy that decided.

Names in brackets were seen but not proven: no handshake took place.

Verdicts: allowed; denied (refused by policy, the application was never
contacted); observed (flowed in observe mode, would have been denied);
failed (the peer could not be reached or was not who it had to be); refused (no
connection: a process, or this node, was refused an identity. FROM is who it was,
TO what was asked for; how often is in the reason; what the control plane refused
is in ` + "`signet ca refused`" + `); issued (no connection: this node got a certificate or
token; shown only when asked for, by --verdict or --serial).

With -o json the answer is one document; with --follow it is one document
per line. Denied connections are what a mesh is for, so they are no finding:
the exit code is 0. It is 3 when a node of the cluster did not answer, and
records are therefore missing.`,
		Example: `  signet audit --since 10m
  signet audit --verdict denied --to pay/ledger -o wide
  signet audit --since 2026-11-23T09:00:00Z --from shop/web -o json
  signet audit -f --verdict denied
  signet audit --verdict refused    # who asked for an identity and got none
  signet audit --serial 5f0ad1c2    # who got this certificate, and where it was shown
  signet audit --verdict issued --from shop/web    # what was issued to an identity, and when
  signet audit --context prod --node worker-1 --since 1h`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error { return a.audit(cmd.Context(), cmd, f) },
	})
	flags := cmd.Flags()
	flags.StringVar(&f.since, "since", "", "only connections that were open at or after this: a duration such as 10m, or an RFC 3339 time")
	flags.StringVar(&f.from, "from", "", "only from this identity: namespace/service-account, namespace/ or SPIFFE ID")
	flags.StringVar(&f.to, "to", "", "only to this identity, likewise")
	flags.StringVar(&f.verdict, "verdict", "", "only allowed|denied|observed|failed|refused|issued")
	flags.StringVar(&f.side, "side", "", "only records made at the source|destination")
	flags.StringVar(&f.node, "node", "", "only the records of this node")
	flags.StringVar(&f.serial, "serial", "", "only connections that the certificate with this serial number was shown in, and whose it is")
	flags.IntVar(&f.limit, "limit", 1000, "the newest N records at most; 0 is all")
	flags.BoolVarP(&f.follow, "follow", "f", false, "go on with new records until interrupted")
	complete(cmd, "verdict", "allowed", "denied", "observed", "failed", "refused", "issued")
	complete(cmd, "side", "source", "destination")
	cmd.AddCommand(a.newAuditVerifyCommand())
	return cmd
}

// query reads the filters.
func (a *app) query(f auditFlags) (q adminclient.AuditQuery, err error) {
	q = adminclient.AuditQuery{Side: audit.Side(f.side), Limit: f.limit, Node: f.node, Serial: f.serial}
	if strings.Trim(strings.ToLower(f.serial), "0123456789abcdef:") != "" {
		return q, usage(fmt.Errorf("--serial %q: must be hexadecimal digits, as `signet certs -o wide` shows them", f.serial))
	}
	if f.limit < 0 {
		return q, usage(fmt.Errorf("--limit %d: must be 0 or more", f.limit))
	}
	if f.verdict != "" {
		v, err := audit.ParseVerdict(f.verdict)
		if err != nil {
			return q, usage(fmt.Errorf("--verdict %w", err))
		}
		q.Verdicts = []audit.Verdict{v}
	}
	if !slices.Contains([]audit.Side{"", audit.Source, audit.Destination}, q.Side) {
		return q, usage(fmt.Errorf("--side %q: must be source or destination", f.side))
	}
	if q.Since, err = a.since(f.since); err != nil {
		return q, err
	}
	for _, end := range []struct {
		flag, given string
		id          *string
	}{{"from", f.from, &q.From}, {"to", f.to, &q.To}} {
		if end.given == "" {
			continue
		}
		if *end.id, err = parseParty(end.flag, end.given); err != nil {
			return q, err
		}
	}
	return q, nil
}

func (a *app) since(s string) (time.Time, error) {
	if s == "" {
		return time.Time{}, nil
	}
	if d, err := time.ParseDuration(s); err == nil && d >= 0 {
		return a.now().Add(-d), nil
	}
	if at, err := time.Parse(time.RFC3339, s); err == nil {
		return at, nil
	}
	return time.Time{}, usage(fmt.Errorf("--since %q: write a duration such as 10m or 2h, or a time such as 2026-11-23T09:00:00Z", s))
}

func (a *app) audit(ctx context.Context, cmd *cobra.Command, f auditFlags) error {
	q, err := a.query(f)
	if err != nil {
		return err
	}
	client, err := a.connect(ctx, cmd)
	if err != nil {
		return err
	}
	defer client.Close()
	if f.follow {
		return a.followAudit(ctx, client.Client, q)
	}
	doc := &auditDoc{Meta: output.NewMeta("AuditRecords"), Records: []audit.Record{}}
	if q.Serial != "" {
		issued, err := a.issued(ctx, client, q.Serial)
		if err != nil {
			return err
		}
		doc.Issued = &issued
	}
	for r, err := range client.MeshAudit(ctx, q, &doc.Missing) {
		if err != nil {
			return err
		}
		doc.Records = append(doc.Records, r)
	}
	if err := a.printer().Print(doc); err != nil {
		return err
	}
	return findings(len(doc.Missing) > 0)
}

// stopped makes an interrupt by the user the ordinary end of a stream.
func stopped(ctx context.Context, err error) error {
	if ctx.Err() != nil && errors.Is(err, context.Canceled) {
		err = nil
	}
	return err
}
