package ca

import (
	"crypto/x509"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// bundleFunc is an x509bundle.Source made of a function.
type bundleFunc func(spiffeid.TrustDomain) ([]*x509.Certificate, error)

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (f bundleFunc) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	roots, err := f(td)
	if err != nil {
		return nil, err
	}
	return x509bundle.FromX509Authorities(td, roots), nil
}

// GetX509BundleForTrustDomain implements x509bundle.Source with the current
// Bundle. It knows one trust domain, the authority's.
func (a *Authority) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != a.td {
		return nil, fmt.Errorf("ca: no bundle for trust domain %q", td)
	}
	return x509bundle.FromX509Authorities(td, a.Bundle()), nil
}
