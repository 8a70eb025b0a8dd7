package main

import (
	"context"
	"errors"
	"fmt"
	"strconv"

	"github.com/spf13/cobra"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/output"
)

type explainDoc struct {
	output.Meta
	adminv1.Explanation
}

func (d *explainDoc) allowed() bool { return d.Verdict == authz.Allow.String() }

func (d *explainDoc) Text(t *output.Text) {
	word := output.S(output.Bad, "DENIED")
	if d.allowed() {
		word = output.S(output.Good, "ALLOWED")
	}
	t.Line(word, "  ", d.From, " -> ", d.To, " :", d.Port)
	t.Line("  ", d.Reason)
	for _, n := range d.Near {
		t.Line("  near miss  ", n.Policy, "  ", n.Why)
	}
	if d.Terminate != "" {
		t.Line("  without a tunnel: mutual TLS to port ", d.Port, " is ended in front of the target, by tls: terminate of ", d.Terminate, "; the verdict is the same")
	}
	if d.Originate != "" {
		t.Line("  inside the tunnel: the caller's proxy speaks mutual TLS to the application on port ", d.Port, ", by tls: originate of ", d.Originate, "; the verdict is the same")
	}
	switch d.Mode {
	case mesh.ModeEnforce.String():
	case mesh.ModeObserve.String():
		if !d.allowed() {
			t.Line("  ", output.S(output.Warn, "observe mode"), ": the connection flows all the same and is recorded as observed")
		}
	default:
		t.Line("  ", output.S(output.Warn, "not enrolled"), ": the target's namespace has mode ", orNone(d.Mode), ", so nothing is enforced for it")
	}
	if t.Wide {
		t.Line("  mode ", orNone(d.Mode), ", revision ", orNone(d.Revision))
	}
}

type explainFlags struct {
	from, to, documents string
	port                int
}

func (a *app) newPolicyExplainCommand() *cobra.Command {
	var f explainFlags
	cmd := a.asks(&cobra.Command{
		Use:   "explain --from ID --to ID --port N",
		Short: "Say whether one identity may reach another, and why",
		Long: `Say whether a caller may reach a port of a workload, which policy decides it,
and, on a denial, why each policy that protects the workload does not admit
the caller. The words are those of the refusal and of the audit record.

The question is put to the running mesh, on this machine or in a cluster, or
with -c to documents that need not be in force. The port is the one on the workload, not the service's.

Exit code 0 when allowed, 3 when denied.`,
		Example: `  signet policy explain --from shop/web --to pay/ledger --port 8443
  signet policy explain -c examples/quickstart --from shop/web --to shop/orders --port 8080
  signet policy explain --context prod --from pod/shop/web-5d9f --to pay/ledger --port 8443
  signet policy explain --from spiffe://mesh.example/ns/shop/sa/web --to pay/ledger --port 8443 -o json`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			e, err := a.explain(cmd.Context(), cmd, f)
			if err != nil {
				return err
			}
			doc := &explainDoc{output.NewMeta("Explanation"), e}
			if err := a.printer().Print(doc); err != nil {
				return err
			}
			return findings(!doc.allowed())
		},
	})
	flags := cmd.Flags()
	flags.StringVar(&f.from, "from", "", "the caller: namespace/service-account, pod/namespace/name or SPIFFE ID")
	flags.StringVar(&f.to, "to", "", "the target, likewise")
	flags.IntVar(&f.port, "port", 0, "the port on the target workload")
	flags.StringVarP(&f.documents, "config", "c", "", "ask this file or directory of documents instead of the running mesh")
	return cmd
}

func (a *app) explain(ctx context.Context, cmd *cobra.Command, f explainFlags) (e adminv1.Explanation, err error) {
	for _, flag := range []struct{ name, value string }{{"from", f.from}, {"to", f.to}} {
		if flag.value == "" {
			return e, usage(fmt.Errorf("--%s is missing; write "+forms, flag.name))
		}
	}
	if f.port < 1 || f.port > 65535 {
		return e, usage(fmt.Errorf("--port %d: write the port on the target workload, 1 to 65535", f.port))
	}
	from, err := parseReference("from", f.from)
	if err != nil {
		return e, err
	}
	to, err := parseReference("to", f.to)
	if err != nil {
		return e, err
	}
	if f.documents != "" {
		return explainDocuments(f.documents, from, to, uint16(f.port))
	}
	client, err := a.connect(ctx, cmd)
	if err != nil {
		return e, err
	}
	defer client.Close()
	fromID, err := liveID(ctx, client.Client, from)
	if err != nil {
		return e, err
	}
	toID, err := liveID(ctx, client.Client, to)
	if err != nil {
		return e, err
	}
	return client.Explain(ctx, fromID, toID, uint16(f.port))
}

// liveID returns the SPIFFE ID of a reference in the running mesh, which is
// asked for its trust domain only when the reference does not name one.
func liveID(ctx context.Context, client *adminclient.Client, r reference) (string, error) {
	if !r.id.IsZero() {
		return r.id.String(), nil
	}
	if r.pod != "" {
		w, err := client.Workload(ctx, r.pod)
		return w.ID, err
	}
	status, err := client.ControlStatus(ctx)
	if err != nil {
		return "", fmt.Errorf("the trust domain of %s/%s is not known (a full SPIFFE ID would need no asking): %w", r.ns, r.sa, err)
	}
	td, err := spiffeid.TrustDomainFromString(status.TrustDomain)
	if err != nil {
		return "", fmt.Errorf("control plane: trust domain: %w", err)
	}
	id, err := r.in(td)
	return id.String(), err
}

// explainDocuments answers from documents as the control plane would that had
// them in force.
func explainDocuments(path string, from, to reference, port uint16) (e adminv1.Explanation, err error) {
	// The node's name has no part in the answer.
	m, err := manifest.Load(path, "this-node")
	if err != nil {
		var refused *manifest.Error
		if errors.As(err, &refused) {
			return e, fmt.Errorf("these documents would be refused; correct them first:\n%w", refused)
		}
		return e, err
	}
	fromID, err := documentedID(m.State, from)
	if err != nil {
		return e, err
	}
	toID, err := documentedID(m.State, to)
	if err != nil {
		return e, err
	}
	model, faults := m.State.Domains().Compile(m.Policies, m.Quarantines...)
	if len(faults) > 0 {
		return e, fmt.Errorf("%s%s: %s: %s", faults[0].Policy, faults[0].Quarantine, faults[0].Field, faults[0].Message)
	}
	view := &mesh.View{Revision: m.Revision, State: m.State, Model: model}
	answer, err := control.Explain(view, fromID.String(), toID.String(), strconv.Itoa(int(port)))
	if err != nil {
		return e, err
	}
	return *answer, nil
}

// documentedID returns the SPIFFE ID of a reference in documents.
func documentedID(state *mesh.State, r reference) (spiffeid.ID, error) {
	if r.pod == "" {
		return r.in(state.TrustDomain)
	}
	w := state.Workload(r.pod)
	if w == nil {
		return spiffeid.ID{}, fmt.Errorf("%s is no workload of these documents", r.pod)
	}
	return w.ID, nil
}
