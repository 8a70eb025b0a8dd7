// Package audit keeps the node's evidence: one record per connection and
// side, one for whoever was refused an identity, and one for each that was
// issued, durable before it is acknowledged, chained by hash.
package audit

import (
	"fmt"
	"slices"
	"strings"
	"time"
)

// Verdict is what happened to a connection, or to who asked for an identity.
type Verdict string

// The verdicts.
const (
	Allowed  Verdict = "allowed"  // a policy admitted it
	Denied   Verdict = "denied"   // refused by policy; the application was never contacted
	Observed Verdict = "observed" // flowed in observe mode, enforce would have refused it
	Failed   Verdict = "failed"   // neither: the peer was not reachable, or not who it had to be
	// Refused is no connection's: an identity was refused, see Record.Refusal.
	Refused Verdict = "refused"
	// Issued is no connection's: an identity was issued, see Record.Issuance.
	Issued Verdict = "issued"
)

// Verdicts are all that there are.
func Verdicts() []Verdict { return []Verdict{Allowed, Denied, Observed, Failed, Refused, Issued} }

// ParseVerdict reads one.
func ParseVerdict(s string) (Verdict, error) {
	if v := Verdict(s); slices.Contains(Verdicts(), v) {
		return v, nil
	}
	var names []string
	for _, v := range Verdicts() {
		names = append(names, string(v))
	}
	return "", fmt.Errorf("%q is none of %s", s, strings.Join(names, ", "))
}

// Side says which end of the connection the record was made at.
type Side string

// The sides.
const (
	Source      Side = "source"
	Destination Side = "destination"
)

// Direct is the transport of mutual TLS without a tunnel in which one end is a proxy's:
// of the caller's own, ended in front of the destination, or with an application, on
// behalf of the source.
const Direct = "mtls-direct"

// Record is one connection as one side saw it, a Refusal, or an Issuance.
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

	// Transport is "mtls", Direct or "plaintext".
	Transport string `json:"transport"`
	TLS       *TLS   `json:"tls,omitempty"`

	// BytesSent went from source to destination, BytesReceived came back.
	BytesSent     uint64 `json:"bytesSent"`
	BytesReceived uint64 `json:"bytesReceived"`
	// Ended says how it ended when that was not an ordinary close:
	// "revoked", "proxy-lost", or the proxy's response flags.
	Ended string `json:"ended,omitempty"`

	// Refusal is set when the verdict is Refused. Then there is no side, Start and
	// End are when it happened first and last, and Source.Workload is the workload
	// that was refused, if it is known.
	Refusal *Refusal `json:"refusal,omitempty"`

	// Issuance is set when the verdict is Issued. Then there is no side, Start and End
	// are when the answer was there, and Source has the identity, the serial number (a
	// token's jti) and the workload, which is empty when it is the node's own.
	Issuance *Issuance `json:"issuance,omitempty"`
}

// Issuance says what the control plane issued to this node.
type Issuance struct {
	// Kind is KindX509 or KindJWT.
	Kind string `json:"kind"`
	// NotBefore, and Issuer, the hexadecimal subject key id of the certificate that
	// signed it, are a certificate's.
	NotBefore time.Time `json:"notBefore,omitzero"`
	NotAfter  time.Time `json:"notAfter"`
	Issuer    string    `json:"issuer,omitempty"`
	// Audience is who a token is for.
	Audience []string `json:"audience,omitempty"`
}

// The kinds of an Issuance.
const (
	KindX509 = "x509-svid"
	KindJWT  = "jwt-svid"
)

// Refusal says who was refused an identity, or what goes with one.
type Refusal struct {
	// Kind is why, in one word; Record.Reason says more.
	Kind string `json:"kind"`
	// Call is what was asked for.
	Call string `json:"call"`
	// ID is the identity that was asked for by name.
	ID string `json:"id,omitempty"`
	// PID and the others are those of the latest caller. Nobody called when the
	// control plane refused what the agent asked for.
	PID        int     `json:"pid,omitempty"`
	UID        *uint32 `json:"uid,omitempty"`
	Executable string  `json:"executable,omitempty"` // as the caller's mount namespace names it; proves nothing
	PodUID     string  `json:"podUID,omitempty"`
	// Count is how often it happened.
	Count uint64 `json:"count"`
	// Several says that callers or requests that differ are counted here, since
	// there were too many to tell apart. The rest describes the latest.
	Several bool `json:"several,omitempty"`
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
	// Serial is the hexadecimal serial number of the certificate that the other end
	// was shown; of a record's own end there is none.
	Serial string `json:"serial,omitempty"`
	// Via is the address of the proxy's own socket: at the destination towards the
	// application, at the source the one that left, which a tunnel's connections share.
	Via string `json:"via,omitempty"`
}

// TLS is what the handshake negotiated.
type TLS struct {
	Version string `json:"version"` // TLSv1.3
	Cipher  string `json:"cipher"`
	Group   string `json:"group"` // key exchange, X25519MLKEM768
}
