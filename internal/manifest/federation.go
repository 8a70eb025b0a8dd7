package manifest

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// federations reads the other trust domains. Two documents for one would be two
// answers to which keys are its own.
func (b *builder) federations() {
	first := map[spiffeid.TrustDomain]*document{}
	for _, d := range b.byKind[v1alpha1.KindFederation] {
		f, field, err := mesh.ParseFederation(b.state.TrustDomain, d.meta.Name, d.spec.(*v1alpha1.FederationSpec))
		if err != nil {
			d.fault(CodeValue, field, "%v", err)
		}
		if f.TrustDomain.IsZero() {
			continue
		}
		if other := first[f.TrustDomain]; other != nil {
			d.fault(CodeDuplicate, "spec.trustDomain", "another Federation for %q is at %s:%d; remove one of them", f.TrustDomain.Name(), other.file, other.line)
			continue
		}
		first[f.TrustDomain] = d
		b.state.Federations = append(b.state.Federations, f)
	}
}

// domains are the trust domains that policies may name.
func (b *builder) domains() authz.Domains {
	d := b.state.Domains()
	d.Own = b.domain
	return d
}
