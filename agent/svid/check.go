package svid

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/x509check"
)

// check decides whether a chain may be presented as id with the key of pub,
// and returns its leaf. What an issuer returns is believed only after this.
func check(id spiffeid.ID, pub crypto.PublicKey, chain [][]byte, roots []*x509.Certificate, now time.Time) (*x509.Certificate, error) {
	switch {
	case len(chain) == 0:
		return nil, errors.New("the chain is empty")
	case len(chain) > x509check.MaxChain:
		return nil, fmt.Errorf("the chain has %d certificates; at most %d are read", len(chain), x509check.MaxChain)
	case len(roots) == 0:
		return nil, errors.New("the trust bundle is empty, so no certificate can be checked")
	}
	certs := make([]*x509.Certificate, len(chain))
	for i, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, fmt.Errorf("certificate %d of the chain: %w", i, err)
		}
		certs[i] = c
	}
	leaf := certs[0]
	if k, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !k.Equal(pub) {
		return nil, errors.New("the certificate is for another public key than the one asked for")
	}
	if late := leaf.NotBefore.Sub(now); late > 0 {
		return nil, fmt.Errorf("the certificate is not valid yet: this node's clock is %s or more behind the control plane's; set it right", late.Round(time.Minute))
	}
	// Verify refuses whatever is no X509-SVID: more or fewer than one URI SAN, CA
	// flags and CA key usages, an expired or early certificate, a chain to other
	// roots, weak keys and wrong usages.
	got, err := x509check.Verify(certs, x509bundle.FromX509Authorities(id.TrustDomain(), roots), now)
	switch {
	case err != nil && got != id && !got.IsZero():
		return nil, fmt.Errorf("the certificate names %s, asked for was %s", got, id)
	case err != nil:
		return nil, err
	case got != id:
		return nil, fmt.Errorf("the certificate names %s, asked for was %s", got, id)
	case len(leaf.DNSNames)+len(leaf.IPAddresses)+len(leaf.EmailAddresses) > 0:
		return nil, errors.New("the certificate has other names beside the SPIFFE ID")
	}
	return leaf, nil
}
