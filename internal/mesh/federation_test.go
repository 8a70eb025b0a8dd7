package mesh

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

// root is a bundle whose one certificate ends in the middle.
const root = `{"keys":[{"use":"x509-svid","kty":"EC","x5c":["MIIBVTCB+6ADAgECAgEBMAoGCCqGSM49BAMCMAAwIBcNMjYwMTAxMDAwMDAwWhgPMjA5OTAxMDEwMDAwMDBaMAAwWTATBgcqhkjOPQIBBggqhkjOPQMBBwNCAAQ="]}]}`

// TestParseFederation: what cannot be a federation is refused, with the field:
// the mesh's own name, which would let another's keys speak for it, URLs that the
// specification forbids, and endpoints that nobody could prove.
func TestParseFederation(t *testing.T) {
	own := spiffeid.RequireTrustDomainFromString("mesh.test")
	web := v1alpha1.FederationSpec{TrustDomain: "partner.test", BundleEndpointURL: "https://partner.test:8443/bundle?x=1", Profile: v1alpha1.ProfileWeb}
	if f, field, err := ParseFederation(own, "partner", &web); err != nil || f.TrustDomain.Name() != "partner.test" || !f.Endpoint.IsZero() {
		t.Fatal(f, field, err)
	}
	third := web
	third.Profile, third.EndpointSPIFFEID = v1alpha1.ProfileSPIFFE, "spiffe://third.test/server"
	if f, field, err := ParseFederation(own, "partner", &third); err != nil || f.Endpoint.String() != third.EndpointSPIFFEID {
		t.Fatal(f, field, err)
	}
	for name, c := range map[string]struct {
		field string
		edit  func(*v1alpha1.FederationSpec)
	}{
		"own trust domain":     {"spec.trustDomain", func(s *v1alpha1.FederationSpec) { s.TrustDomain = "mesh.test" }},
		"none":                 {"spec.trustDomain", func(s *v1alpha1.FederationSpec) { s.TrustDomain = "" }},
		"an ID":                {"spec.trustDomain", func(s *v1alpha1.FederationSpec) { s.TrustDomain = "spiffe://partner.test" }},
		"upper case":           {"spec.trustDomain", func(s *v1alpha1.FederationSpec) { s.TrustDomain = "Partner.test" }},
		"no URL":               {"spec.bundleEndpointURL", func(s *v1alpha1.FederationSpec) { s.BundleEndpointURL = "" }},
		"plain":                {"spec.bundleEndpointURL", func(s *v1alpha1.FederationSpec) { s.BundleEndpointURL = "http://partner.test/bundle" }},
		"a user":               {"spec.bundleEndpointURL", func(s *v1alpha1.FederationSpec) { s.BundleEndpointURL = "https://me:secret@partner.test" }},
		"no host":              {"spec.bundleEndpointURL", func(s *v1alpha1.FederationSpec) { s.BundleEndpointURL = "https:///bundle" }},
		"a fragment":           {"spec.bundleEndpointURL", func(s *v1alpha1.FederationSpec) { s.BundleEndpointURL = "https://partner.test/#x" }},
		"a file":               {"spec.bundleEndpointURL", func(s *v1alpha1.FederationSpec) { s.BundleEndpointURL = "file:///etc/passwd" }},
		"no profile":           {"spec.profile", func(s *v1alpha1.FederationSpec) { s.Profile = "" }},
		"unknown profile":      {"spec.profile", func(s *v1alpha1.FederationSpec) { s.Profile = "https" }},
		"web with an identity": {"spec.endpointSPIFFEID", func(s *v1alpha1.FederationSpec) { s.EndpointSPIFFEID = "spiffe://partner.test/x" }},
		"SPIFFE without":       {"spec.endpointSPIFFEID", func(s *v1alpha1.FederationSpec) { s.Profile = v1alpha1.ProfileSPIFFE }},
		"an endpoint, no path": {"spec.endpointSPIFFEID", func(s *v1alpha1.FederationSpec) {
			s.Profile, s.EndpointSPIFFEID = v1alpha1.ProfileSPIFFE, "spiffe://partner.test"
		}},
		"an endpoint of ours": {"spec.endpointSPIFFEID", func(s *v1alpha1.FederationSpec) {
			s.Profile, s.EndpointSPIFFEID = v1alpha1.ProfileSPIFFE, "spiffe://mesh.test/x"
		}},
		"nothing to begin with": {"spec.bundle", func(s *v1alpha1.FederationSpec) {
			s.Profile, s.EndpointSPIFFEID = v1alpha1.ProfileSPIFFE, "spiffe://partner.test/x"
		}},
		"no bundle":           {"spec.bundle", func(s *v1alpha1.FederationSpec) { s.Bundle = "{}" }},
		"a bundle of nothing": {"spec.bundle", func(s *v1alpha1.FederationSpec) { s.Bundle = `{"keys":[]}` }},
		"a broken root":       {"spec.bundle", func(s *v1alpha1.FederationSpec) { s.Bundle = root }},
	} {
		spec := web
		c.edit(&spec)
		if _, field, err := ParseFederation(own, "partner", &spec); err == nil || field != c.field || strings.Contains(err.Error(), "secret") {
			t.Errorf("%s: %s %v; want a fault at %s", name, field, err, c.field)
		}
	}
}
