// Package audit keeps the node's evidence: one record per connection and
// side, durable before it is acknowledged, chained by hash.
package audit

import "time"

// Verdict is what happened to a connection.
type Verdict string

// The verdicts.
const (
	Allowed  Verdict = "allowed"  // a policy admitted it
	Denied   Verdict = "denied"   // refused by policy; the application was never contacted
	Observed Verdict = "observed" // flowed in observe mode, enforce would have refused it
	Failed   Verdict = "failed"   // neither: the peer was not reachable, or not who it had to be
)

// Side says which end of the connection the record was made at.
type Side string

// The sides.
const (
	Source      Side = "source"
	Destination Side = "destination"
)

// Record is one connection as one side saw it.
type Record struct {
	// Seq is the position in this node's store, rising by one.
	Seq uint64 `json:"seq"`
	// ID names the connection on this side; unique across restarts.
	ID   string `json:"id"`
	Node string `json:"node"`
	// Proxy is which of the node's proxies had the connection.
	Proxy string `json:"proxy,omitempty"`
	Side  Side   `json:"side"`

	Start time.Time `json:"start"`
	// End is zero while the connection is open.
	End time.Time `json:"end,omitzero"`

	Source      Party `json:"source"`
	Destination Party `json:"destination"`

	Verdict Verdict `json:"verdict"`
	// Reason is in the words of authz.
	Reason string `json:"reason"`
	// Policy is the policy that admitted the connection, "namespace/name".
	Policy string `json:"policy,omitempty"`
	// Revision is the policy state that decided.
	Revision string `json:"revision,omitempty"`

	// Transport is "mtls" or "plaintext".
	Transport string `json:"transport"`
	TLS       *TLS   `json:"tls,omitempty"`

	// BytesSent went from source to destination, BytesReceived came back.
	BytesSent     uint64 `json:"bytesSent"`
	BytesReceived uint64 `json:"bytesReceived"`
	// Ended says how it ended when that was not an ordinary close:
	// "revoked", "proxy-lost", or the proxy's response flags.
	Ended string `json:"ended,omitempty"`
}

// Party is one end of a connection.
type Party struct {
	// ID is the SPIFFE ID proven in the handshake (or, for this side's own
	// end, the one the proxy presents). Empty when nothing was proven.
	ID string `json:"id,omitempty"`
	// Workload is "namespace/name" where it is a local workload.
	Workload string `json:"workload,omitempty"`
	// Address is "ip:port".
	Address string `json:"address,omitempty"`
	// Serial is the hexadecimal serial number of the certificate.
	Serial string `json:"serial,omitempty"`
	// Via is the address of the proxy's own socket towards the application,
	// at the destination.
	Via string `json:"via,omitempty"`
}

// TLS is what the handshake negotiated.
type TLS struct {
	Version string `json:"version"` // TLSv1.3
	Cipher  string `json:"cipher"`
	Group   string `json:"group"` // key exchange, X25519MLKEM768
}
