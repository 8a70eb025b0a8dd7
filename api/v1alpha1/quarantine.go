package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Quarantine cuts identities and nodes off, in both directions, at once,
// whatever policies say, and in namespaces that are only observed too. Of a
// Quarantine that is not valid (Accepted is False) every part that is valid is
// in force all the same: what was meant to be cut off is not let through
// because of a mistake beside it.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Cluster,shortName=quar,categories=signet
// +kubebuilder:printcolumn:name="Reason",type=string,JSONPath=`.spec.reason`
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].status`
// +kubebuilder:printcolumn:name="On",type=integer,JSONPath=`.status.programmedNodes`,description="nodes that refuse what is cut off"
// +kubebuilder:printcolumn:name="Of",type=integer,JSONPath=`.status.nodes`,description="nodes of the mesh"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type Quarantine struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec QuarantineSpec `json:"spec"`
	// Status is written by the control plane.
	// +optional
	Status QuarantineStatus `json:"status,omitzero"`
}

// QuarantineSpec is the body of a Quarantine. At least one of Identities,
// ServiceAccounts, Namespaces and Nodes is set.
//
// +kubebuilder:validation:XValidation:rule="has(self.identities) || has(self.serviceAccounts) || has(self.namespaces) || has(self.nodes)",message="name whom to cut off: set at least one of identities, serviceAccounts, namespaces, nodes"
type QuarantineSpec struct {
	// Reason says why, for whoever finds a connection refused.
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=256
	Reason string `json:"reason"`
	// Identities are SPIFFE IDs; a path segment that is exactly "*" stands
	// for any one segment: "spiffe://mesh.example/ns/*/sa/backup".
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=2048
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^spiffe://[a-z0-9._-]+/')",message="must start with spiffe://, a trust domain without a wildcard, and a slash, such as spiffe://mesh.example/ns/*/sa/backup"
	// +kubebuilder:validation:items:XValidation:rule="!self.matches('^spiffe://[a-z0-9._-]+/') || self.matches('^spiffe://[^/]+(/([*]|[A-Za-z0-9._-]+))+$')",message="each path segment must be * or letters, digits, dots, dashes and underscores; a wildcard must be a whole segment"
	// +kubebuilder:validation:items:XValidation:rule="!self.matches('/[.][.]?(/|$)')",message="a path segment must not be . or .."
	Identities []string `json:"identities,omitempty"`
	// ServiceAccounts are given as "namespace/name".
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=317
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$') && self.split('/').all(part, part.size() <= 253)",message="must be namespace/name: lower-case letters, digits, dashes and dots, one slash and no wildcard"
	ServiceAccounts []string `json:"serviceAccounts,omitempty"`
	// Namespaces are cut off with every service account in them.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=63
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="must be the name of a namespace: lower-case letters, digits and dashes, and no wildcard"
	Namespaces []string `json:"namespaces,omitempty"`
	// Nodes are cut off with everything that runs on them: they get neither
	// certificates nor configuration any more.
	// +optional
	// +listType=set
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:MinLength=1
	// +kubebuilder:validation:items:MaxLength=253
	// +kubebuilder:validation:items:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="must be the name of a node: lower-case letters, digits, dashes and dots, and no wildcard"
	Nodes []string `json:"nodes,omitempty"`
}

// QuarantineStatus says what became of a Quarantine.
type QuarantineStatus struct {
	// ObservedGeneration is the generation that the status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// ProgrammedNodes of Nodes refuse what is cut off. Nodes counts every
	// node of the mesh.
	// +optional
	// +kubebuilder:validation:Minimum=0
	ProgrammedNodes int32 `json:"programmedNodes"`
	// +optional
	// +kubebuilder:validation:Minimum=0
	Nodes int32 `json:"nodes"`
	// Conditions has ConditionAccepted and ConditionProgrammed.
	// +optional
	// +listType=map
	// +listMapKey=type
	// +kubebuilder:validation:MaxItems=8
	Conditions []metav1.Condition `json:"conditions,omitempty"`
}

// QuarantineList is a list of Quarantines.
//
// +kubebuilder:object:root=true
type QuarantineList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []Quarantine `json:"items"`
}
