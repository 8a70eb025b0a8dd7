package v1alpha1

import (
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// WorkloadEntry declares one workload of one machine: its identity, how a
// process proves that it is that workload, and, optionally, the network
// namespace whose traffic is captured into the mesh. It exists in files only.
type WorkloadEntry struct {
	metav1.TypeMeta `json:",inline"`
	// Metadata is a field and not embedded: a kind that embeds it is one that
	// a cluster has, and gets a CustomResourceDefinition.
	Metadata metav1.ObjectMeta `json:"metadata,omitempty"`

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

	// Hint tells a process that is given several identities which this one is
	// for, such as "internal"; the Workload API passes it on. At most 64 bytes.
	Hint string `json:"hint,omitempty"`

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

// ServiceEntry is a virtual address in front of endpoints. It exists in files
// only.
type ServiceEntry struct {
	metav1.TypeMeta `json:",inline"`
	// Metadata is a field and not embedded: a kind that embeds it is one that
	// a cluster has, and gets a CustomResourceDefinition.
	Metadata metav1.ObjectMeta `json:"metadata,omitempty"`

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
// "namespace/name") or an address outside the mesh; exactly one is set.
type ServiceEndpoint struct {
	Workload string `json:"workload,omitempty"`
	Address  string `json:"address,omitempty"`
	// SPIFFEID makes the address that of a captured workload of another mesh, for
	// whose trust domain there is a Federation: connections go by a tunnel to who
	// proves this identity there. Without it they go in plain.
	SPIFFEID string `json:"spiffeID,omitempty"`
	// TLS, if it is "originate", makes the address that of an application, of this
	// mesh or another, that is not captured and asks for mutual TLS itself: the
	// proxies of captured callers, which speak none, speak it for them, with the
	// caller's certificate, and to nobody but SPIFFEID.
	TLS string `json:"tls,omitempty"`
	// ALPN is as in an AllowPolicy.
	ALPN string `json:"alpn,omitempty"`
}
