package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// MeshConfig holds what is true for the whole mesh. There is exactly one; in a
// cluster its name is "mesh".
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=meshconf,categories=signet
// +kubebuilder:printcolumn:name="Trust Domain",type=string,JSONPath=`.spec.trustDomain`
// +kubebuilder:printcolumn:name="SVID TTL",type=string,JSONPath=`.spec.svidTTL`
// +kubebuilder:printcolumn:name="Unknown",type=string,JSONPath=`.spec.unknownDestinations`,priority=1
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
// +kubebuilder:validation:XValidation:rule="self.metadata.name == 'mesh'",message="there is exactly one MeshConfig, and its name must be mesh"
type MeshConfig struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec MeshConfigSpec `json:"spec"`
	// Status is written by the control plane.
	// +optional
	Status MeshConfigStatus `json:"status,omitzero"`
}

// MeshConfigSpec is the body of a MeshConfig.
type MeshConfigSpec struct {
	// TrustDomain is the SPIFFE trust domain, such as "mesh.example".
	// Required, and cannot be edited while the mesh runs.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9_-]+([.][a-z0-9_-]+)*$')",message="must be a bare name such as mesh.example: lower-case letters, digits, dots, dashes and underscores"
	// +kubebuilder:validation:XValidation:rule="self == oldSelf",message="a trust domain cannot be edited: every identity of the mesh is in it"
	TrustDomain string `json:"trustDomain"`

	// SVIDTTL is the lifetime of workload certificates. Default 1h,
	// at least 4s, at most 24h.
	// +optional
	// +kubebuilder:validation:Type=string
	// +kubebuilder:default="1h"
	// +kubebuilder:validation:MaxLength=32
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9]+([.][0-9]+)?(ms|s|m|h))+$') && duration(self) >= duration('4s') && duration(self) <= duration('24h')",message="must be a duration from 4s to 24h, such as 1h or 90s"
	SVIDTTL *metav1.Duration `json:"svidTTL,omitempty"`

	// SVIDKeyType is the kind of key that workload certificates are made for:
	// "ec-p256" (default), "ec-p384", "rsa-2048" or "rsa-4096". An edit is
	// followed with each workload's next certificate.
	// +optional
	// +kubebuilder:default=ec-p256
	// +kubebuilder:validation:Enum=ec-p256;ec-p384;rsa-2048;rsa-4096
	SVIDKeyType string `json:"svidKeyType,omitempty"`

	// UnknownDestinations says what a captured workload may do with a
	// destination that is no workload or service of the mesh: "plain"
	// (default; passed through as it is and recorded) or "refuse".
	// +optional
	// +kubebuilder:default=plain
	// +kubebuilder:validation:Enum=plain;refuse
	UnknownDestinations string `json:"unknownDestinations,omitempty"`

	// RootNotBefore replaces the root, step by step and while everything runs,
	// if it was made before this instant. An instant that is still to come
	// replaces it then. Default: the root is replaced when two thirds of its
	// life are over.
	// +optional
	RootNotBefore *metav1.Time `json:"rootNotBefore,omitempty"`

	// RootDistrustedBefore says that a root that was made before this instant
	// may be in somebody else's hands. It is replaced in a hurry: certificates
	// below it are renewed at once, no step waits longer than 15 s for a node,
	// and when it is withdrawn, all connections through tunnels end once.
	// +optional
	RootDistrustedBefore *metav1.Time `json:"rootDistrustedBefore,omitempty"`

	// Revoked are certificates and tokens that nobody is to take any more.
	// `kubectl signet ca revoke` writes it. An entry whose certificate has expired
	// does nothing, and goes when the next one is added.
	// +optional
	// +listType=map
	// +listMapKey=serial
	// +kubebuilder:validation:MaxItems=256
	Revoked []Revocation `json:"revoked,omitempty"`
}

// Revocation names a certificate, or a token, that nobody is to take any more.
type Revocation struct {
	// Serial is the certificate's serial number, or the token's jti: lower-case
	// hexadecimal, two digits for each byte.
	// +kubebuilder:validation:MinLength=2
	// +kubebuilder:validation:MaxLength=40
	// +kubebuilder:validation:XValidation:rule="self.matches('^([0-9a-f]{2})+$') && !self.startsWith('00')",message="must be a serial number as `kubectl signet certs -o wide` shows it: lower-case hexadecimal, two digits for each byte, without leading zero bytes"
	Serial string `json:"serial"`
	// Reason says why, for who looks at the list or finds a connection refused.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	Reason string `json:"reason"`
	// ID is whose it is, for who looks at the list.
	// +optional
	// +kubebuilder:validation:MaxLength=2048
	ID string `json:"id,omitempty"`
	// Since is when it was revoked. Whoever holds the certificate rightly has 2 s
	// from then to renew it; without it, it is refused at once.
	// +optional
	Since *metav1.Time `json:"since,omitempty"`
	// NotAfter is when the certificate expires, and the entry does nothing any
	// more. Without it the entry is in force until it is removed.
	// +optional
	NotAfter *metav1.Time `json:"notAfter,omitempty"`
}

// MeshConfigStatus says what became of a MeshConfig.
type MeshConfigStatus struct {
	// ObservedGeneration is the generation that the status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// ProgrammedNodes of Nodes refuse what is revoked; absent while nothing is.
	// +optional
	ProgrammedNodes int32 `json:"programmedNodes,omitempty"`
	// Nodes of the mesh.
	// +optional
	Nodes int32 `json:"nodes,omitempty"`
	// Conditions has ConditionAccepted, ConditionProgrammed while anything is
	// revoked, and ConditionAuthority where the mesh has an authority above.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// MeshConfigList is a list of MeshConfigs.
//
// +kubebuilder:object:root=true
type MeshConfigList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []MeshConfig `json:"items"`
}
