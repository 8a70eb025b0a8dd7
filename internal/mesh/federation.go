package mesh

import (
	"errors"
	"fmt"
	"net/url"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/bundle"
)

// Federation is another trust domain whose bundle is fetched. It is immutable.
type Federation struct {
	Name        string // of the document
	TrustDomain spiffeid.TrustDomain
	URL         string
	// Endpoint is who serves the bundle; zero: the web's authorities say.
	Endpoint spiffeid.ID
	// Bundle is the document to begin with; nil: there is none.
	Bundle []byte
}

// ParseFederation reads the body of a Federation of the mesh own. On an error it
// also returns the field at fault.
func ParseFederation(own spiffeid.TrustDomain, name string, spec *v1alpha1.FederationSpec) (f Federation, field string, err error) {
	f.Name, f.URL = name, spec.BundleEndpointURL
	switch f.TrustDomain, err = ParseTrustDomain(spec.TrustDomain); {
	case spec.TrustDomain == "":
		return f, "spec.trustDomain", errors.New("is missing; name the other trust domain")
	case err != nil:
		return f, "spec.trustDomain", err
	case f.TrustDomain == own:
		return f, "spec.trustDomain", fmt.Errorf("is %q, which is this mesh; its own bundle comes from its own authority only", own.Name())
	}
	if err := CheckBundleURL(f.URL); err != nil {
		return f, "spec.bundleEndpointURL", err
	}
	switch {
	case spec.Profile == v1alpha1.ProfileWeb && spec.EndpointSPIFFEID != "":
		return f, "spec.endpointSPIFFEID", errors.New("has no meaning with the profile https_web; remove it")
	case spec.Profile == v1alpha1.ProfileWeb:
	case spec.Profile != v1alpha1.ProfileSPIFFE:
		return f, "spec.profile", fmt.Errorf("is %q; use https_spiffe or https_web", spec.Profile)
	default:
		if f.Endpoint, err = spiffeid.FromString(spec.EndpointSPIFFEID); err != nil {
			return f, "spec.endpointSPIFFEID", fmt.Errorf("%w; with the profile https_spiffe, name who serves the bundle", err)
		}
		switch {
		case f.Endpoint.Path() == "":
			return f, "spec.endpointSPIFFEID", fmt.Errorf("%q has no path, and names nobody", f.Endpoint)
		case f.Endpoint.TrustDomain() == own:
			return f, "spec.endpointSPIFFEID", fmt.Errorf("is of this mesh, %q; another trust domain's bundle is served by another", own.Name())
		case f.Endpoint.TrustDomain() == f.TrustDomain && spec.Bundle == "":
			return f, "spec.bundle", errors.New("is missing; with the profile https_spiffe it proves the endpoint's first certificate")
		}
	}
	if spec.Bundle != "" {
		f.Bundle = []byte(spec.Bundle)
		first, err := bundle.Parse(f.TrustDomain, f.Bundle)
		if err != nil {
			return f, "spec.bundle", err
		}
		if len(first.Roots) == 0 {
			return f, "spec.bundle", fmt.Errorf("has no usable root of %s: %s", f.TrustDomain, strings.Join(first.Ignored, "; "))
		}
	}
	return f, "", nil
}

// CheckBundleURL refuses what cannot be the URL of a bundle endpoint.
func CheckBundleURL(s string) error {
	u, err := url.Parse(s)
	switch {
	case s == "":
		return errors.New("is missing; say where the bundle is fetched, such as https://partner.example/bundle")
	case len(s) > 2048:
		return fmt.Errorf("is %d bytes long; at most 2048 are allowed", len(s))
	case err != nil:
		return errors.New("is no URL")
	case u.Scheme != "https":
		return fmt.Errorf("has the scheme %q; a bundle is fetched by https only", u.Scheme)
	case u.User != nil:
		return errors.New("names a user; an endpoint asks for none")
	case u.Hostname() == "" || u.Opaque != "":
		return errors.New("names no host")
	case u.Fragment != "":
		return errors.New("has a fragment; remove it")
	}
	return nil
}

// ParseTrustDomain reads a bare trust domain name, in its one spelling.
func ParseTrustDomain(s string) (spiffeid.TrustDomain, error) {
	if len(s) > 255 {
		return spiffeid.TrustDomain{}, fmt.Errorf("is %d bytes long, at most 255 are allowed", len(s))
	}
	if strings.Contains(s, ":") {
		return spiffeid.TrustDomain{}, fmt.Errorf("%q must be a bare name such as mesh.example", s)
	}
	if strings.HasPrefix(s, ".") || strings.HasSuffix(s, ".") || strings.Contains(s, "..") {
		return spiffeid.TrustDomain{}, fmt.Errorf("%q has a dot at an end or two in a row", s)
	}
	td, err := spiffeid.TrustDomainFromString(s)
	if err != nil {
		return td, fmt.Errorf("%q: %w", s, err)
	}
	return td, nil
}
