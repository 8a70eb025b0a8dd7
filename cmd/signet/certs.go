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
}

type certState struct {
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
	return certState{c, state}
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
	return false
}

func (d *certsDoc) Text(t *output.Text) {
	if len(d.Certificates) == 0 {
		t.Line("The agent holds no certificates.")
		return
	}
	var rows [][]output.Cell
	for i := range d.Certificates {
		c := &d.Certificates[i]
		style := output.Good
		if c.bad() {
			style = output.Bad
		}
		rows = append(rows, []output.Cell{
			output.C(c.Holder), output.S(style, c.State), output.C(until(d.At, c.NotAfter)), output.C(until(d.At, c.RenewAt)),
			output.C(c.ID), output.C(orDash(c.Serial)), output.C(instant(c.NotBefore)), output.C(instant(c.NotAfter)), output.C(orDash(c.Issuer)),
		})
	}
	t.Table([]output.Column{
		{Name: "HOLDER"}, {Name: "STATE"}, {Name: "EXPIRES"}, {Name: "RENEWS"}, {Name: "ID"},
		{Name: "SERIAL", Wide: true}, {Name: "NOT BEFORE", Wide: true}, {Name: "NOT AFTER", Wide: true}, {Name: "ISSUER", Wide: true},
	}, rows)
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
	return a.answers(&cobra.Command{
		Use:   "certs",
		Short: "List the certificates this node holds",
		Long: `List the certificates that the agent of this node holds: whose they are, when
they expire and when they will be renewed.

Exit code 3 when one is expired, not valid yet, or its renewal fails.`,
		Example: `  signet certs
  signet certs -o wide    # with serial numbers and issuers
  signet certs -o json | jq -r '.certificates[] | select(.state != "valid") | .id'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			client := a.client()
			defer client.Close()
			certs, err := client.Certificates(cmd.Context())
			if err != nil {
				return err
			}
			doc := &certsDoc{Meta: output.NewMeta("Certificates"), At: a.now().UTC(), Certificates: []certState{}}
			for _, c := range certs {
				doc.Certificates = append(doc.Certificates, judgeCert(c, doc.At))
			}
			if err := a.printer().Print(doc); err != nil {
				return err
			}
			return findings(doc.bad())
		},
	})
}
