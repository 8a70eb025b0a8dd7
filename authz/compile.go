package authz

import (
	"errors"
	"fmt"
	"regexp"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

// Ports that the mesh itself listens on. Package mesh has the same numbers; it
// imports this package, so they are repeated.
const (
	portOutbound = 15001
	portInbound  = 15006
	portTunnel   = 15008
)

// Compile turns documents into a Model. A policy with anything wrong in it
// grants nothing at all: it is left out of the model whole, and each of its
// faults is a Diagnostic. When two policies have the same namespace and name,
// the later one is invalid, also when the first is invalid too. With a
// quarantine it is the other way round: whatever is wrong with it is a
// Diagnostic, and every part of it that is valid is in force.
//
// Diagnostics are in the order of the policies, then of the quarantines, then
// of their fields. What is given by namespace or service account belongs to
// the trust domain td.
func Compile(td spiffeid.TrustDomain, docs []v1alpha1.AllowPolicy, quarantines ...v1alpha1.Quarantine) (*Model, []Diagnostic) {
	return Domains{Own: td}.Compile(docs, quarantines...)
}

// Compile is the function Compile, for a mesh that others are federated with:
// documents may name their identities too, as SPIFFE IDs.
func (d Domains) Compile(docs []v1alpha1.AllowPolicy, quarantines ...v1alpha1.Quarantine) (*Model, []Diagnostic) {
	var (
		policies    []Policy
		diagnostics []Diagnostic
	)
	seen := map[[2]string]bool{}
	for i := range docs {
		c := compiler{domains: d, td: d.Own, doc: &docs[i]}
		c.metadata(seen)
		c.target()
		c.ports()
		c.tls()
		c.from()
		if len(c.diagnostics) == 0 {
			policies = append(policies, c.policy)
		}
		diagnostics = append(diagnostics, c.diagnostics...)
	}
	cutOff, faults := compileQuarantines(d, quarantines)
	return NewModel(policies).WithQuarantines(d.Own, cutOff), append(diagnostics, faults...)
}

// compiler works on one document.
type compiler struct {
	domains     Domains
	td          spiffeid.TrustDomain
	doc         *v1alpha1.AllowPolicy
	policy      Policy
	diagnostics []Diagnostic
}

func (c *compiler) fault(field, format string, args ...any) {
	c.diagnostics = append(c.diagnostics, Diagnostic{
		Policy:  c.doc.Namespace + "/" + c.doc.Name,
		Field:   field,
		Message: fmt.Sprintf(format, args...),
	})
}

func (c *compiler) metadata(seen map[[2]string]bool) {
	c.policy.Namespace, c.policy.Name = c.doc.Namespace, c.doc.Name
	if err := CheckNamespace(c.doc.Namespace); err != nil {
		c.fault("metadata.namespace", "%v", err)
	}
	if err := CheckName(c.doc.Name); err != nil {
		c.fault("metadata.name", "%v", err)
	}
	key := [2]string{c.doc.Namespace, c.doc.Name}
	if seen[key] {
		c.fault("metadata.name", "another AllowPolicy %s/%s exists; rename or remove one of them", c.doc.Namespace, c.doc.Name)
	}
	seen[key] = true
}

func (c *compiler) target() {
	sa := c.doc.Spec.Target.ServiceAccount
	c.policy.TargetServiceAccount = sa
	if sa == "" {
		return // the whole namespace
	}
	if err := CheckName(sa); err != nil {
		c.fault("spec.target.serviceAccount", "%v", err)
	}
}

func (c *compiler) ports() {
	for i, port := range c.doc.Spec.Ports {
		field := fmt.Sprintf("spec.ports[%d]", i)
		switch {
		case port < 1 || port > 65535:
			c.fault(field, "%d is no port; use 1 to 65535", port)
		case port == portOutbound || port == portInbound || port == portTunnel:
			c.fault(field, "port %d belongs to the mesh itself and cannot be granted", port)
		default:
			c.policy.Ports = append(c.policy.Ports, uint16(port))
		}
	}
}

func (c *compiler) tls() {
	switch c.doc.Spec.TLS {
	case "":
	case v1alpha1.TLSTerminate:
		c.policy.Terminate = true
		if len(c.doc.Spec.Ports) == 0 {
			c.fault("spec.tls", "needs spec.ports; name the ports on which the application takes plain bytes from the proxy")
		}
	case v1alpha1.TLSOriginate:
		c.policy.Originate = true
		if len(c.doc.Spec.Ports) == 0 {
			c.fault("spec.tls", "needs spec.ports; name the ports on which the application asks for mutual TLS")
		}
	default:
		c.fault("spec.tls", "%q is not known; write %s or %s, or leave it out", c.doc.Spec.TLS, v1alpha1.TLSTerminate, v1alpha1.TLSOriginate)
	}
	c.policy.ALPN = c.doc.Spec.ALPN
	switch err := CheckALPN(c.policy.ALPN); {
	case c.policy.ALPN == "":
	case !c.policy.Originate:
		c.fault("spec.alpn", "needs spec.tls: %s, for it is what the proxies of callers offer in that TLS", v1alpha1.TLSOriginate)
	case err != nil:
		c.fault("spec.alpn", "%v", err)
	}
}

var alpn = regexp.MustCompile(`^[A-Za-z0-9._/+-]{1,255}$`)

// CheckALPN says why a text is not the name of a protocol that TLS can agree on (RFC
// 7301, section 6). Of the names that are possible, those that are in use are taken.
func CheckALPN(s string) error {
	if !alpn.MatchString(s) {
		return fmt.Errorf("%.64q is no protocol; write what the application agrees on, such as h2", s)
	}
	return nil
}

func (c *compiler) from() {
	if len(c.doc.Spec.From) == 0 {
		c.fault("spec.from", "is empty; name at least one caller, or delete the policy")
	}
	if c.td.IsZero() {
		c.fault("spec.from", "cannot be read without a trust domain")
		return
	}
	for i, peer := range c.doc.Spec.From {
		path := fmt.Sprintf("spec.from[%d]", i)
		pattern, field, err := c.peer(peer)
		if err != nil {
			c.fault(path+field, "%v", err)
			continue
		}
		c.policy.From = append(c.policy.From, pattern)
	}
}

// peer translates one caller. On an error it also returns the field at fault,
// with a leading dot.
func (c *compiler) peer(p v1alpha1.Peer) (Pattern, string, error) {
	set := 0
	for _, s := range []string{p.ServiceAccount, p.Namespace, p.SPIFFEID} {
		if s != "" {
			set++
		}
	}
	if set != 1 {
		return Pattern{}, "", fmt.Errorf("has %d fields set; set exactly one of serviceAccount, namespace, spiffeID", set)
	}
	switch {
	case p.ServiceAccount != "":
		pattern, err := c.serviceAccount(p.ServiceAccount)
		return pattern, ".serviceAccount", err
	case p.Namespace != "":
		pattern, err := wholeNamespace(c.td, p.Namespace)
		return pattern, ".namespace", err
	default:
		pattern, err := c.domains.pattern(p.SPIFFEID)
		return pattern, ".spiffeID", err
	}
}

// serviceAccount reads "name" or "namespace/name".
func (c *compiler) serviceAccount(s string) (Pattern, error) {
	if strings.Contains(s, "/") {
		return qualifiedServiceAccount(c.td, s, "name or namespace/name")
	}
	if err := CheckName(s); err != nil {
		return Pattern{}, fmt.Errorf("name %w", err)
	}
	id, err := identity(c.td, c.doc.Namespace, s)
	if err != nil {
		return Pattern{}, errors.New("cannot be read while metadata.namespace is invalid")
	}
	return patternOf(id), nil
}

// qualifiedServiceAccount reads "namespace/name"; forms is what errors tell to
// write.
func qualifiedServiceAccount(td spiffeid.TrustDomain, s, forms string) (Pattern, error) {
	namespace, name, _ := strings.Cut(s, "/")
	if strings.Contains(name, "/") {
		return Pattern{}, fmt.Errorf("%q has more than one slash; write %s", s, forms)
	}
	if err := CheckNamespace(namespace); err != nil {
		return Pattern{}, fmt.Errorf("namespace %w", err)
	}
	if err := CheckName(name); err != nil {
		return Pattern{}, fmt.Errorf("name %w", err)
	}
	id, err := identity(td, namespace, name)
	return patternOf(id), err
}

// wholeNamespace matches every service account of a namespace.
func wholeNamespace(td spiffeid.TrustDomain, namespace string) (Pattern, error) {
	if err := CheckNamespace(namespace); err != nil {
		return Pattern{}, err
	}
	return ParsePattern(fmt.Sprintf("spiffe://%s/ns/%s/sa/*", td.Name(), namespace))
}

// identity is the SPIFFE ID of a service account.
func identity(td spiffeid.TrustDomain, namespace, serviceAccount string) (spiffeid.ID, error) {
	return spiffeid.FromSegments(td, "ns", namespace, "sa", serviceAccount)
}
