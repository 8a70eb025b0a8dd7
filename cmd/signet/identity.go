package main

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
)

// reference is an identity as it was given on the command line: a SPIFFE ID,
// or "namespace/service-account" of whatever trust domain the mesh has.
type reference struct {
	id     spiffeid.ID // set when given whole
	ns, sa string      // set when short
	pod    string      // "namespace/name", set when a pod was given
}

// forms is how errors tell what may be written.
const forms = "NAMESPACE/SERVICE-ACCOUNT, pod/NAMESPACE/NAME or a SPIFFE ID"

func parseReference(flag, s string) (reference, error) {
	bad := func(why any) (reference, error) {
		return reference{}, usage(fmt.Errorf("--%s %q: %v; write "+forms+" such as spiffe://mesh.example/ns/shop/sa/web", flag, s, why))
	}
	if strings.HasPrefix(s, "spiffe://") {
		id, err := spiffeid.FromString(s)
		if err != nil {
			return bad(err)
		}
		return reference{id: id}, nil
	}
	if rest, ok := strings.CutPrefix(s, "pod/"); ok && strings.Contains(rest, "/") {
		ns, name, _ := strings.Cut(rest, "/")
		if err := authz.CheckNamespace(ns); err != nil {
			return bad(fmt.Errorf("namespace %w", err))
		}
		if err := authz.CheckName(name); err != nil {
			return bad(fmt.Errorf("pod %w", err))
		}
		return reference{pod: rest}, nil
	}
	ns, sa, ok := strings.Cut(s, "/")
	if !ok || strings.Contains(sa, "/") {
		return bad("is neither")
	}
	if err := authz.CheckNamespace(ns); err != nil {
		return bad(fmt.Errorf("namespace %w", err))
	}
	if err := authz.CheckName(sa); err != nil {
		return bad(fmt.Errorf("service account %w", err))
	}
	return reference{ns: ns, sa: sa}, nil
}

// parseParty reads a filter of audit records: an identity, or "namespace/" for
// all of a namespace.
func parseParty(flag, s string) (string, error) {
	if ns, ok := strings.CutSuffix(s, "/"); ok && authz.CheckNamespace(ns) == nil {
		return s, nil
	}
	r, err := parseReference(flag, s)
	if err != nil {
		return "", err
	}
	if r.pod != "" {
		return "", usage(fmt.Errorf("--%s %q: records are found by identity; write NAMESPACE/SERVICE-ACCOUNT, NAMESPACE/ or a SPIFFE ID", flag, s))
	}
	if !r.id.IsZero() {
		return r.id.String(), nil
	}
	return r.ns + "/" + r.sa, nil
}

// in returns the SPIFFE ID in a mesh. What pod a reference names must be known.
func (r reference) in(td spiffeid.TrustDomain) (spiffeid.ID, error) {
	if !r.id.IsZero() {
		return r.id, nil
	}
	return spiffeid.FromSegments(td, "ns", r.ns, "sa", r.sa)
}

// shortID writes an ID as "namespace/service-account" where it has that form.
// The trust domain stays when it is not the usual one.
func shortID(id, usual string) string {
	parsed, err := spiffeid.FromString(id)
	if err != nil {
		return id
	}
	parts := strings.Split(parsed.Path(), "/")
	if len(parts) != 5 || parts[1] != "ns" || parts[3] != "sa" || (usual != "" && parsed.TrustDomain().Name() != usual) {
		return id
	}
	return parts[2] + "/" + parts[4]
}
