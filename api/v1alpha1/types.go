// Package v1alpha1 defines the documents that users write: the same kinds and
// fields are read from a directory of YAML on one machine and from a
// Kubernetes API server.
package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Names that appear in every document.
const (
	// GroupVersion is the apiVersion of every kind in this package.
	GroupVersion = "signet.dev/v1alpha1"

	// AnnotationMesh on a Namespace enrolls it: enforce, observe or off.
	AnnotationMesh = "signet.dev/mesh"

	KindMeshConfig    = "MeshConfig"
	KindWorkloadEntry = "WorkloadEntry"
	KindServiceEntry  = "ServiceEntry"
	KindAllowPolicy   = "AllowPolicy"
)

// MeshConfig holds what is true for the whole mesh. There is exactly one.
type MeshConfig struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec MeshConfigSpec `json:"spec"`
}

// MeshConfigSpec is the body of a MeshConfig.
type MeshConfigSpec struct {
	// TrustDomain is the SPIFFE trust domain, such as "mesh.example".
	// Required, and cannot be edited while the mesh runs.
	TrustDomain string `json:"trustDomain"`

	// SVIDTTL is the lifetime of workload certificates. Default 1h,
	// at least 4s, at most 24h.
	SVIDTTL *metav1.Duration `json:"svidTTL,omitempty"`

	// UnknownDestinations says what a captured workload may do with a
	// destination that is no workload or service of the mesh: "plain"
	// (default; passed through as it is and recorded) or "refuse".
	UnknownDestinations string `json:"unknownDestinations,omitempty"`
}

// WorkloadEntry declares one workload of one machine: its identity, how a
// process proves that it is that workload, and, optionally, the network
// namespace whose traffic is captured into the mesh.
type WorkloadEntry struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec WorkloadEntrySpec `json:"spec"`
}

// WorkloadEntrySpec is the body of a WorkloadEntry.
type WorkloadEntrySpec struct {
	// ServiceAccount names the identity:
	// spiffe://<trust domain>/ns/<namespace>/sa/<service account>.
	ServiceAccount string `json:"serviceAccount"`

	// Node is the machine the workload runs on. Empty means the machine
	// that the documents are read on.
	Node string `json:"node,omitempty"`

	// Attest lists what a process must be to be given the identity over the
	// Workload API. Every field that is set must match. Absent: the
	// Workload API never gives this identity to anyone.
	Attest *Attest `json:"attest,omitempty"`

	// Capture puts a network namespace's TCP traffic into the mesh.
	Capture *Capture `json:"capture,omitempty"`
}

// Attest is a set of facts about a process, as the kernel reports them.
type Attest struct {
	// UID is the effective user id of the process.
	UID *int64 `json:"uid,omitempty"`
	// Path is the absolute path of the executable.
	Path string `json:"path,omitempty"`
	// SHA256 is the lower-case hex digest of the executable's content.
	SHA256 string `json:"sha256,omitempty"`
	// SystemdUnit is the unit the process belongs to, such as "nginx.service".
	SystemdUnit string `json:"systemdUnit,omitempty"`
	// Cgroup is the absolute cgroup path; the process may be in it or below it.
	Cgroup string `json:"cgroup,omitempty"`
}

// Capture names a network namespace and its addresses.
type Capture struct {
	// NetworkNamespace is a name under /run/netns or an absolute path.
	NetworkNamespace string `json:"networkNamespace"`
	// Addresses are the namespace's own addresses, by which others reach it.
	Addresses []string `json:"addresses"`
}

// ServiceEntry is a virtual address in front of endpoints.
type ServiceEntry struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec ServiceEntrySpec `json:"spec"`
}

// ServiceEntrySpec is the body of a ServiceEntry.
type ServiceEntrySpec struct {
	// VIPs are the virtual addresses. They need not exist on any interface.
	VIPs []string `json:"vips"`
	// Ports maps service ports to the endpoints' ports.
	Ports []ServicePort `json:"ports"`
	// Endpoints receive the connections.
	Endpoints []ServiceEndpoint `json:"endpoints"`
}

// ServicePort maps one port.
type ServicePort struct {
	Name string `json:"name,omitempty"`
	Port int32  `json:"port"`
	// TargetPort is the port on the endpoint. Default: the same as Port.
	TargetPort int32 `json:"targetPort,omitempty"`
}

// ServiceEndpoint is a workload (by name, in the service's namespace or as
// "namespace/name") or a plain address outside the mesh; exactly one is set.
type ServiceEndpoint struct {
	Workload string `json:"workload,omitempty"`
	Address  string `json:"address,omitempty"`
}

// AllowPolicy lets callers reach workloads of its own namespace. Nothing is
// allowed that no AllowPolicy allows; the order of policies has no meaning.
type AllowPolicy struct {
	metav1.TypeMeta   `json:",inline"`
	metav1.ObjectMeta `json:"metadata,omitempty"`

	Spec AllowPolicySpec `json:"spec"`
}

// AllowPolicySpec is the body of an AllowPolicy.
type AllowPolicySpec struct {
	// Target chooses whom the policy protects.
	Target Target `json:"target,omitempty"`
	// Ports are the ports on the target workload (not the service's).
	// Empty means every port.
	Ports []int32 `json:"ports,omitempty"`
	// From lists the callers; one match is enough. At least one is required.
	From []Peer `json:"from"`
}

// Target chooses workloads of the policy's namespace.
type Target struct {
	// ServiceAccount in the policy's namespace. Empty means all of them.
	ServiceAccount string `json:"serviceAccount,omitempty"`
}

// Peer names callers; exactly one field is set.
type Peer struct {
	// ServiceAccount is "name" (in the policy's namespace) or "namespace/name".
	ServiceAccount string `json:"serviceAccount,omitempty"`
	// Namespace admits every service account of a namespace.
	Namespace string `json:"namespace,omitempty"`
	// SPIFFEID is a SPIFFE ID; a path segment that is exactly "*" stands for
	// any one segment: "spiffe://mesh.example/ns/*/sa/backup".
	SPIFFEID string `json:"spiffeID,omitempty"`
}
