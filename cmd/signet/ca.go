package main

import (
	"context"
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/output"
)

type caDoc struct {
	output.Meta
	At time.Time `json:"at"` // when it was asked
	adminv1.AuthorityStatus
}

// waiting counts the nodes that the next step waits for.
func (d *caDoc) waiting() (n int) {
	for i := range d.Nodes {
		if d.Nodes[i].Waits != "" {
			n++
		}
	}
	return n
}

func (d *caDoc) Text(t *output.Text) {
	stage := map[adminv1.RotationStage]string{
		adminv1.RotationIdle:       "no rotation is under way",
		adminv1.RotationPublishing: "the next root is published and not trusted everywhere yet; the old one signs",
		adminv1.RotationRetiring:   "the new root signs; the former one is still published",
	}[d.Stage]
	t.Line("trust domain ", d.TrustDomain, ": ", stage)
	if d.Error != "" {
		t.Line(output.S(output.Bad, "the last step failed: "+d.Error))
	}
	if d.Renewal != "" {
		t.Line(output.S(output.Bad, "the intermediate could not be renewed, and ends "+until(d.At, d.NotAfter)+": "+d.Renewal))
	}
	var rows [][]output.Cell
	for _, r := range d.Roots {
		rows = append(rows, []output.Cell{output.C(r.Role), output.C(shortPrint(r.Fingerprint)), output.C(until(d.At, r.NotAfter)), output.C(r.Fingerprint), output.C(instant(r.NotBefore)), output.C(instant(r.NotAfter)), output.C(orDash(r.Key))})
	}
	t.Line("")
	t.Table([]output.Column{{Name: "ROOT"}, {Name: "FINGERPRINT"}, {Name: "EXPIRES"}, {Name: "SHA-256", Wide: true}, {Name: "NOT BEFORE", Wide: true}, {Name: "NOT AFTER", Wide: true}, {Name: "KEY IN TOKEN", Wide: true}}, rows)
	if u := d.Upstream; u != nil {
		t.Line("")
		style := output.Good
		if u.Reason != "Ready" {
			style = output.Bad
		}
		t.Line("Authority above: ", u.Name, ", ", output.S(style, u.Reason))
		t.Line("  ", u.Message)
		if !u.NotAfter.IsZero() {
			t.Line("  The intermediate ends ", until(d.At, u.NotAfter), "; the next is asked for ", until(d.At, u.RenewAt), ".")
		}
		if !u.RetryAt.IsZero() {
			t.Line("  It is asked again ", until(d.At, u.RetryAt), ".")
		}
	}
	if d.Waits != "" {
		t.Line("")
		t.Line(output.S(output.Bad, "It waits: "+d.Waits))
	}
	if !d.Due.IsZero() {
		t.Line("")
		t.Line("It is replaced by itself ", until(d.At, d.Due), ".")
	}
	rows = nil
	for _, n := range d.Nodes {
		style := output.Good
		if n.Waits != "" {
			style = output.Bad
		}
		state := n.Waits
		if state == "" {
			state = "-"
		}
		rows = append(rows, []output.Cell{output.C(n.Name), output.C(prints(n.Trusted)), output.C(prints(n.Used)), output.S(style, state)})
	}
	if len(rows) > 0 {
		t.Line("")
		t.Table([]output.Column{{Name: "NODE"}, {Name: "TRUSTS"}, {Name: "USES"}, {Name: "WAITS FOR"}}, rows)
	}
}

func shortPrint(fingerprint string) string { return fingerprint[:min(16, len(fingerprint))] }

func prints(fingerprints []string) string {
	var out []string
	for _, f := range fingerprints {
		out = append(out, shortPrint(f))
	}
	return orDash(strings.Join(out, ","))
}

func (a *app) newCACommand() *cobra.Command {
	ca := group("ca", "Look at the certificate authority, and replace its root", `Look at the certificate authority of the mesh, and replace its root.

A rotation publishes the next root, waits until every node, its proxy and every
open stream of the Workload API trusts it, has it sign, waits until nothing on any
node uses a certificate of the old root, and withdraws that. It goes on by itself,
also over a restart of the control plane, and begins by itself when two thirds of
the root's life are over.`, `  signet ca status
  signet ca rotate`)
	ca.AddCommand(a.newCAStatusCommand(), a.newCABundleCommand(), a.newCARotateCommand(), a.newCADistrustCommand(), a.newCAAbandonCommand(), a.newCARevokeCommand(), a.newCARevokedCommand(), a.newCARefusedCommand())
	return ca
}

func (a *app) newCAStatusCommand() *cobra.Command {
	return a.asks(&cobra.Command{
		Use:   "status",
		Short: "Say which roots are published, and who trusts and uses which",
		Long: `Say which roots are published, and which of them each node trusts and uses.

Exit code 3 when a step of a rotation has failed, or the root's key does not sign
the intermediate that is due.`,
		Example: `  signet ca status
  signet ca status -o wide    # whole fingerprints
  signet ca status -o json | jq -r '.nodes[] | select(.waits) | .name'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withCA(cmd, func(ctx context.Context, c *link) (adminv1.AuthorityStatus, error) {
				return c.Authority(ctx)
			})
		},
	})
}

func (a *app) newCAAbandonCommand() *cobra.Command {
	return a.asks(&cobra.Command{
		Use:     "abandon",
		Short:   "Withdraw the next root before it signs",
		Long:    `Withdraw the next root before it signs. Once it signs, the rotation has to go on.`,
		Example: `  signet ca abandon`,
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.withCA(cmd, func(ctx context.Context, c *link) (adminv1.AuthorityStatus, error) {
				return c.AbandonRoot(ctx)
			})
		},
	})
}

func (a *app) newCARotateCommand() *cobra.Command {
	var force, noWait bool
	cmd := a.asks(&cobra.Command{
		Use:   "rotate",
		Short: "Replace the root",
		Long: `Replace the root, and wait until that is done. Interrupting the command does not
interrupt the rotation. In a cluster it sets spec.rootNotBefore of the MeshConfig,
which takes the right to patch that.

With --force, a rotation that is under way takes the next step without waiting:
what still waits is cut off until it has caught up, or has joined again.`,
		Example: `  signet ca rotate
  signet ca rotate --no-wait
  signet ca rotate --force    # a node is gone for good and will never answer`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			return a.replaceRoot(cmd, noWait, func(ctx context.Context, c *link) (adminv1.AuthorityStatus, error) {
				switch {
				case c.kube == nil:
					return c.RotateRoot(ctx, force)
				case force:
					return adminv1.AuthorityStatus{}, usage(errors.New("--force: not in a cluster; delete the Node object of a node that is gone for good"))
				}
				return a.declareRotation(ctx, c, "rootNotBefore")
			})
		},
	})
	cmd.Flags().BoolVar(&force, "force", false, "take the next step of a rotation under way now")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return when the rotation has begun")
	return cmd
}

func (a *app) newCADistrustCommand() *cobra.Command {
	var yes, noWait bool
	cmd := a.asks(&cobra.Command{
		Use:   "distrust",
		Short: "Replace a root whose key somebody else may have, at once",
		Long: `Replace a root whose key somebody else may have, and wait until that is done.

It goes through the steps of a rotation in a hurry. All certificates are renewed
at once, and no step waits longer than 15 s for a node: one that is behind is cut
off until it has joined again. When the root is withdrawn, every tunnel from before
ends once, with all connections in it; they can be opened again at once. In a
cluster it sets spec.rootDistrustedBefore of the MeshConfig.`,
		Example: `  signet ca distrust --yes`,
		Args:    args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !yes {
				return usage(errors.New("all connections through tunnels will end once; say --yes if that is wanted"))
			}
			return a.replaceRoot(cmd, noWait, func(ctx context.Context, c *link) (adminv1.AuthorityStatus, error) {
				if c.kube == nil {
					return c.DistrustRoot(ctx)
				}
				return a.declareRotation(ctx, c, "rootDistrustedBefore")
			})
		},
	})
	cmd.Flags().BoolVar(&yes, "yes", false, "end all connections through tunnels once")
	cmd.Flags().BoolVar(&noWait, "no-wait", false, "return when it has begun")
	return cmd
}

// withCA asks the control plane and prints its answer.
func (a *app) withCA(cmd *cobra.Command, ask func(context.Context, *link) (adminv1.AuthorityStatus, error)) error {
	client, err := a.connect(cmd.Context(), cmd)
	if err != nil {
		return err
	}
	defer client.Close()
	s, err := ask(cmd.Context(), client)
	if err != nil {
		return err
	}
	doc := &caDoc{Meta: output.NewMeta("CertificateAuthority"), At: a.now().UTC(), AuthorityStatus: s}
	if err := a.printer().Print(doc); err != nil {
		return err
	}
	return findings(s.Error != "" || s.Renewal != "")
}

// replaceRoot has a replacement of the root begin, and follows it, unless nobody
// wants to wait.
func (a *app) replaceRoot(cmd *cobra.Command, noWait bool, begin func(context.Context, *link) (adminv1.AuthorityStatus, error)) error {
	return a.withCA(cmd, func(ctx context.Context, c *link) (adminv1.AuthorityStatus, error) {
		s, err := begin(ctx, c)
		if err != nil || noWait {
			return s, err
		}
		return a.followRotation(ctx, c.Client)
	})
}

// beginTime is how long a control plane may take to see an edit of its MeshConfig.
const beginTime = 10 * time.Second

// declareRotation writes into the MeshConfig that the root is to be replaced, and
// returns when that has begun, or is done.
func (a *app) declareRotation(ctx context.Context, c *link, field string) (adminv1.AuthorityStatus, error) {
	before, err := c.Authority(ctx)
	if err != nil || field == "rootNotBefore" && before.Stage != adminv1.RotationIdle {
		return before, err // follow the one that is under way
	}
	patch := map[string]any{"spec": map[string]any{field: a.now().UTC().Format(time.RFC3339)}}
	var answer struct{}
	if err := c.kube.Patch(ctx, meshConfigPath, patch, &answer); err != nil {
		return before, fmt.Errorf("set spec.%s of the MeshConfig: %w", field, err)
	}
	for end := time.Now().Add(beginTime); ; {
		s, err := c.Authority(ctx)
		if err != nil || s.Stage != adminv1.RotationIdle && (s.Hurries || field == "rootNotBefore") || s.Error != "" || s.Roots[0].Fingerprint != before.Roots[0].Fingerprint {
			return s, err
		}
		if time.Now().After(end) {
			return s, fmt.Errorf("the MeshConfig says that the root is to be replaced, but the control plane has not begun within %s; see its log", beginTime)
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return s, ctx.Err()
		}
	}
}

// followRotation waits until no rotation is under way, and says on the side what
// it waits for.
func (a *app) followRotation(ctx context.Context, c *adminclient.Client) (adminv1.AuthorityStatus, error) {
	said := ""
	for {
		s, err := c.Authority(ctx)
		if err != nil || s.Stage == adminv1.RotationIdle || s.Error != "" {
			return s, err
		}
		doc := caDoc{AuthorityStatus: s}
		says := string(s.Stage)
		if s.Waits != "" {
			says += ": " + s.Waits
		}
		for _, n := range s.Nodes {
			if n.Waits != "" {
				says = fmt.Sprintf("%s: waiting for %s; %s: %s", s.Stage, plural(doc.waiting(), "node", "nodes"), n.Name, n.Waits)
				break
			}
		}
		if says != said {
			said = says
			_, _ = fmt.Fprintf(a.err, "%s\n", output.Clean(says)) // on the side
		}
		select {
		case <-time.After(200 * time.Millisecond):
		case <-ctx.Done():
			return s, fmt.Errorf("%w; the rotation goes on: see `signet ca status`", ctx.Err())
		}
	}
}
