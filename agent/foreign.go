package agent

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/internal/bundle"
)

// parseForeign reads the bundles of other trust domains. One for the mesh's own
// trust domain, or two for one, would make a root speak for whom it does not.
func parseForeign(own spiffeid.TrustDomain, messages []*nodev1.ForeignBundle) ([]*bundle.Bundle, error) {
	var out []*bundle.Bundle
	for _, m := range messages {
		td, err := spiffeid.TrustDomainFromString(m.GetTrustDomain())
		switch {
		case err != nil:
			return nil, fmt.Errorf("foreign bundle: %w", err)
		case td == own:
			return nil, fmt.Errorf("foreign bundle: %s is this mesh", td)
		case slices.ContainsFunc(out, func(b *bundle.Bundle) bool { return b.TrustDomain == td }):
			return nil, fmt.Errorf("foreign bundle: %s is there twice", td)
		}
		b := &bundle.Bundle{TrustDomain: td, JWTKeys: map[string]crypto.PublicKey{}}
		for _, der := range m.GetRoots() {
			c, err := x509.ParseCertificate(der)
			if err != nil {
				return nil, fmt.Errorf("foreign bundle of %s: %w", td, err)
			}
			b.Roots = append(b.Roots, c)
		}
		for _, k := range m.GetJwtKeys() {
			key, err := x509.ParsePKIXPublicKey(k.GetPublicKey())
			if err == nil {
				err = bundle.CheckJWTKey(key)
			}
			if err != nil {
				return nil, fmt.Errorf("foreign bundle of %s: JWT key %.64q: %w", td, k.GetKeyId(), err)
			}
			b.JWTKeys[k.GetKeyId()] = key
		}
		out = append(out, b)
	}
	slices.SortFunc(out, func(a, b *bundle.Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })
	return out, nil
}
