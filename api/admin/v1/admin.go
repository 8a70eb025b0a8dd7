// Package adminv1 is what a running mesh tells its operator: JSON over HTTP. On
// one machine it is served on unix sockets that only root may open.
//
//	GET  agent.sock   /v1/status        -> AgentStatus
//	GET  agent.sock   /v1/certificates  -> []Certificate
//	GET  agent.sock   /v1/audit?since=RFC3339&from=&to=&verdict=&side=&limit=  -> newline-delimited audit.Record
//	GET  agent.sock   /v1/audit/verify  -> AuditVerification
//	GET  agent.sock   /metrics, control.sock /metrics (Prometheus)
//	GET  control.sock /v1/status        -> ControlStatus
//	GET  control.sock /v1/explain?from=&to=&port= -> Explanation
//	GET  control.sock /v1/ca            -> AuthorityStatus
//	GET  control.sock /v1/ca/issued?serial= -> Issuance
//	GET  control.sock /v1/ca/issued/to?id= -> Issuances
//	GET  control.sock /v1/ca/revoked    -> Revocations
//	GET  control.sock /v1/ca/refused?since=RFC3339&limit= -> Refusals
//	POST control.sock /v1/ca/revoke?serial=&reason= -> Revocations
//	POST control.sock /v1/ca/rotate?force=, /v1/ca/distrust, /v1/ca/abandon -> AuthorityStatus
//
// In a cluster the operator reaches the control plane alone, through the API
// server's port-forward, and it asks the nodes (package internal/fanout):
//
//	GET  control /v1/mesh/status            -> MeshStatus
//	GET  control /v1/mesh/certificates      -> MeshCertificates
//	GET  control /v1/mesh/audit?node=&...   -> newline-delimited audit.Record, then AuditLast
//	GET  control /v1/mesh/audit/verify?node= -> MeshVerification
//	GET  control /v1/mesh/workload?name=namespace/name -> Workload
//
// An error is a status of 4xx or 5xx with a body of {"error": "..."}.
package adminv1

import (
	"time"

	"github.com/signet-mesh/signet/authz"
)

// ControlStatus is the state of the control plane.
type ControlStatus struct {
	// Version of the program; empty when it does not say.
	Version     string `json:"version,omitempty"`
	TrustDomain string `json:"trustDomain"`
	// Revision is the content hash of what is in force.
	Revision string    `json:"revision"`
	Since    time.Time `json:"since"` // when the revision came into force
	// Rejected describes the newest edit when it was refused and the last
	// good state is still in force; empty otherwise.
	Rejected []string           `json:"rejected,omitempty"`
	Policies int                `json:"policies"`
	Invalid  []authz.Diagnostic `json:"invalid,omitempty"`
	Nodes    []NodeStatus       `json:"nodes"`
}

// NodeStatus is one node as the control plane sees it.
type NodeStatus struct {
	Name      string    `json:"name"`
	Connected bool      `json:"connected"`
	Revision  string    `json:"revision"` // acknowledged by the node's proxy
	Since     time.Time `json:"since"`
}

// AgentStatus is the state of one node.
type AgentStatus struct {
	Node string `json:"node"`
	// Version of the program; empty when it does not say.
	Version          string           `json:"version,omitempty"`
	ControlConnected bool             `json:"controlConnected"`
	ProxyConnected   bool             `json:"proxyConnected"`
	Revision         string           `json:"revision"`
	Workloads        []WorkloadStatus `json:"workloads"`
	Audit            AuditStatus      `json:"audit"`
}

// WorkloadStatus is one local workload.
type WorkloadStatus struct {
	Workload string `json:"workload"` // namespace/name
	ID       string `json:"id"`
	Mode     string `json:"mode"`
	// Captured is true only after the kernel's rules have been read back and
	// the proxy has taken the workload's listeners.
	Captured bool `json:"captured"`
	// Problem says why it is not captured; empty when it is, or when no
	// capture is asked for.
	Problem string `json:"problem,omitempty"`
	// Connections are the open inbound connections.
	Connections int `json:"connections"`
}

// AuditStatus is the state of the node's audit store.
type AuditStatus struct {
	Records uint64 `json:"records"`
	Open    uint64 `json:"open"`
	// Gaps counts records known to be missing.
	Gaps uint64 `json:"gaps"`
}

// Certificate is one certificate that the agent holds.
type Certificate struct {
	Holder    string    `json:"holder"` // namespace/name, or "node"
	ID        string    `json:"id"`
	Serial    string    `json:"serial"`
	NotBefore time.Time `json:"notBefore"`
	NotAfter  time.Time `json:"notAfter"`
	// RenewAt is when the agent will ask for the next one.
	RenewAt time.Time `json:"renewAt"`
	// Issuer is the hexadecimal subject key id of the issuing certificate.
	Issuer string `json:"issuer"`
	// LastError is why the latest renewal failed, if it did.
	LastError string `json:"lastError,omitempty"`
}

// Explanation is the answer to "may FROM reach TO on PORT, and why".
type Explanation struct {
	From    string           `json:"from"`
	To      string           `json:"to"` // the target's SPIFFE ID
	Port    int              `json:"port"`
	Mode    string           `json:"mode"` // of the target's namespace
	Verdict string           `json:"verdict"`
	Reason  string           `json:"reason"`
	Policy  string           `json:"policy,omitempty"`
	Near    []authz.NearMiss `json:"nearMisses,omitempty"`
	// Terminate is the policy that has mutual TLS without a tunnel ended on the
	// port, "namespace/name".
	Terminate string `json:"terminate,omitempty"`
	// Originate is the policy that has callers' proxies speak mutual TLS to the
	// application on the port, "namespace/name".
	Originate string `json:"originate,omitempty"`
	// Revision names the policy state of the target, as audit records do.
	Revision string `json:"revision,omitempty"`
}

// AuditVerification is the result of reading the whole store.
type AuditVerification struct {
	Batches uint64 `json:"batches"`
	Records uint64 `json:"records"`
	// Fault is empty when every batch is intact and linked to the one before.
	Fault string `json:"fault,omitempty"`
}

// Refusals is what the control plane refused nodes, and whoever else called it.
type Refusals struct {
	Refused []Refused `json:"refused"`
}

// Refused is one kind of them.
type Refused struct {
	First time.Time `json:"first"`
	Last  time.Time `json:"last"`
	Count uint64    `json:"count"`
	// Several says that calls that differ are counted here, since there were too
	// many to tell apart. The rest describes the latest.
	Several bool `json:"several,omitempty"`
	// Call is what was called, such as "Issue".
	Call string `json:"call"`
	// Node is who called, as its certificate proved; empty: nobody proved to be a
	// node.
	Node string `json:"node,omitempty"`
	// Workload is whom the call named, in the caller's words.
	Workload string `json:"workload,omitempty"`
	// From is the caller's address.
	From string `json:"from,omitempty"`
	// Why is the reason in one word, as in signet_control_refused_total; Reason is
	// what the caller was told.
	Why    string `json:"why"`
	Reason string `json:"reason"`
}
