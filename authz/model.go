package authz

import (
	"cmp"
	"fmt"
	"maps"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Policy is one compiled allow policy.
type Policy struct {
	Namespace string
	Name      string
	// TargetServiceAccount is protected by the policy; empty means every
	// service account of the namespace.
	TargetServiceAccount string
	// Ports are the ports on the target workload; empty means every port.
	Ports []uint16
	// Terminate has mutual TLS that reaches Ports without a tunnel ended in
	// front of the target. It admits nobody, and without ports it means nothing.
	Terminate bool
	// Originate says that the target speaks mutual TLS on Ports itself, so that
	// proxies speak it for callers that do not. Likewise.
	Originate bool
	// ALPN is what they offer in it; empty: nothing.
	ALPN string
	// From lists the callers that are admitted; empty admits nobody.
	From []Pattern
}

// Key returns "namespace/name".
func (p *Policy) Key() string { return p.Namespace + "/" + p.Name }

func (p *Policy) protects(t Target) bool {
	return p.Namespace == t.Namespace && (p.TargetServiceAccount == "" || p.TargetServiceAccount == t.ServiceAccount)
}

// Model is a compiled set of policies and quarantines. It is immutable and
// safe for concurrent use. A nil Model has no policies and so denies
// everything.
type Model struct {
	policies    []Policy            // sorted by namespace, then name
	byNamespace map[string][]Policy // slices of policies
	td          spiffeid.TrustDomain
	quarantines []Quarantine // sorted by name
}

// NewModel builds a model of policies that have been validated already. It
// copies what it is given and sorts ports and patterns. Of several policies
// with the same namespace and name only the first counts.
func NewModel(policies []Policy) *Model {
	m := &Model{byNamespace: map[string][]Policy{}}
	seen := map[[2]string]bool{}
	for _, p := range policies {
		if key := [2]string{p.Namespace, p.Name}; seen[key] {
			continue
		} else {
			seen[key] = true
		}
		m.policies = append(m.policies, normal(p))
	}
	slices.SortFunc(m.policies, func(a, b Policy) int {
		return cmp.Or(strings.Compare(a.Namespace, b.Namespace), strings.Compare(a.Name, b.Name))
	})
	for start := 0; start < len(m.policies); {
		end, ns := start+1, m.policies[start].Namespace
		for end < len(m.policies) && m.policies[end].Namespace == ns {
			end++
		}
		m.byNamespace[ns] = m.policies[start:end]
		start = end
	}
	return m
}

// normal returns a deep copy with sorted and compacted slices.
func normal(p Policy) Policy {
	p.Ports = slices.Clone(p.Ports)
	slices.Sort(p.Ports)
	p.Ports = slices.Compact(p.Ports)
	p.From = slices.Clone(p.From)
	slices.SortFunc(p.From, func(a, b Pattern) int { return strings.Compare(a.String(), b.String()) })
	p.From = slices.Compact(p.From)
	return p
}

// Policies returns a copy of the policies, sorted by namespace, then name.
func (m *Model) Policies() []Policy {
	if m == nil {
		return nil
	}
	out := make([]Policy, len(m.policies))
	for i, p := range m.policies {
		out[i] = normal(p)
	}
	return out
}

// protecting returns the policies that protect the target, sorted by name. A
// target without a namespace or service account is protected by none.
func (m *Model) protecting(t Target) []Policy {
	if m == nil || t.Namespace == "" || t.ServiceAccount == "" {
		return nil
	}
	var out []Policy
	for _, p := range m.byNamespace[t.Namespace] {
		if p.protects(t) {
			out = append(out, p)
		}
	}
	return out
}

// Grants returns the policies that protect the target, sorted by policy; none
// for a target that is cut off. A grant may admit a caller that is cut off:
// who acts by grants has to refuse those that Quarantines lists first. The
// caller owns the result.
func (m *Model) Grants(t Target) []Grant {
	if _, cut := m.QuarantinedTarget(t); cut {
		return nil
	}
	var out []Grant
	for _, p := range m.protecting(t) {
		out = append(out, Grant{Policy: p.Key(), Ports: slices.Clone(p.Ports), From: slices.Clone(p.From)})
	}
	return out
}

// Terminated returns the policies that have mutual TLS without a tunnel ended in
// front of the target, by port: "namespace/name", the first in lexical order when
// several do. Policies cannot contradict each other about a port: one that does
// not say Terminate says nothing about it, and there is nothing to end where the
// target itself speaks TLS (Originated).
func (m *Model) Terminated(t Target) map[uint16]string {
	out := map[uint16]string{}
	for _, p := range m.protecting(t) {
		if !p.Terminate {
			continue
		}
		for _, port := range p.Ports {
			if _, known := out[port]; !known {
				out[port] = p.Key()
			}
		}
	}
	maps.DeleteFunc(out, func(port uint16, _ string) bool {
		_, itself := m.Originated(t, port)
		return itself
	})
	return out
}

// Origination says that a target itself speaks mutual TLS on a port.
type Origination struct {
	Policy string   // "namespace/name", the first in lexical order when several say it
	ALPN   []string // what is offered in it: what any of them says
}

// Originated reports whether the target speaks mutual TLS itself on a port. It is asked
// for every endpoint of every destination.
func (m *Model) Originated(t Target, port uint16) (o Origination, ok bool) {
	if m == nil || t.Namespace == "" || t.ServiceAccount == "" {
		return Origination{}, false
	}
	for i := range m.byNamespace[t.Namespace] {
		p := &m.byNamespace[t.Namespace][i]
		if !p.Originate || !p.protects(t) || !slices.Contains(p.Ports, port) {
			continue
		}
		if !ok {
			o.Policy, ok = p.Key(), true
		}
		if p.ALPN != "" && !slices.Contains(o.ALPN, p.ALPN) {
			o.ALPN = append(o.ALPN, p.ALPN)
		}
	}
	return o, ok
}

// Decide answers a request. It denies when the caller or the target is cut
// off, and unless a policy that protects the target admits both the caller and
// the port. Port 0 is no port and is denied.
func (m *Model) Decide(r Request) Decision {
	if name, cut := m.Quarantined(r.From); cut {
		return Decision{Verdict: Deny, Quarantine: name, Reason: CallerCutOff(name, r.From.String())}
	}
	if name, cut := m.QuarantinedTarget(r.Target); cut {
		return Decision{Verdict: Deny, Quarantine: name, Reason: m.DenyReason(r.Target)}
	}
	policies := m.protecting(r.Target)
	var near []NearMiss
	for i := range policies {
		p := &policies[i]
		why := p.refuses(r)
		if why == "" {
			return Decision{Verdict: Allow, Policy: p.Key(), Reason: Allowed(p.Key())}
		}
		near = append(near, NearMiss{Policy: p.Key(), Why: why})
	}
	return Decision{Verdict: Deny, Reason: m.DenyReason(r.Target), Near: near}
}

// refuses says why the policy does not admit the request, "" if it does.
func (p *Policy) refuses(r Request) string {
	var why []string
	if !p.admits(r.From) {
		why = append(why, fmt.Sprintf("caller %s, policy admits %s", callerWords(r.From), list(p.From, "nobody")))
	}
	switch {
	case r.Port == 0:
		why = append(why, "port 0 is no port")
	case len(p.Ports) != 0 && !slices.Contains(p.Ports, r.Port):
		why = append(why, fmt.Sprintf("port %d, policy admits %s", r.Port, list(p.Ports, "none")))
	}
	return strings.Join(why, "; ")
}

func (p *Policy) admits(id spiffeid.ID) bool {
	return slices.ContainsFunc(p.From, func(pt Pattern) bool { return pt.Matches(id) })
}

func callerWords(id spiffeid.ID) string {
	if id.IsZero() {
		return "has no identity"
	}
	return "is " + id.String()
}

// maxListed bounds how many names a near miss repeats.
const maxListed = 8

func list[T any](items []T, none string) string {
	if len(items) == 0 {
		return none
	}
	var words []string
	for i, item := range items {
		if i == maxListed {
			return fmt.Sprintf("%s and %d more", strings.Join(words, ", "), len(items)-i)
		}
		words = append(words, fmt.Sprint(item))
	}
	return strings.Join(words, ", ")
}

// DenyReason returns the words of a denial. They depend on the target alone,
// so that a proxy can be told them ahead of any caller. A caller that is cut
// off is refused with CallerCutOff instead.
func (m *Model) DenyReason(t Target) string {
	if name, cut := m.QuarantinedTarget(t); cut {
		return targetCutOff(name, t)
	}
	switch n := len(m.protecting(t)); n {
	case 0:
		return fmt.Sprintf("default deny: no policy protects %s", t)
	case 1:
		return fmt.Sprintf("default deny: 1 policy protects %s, it does not admit this caller", t)
	default:
		return fmt.Sprintf("default deny: %d policies protect %s, none admits this caller", n, t)
	}
}

// Allowed returns the words of a grant by the policy with the given key.
func Allowed(policy string) string { return "allowed by " + policy }
