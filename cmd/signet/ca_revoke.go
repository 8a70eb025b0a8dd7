package main

import (
	"context"
	"errors"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/output"
)

type revokedDoc struct {
	output.Meta
	adminv1.Revocations
}

func (d *revokedDoc) Text(t *output.Text) {
	if len(d.Certificates) == 0 {
		t.Line("no certificate is revoked")
		return
	}
	var rows [][]output.Cell
	for _, r := range d.Certificates {
		rows = append(rows, []output.Cell{output.C(r.Serial), output.C(r.ID), output.C(instant(r.At)), output.C(instant(r.NotAfter)), output.C(r.Reason)})
	}
	t.Table([]output.Column{{Name: "SERIAL"}, {Name: "ID"}, {Name: "REVOKED"}, {Name: "EXPIRES"}, {Name: "REASON"}}, rows)
}

func (a *app) newCARevokeCommand() *cobra.Command {
	var serial, id, reason string
	cmd := a.asks(&cobra.Command{
		Use:   "revoke",
		Short: "Have certificates refused by every proxy, before they expire",
		Long: `Have one certificate, or all that an identity has now, refused by every proxy
before they expire.

Who holds it rightly has 2 s to renew it, which its agent does by itself. Then the
tunnels that were opened with it end, with all connections in them, and callers
who show it are refused. It stays so until the certificate has expired. The identity
gets new certificates; a Quarantine is what cuts an identity off.`,
		Example: `  signet audit --serial 694a9701a53b66da1abef0b30d9e99de
  signet ca revoke --serial 694a9701a53b66da1abef0b30d9e99de --reason stolen
  signet ca revoke --id spiffe://mesh.example/ns/shop/sa/web --reason copied`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case serial == "" && id == "":
				return usage(errors.New("--serial: is missing; `signet certs -o wide` and `signet audit -o json` show serial numbers; --id is for all of an identity"))
			case serial != "" && id != "":
				return usage(errors.New("--serial and --id: give one of them"))
			case reason == "":
				return usage(errors.New("--reason: is missing; say why, for who looks at the list"))
			}
			return a.withRevoked(cmd, func(ctx context.Context, c *link) (adminv1.Revocations, error) {
				if id != "" {
					return c.RevokeIdentity(ctx, id, reason)
				}
				return c.Revoke(ctx, serial, reason)
			})
		},
	})
	cmd.Flags().StringVar(&serial, "serial", "", "the certificate's serial number, hexadecimal")
	cmd.Flags().StringVar(&id, "id", "", "the identity whose certificates are all meant, a SPIFFE ID")
	cmd.Flags().StringVar(&reason, "reason", "", "why")
	return cmd
}

func (a *app) newCARevokedCommand() *cobra.Command {
	return a.asks(&cobra.Command{
		Use:   "revoked",
		Short: "List the certificates that are revoked and have not expired",
		Long:  `List the certificates that are revoked and have not expired.`,
		Example: `  signet ca revoked
  signet ca revoked -o json | jq -r '.certificates[].serial'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withRevoked(cmd, func(ctx context.Context, c *link) (adminv1.Revocations, error) { return c.Revoked(ctx) })
		},
	})
}

func (a *app) withRevoked(cmd *cobra.Command, ask func(context.Context, *link) (adminv1.Revocations, error)) error {
	client, err := a.connect(cmd.Context(), cmd)
	if err != nil {
		return err
	}
	defer client.Close()
	list, err := ask(cmd.Context(), client)
	if err != nil {
		return err
	}
	return a.printer().Print(&revokedDoc{Meta: output.NewMeta("Revocations"), Revocations: list})
}
