package authz

import (
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

// maxReason is the longest reason of a quarantine, in characters.
const maxReason = 256

// Quarantine is one compiled Quarantine document.
type Quarantine struct {
	Name   string
	Reason string
	// Identities are cut off in both directions.
	Identities []Pattern
	// Nodes are cut off with everything on them. A Model only lists them:
	// where an identity runs is not known here.
	Nodes []string
}

// WithQuarantines returns a model that has the policies of m and these
// quarantines instead of its own. Targets belong to the trust domain td. It
// copies what it is given and sorts it; quarantines of the same name are
// joined, so that none is lost. A nil m has no policies.
func (m *Model) WithQuarantines(td spiffeid.TrustDomain, quarantines []Quarantine) *Model {
	out := &Model{td: td}
	if m != nil {
		out.policies, out.byNamespace = m.policies, m.byNamespace
	}
	for _, q := range quarantines {
		i := slices.IndexFunc(out.quarantines, func(have Quarantine) bool { return have.Name == q.Name })
		if i < 0 {
			out.quarantines = append(out.quarantines, normalQuarantine(q))
			continue
		}
		joined := out.quarantines[i]
		joined.Identities = append(joined.Identities, q.Identities...)
		joined.Nodes = append(joined.Nodes, q.Nodes...)
		out.quarantines[i] = normalQuarantine(joined)
	}
	slices.SortFunc(out.quarantines, func(a, b Quarantine) int { return strings.Compare(a.Name, b.Name) })
	return out
}

// normalQuarantine returns a deep copy with sorted and compacted slices.
func normalQuarantine(q Quarantine) Quarantine {
	q.Identities = slices.Clone(q.Identities)
	slices.SortFunc(q.Identities, func(a, b Pattern) int { return strings.Compare(a.String(), b.String()) })
	q.Identities = slices.Compact(q.Identities)
	q.Nodes = slices.Clone(q.Nodes)
	slices.Sort(q.Nodes)
	q.Nodes = slices.Compact(q.Nodes)
	return q
}

// Quarantines returns a copy of the quarantines, sorted by name.
func (m *Model) Quarantines() []Quarantine {
	if m == nil {
		return nil
	}
	out := make([]Quarantine, len(m.quarantines))
	for i, q := range m.quarantines {
		out[i] = normalQuarantine(q)
	}
	return out
}

// Quarantined names the quarantine that cuts the identity off, the first by
// name when several do.
func (m *Model) Quarantined(id spiffeid.ID) (name string, ok bool) {
	if m == nil {
		return "", false
	}
	for i := range m.quarantines {
		q := &m.quarantines[i]
		if slices.ContainsFunc(q.Identities, func(p Pattern) bool { return p.Matches(id) }) {
			return q.Name, true
		}
	}
	return "", false
}

// QuarantinedTarget names the quarantine that cuts the target off, the first
// by name when several do.
func (m *Model) QuarantinedTarget(t Target) (name string, ok bool) {
	if m == nil || len(m.quarantines) == 0 {
		return "", false
	}
	id, err := identity(m.td, t.Namespace, t.ServiceAccount)
	if err != nil {
		return "", false // nobody has such an identity
	}
	return m.Quarantined(id)
}

// QuarantinedNode names the quarantine that cuts the node off, the first by
// name when several do.
func (m *Model) QuarantinedNode(node string) (name string, ok bool) {
	if m == nil {
		return "", false
	}
	for i := range m.quarantines {
		if slices.Contains(m.quarantines[i].Nodes, node) {
			return m.quarantines[i].Name, true
		}
	}
	return "", false
}

// CallerRevoked is the reason why a caller is refused whose certificate is revoked,
// whatever the policies say. What was given as the reason of that may follow.
const CallerRevoked = "the caller's certificate is revoked"

// ServerRevoked is the reason why a connection with a server ended that proved itself by
// a certificate which is revoked.
const ServerRevoked = "the server's certificate is revoked"

// CallerExpired is the reason why a caller is refused whose certificate has expired
// since it opened its tunnel.
const CallerExpired = "the caller's certificate has expired since it opened the tunnel"

// CallerCutOff returns the words of a denial because the caller is cut off.
func CallerCutOff(quarantine, caller string) string {
	return fmt.Sprintf("quarantined by %q: caller %s is cut off", quarantine, caller)
}

// ApplicationCutOff returns the words of a denial because an application that speaks
// mutual TLS itself is cut off.
func ApplicationCutOff(quarantine, application string) string {
	return fmt.Sprintf("quarantined by %q: application %s is cut off", quarantine, application)
}

func targetCutOff(quarantine string, t Target) string {
	return fmt.Sprintf("quarantined by %q: target %s is cut off", quarantine, t)
}

// compileQuarantines turns documents into quarantines. Whatever is valid in a
// document is in force, also when other parts of it are not: the opposite
// would let through what somebody meant to cut off.
func compileQuarantines(domains Domains, docs []v1alpha1.Quarantine) ([]Quarantine, []Diagnostic) {
	var (
		out         []Quarantine
		diagnostics []Diagnostic
	)
	seen := map[string]bool{}
	for i := range docs {
		c := quarantineCompiler{domains: domains, td: domains.Own, doc: &docs[i]}
		c.metadata(seen)
		c.nodes()
		c.identities()
		out = append(out, c.quarantine)
		diagnostics = append(diagnostics, c.diagnostics...)
	}
	return out, diagnostics
}

// quarantineCompiler works on one document.
type quarantineCompiler struct {
	domains     Domains
	td          spiffeid.TrustDomain
	doc         *v1alpha1.Quarantine
	quarantine  Quarantine
	diagnostics []Diagnostic
}

func (c *quarantineCompiler) fault(field, format string, args ...any) {
	c.diagnostics = append(c.diagnostics, Diagnostic{
		Quarantine: c.doc.Name, Field: field, Message: fmt.Sprintf(format, args...),
	})
}

func (c *quarantineCompiler) metadata(seen map[string]bool) {
	spec := &c.doc.Spec
	c.quarantine.Name, c.quarantine.Reason = c.doc.Name, spec.Reason
	if err := CheckName(c.doc.Name); err != nil {
		c.fault("metadata.name", "%v", err)
	}
	if seen[c.doc.Name] {
		c.fault("metadata.name", "another Quarantine %s exists; rename or remove one of them", c.doc.Name)
	}
	seen[c.doc.Name] = true
	if spec.Reason == "" {
		c.fault("spec.reason", "is missing; say why, for whoever finds a connection refused")
	}
	if n := utf8.RuneCountInString(spec.Reason); n > maxReason {
		c.fault("spec.reason", "is %d characters long, at most %d are allowed", n, maxReason)
	}
	if len(spec.Identities)+len(spec.ServiceAccounts)+len(spec.Namespaces)+len(spec.Nodes) == 0 {
		c.fault("spec", "cuts nobody off; set at least one of identities, serviceAccounts, namespaces, nodes")
	}
}

func (c *quarantineCompiler) nodes() {
	for i, node := range c.doc.Spec.Nodes {
		if err := CheckName(node); err != nil {
			c.fault(fmt.Sprintf("spec.nodes[%d]", i), "%v", err)
			continue
		}
		c.quarantine.Nodes = append(c.quarantine.Nodes, node)
	}
}

func (c *quarantineCompiler) identities() {
	spec := &c.doc.Spec
	if c.td.IsZero() {
		c.each("spec.identities", spec.Identities, ParsePattern)
		if len(spec.ServiceAccounts)+len(spec.Namespaces) > 0 {
			c.fault("spec", "serviceAccounts and namespaces cannot be read without a trust domain")
		}
		return
	}
	c.each("spec.identities", spec.Identities, c.domains.pattern)
	c.each("spec.serviceAccounts", spec.ServiceAccounts, func(s string) (Pattern, error) {
		if !strings.Contains(s, "/") {
			return Pattern{}, fmt.Errorf("%q names no namespace; write namespace/name", s)
		}
		return qualifiedServiceAccount(c.td, s, "namespace/name")
	})
	c.each("spec.namespaces", spec.Namespaces, func(s string) (Pattern, error) { return wholeNamespace(c.td, s) })
}

func (c *quarantineCompiler) each(field string, items []string, parse func(string) (Pattern, error)) {
	for i, item := range items {
		pattern, err := parse(item)
		if err != nil {
			c.fault(fmt.Sprintf("%s[%d]", field, i), "%v", err)
			continue
		}
		c.quarantine.Identities = append(c.quarantine.Identities, pattern)
	}
}
