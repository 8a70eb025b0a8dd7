// Package authz decides who may reach whom. It compiles AllowPolicy and
// Quarantine documents to a Model and answers questions about it, without Kubernetes, network or
// clock. The same answers are given to the proxy configuration, to the agent
// that ends revoked connections, and to people who ask why.
package authz

import (
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Verdict is the outcome of a decision.
type Verdict uint8

// The verdicts. The zero value refuses.
const (
	Deny Verdict = iota
	Allow
)

// String returns "denied" or "allowed".
func (v Verdict) String() string {
	if v == Allow {
		return "allowed"
	}
	return "denied"
}

// Target is what a caller wants to reach.
type Target struct {
	Namespace      string
	ServiceAccount string
}

// String returns "namespace/serviceAccount".
func (t Target) String() string { return t.Namespace + "/" + t.ServiceAccount }

// Request is one question. A zero From (no identity) is always denied.
type Request struct {
	From   spiffeid.ID
	Target Target
	Port   uint16 // the port on the target workload
}

// Decision is the answer to a Request, with its reason.
type Decision struct {
	Verdict Verdict
	// Policy is "namespace/name" of the policy that allows, the first in
	// lexical order when several do. Empty on a denial.
	Policy string
	// Quarantine is the name of the quarantine that denies, the first in
	// lexical order when several do. Such a denial holds in namespaces that
	// are only observed too.
	Quarantine string
	// Reason says why in the words that the 403, the audit record and the CLI
	// share: Allowed(policy), CallerCutOff(quarantine, caller) or
	// Model.DenyReason(target).
	Reason string
	// Near lists the policies that protect the target and say why each of
	// them does not admit the request. Only on a denial that is not a
	// quarantine's.
	Near []NearMiss
}

// NearMiss is a policy that protects the target but does not admit the caller.
type NearMiss struct {
	Policy string `json:"policy"`
	Why    string `json:"why"`
}

// Grant is one compiled policy as it applies to one target.
type Grant struct {
	Policy string   // "namespace/name"
	Ports  []uint16 // sorted; empty means every port
	From   []Pattern
}

// Diagnostic says what is wrong with one document. An AllowPolicy with a
// diagnostic grants nothing; of a Quarantine with one, every part that is
// valid is in force.
type Diagnostic struct {
	Policy     string `json:"policy"`               // "namespace/name"; empty for a Quarantine
	Quarantine string `json:"quarantine,omitempty"` // name; empty for an AllowPolicy
	Field      string `json:"field"`                // such as spec.from[1].spiffeID
	Message    string `json:"message"`              // what is wrong and how to mend it
}
