// Package v1alpha1 defines the documents that users write: the same kinds and
// fields are read from a directory of YAML on one machine and from a
// Kubernetes API server. WorkloadEntry and ServiceEntry exist in files only:
// in a cluster pods and services say the same.
//
// +kubebuilder:object:generate=true
// +groupName=signet.dev
package v1alpha1

// Names that appear in every document.
const (
	// GroupVersion is the apiVersion of every kind in this package.
	GroupVersion = "signet.dev/v1alpha1"

	KindMeshConfig    = "MeshConfig"
	KindWorkloadEntry = "WorkloadEntry"
	KindServiceEntry  = "ServiceEntry"
	KindAllowPolicy   = "AllowPolicy"
	KindQuarantine    = "Quarantine"
	KindFederation    = "Federation"

	// MeshConfigName is the name of the one MeshConfig of a cluster.
	MeshConfigName = "mesh"
)

// Annotations on objects of Kubernetes.
const (
	// AnnotationMesh on a Namespace enrolls it: enforce, observe or off. On a
	// Pod its only value is off: the pod opts out, where its namespace has
	// AnnotationAllowOptOut.
	AnnotationMesh = "signet.dev/mesh"

	// AnnotationAllowOptOut on a Namespace, with the value "true", lets its
	// pods opt out.
	AnnotationAllowOptOut = "signet.dev/allow-opt-out"

	// AnnotationStatus on a Namespace is written by the control plane alone
	// and says how many of its pods are enrolled.
	AnnotationStatus = "signet.dev/status"
)

// Types of the conditions in a status.
const (
	// ConditionAccepted says whether the whole object is valid.
	ConditionAccepted = "Accepted"
	// ConditionProgrammed says whether every node that the object concerns
	// acts by its newest generation.
	ConditionProgrammed = "Programmed"
	// ConditionFetched says whether another trust domain's bundle could be fetched
	// when it was last tried. What was fetched before stays believed.
	ConditionFetched = "Fetched"
	// ConditionAuthority, of a MeshConfig, says whether certificates can be signed
	// and how it stands with the authority above, where there is one.
	ConditionAuthority = "Authority"
)

// Reasons of the conditions in a status.
const (
	ReasonValid      = "Valid"      // Accepted is True
	ReasonInvalid    = "Invalid"    // Accepted is False; the message names each field and its fault
	ReasonProgrammed = "Programmed" // Programmed is True
	ReasonPending    = "Pending"    // Programmed is False: some nodes have not confirmed yet; Fetched is False: it is not tried yet
	ReasonFetched    = "Fetched"    // Fetched is True
	ReasonFailing    = "Failing"    // Fetched is False; the message says why
)
