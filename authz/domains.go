package authz

import (
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Domains are the trust domains whose identities documents may name.
type Domains struct {
	Own spiffeid.TrustDomain
	// Foreign are those that the mesh is federated with.
	Foreign []spiffeid.TrustDomain
}

// pattern reads a pattern of identities that a mesh can meet. One of a trust
// domain whose keys nobody here has can match nobody.
func (d Domains) pattern(s string) (Pattern, error) {
	pattern, err := ParsePattern(s)
	switch {
	case err != nil:
		return Pattern{}, err
	case pattern.td == d.Own:
		return pattern, nil
	case !slices.Contains(d.Foreign, pattern.td):
		return Pattern{}, fmt.Errorf("SPIFFE ID pattern %q is of trust domain %q, and nobody of that is known here; this mesh is %q, write spiffe://%s%s, or add a Federation for %q", s, pattern.td.Name(), d.Own.Name(), d.Own.Name(), pattern.path, pattern.td.Name())
	}
	return pattern, checkForeign(pattern)
}

// CheckWorkload says why an identity cannot be that of a workload that the mesh calls.
// If not all Federations are known, its trust domain may be any.
func (d Domains) CheckWorkload(id spiffeid.ID, anyDomain bool) error {
	if anyDomain {
		d.Foreign = append(slices.Clone(d.Foreign), id.TrustDomain())
	}
	pattern, err := d.pattern(id.String())
	if _, exact := pattern.Exact(); err == nil && (!exact || !ofWorkload(pattern)) {
		err = fmt.Errorf("%q is no identity of a workload; those are spiffe://%s/ns/<namespace>/sa/<service account>", id, id.TrustDomain().Name())
	}
	return err
}

// checkForeign holds a pattern of another trust domain to what a proxy compares
// without knowing who exists there.
func checkForeign(p Pattern) error {
	if !ofWorkload(p) {
		return fmt.Errorf("SPIFFE ID pattern %q is of another trust domain; of those, spiffe://%s/ns/<namespace>/sa/<service account> can be named, with * for the service account only", p, p.td.Name())
	}
	return nil
}

func ofWorkload(p Pattern) bool {
	s := strings.Split(p.path, "/")
	return len(s) == 5 && s[1] == "ns" && s[2] != "*" && s[3] == "sa"
}
