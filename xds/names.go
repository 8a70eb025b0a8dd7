package xds

import (
	"net/netip"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/mesh"
)

// Names of resources and of the keys that travel inside the proxy. They are
// a contract between this package, the agent's relay and the audit's reader.
const (
	// BundleSecret is the SDS name of the trust bundle, for tunnels that leave.
	BundleSecret = "bundle"
	// InboundSecret is the SDS name of what callers are verified by: the bundle,
	// and those of other trust domains beside it.
	InboundSecret = "bundles"

	// inboundPrefix keeps the SDS names of server certificates apart from
	// those of client certificates: a name that is both static and on demand
	// on one stream leaves the second watcher without its first copy, and
	// the handshake hangs.
	inboundPrefix = "inbound:"

	destinationPrefix = "dst|"

	clusterTunnel = "tunnel"      // mTLS to other pods' 15008
	clusterLocal  = "local"       // from the tunnel to the local application
	clusterPlain  = "local-plain" // from 15006 to the local application, observe mode
	clusterRefuse = "refuse"      // has no endpoints

	listenerTunnel = "tunnel"

	// UpstreamInside begins what an audit line calls an upstream inside the proxy, and
	// UpstreamTunnel what it calls the tunnels; the endpoint's address follows.
	UpstreamInside = "envoy://"
	UpstreamTunnel = UpstreamInside + listenerTunnel + "/"

	// metadataKey is the filter metadata namespace of everything here.
	metadataKey = "signet"
)

// Filter state that describes a captured connection; read by the access log.
const stateConn = "signet.conn"

// stateDirect describes a connection whose TLS was ended on the workload's own
// port; read by the access log.
const stateDirect = "signet.direct"

// statePool is the filter state key by whose value tunnels are shared.
const statePool = "signet.pool"

// ClientSecret is the SDS name of the certificate that a workload dials with.
func ClientSecret(id spiffeid.ID) string { return id.String() }

// ServerSecret is the SDS name of the certificate that a workload serves with.
func ServerSecret(id spiffeid.ID) string { return inboundPrefix + id.String() }

// ForeignSecret is the SDS name of another trust domain's roots, for tunnels that
// leave for it.
func ForeignSecret(td spiffeid.TrustDomain) string { return BundleSecret + "|" + td.Name() }

// foreignTunnel is the internal listener of connections to another trust domain, and
// the cluster of the tunnels in which they leave.
func foreignTunnel(td spiffeid.TrustDomain) string { return clusterTunnel + "|" + td.Name() }

// originateName is the internal listener of connections that leave as mutual TLS with
// an application of a trust domain that is in no tunnel, and the cluster by which they do.
func originateName(td spiffeid.TrustDomain) string { return "originate|" + td.Name() }

// SecretID returns the identity that an SDS name stands for.
func SecretID(name string) (spiffeid.ID, bool) {
	id, err := spiffeid.FromString(strings.TrimPrefix(name, inboundPrefix))
	return id, err == nil
}

// DestinationName is the cluster name of an address that a workload dialled.
func DestinationName(a netip.AddrPort) string { return destinationPrefix + a.String() }

// ParseDestination is the inverse of DestinationName.
func ParseDestination(name string) (netip.AddrPort, bool) {
	s, ok := strings.CutPrefix(name, destinationPrefix)
	if !ok {
		return netip.AddrPort{}, false
	}
	a, err := netip.ParseAddrPort(s)
	if err != nil || a.String() != s || a.Addr().Is4In6() { // one spelling only
		return netip.AddrPort{}, false
	}
	return a, true
}

func outboundListener(w *mesh.Workload) string { return "out|" + w.Key() }
func tunnelInListener(w *mesh.Workload) string { return "in|" + w.Key() }
func plainInListener(w *mesh.Workload) string  { return "plain|" + w.Key() }

// directName is the internal listener of connections whose TLS was ended on the
// workload's own port, and the cluster that leads there.
func directName(w *mesh.Workload) string { return "direct|" + w.Key() }

// RouteName is the RDS name of a workload's inbound policy.
func RouteName(w *mesh.Workload) string { return "in|" + w.Key() }
