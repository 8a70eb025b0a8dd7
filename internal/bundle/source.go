package bundle

import (
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// GetX509BundleForTrustDomain implements x509bundle.Source, for the bundle's own
// trust domain alone.
func (b *Bundle) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if b == nil || td != b.TrustDomain {
		return nil, fmt.Errorf("no bundle for trust domain %q", td)
	}
	return x509bundle.FromX509Authorities(td, b.Roots), nil
}

// JWTBundle returns the keys that verify tokens.
func (b *Bundle) JWTBundle() *jwtbundle.Bundle {
	return jwtbundle.FromJWTAuthorities(b.TrustDomain, b.JWTKeys)
}
