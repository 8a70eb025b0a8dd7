package adminv1

import (
	"encoding/json"
	"time"
)

// RotationStage is where the replacement of the root stands.
type RotationStage string

// The stages.
const (
	RotationIdle       RotationStage = "idle"       // one root, and it signs
	RotationPublishing RotationStage = "publishing" // the next root is published; the old one signs
	RotationRetiring   RotationStage = "retiring"   // the new root signs; the old one is still published
)

// AuthorityStatus is the state of the certificate authority.
type AuthorityStatus struct {
	TrustDomain string        `json:"trustDomain"`
	Stage       RotationStage `json:"stage"`
	// Hurries is set while a distrusted root is published: no step waits long.
	Hurries bool `json:"hurries,omitempty"`
	// Roots are those that are published, the one that signs first.
	Roots []RootStatus `json:"roots"`
	// Nodes are all nodes of the mesh.
	Nodes []NodeRoots `json:"nodes"`
	// Waits says what outside the mesh the next step waits for; empty: nothing.
	Waits string `json:"waits,omitempty"`
	// Upstream is the authority above; nil: the root is the mesh's own.
	Upstream *UpstreamStatus `json:"upstream,omitempty"`
	// Due is when the root is replaced by itself; zero: an operator has placed it,
	// and replaces it.
	Due time.Time `json:"due,omitzero"`
	// Error is why the last step failed; empty: it did not.
	Error string `json:"error,omitempty"`
	// Renewal is why the root does not sign another intermediate, which is due; empty:
	// none is. NotAfter is when the present one ends, and issuing with it.
	Renewal  string    `json:"renewal,omitempty"`
	NotAfter time.Time `json:"notAfter,omitzero"`
}

// UpstreamStatus is how it stands with the authority above.
type UpstreamStatus struct {
	Name    string `json:"name"`             // such as Issuer signet-system/mesh
	Reason  string `json:"reason"`           // Ready, Pending, Denied, Failed, IssuerNotFound, Unreachable or Unusable
	Message string `json:"message"`          // what was asked, what became of it, what to do
	Wanted  string `json:"wanted,omitempty"` // why another intermediate is asked for; empty: none is
	// NotAfter is when the intermediate ends that signs, RenewAt when the next is
	// asked for.
	NotAfter time.Time `json:"notAfter,omitzero"`
	RenewAt  time.Time `json:"renewAt,omitzero"`
	// RetryAt is when it is asked again after a no; zero: there was none.
	RetryAt time.Time `json:"retryAt,omitzero"`
}

// IssuanceJWT is the kind of a token's issuance.
const IssuanceJWT = "jwt"

// Where the evidence of an issuance is.
const (
	EvidenceLog  = "log"  // the issuance log of a control plane
	EvidenceNode = "node" // the audit of the node that it was issued to
)

// Issuance is one certificate or token in the issuance log, or in a node's audit.
type Issuance struct {
	// Found is false, and the rest empty, when the control plane that was asked
	// has not issued it, or not since its log began.
	Found     bool      `json:"found"`
	Evidence  string    `json:"evidence,omitempty"` // EvidenceLog or EvidenceNode
	Kind      string    `json:"kind,omitempty"`     // IssuanceJWT; a certificate's is empty
	Serial    string    `json:"serial,omitempty"`
	ID        string    `json:"id,omitempty"`
	Node      string    `json:"node,omitempty"`     // on whose behalf it was asked for
	Workload  string    `json:"workload,omitempty"` // namespace/name
	At        time.Time `json:"at,omitzero"`        // when it was asked for
	NotBefore time.Time `json:"notBefore,omitzero"`
	NotAfter  time.Time `json:"notAfter,omitzero"`
	Outcome   string    `json:"outcome,omitempty"` // issued, failed or unknown
}

// RootStatus is one published root.
type RootStatus struct {
	Fingerprint string    `json:"fingerprint"`   // SHA-256 of the certificate
	Role        string    `json:"role"`          // signs, next or former
	Key         string    `json:"key,omitempty"` // its name in a token; empty: it is in none
	NotBefore   time.Time `json:"notBefore"`
	NotAfter    time.Time `json:"notAfter"`
}

// NodeRoots is which of the published roots a node trusts and uses, by
// fingerprint.
type NodeRoots struct {
	Name    string   `json:"name"`
	Trusted []string `json:"trusted"` // by everything on the node
	Used    []string `json:"used"`    // by any certificate that it holds
	// Waits says what of the node the next step waits for; empty: nothing.
	Waits string `json:"waits,omitempty"`
}

// TrustBundle is what the certificates and tokens of a trust domain are verified by:
// the mesh's own, or one that it is federated with.
type TrustBundle struct {
	TrustDomain string `json:"trustDomain"`
	// Document is a JWK set as SPIFFE Trust Domain and Bundle has it. The mesh's own is
	// byte for byte what its bundle endpoint shows.
	Document json.RawMessage `json:"document"`
}

// Issuances are the certificates of one identity in the issuance log of the
// control plane that was asked.
type Issuances struct {
	// Since is when the log begins: what was issued before is not in it.
	Since  time.Time  `json:"since"`
	Issued []Issuance `json:"issued"` // that have not expired; oldest first
}

// Revocations are the certificates and tokens that are revoked and have not
// expired.
type Revocations struct {
	// Now is the control plane's clock.
	Now time.Time `json:"now,omitzero"`
	// Acting of Nodes act by the list and all else that is in force; of those that
	// are connected. In a cluster only.
	Acting       int                  `json:"acting,omitempty"`
	Nodes        int                  `json:"nodes,omitempty"`
	Certificates []RevokedCertificate `json:"certificates"` // oldest first
}

// RevokedCertificate is one of them.
type RevokedCertificate struct {
	Serial   string    `json:"serial"` // lower-case hexadecimal
	ID       string    `json:"id"`
	Reason   string    `json:"reason"`
	At       time.Time `json:"at"`                // when it was revoked
	NotAfter time.Time `json:"notAfter,omitzero"` // zero: not known
	// Refused says that its holder's time to renew is over.
	Refused bool `json:"refused"`
}
