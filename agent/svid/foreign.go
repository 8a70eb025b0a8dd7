package svid

import (
	"slices"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/bundle"
)

// Foreign returns the bundles of other trust domains, sorted by name. The slice
// is the caller's; the bundles are shared and must not be edited.
func (m *Manager) Foreign() []*bundle.Bundle {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.foreign)
}

// TrustDomain returns the mesh's trust domain; zero before it is known.
func (m *Manager) TrustDomain() spiffeid.TrustDomain {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.td
}

// JWTBundles returns the keys that verify tokens, each set for its own trust
// domain.
func (m *Manager) JWTBundles() *jwtbundle.Set {
	m.mu.Lock()
	defer m.mu.Unlock()
	set := jwtbundle.NewSet(m.jwtKeys)
	for _, b := range m.foreign {
		if b.TrustDomain != m.td { // nobody else speaks for the mesh
			set.Add(b.JWTBundle())
		}
	}
	return set
}

func sameBundles(a, b []*bundle.Bundle) bool {
	return slices.EqualFunc(a, b, func(x, y *bundle.Bundle) bool {
		return x.TrustDomain == y.TrustDomain && x.Digest() == y.Digest()
	})
}
