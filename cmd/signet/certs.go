package main

import (
	"fmt"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/output"
)

type certsDoc struct {
	output.Meta
	// At is the instant that the states were judged at.
	At           time.Time   `json:"at"`
	Certificates []certState `json:"certificates"`
	missingNodes
	cluster bool // nodes have names
}

type certState struct {
	// Node is set in a cluster.
	Node string `json:"node,omitempty"`
	adminv1.Certificate
	// State is valid, renewing (renewal is due), failing (the first issue or
	// a renewal failed), pending (there is none yet), expired, or early (not
	// valid yet).
	State string `json:"state"`
}

// The states of certificates.
const (
	certValid    = "valid"
	certRenewing = "renewing"
	certFailing  = "failing"
	certPending  = "pending"
	certExpired  = "expired"
	certEarly    = "early"
)

func judgeCert(c adminv1.Certificate, now time.Time) certState {
	state := certValid
	switch {
	case c.Serial == "" && c.LastError == "":
		state = certPending
	case c.Serial == "":
		state = certFailing
	case !now.Before(c.NotAfter):
		state = certExpired
	case now.Before(c.NotBefore):
		state = certEarly
	case c.LastError != "":
		state = certFailing
	case !now.Before(c.RenewAt):
		state = certRenewing
	}
	return certState{Certificate: c, State: state}
}

func (c *certState) bad() bool {
	return c.State == certExpired || c.State == certFailing || c.State == certEarly
}

func (d *certsDoc) bad() bool {
	for i := range d.Certificates {
		if d.Certificates[i].bad() {
			return true
		}
	}
	return len(d.Missing) > 0
}

func (d *certsDoc) Text(t *output.Text) {
	defer d.tell(t)
	if len(d.Certificates) == 0 {
		t.Line("There are no certificates.")
		return
	}
	var rows [][]output.Cell
	for i := range d.Certificates {
		c := &d.Certificates[i]
		style := output.Good
		if c.bad() {
			style = output.Bad
		}
		row := []output.Cell{
			output.C(c.Holder), output.S(style, c.State), output.C(until(d.At, c.NotAfter)), output.C(until(d.At, c.RenewAt)),
			output.C(c.ID), output.C(orDash(c.Serial)), output.C(instant(c.NotBefore)), output.C(instant(c.NotAfter)), output.C(orDash(c.Issuer)),
		}
		if d.cluster {
			row = append([]output.Cell{output.C(c.Node)}, row...)
		}
		rows = append(rows, row)
	}
	columns := []output.Column{
		{Name: "HOLDER"}, {Name: "STATE"}, {Name: "EXPIRES"}, {Name: "RENEWS"}, {Name: "ID"},
		{Name: "SERIAL", Wide: true}, {Name: "NOT BEFORE", Wide: true}, {Name: "NOT AFTER", Wide: true}, {Name: "ISSUER", Wide: true},
	}
	if d.cluster {
		columns = append([]output.Column{{Name: "NODE"}}, columns...)
	}
	t.Table(columns, rows)
	for i := range d.Certificates {
		if c := &d.Certificates[i]; c.LastError != "" {
			t.Line(c.Holder, ": ", output.S(output.Bad, "issue failed: "+c.LastError))
		}
	}
}

// instant writes a time as people in several zones can compare it.
func instant(at time.Time) string {
	if at.IsZero() {
		return "-"
	}
	return at.UTC().Format("2006-01-02 15:04:05Z")
}

// until writes the distance to an instant, "in 5m0s" or "5m0s ago".
func until(now, at time.Time) string {
	if at.IsZero() {
		return "-"
	}
	d := at.Sub(now).Round(time.Second)
	if d < 0 {
		return fmt.Sprintf("%s ago", -d)
	}
	return fmt.Sprintf("in %s", d)
}

func (a *app) newCertsCommand() *cobra.Command {
	var node string
	cmd := a.asks(&cobra.Command{
		Use:   "certs",
		Short: "List the certificates that nodes hold",
		Long: `List the certificates that the agent of this machine, or of every node of a
cluster, holds: whose they are, when they expire and when they will be renewed.

Exit code 3 when one is expired, not valid yet, or its renewal fails, or when a
node did not answer.`,
		Example: `  signet certs
  signet certs -o wide    # with serial numbers and issuers
  signet certs --context prod --node worker-1
  signet certs -o json | jq -r '.certificates[] | select(.state != "valid") | .id'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client, err := a.connect(cmd.Context(), cmd)
			if err != nil {
				return err
			}
			defer client.Close()
			certs, err := client.MeshCertificates(cmd.Context(), node)
			if err != nil {
				return err
			}
			doc := &certsDoc{Meta: output.NewMeta("Certificates"), At: a.now().UTC(), Certificates: []certState{}, missingNodes: missingNodes{certs.Missing}, cluster: client.Cluster()}
			for _, c := range certs.Certificates {
				s := judgeCert(c.Certificate, doc.At)
				s.Node = c.Node
				doc.Certificates = append(doc.Certificates, s)
			}
			if err := a.printer().Print(doc); err != nil {
				return err
			}
			return findings(doc.bad())
		},
	})
	cmd.Flags().StringVar(&node, "node", "", "only the certificates of this node")
	return cmd
}
