// Package mesh holds the parsed facts that the other packages work on:
// workloads, services, namespaces. Values are immutable once built; every
// identity and address in them has been validated.
package mesh

import (
	"net/netip"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
)

// Ports that the mesh itself listens on inside a captured network namespace.
// No service or policy may name them.
const (
	PortOutbound = 15001 // captured outbound connections
	PortInbound  = 15006 // inbound connections that came without a tunnel
	PortTunnel   = 15008 // inbound mTLS tunnels
)

// SocketMark is the SO_MARK on every socket that the node proxy opens, so
// that the capture rules do not capture the proxy itself.
const SocketMark = 0x539

// Mode says how a namespace takes part in the mesh.
type Mode uint8

// The modes. The zero value takes no part: it is captured by nobody and
// receives no identity.
const (
	ModeOff     Mode = iota
	ModeObserve      // everything flows; what would be denied is recorded
	ModeEnforce      // only what a policy allows flows
)

// ParseMode reads the value of the namespace annotation.
func ParseMode(s string) (Mode, bool) {
	switch s {
	case "", "off":
		return ModeOff, true
	case "observe":
		return ModeObserve, true
	case "enforce":
		return ModeEnforce, true
	}
	return ModeOff, false
}

// String returns the annotation's value.
func (m Mode) String() string {
	switch m {
	case ModeObserve:
		return "observe"
	case ModeEnforce:
		return "enforce"
	}
	return "off"
}

// State is everything known about the mesh at one instant, except policies.
// Slices are sorted by namespace, then name.
type State struct {
	TrustDomain spiffeid.TrustDomain
	SVIDTTL     time.Duration
	SVIDKeyType KeyType `json:",omitempty"`
	// RootNotBefore: a root that was made before is to be replaced, once it is
	// then. Zero: none is.
	RootNotBefore time.Time
	// RootDistrustedBefore: a root that was made before is distrusted. Zero: none is.
	RootDistrustedBefore time.Time
	// Revoked are certificates and tokens that nobody is to take any more, also
	// some that have expired.
	Revoked []Revocation `json:",omitempty"`
	// RefuseUnknown closes connections to destinations outside the mesh.
	RefuseUnknown bool
	Namespaces    map[string]Mode // absent means ModeOff
	// Plain are namespaces that are on their way into the mesh or out of it:
	// their workloads take tunnels, and plaintext, and are called in plain.
	Plain map[string]bool
	// Excluded are the pods that opted out of an enrolled namespace, where its
	// owner allows that: pod UID to node.
	Excluded  map[string]string
	Workloads []Workload
	Services  []Service
	// Federations are the other trust domains whose identities are believed,
	// sorted by name.
	Federations []Federation `json:",omitempty"`

	index index
}

// Domains are the trust domains that policies may name.
func (s *State) Domains() authz.Domains {
	out := authz.Domains{Own: s.TrustDomain}
	for i := range s.Federations {
		out.Foreign = append(out.Foreign, s.Federations[i].TrustDomain)
	}
	return out
}

// Workload is one identity in one place.
type Workload struct {
	Namespace      string
	Name           string
	ServiceAccount string
	ID             spiffeid.ID
	Node           string
	// UID tells one pod from the next of the same name. Empty for workloads
	// that are declared and not watched.
	UID     string
	Attest  *Attest  // nil: not available over the Workload API
	Hint    string   `json:",omitempty"` // tells a process with several identities which this is
	Capture *Capture // nil: not captured
}

// Key returns "namespace/name".
func (w *Workload) Key() string { return w.Namespace + "/" + w.Name }

// Attest is what a process must be; nil or empty fields are not looked at,
// and at least one is set.
type Attest struct {
	UID         *uint32
	Path        string
	SHA256      string
	SystemdUnit string
	Cgroup      string
	PodUID      string
}

// Capture is a network namespace whose TCP traffic passes the node proxy.
type Capture struct {
	// NetNS is an absolute path. Of a pod only its own node knows it: it is
	// empty elsewhere.
	NetNS string
	// Addrs are the namespace's own addresses. On the pod's own node they are
	// read from the namespace; elsewhere they are what the API server says.
	Addrs []netip.Addr
	// Probes are the ports that the pod declares probes on. The node's kubelet
	// may connect to them without a tunnel.
	Probes []uint16
}

// Service is a virtual address in front of endpoints.
type Service struct {
	Namespace string
	Name      string
	VIPs      []netip.Addr
	Ports     []ServicePort
	Endpoints []Endpoint
	// Local keeps connections on the caller's node
	// (internalTrafficPolicy: Local).
	Local bool
	// Affinity sends the connections of one caller to one endpoint
	// (sessionAffinity: ClientIP).
	Affinity bool
}

// Key returns "namespace/name".
func (s *Service) Key() string { return s.Namespace + "/" + s.Name }

// ServicePort maps a service port to the endpoints' port.
type ServicePort struct {
	Name   string
	Port   uint16
	Target uint16
}

// Endpoint is a workload of the mesh (Workload is its key) or an address
// outside of it; exactly one is set.
type Endpoint struct {
	Workload string
	Addr     netip.Addr
	// Identity is who must answer at Addr, in a tunnel of another mesh or, with
	// Originate, outside of any. Zero: Addr is called in plain.
	Identity spiffeid.ID `json:",omitzero"`
	// Originate: what listens at Addr speaks mutual TLS itself.
	Originate bool `json:",omitempty"`
	// ALPN is the protocol that is offered in it; empty: none.
	ALPN string `json:",omitempty"`
	// Node is where the endpoint runs; empty when not known.
	Node string
	// Ending endpoints still serve while they end. They are called only where
	// there is no other.
	Ending bool
	// Targets are the endpoint's own ports, one for each of the service's
	// Ports; 0 where it does not serve that port. Nil: the service's targets.
	Targets []uint16
}

// Target returns the endpoint's port for the i-th port of its service.
func (e *Endpoint) Target(s *Service, i int) (port uint16, ok bool) {
	if e.Targets == nil {
		return s.Ports[i].Target, true
	}
	if i >= len(e.Targets) || e.Targets[i] == 0 {
		return 0, false
	}
	return e.Targets[i], true
}

// Mode returns the mode of a namespace.
func (s *State) Mode(namespace string) Mode { return s.Namespaces[namespace] }

// OnNode returns the enrolled workloads of one node: those whose namespace
// is not off.
func (s *State) OnNode(node string) []Workload {
	var out []Workload
	for _, w := range s.indexed().onNode[node] {
		if s.Mode(w.Namespace) != ModeOff {
			out = append(out, *w)
		}
	}
	return out
}
