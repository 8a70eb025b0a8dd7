package adminv1

// MissingNode is a node whose answer is not in a document, which is therefore
// incomplete.
type MissingNode struct {
	Node string `json:"node"`
	// Error says why, in one line.
	Error string `json:"error"`
}

// MeshStatus is the state of every node.
type MeshStatus struct {
	// Agents are the nodes that answered, by name.
	Agents []AgentStatus `json:"agents"`
	// Namespaces are those in the mesh, by name; empty where the answerer
	// knows one node alone.
	Namespaces []NamespaceStatus `json:"namespaces,omitempty"`
	// Missing are the nodes that did not answer, by name.
	Missing []MissingNode `json:"missing,omitempty"`
}

// NamespaceStatus is one namespace that is in the mesh.
type NamespaceStatus struct {
	Namespace string `json:"namespace"`
	Mode      string `json:"mode"` // "observe" or "enforce"
	// Enrolled of Pods are captured, as their nodes have seen themselves.
	Pods     int `json:"pods"`
	Enrolled int `json:"enrolled"`
	// Problems has each pod that is not enrolled, by name.
	Problems []PodProblem `json:"problems,omitempty"`
}

// PodProblem is a pod that should be enrolled and is not.
type PodProblem struct {
	Pod     string `json:"pod"`  // name, in its namespace
	Node    string `json:"node"` // empty while it has none
	Problem string `json:"problem"`
}

// NodeCertificate is a certificate and the node that holds it.
type NodeCertificate struct {
	Node string `json:"node"`
	Certificate
}

// MeshCertificates are the certificates of every node, by node and then in the
// node's own order.
type MeshCertificates struct {
	Certificates []NodeCertificate `json:"certificates"`
	Missing      []MissingNode     `json:"missing,omitempty"`
}

// NodeVerification is what became of one node's audit store.
type NodeVerification struct {
	Node string `json:"node"`
	AuditVerification
}

// MeshVerification is the result of reading every node's audit store.
type MeshVerification struct {
	Nodes   []NodeVerification `json:"nodes"`
	Missing []MissingNode      `json:"missing,omitempty"`
}

// AuditLast is the last line of a stream of the mesh's records. A stream
// without it broke off.
type AuditLast struct {
	Complete AuditEnd `json:"complete"`
}

// AuditEnd says what a stream of records had.
type AuditEnd struct {
	// Records counts the records before it.
	Records int `json:"records"`
	// Missing are the nodes whose records are not there, or not all there.
	Missing []MissingNode `json:"missing,omitempty"`
}

// Workload is one workload of the mesh.
type Workload struct {
	Workload string `json:"workload"` // namespace/name
	ID       string `json:"id"`
	Node     string `json:"node"`
	Mode     string `json:"mode"`
}
