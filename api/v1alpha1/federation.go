package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// The ways in which a bundle endpoint proves that it is the right one.
const (
	// ProfileSPIFFE: with an X509-SVID.
	ProfileSPIFFE = "https_spiffe"
	// ProfileWeb: with a certificate of the authorities that the machine trusts.
	ProfileWeb = "https_web"
)

// Federation has another trust domain's bundle fetched, and its identities
// believed. Nodes get the bundle, workloads get it from the Workload API, and
// policies may name its identities. It is one-way: for calls in the other
// direction the other trust domain does the same. Of a Federation that is not
// valid (Accepted is False) nobody is believed.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=fed,categories=signet
// +kubebuilder:printcolumn:name="Trust Domain",type=string,JSONPath=`.spec.trustDomain`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Fetched",type=string,JSONPath=`.status.conditions[?(@.type=="Fetched")].status`
// +kubebuilder:printcolumn:name="Sequence",type=integer,JSONPath=`.status.sequence`
// +kubebuilder:printcolumn:name="Last",type=date,JSONPath=`.status.fetchedAt`,description="when the bundle was last fetched"
// +kubebuilder:printcolumn:name="URL",type=string,JSONPath=`.spec.bundleEndpointURL`,priority=1
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Federation struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec FederationSpec `json:"spec"`
	// Status is written by the control plane.
	// +optional
	Status FederationStatus `json:"status,omitzero"`
}

// FederationSpec is the body of a Federation.
//
// +kubebuilder:validation:XValidation:rule="self.profile != 'https_web' || !has(self.endpointSPIFFEID)",message="endpointSPIFFEID has no meaning with the profile https_web; remove it"
// +kubebuilder:validation:XValidation:rule="self.profile != 'https_spiffe' || has(self.endpointSPIFFEID)",message="endpointSPIFFEID is missing; with the profile https_spiffe, name who serves the bundle"
// +kubebuilder:validation:XValidation:rule="!has(self.endpointSPIFFEID) || has(self.bundle) || !self.endpointSPIFFEID.startsWith('spiffe://' + self.trustDomain + '/')",message="bundle is missing; with the profile https_spiffe it proves the endpoint's first certificate"
type FederationSpec struct {
	// TrustDomain is the other trust domain, such as "partner.example".
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9_-]+([.][a-z0-9_-]+)*$')",message="must be a bare name such as partner.example: lower-case letters, digits, dots, dashes and underscores"
	TrustDomain string `json:"trustDomain"`
	// BundleEndpointURL is where its bundle is fetched; https, without a user.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:XValidation:rule="self.matches('^https://[^/?#@]+([/?][^#]*)?$')",message="must be an https URL without a user and a fragment, such as https://partner.example/bundle"
	BundleEndpointURL string `json:"bundleEndpointURL"`
	// Profile is https_spiffe or https_web.
	// +kubebuilder:validation:Enum=https_spiffe;https_web
	Profile string `json:"profile"`
	// EndpointSPIFFEID is who the endpoint must be, with https_spiffe.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:XValidation:rule="self.matches('^spiffe://[a-z0-9._-]+(/[A-Za-z0-9._-]+)+$')",message="must be a SPIFFE ID with a path, such as spiffe://partner.example/signet/bundle"
	EndpointSPIFFEID string `json:"endpointSPIFFEID,omitempty"`
	// Bundle is the other trust domain's bundle as a document (a JWK set). It is
	// believed until the first one is fetched; with https_spiffe it proves the
	// endpoint's first certificate.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=524288
	Bundle string `json:"bundle,omitempty"`
}

// FederationStatus says what became of a Federation.
type FederationStatus struct {
	// ObservedGeneration is the generation that the status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// FetchedAt is when the bundle was last fetched, to within a minute.
	// +optional
	FetchedAt *metav1.Time `json:"fetchedAt,omitempty"`
	// Sequence is the number of the bundle that is believed.
	// +optional
	Sequence int64 `json:"sequence,omitempty"`
	// Copy is the bundle that was fetched last, as replicas of the control plane
	// go on with it. It is of their making; an edit of it is an edit of whom they
	// believe.
	// +optional
	// +kubebuilder:validation:MaxLength=1200000
	Copy string `json:"copy,omitempty"`
	// Conditions has ConditionAccepted and ConditionFetched.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// FederationList is a list of Federations.
//
// +kubebuilder:object:root=true
type FederationList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Federation `json:"items"`
}
