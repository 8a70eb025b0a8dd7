package main

import (
	"context"
	"errors"
	"fmt"
	"time"

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
	if d.Nodes > 0 {
		defer func() {
			t.Line("")
			t.Line(fmt.Sprintf("%d of %d nodes act by it.", d.Acting, d.Nodes))
		}()
	}
	var rows [][]output.Cell
	for _, r := range d.Certificates {
		rows = append(rows, []output.Cell{output.C(r.Serial), output.C(orDash(r.ID)), output.C(expiry(r.At)), output.C(expiry(r.NotAfter)), output.C(r.Reason)})
	}
	t.Table([]output.Column{{Name: "SERIAL"}, {Name: "ID"}, {Name: "REVOKED"}, {Name: "EXPIRES"}, {Name: "REASON"}}, rows)
}

func expiry(t time.Time) string {
	if t.IsZero() {
		return "-"
	}
	return instant(t)
}

func (a *app) newCARevokeCommand() *cobra.Command {
	var f revokeFlags
	cmd := a.asks(&cobra.Command{
		Use:   "revoke",
		Short: "Have certificates refused by every proxy, before they expire",
		Long: `Have one certificate, or all that an identity has now, refused by every proxy
before they expire.

Who holds it rightly has 2 s to renew it, which its agent does by itself. Then the
tunnels that were opened with it end, with all connections in them, and callers
who show it are refused. It stays so until the certificate has expired. The identity
gets new certificates; a Quarantine is what cuts an identity off.

A token is named by its jti. Agents refuse it at once; a verifier that judges by
itself takes it until it expires. --id leaves tokens alone.

In a cluster it sets spec.revoked of the MeshConfig, which takes the right to patch
that, and waits until every node acts by it.`,
		Example: `  signet audit --serial 694a9701a53b66da1abef0b30d9e99de
  signet ca revoke --serial 694a9701a53b66da1abef0b30d9e99de --reason stolen
  signet ca revoke --id spiffe://mesh.example/ns/shop/sa/web --reason copied`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			switch {
			case f.serial == "" && f.id == "":
				return usage(errors.New("--serial: is missing; `signet certs -o wide` and `signet audit -o json` show serial numbers; --id is for all of an identity"))
			case f.serial != "" && f.id != "":
				return usage(errors.New("--serial and --id: give one of them"))
			case f.reason == "":
				return usage(errors.New("--reason: is missing; say why, for who looks at the list"))
			case f.notAfter != "" && f.id != "":
				return usage(errors.New("--not-after: is of one certificate; give --serial"))
			}
			return a.withRevoked(cmd, func(ctx context.Context, c *link) (adminv1.Revocations, error) {
				switch {
				case c.kube != nil:
					return a.revokeInCluster(ctx, c, f)
				case f.notAfter != "":
					return adminv1.Revocations{}, usage(errors.New("--not-after: is for a cluster; on one machine the issuance log knows"))
				case f.id != "":
					return c.RevokeIdentity(ctx, f.id, f.reason)
				}
				return c.Revoke(ctx, f.serial, f.reason)
			})
		},
	})
	cmd.Flags().StringVar(&f.serial, "serial", "", "the certificate's serial number, or a token's jti, hexadecimal")
	cmd.Flags().StringVar(&f.id, "id", "", "the identity whose certificates are all meant, a SPIFFE ID")
	cmd.Flags().StringVar(&f.reason, "reason", "", "why")
	cmd.Flags().StringVar(&f.notAfter, "not-after", "", "when it expires, if nobody in the cluster knows it: an instant, or a duration from now")
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
