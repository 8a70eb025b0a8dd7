package main

import (
	"context"
	"fmt"
	"strings"
	"time"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/output"
)

// generateDoc is what was seen and the policies made of it.
type generateDoc struct {
	output.Meta
	Since    time.Time              `json:"since"`
	Policies []v1alpha1.AllowPolicy `json:"policies"`
	Seen     []*seenPair            `json:"seen"`
	LeftOut  []leftOut              `json:"leftOut"`
	missingNodes
	made []generatedPolicy
}

func newGenerateDoc(o *observations, since time.Time, missing []adminv1.MissingNode) *generateDoc {
	d := &generateDoc{
		Meta: output.NewMeta("GeneratedPolicies"), Since: since.UTC(), Policies: []v1alpha1.AllowPolicy{}, Seen: []*seenPair{}, LeftOut: []leftOut{},
		missingNodes: missingNodes{missing}, made: o.policies(),
	}
	d.Seen = append(d.Seen, o.sorted()...)
	d.LeftOut = append(d.LeftOut, o.leftOut()...)
	for i := range d.made {
		d.Policies = append(d.Policies, d.made[i].document())
	}
	return d
}

// document returns the AllowPolicy.
func (p *generatedPolicy) document() v1alpha1.AllowPolicy {
	var doc v1alpha1.AllowPolicy
	doc.APIVersion, doc.Kind = v1alpha1.GroupVersion, v1alpha1.KindAllowPolicy
	doc.Namespace, doc.Name = p.Namespace, p.Name
	doc.Spec.Target.ServiceAccount = p.Target
	for _, port := range p.Ports {
		doc.Spec.Ports = append(doc.Spec.Ports, int32(port))
	}
	for _, caller := range p.From {
		doc.Spec.From = append(doc.Spec.From, v1alpha1.Peer{ServiceAccount: serviceAccountOf(caller)})
	}
	return doc
}

// serviceAccountOf names a caller as policies do. It is one: identified looked.
func serviceAccountOf(caller string) string {
	w, _ := workloadOf(spiffeid.RequireFromString(caller))
	return w.String()
}

// Text writes what was seen.
func (d *generateDoc) Text(t *output.Text) {
	if len(d.Seen) == 0 {
		t.Line("No connection with a proven identity was recorded since ", instant(d.Since), ".")
	} else {
		var rows [][]output.Cell
		for _, s := range d.Seen {
			rows = append(rows, []output.Cell{output.C(s.Target), output.C(s.Port), output.C(shortID(s.Caller, "")), output.C(s.Connections), output.C(s.Denied), output.C(instant(s.LastSeen))})
		}
		t.Table([]output.Column{{Name: "TARGET"}, {Name: "PORT"}, {Name: "CALLER"}, {Name: "CONNECTIONS"}, {Name: "WOULD BE DENIED"}, {Name: "LAST SEEN"}}, rows)
	}
	for _, l := range d.LeftOut {
		t.Line(output.S(output.Warn, "left out"), ": ", l.Caller, " -> ", l.Target, ": ", l.Why, " (", plural(l.Connections, "connection", "connections"), ", last ", instant(l.LastSeen), ")")
	}
	d.tell(t)
}

// YAML writes the policies as documents that can be applied, with the evidence
// in comments.
func (d *generateDoc) YAML() ([]byte, error) {
	var b strings.Builder
	// Every word of a comment may come from another machine: Clean keeps it in
	// its line.
	comment := func(format string, args ...any) {
		fmt.Fprintf(&b, "# %s\n", output.Clean(fmt.Sprintf(format, args...)))
	}
	comment("Made by `signet policy generate` of what was recorded since %s.", instant(d.Since))
	comment("Each policy admits exactly the callers and ports that were seen. Read before you apply:")
	comment("what happened is not always what should.")
	for _, n := range d.Missing {
		comment("NOT ALL: node %s did not answer, and what it saw is not here: %s", n.Node, n.Error)
	}
	if len(d.LeftOut) > 0 {
		comment("")
		comment("No policy was made for these; enforce will refuse them:")
	}
	for _, l := range d.LeftOut {
		comment("  %s -> %s: %s (%s, last %s)", l.Caller, l.Target, l.Why, plural(l.Connections, "connection", "connections"), instant(l.LastSeen))
	}
	if len(d.made) == 0 {
		comment("")
		comment("No connection with a proven identity was recorded.")
	}
	for i := range d.made {
		p := &d.made[i]
		b.WriteString("---\n")
		for _, e := range p.Evidence {
			comment("%s -> %s:%d  %s, %d of them would be denied without this, last %s", shortID(e.Caller, p.trustDomain.Name()), e.Target, e.Port, plural(e.Connections, "connection", "connections"), e.Denied, instant(e.LastSeen))
		}
		fmt.Fprintf(&b, "apiVersion: %s\nkind: %s\nmetadata:\n  namespace: %q\n  name: %q\nspec:\n  target:\n    serviceAccount: %q\n  ports:\n", v1alpha1.GroupVersion, v1alpha1.KindAllowPolicy, p.Namespace, p.Name, p.Target)
		for _, port := range p.Ports {
			fmt.Fprintf(&b, "    - %d\n", port)
		}
		b.WriteString("  from:\n")
		for _, caller := range p.From {
			fmt.Fprintf(&b, "    - serviceAccount: %q\n", serviceAccountOf(caller))
		}
	}
	return []byte(b.String()), nil
}

func (a *app) newPolicyGenerateCommand() *cobra.Command {
	var since, namespace string
	cmd := a.reaches(&cobra.Command{
		Use:   "generate",
		Short: "Write allow policies for what was observed",
		Long: `Write AllowPolicies that admit exactly what the audit recorded: which identity
reached which port of which service account, and nothing else. Connections that
were allowed count, and those of observe mode that enforce would deny; what was
refused does not. Callers that proved no identity get no policy; they are
listed in comments.

Put a namespace in observe mode, let it work for as long as its rarest job
needs, read what this writes, apply it, and enforce.

Without -o the answer is YAML to apply; -o table tells what was seen. Exit code
3 when a node did not answer, and what it saw is missing.`,
		Example: `  signet policy generate --since 24h > policies.yaml
  signet policy generate --namespace pay -o table
  signet policy generate --context prod --since 168h --namespace shop`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if !cmd.Flags().Changed("output") {
				a.format = output.YAML
			}
			doc, err := a.generate(cmd.Context(), cmd, since, namespace)
			if err != nil {
				return err
			}
			if err := a.printer().Print(doc); err != nil {
				return err
			}
			return findings(len(doc.Missing) > 0)
		},
	}, "release-namespace", "")
	flags := cmd.Flags()
	flags.Lookup("output").DefValue = string(output.YAML)
	flags.StringVar(&since, "since", "24h", "what was recorded at or after this: a duration such as 24h, or an RFC 3339 time")
	flags.StringVarP(&namespace, "namespace", "n", "", "only policies of this namespace")
	return cmd
}

func (a *app) generate(ctx context.Context, cmd *cobra.Command, since, namespace string) (*generateDoc, error) {
	q := adminclient.AuditQuery{Side: audit.Destination, Verdicts: []audit.Verdict{audit.Allowed, audit.Observed}}
	var err error
	if q.Since, err = a.since(since); err != nil {
		return nil, err
	}
	if namespace != "" {
		if err := authz.CheckNamespace(namespace); err != nil {
			return nil, usage(fmt.Errorf("--namespace %w", err))
		}
		q.To = namespace + "/"
	}
	client, err := a.connect(ctx, cmd)
	if err != nil {
		return nil, err
	}
	defer client.Close()
	seen := newObservations()
	var missing []adminv1.MissingNode
	for r, err := range client.MeshAudit(ctx, q, &missing) {
		if err != nil {
			return nil, err
		}
		seen.add(r)
	}
	return newGenerateDoc(seen, q.Since, missing), nil
}
