package v1alpha1

// The ways in which a bundle endpoint proves that it is the right one.
const (
	// ProfileSPIFFE: with an X509-SVID.
	ProfileSPIFFE = "https_spiffe"
	// ProfileWeb: with a certificate of the authorities that the machine trusts.
	ProfileWeb = "https_web"
)

// FederationSpec is the body of a Federation, a document on one machine: it has
// another trust domain's bundle fetched, and its identities believed. Nodes get
// the bundle, workloads get it from the Workload API, and policies may name its
// identities. It is one-way: for calls in the other direction the other trust
// domain does the same.
type FederationSpec struct {
	// TrustDomain is the other trust domain, such as "partner.example".
	TrustDomain string `json:"trustDomain"`
	// BundleEndpointURL is where its bundle is fetched; https, without a user.
	BundleEndpointURL string `json:"bundleEndpointURL"`
	// Profile is https_spiffe or https_web.
	Profile string `json:"profile"`
	// EndpointSPIFFEID is who the endpoint must be, with https_spiffe.
	EndpointSPIFFEID string `json:"endpointSPIFFEID,omitempty"`
	// Bundle is the other trust domain's bundle as a document (a JWK set). It is
	// believed until the first one is fetched; with https_spiffe it proves the
	// endpoint's first certificate.
	Bundle string `json:"bundle,omitempty"`
}
