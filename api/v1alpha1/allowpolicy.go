package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// AllowPolicy lets callers reach workloads of its own namespace. Nothing is
// allowed that no AllowPolicy allows; the order of policies has no meaning.
//
// +kubebuilder:object:root=true
// +kubebuilder:subresource:status
// +kubebuilder:resource:scope=Namespaced,path=allowpolicies,shortName=allow,categories=signet
// +kubebuilder:printcolumn:name="Target",type=string,JSONPath=`.spec.target.serviceAccount`,description="the protected service account; empty: the whole namespace"
// +kubebuilder:printcolumn:name="Ports",type=string,JSONPath=`.spec.ports`,priority=1
// +kubebuilder:printcolumn:name="Accepted",type=string,JSONPath=`.status.conditions[?(@.type=="Accepted")].status`
// +kubebuilder:printcolumn:name="Programmed",type=string,JSONPath=`.status.conditions[?(@.type=="Programmed")].status`
// +kubebuilder:printcolumn:name="On",type=integer,JSONPath=`.status.programmedNodes`,description="nodes that act by this policy"
// +kubebuilder:printcolumn:name="Of",type=integer,JSONPath=`.status.nodes`,description="nodes that run what it protects"
// +kubebuilder:printcolumn:name="Age",type=date,JSONPath=`.metadata.creationTimestamp`
type AllowPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec AllowPolicySpec `json:"spec"`
	// Status is written by the control plane.
	// +optional
	Status AllowPolicyStatus `json:"status,omitzero"`
}

// The values of AllowPolicySpec.TLS. The second is one of ServiceEndpoint.TLS too.
const (
	TLSTerminate = "terminate"
	TLSOriginate = "originate"
)

// AllowPolicySpec is the body of an AllowPolicy.
//
// +kubebuilder:validation:XValidation:rule="!has(self.tls) || has(self.ports)",message="tls needs ports: name those that it is about"
// +kubebuilder:validation:XValidation:rule="!has(self.alpn) || has(self.tls) && self.tls == 'originate'",message="alpn needs tls: originate, for it is what the proxies of callers offer in that TLS"
type AllowPolicySpec struct {
	// Target chooses whom the policy protects.
	// +optional
	Target Target `json:"target,omitempty"`
	// Ports are the ports on the target workload (not the service's).
	// Absent means every port.
	// +optional
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	// +kubebuilder:validation:items:Minimum=1
	// +kubebuilder:validation:items:Maximum=65535
	// +kubebuilder:validation:XValidation:rule="self.all(p, !(p in [15001, 15006, 15008]))",message="15001, 15006 and 15008 belong to the mesh itself and cannot be granted"
	Ports []int32 `json:"ports,omitempty"`
	// TLS says between whom mutual TLS is spoken on Ports, which must be given,
	// beside that of the mesh's tunnels. Who is let in is for all policies of
	// the target to say, as ever.
	//
	// "terminate": where a caller without a tunnel proves an identity by mutual
	// TLS, the proxy of the target's node ends that TLS, and the application,
	// which speaks none, gets what is in it.
	//
	// "originate": the application itself asks for mutual TLS. The proxies of
	// captured callers, which speak none, speak it for them, inside the tunnel,
	// with the caller's certificate and to nobody but the target's identity.
	// It goes before "terminate" of another policy.
	// +optional
	// +kubebuilder:validation:Enum=terminate;originate
	TLS string `json:"tls,omitempty"`
	// ALPN is the protocol that captured callers speak on Ports, which is offered
	// to an application that has to agree on one: "h2" for gRPC. Absent: none.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=255
	// +kubebuilder:validation:Pattern=`^[A-Za-z0-9._/+-]+$`
	ALPN string `json:"alpn,omitempty"`
	// From lists the callers; one match is enough. At least one is required.
	// +listType=atomic
	// +kubebuilder:validation:MinItems=1
	// +kubebuilder:validation:MaxItems=256
	From []Peer `json:"from"`
}

// Target chooses workloads of the policy's namespace.
type Target struct {
	// ServiceAccount in the policy's namespace. Absent means all of them.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=253
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$')",message="must be the name of a service account in the policy's namespace: lower-case letters, digits, dashes and dots, no slash and no wildcard"
	ServiceAccount string `json:"serviceAccount,omitempty"`
}

// Peer names callers; exactly one field is set.
//
// +kubebuilder:validation:XValidation:rule="[has(self.serviceAccount), has(self.namespace), has(self.spiffeID)].filter(set, set).size() == 1",message="set exactly one of serviceAccount, namespace, spiffeID"
type Peer struct {
	// ServiceAccount is "name" (in the policy's namespace) or "namespace/name".
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=317
	// +kubebuilder:validation:XValidation:rule="self.matches('^([a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?/)?[a-z0-9]([-a-z0-9]*[a-z0-9])?([.][a-z0-9]([-a-z0-9]*[a-z0-9])?)*$') && self.split('/').all(part, part.size() <= 253)",message="must be name or namespace/name: lower-case letters, digits, dashes and dots, one slash at most and no wildcard"
	ServiceAccount string `json:"serviceAccount,omitempty"`
	// Namespace admits every service account of a namespace.
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=63
	// +kubebuilder:validation:XValidation:rule="self.matches('^[a-z0-9]([-a-z0-9]*[a-z0-9])?$')",message="must be the name of a namespace: lower-case letters, digits and dashes, and no wildcard"
	Namespace string `json:"namespace,omitempty"`
	// SPIFFEID is a SPIFFE ID; a path segment that is exactly "*" stands for
	// any one segment: "spiffe://mesh.example/ns/*/sa/backup".
	// +optional
	// +kubebuilder:validation:MinLength=1
	// +kubebuilder:validation:MaxLength=2048
	// +kubebuilder:validation:XValidation:rule="self.matches('^spiffe://[a-z0-9._-]+/')",message="must start with spiffe://, a trust domain without a wildcard, and a slash, such as spiffe://mesh.example/ns/*/sa/backup"
	// +kubebuilder:validation:XValidation:rule="!self.matches('^spiffe://[a-z0-9._-]+/') || self.matches('^spiffe://[^/]+(/([*]|[A-Za-z0-9._-]+))+$')",message="each path segment must be * or letters, digits, dots, dashes and underscores; a wildcard must be a whole segment"
	// +kubebuilder:validation:XValidation:rule="!self.matches('/[.][.]?(/|$)')",message="a path segment must not be . or .."
	SPIFFEID string `json:"spiffeID,omitempty"`
}

// AllowPolicyStatus says what became of an AllowPolicy.
type AllowPolicyStatus struct {
	// ObservedGeneration is the generation that the status is about.
	// +optional
	ObservedGeneration int64 `json:"observedGeneration,omitempty"`
	// ProgrammedNodes of Nodes act by the policy. Nodes counts those that run
	// a workload that the policy protects.
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

// AllowPolicyList is a list of AllowPolicies.
//
// +kubebuilder:object:root=true
type AllowPolicyList struct {
	metav1.TypeMeta `json:",inline"`
	metav1.ListMeta `json:"metadata,omitempty"`

	Items []AllowPolicy `json:"items"`
}
