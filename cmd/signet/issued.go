package main

import (
	"context"
	"strings"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
)

// issued finds out whose a certificate or token is: from the issuance log of the
// control plane that is asked, from the audit of the node that it was issued to, or
// from the log of another replica. What a replica has issued to somebody else than the
// node's agent, no node knows.
func (a *app) issued(ctx context.Context, l *link, serial string) (i adminv1.Issuance, err error) {
	if i, err = l.Issued(ctx, serial); err != nil || i.Found {
		return i, err
	}
	// A node that does not answer is missing in the records that are asked for next.
	found, _, err := issuedToNodes(ctx, l, adminclient.AuditQuery{Serial: serial, Limit: 1})
	switch {
	case err != nil:
		return i, err
	case len(found) > 0:
		return found[0], nil
	case l.kube == nil:
		return i, nil
	}
	replicas, err := a.replicas(ctx, l.kube)
	defer func() {
		for _, r := range replicas {
			r.Close()
		}
	}()
	if err != nil {
		return i, err
	}
	return issuedBy(ctx, replicas, serial)
}

// issuedBy asks the logs of replicas.
func issuedBy(ctx context.Context, replicas []*link, serial string) (i adminv1.Issuance, err error) {
	for _, r := range replicas {
		if i, err = r.Issued(ctx, serial); err != nil || i.Found {
			return i, err
		}
	}
	return i, nil
}

// issuedToNodes reads from the audits of the nodes what the control plane has issued to
// them, oldest first, and says which nodes did not answer.
func issuedToNodes(ctx context.Context, l *link, q adminclient.AuditQuery) (found []adminv1.Issuance, missing []adminv1.MissingNode, err error) {
	q.Verdicts = []audit.Verdict{audit.Issued}
	for r, err := range l.MeshAudit(ctx, q, &missing) {
		if err != nil {
			return nil, nil, err
		}
		if r.Issuance != nil {
			found = append(found, issuance(&r))
		}
	}
	return found, missing, nil
}

// issuance is what a node's record says.
func issuance(r *audit.Record) adminv1.Issuance {
	kind := ""
	if r.Issuance.Kind == audit.KindJWT {
		kind = adminv1.IssuanceJWT
	}
	return adminv1.Issuance{
		Found: true, Evidence: adminv1.EvidenceNode, Kind: kind, Serial: r.Source.Serial, ID: r.Source.ID, Node: r.Node, Workload: r.Source.Workload,
		At: r.Start, NotBefore: r.Issuance.NotBefore, NotAfter: r.Issuance.NotAfter, Outcome: string(r.Verdict),
	}
}

// issuedRow says what was issued, and for how long.
func issuedRow(r *audit.Record) (from, to, reason string) {
	to = r.Issuance.Kind
	if len(r.Issuance.Audience) > 0 {
		to += " for " + strings.Join(r.Issuance.Audience, ", ")
	}
	reason = r.Source.Serial + ", valid until " + instant(r.Issuance.NotAfter)
	if r.Source.Workload != "" {
		reason = r.Source.Workload + ": " + reason
	}
	return party(r.Source), to, reason
}
