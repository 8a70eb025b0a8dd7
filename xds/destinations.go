package xds

import (
	"net/netip"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	internalv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/internal_upstream/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	metadatav3 "github.com/envoyproxy/go-control-plane/envoy/type/metadata/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Destination builds the cluster for an address that a workload of a node
// dialled, by its name. It reports false for a name that stands for nothing: a
// service's address with a port that the service does not have, one of the
// mesh's own ports, a link-local address of IPv6, or, where unknown
// destinations are refused, an address outside the mesh.
func Destination(v *mesh.View, node, name string) (Resource, bool) {
	addr, ok := ParseDestination(name)
	if !ok || v == nil || v.State == nil {
		return Resource{}, false
	}
	where, ok := resolve(v, node, addr)
	if !ok {
		return Resource{}, false
	}
	r, err := NewResource(name, where.cluster(name))
	return r, err == nil
}

// ClusterRefused is what the audit line of a connection to a destination that
// does not exist says in place of the cluster's name.
const ClusterRefused = "refused"

// Refused is the cluster for a name that stands for nothing: without endpoints,
// so that a connection to it is refused at once. Without any answer the proxy
// would hold every further connection to it for as long as it waits for one.
//
// It reports false for a name that cannot be a resource's.
func Refused(name string) (Resource, bool) {
	r, err := NewResource(name, &clusterv3.Cluster{
		Name:                 name,
		AltStatName:          ClusterRefused,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
	})
	return r, err == nil
}

// hop is where a connection to a destination may go.
type hop struct {
	addr     netip.AddrPort
	workload *mesh.Workload // nil: not called by a tunnel of this mesh
	identity spiffeid.ID    // who must answer there; zero: nobody, it is called in plain
	// originate: mutual TLS is spoken with the application itself, inside the tunnel
	// of a workload, or without a tunnel elsewhere; alpn is offered in it.
	originate bool
	alpn      []string
}

// destination is what an address stands for.
type destination struct {
	hops     []hop
	affinity bool // one caller's connections go to one endpoint
}

// resolve finds the endpoints behind an address, as seen from a node.
func resolve(v *mesh.View, node string, addr netip.AddrPort) (destination, bool) {
	s := v.State
	switch addr.Port() {
	case 0, mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel:
		return destination{}, false
	}
	if svc := s.ServiceAt(addr.Addr()); svc != nil {
		return resolveService(v, node, svc, addr)
	}
	if w := s.WorkloadAt(addr.Addr()); w != nil {
		return destination{hops: []hop{workloadHop(v, w, addr)}}, true
	}
	if s.RefuseUnknown || linkLocal6(addr.Addr()) {
		return destination{}, false
	}
	return destination{hops: []hop{{addr: addr}}}, true
}

// linkLocal6: what such an address means depends on the interface, which the
// proxy cannot name when it dials; and whether it is an enrolled neighbour's is
// not known.
func linkLocal6(a netip.Addr) bool { return a.Is6() && a.IsLinkLocalUnicast() }

// resolveService finds the endpoints as kube-proxy does: those that end are
// called where, for this port and this caller's node, there is no other.
func resolveService(v *mesh.View, node string, svc *mesh.Service, vip netip.AddrPort) (destination, bool) {
	for i, p := range svc.Ports {
		if p.Port != vip.Port() {
			continue
		}
		out := destination{affinity: svc.Affinity}
		var ending []hop
		for j := range svc.Endpoints {
			e := &svc.Endpoints[j]
			target, ok := e.Target(svc, i)
			if !ok || svc.Local && e.Node != node {
				continue
			}
			h, ok := endpointHop(v, e, target, vip.Addr().Is4())
			switch {
			case !ok:
			case e.Ending:
				ending = append(ending, h)
			default:
				out.hops = append(out.hops, h)
			}
		}
		if len(out.hops) == 0 {
			out.hops = ending
		}
		return out, true
	}
	return destination{}, false
}

// endpointHop is where an endpoint is reached by a family, if it is.
func endpointHop(v *mesh.View, e *mesh.Endpoint, port uint16, four bool) (hop, bool) {
	if e.Workload == "" {
		h := hop{addr: netip.AddrPortFrom(e.Addr, port), identity: e.Identity, originate: e.Originate}
		if e.ALPN != "" {
			h.alpn = []string{e.ALPN}
		}
		return h, e.Addr.Is4() == four && (e.Identity.IsZero() || provable(v, e))
	}
	w := v.State.Workload(e.Workload)
	if w == nil || w.Capture == nil {
		return hop{}, false
	}
	for _, a := range w.Capture.Addrs {
		if a.Is4() == four {
			return workloadHop(v, w, netip.AddrPortFrom(a, port)), true
		}
	}
	return hop{}, false
}

// workloadHop is how a workload is reached at an address of its own.
func workloadHop(v *mesh.View, w *mesh.Workload, addr netip.AddrPort) hop {
	h := hop{addr: addr, workload: meshed(v.State, w)}
	if h.workload != nil {
		h.identity = w.ID
		o, originate := v.Model.Originated(authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}, addr.Port())
		h.originate, h.alpn = originate, o.ALPN
	}
	return h
}

// provable reports whether whoever must answer at an address can prove it, and is
// not cut off.
func provable(v *mesh.View, e *mesh.Endpoint) bool {
	if _, cut := v.Model.Quarantined(e.Identity); cut {
		return false
	}
	td := e.Identity.TrustDomain()
	return td == v.State.TrustDomain && e.Originate ||
		slices.ContainsFunc(v.State.Federations, func(f mesh.Federation) bool { return f.TrustDomain == td })
}

// meshed returns w if connections to it must go through a tunnel.
func meshed(s *mesh.State, w *mesh.Workload) *mesh.Workload {
	if s.Mode(w.Namespace) == mesh.ModeOff || s.Plain[w.Namespace] {
		return nil
	}
	return w
}

// cluster: an endpoint of the mesh is the internal tunnel listener
// with metadata that says where the tunnel goes and who must answer; an
// endpoint outside the mesh is its address. TLS of the application's own that goes
// by a tunnel is the endpoint's transport; see insideTunnels.
func (d destination) cluster(name string) *clusterv3.Cluster {
	var eps []*endpointv3.LbEndpoint
	plain, six := false, false
	for _, h := range d.hops {
		if h.identity.IsZero() {
			plain, six = true, six || h.addr.Addr().Is6()
			eps = append(eps, plainEndpoint(h.addr))
			continue
		}
		eps = append(eps, securedEndpoint(h))
	}
	c := &clusterv3.Cluster{
		Name:                 name,
		CircuitBreakers:      unlimited(),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       seconds(5),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: name,
			Endpoints:   []*endpointv3.LocalityLbEndpoints{{LbEndpoints: eps}},
		},
		TransportSocketMatches: d.insideTunnels(),
		TransportSocket:        internalUpstream(rawBuffer(), endpointMetadata()),
	}
	if plain {
		c.UpstreamBindConfig = insideNamespace(six)
	}
	if d.affinity { // by the caller's address; see hashPolicy
		c.LbPolicy = clusterv3.Cluster_MAGLEV
	}
	return c
}

func plainEndpoint(a netip.AddrPort) *endpointv3.LbEndpoint {
	return &endpointv3.LbEndpoint{HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
		Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address:       a.Addr().String(),
			PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: uint32(a.Port())},
		}}},
	}}}
}

// securedEndpoint is an internal listener from which a connection goes on by mutual
// TLS, with metadata that says where to and who must answer.
func securedEndpoint(h hop) *endpointv3.LbEndpoint {
	meta := map[string]string{metaAuthority: h.addr.String(), metaIdentity: h.identity.String()}
	tunnel := netip.AddrPortFrom(h.addr.Addr(), mesh.PortTunnel).String()
	var listener string
	switch {
	case h.workload != nil:
		meta[metaTunnel], meta[metaWorkload], listener = tunnel, h.workload.Key(), listenerTunnel
	case h.originate:
		meta[metaALPN], listener = strings.Join(h.alpn, ","), originateName(h.identity.TrustDomain())
	default: // what its mesh calls it is not known here
		meta[metaTunnel], listener = tunnel, foreignTunnel(h.identity.TrustDomain())
	}
	out := &endpointv3.LbEndpoint{
		Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metadataKey: textStruct(meta)}},
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
			Address: &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
				AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: listener},
				EndpointId:           h.addr.String(),
			}}},
		}},
	}
	if h.workload != nil && h.originate {
		out.Metadata.FilterMetadata["envoy.transport_socket_match"] = textStruct(map[string]string{matchInside: h.insideTunnel()})
	}
	return out
}

// textStruct leaves out what is empty.
func textStruct(values map[string]string) *structpb.Struct {
	out := &structpb.Struct{Fields: map[string]*structpb.Value{}}
	for k, v := range values {
		if v != "" {
			out.Fields[k] = structpb.NewStringValue(v)
		}
	}
	return out
}

// internalUpstream passes shared filter state to an internal listener, and
// metadata. What is said to it goes through another transport first.
func internalUpstream(through *corev3.TransportSocket, metadata ...*internalv3.InternalUpstreamTransport_MetadataValueSource) *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name: "envoy.transport_sockets.internal_upstream",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: packed(&internalv3.InternalUpstreamTransport{
			PassthroughMetadata: metadata,
			TransportSocket:     through,
		})},
	}
}

func rawBuffer() *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name:       "envoy.transport_sockets.raw_buffer",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: packed(&rawv3.RawBuffer{})},
	}
}

// endpointMetadata is what securedEndpoint says.
func endpointMetadata() *internalv3.InternalUpstreamTransport_MetadataValueSource {
	return &internalv3.InternalUpstreamTransport_MetadataValueSource{
		Kind: &metadatav3.MetadataKind{Kind: &metadatav3.MetadataKind_Host_{Host: &metadatav3.MetadataKind_Host{}}},
		Name: metadataKey,
	}
}

// allowedDestinations pushes ahead what local identities may reach by policy,
// so that those connections neither wait for a round trip nor need the
// control plane. Default deny keeps the set small.
func (b *builder) allowedDestinations() {
	s := b.view.State
	b.set[TypeCluster] = map[string]Resource{}
	callers := map[spiffeid.ID]bool{}
	for _, w := range s.OnNode(b.node) {
		if w.Capture != nil {
			callers[w.ID] = true
		}
	}
	if len(callers) == 0 {
		return
	}
	type question struct {
		target authz.Target
		port   uint16
	}
	answers := map[question]bool{} // many pods share one service account
	admits := func(w *mesh.Workload, port uint16) bool {
		if s.Mode(w.Namespace) == mesh.ModeOff {
			return false
		}
		q := question{authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}, port}
		if known, ok := answers[q]; ok {
			return known
		}
		for id := range callers {
			if b.view.Model.Decide(authz.Request{From: id, Target: q.target, Port: port}).Verdict == authz.Allow {
				answers[q] = true
				return true
			}
		}
		answers[q] = false
		return false
	}
	push := func(a netip.AddrPort) {
		if r, ok := Destination(b.view, b.node, DestinationName(a)); ok {
			b.set.Put(r)
		}
	}
	for i := range s.Services {
		svc := &s.Services[i]
		for k, p := range svc.Ports {
			for j := range svc.Endpoints {
				e := &svc.Endpoints[j]
				target, ok := e.Target(svc, k)
				w := s.Workload(e.Workload)
				// Whom another mesh admits, or an application by itself, is not known here.
				if ok && (w != nil && admits(w, target) || !e.Identity.IsZero()) {
					for _, vip := range svc.VIPs {
						push(netip.AddrPortFrom(vip, p.Port))
					}
					break
				}
			}
		}
	}
	for i := range s.Workloads {
		w := &s.Workloads[i]
		if w.Capture == nil {
			continue
		}
		for _, port := range b.grantedPorts(w) {
			if admits(w, port) {
				for _, a := range w.Capture.Addrs {
					push(netip.AddrPortFrom(a, port))
				}
			}
		}
	}
}

// grantedPorts lists the ports that policies name for a workload.
func (b *builder) grantedPorts(w *mesh.Workload) []uint16 {
	seen := map[uint16]bool{}
	var out []uint16
	for _, g := range b.view.Model.Grants(authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}) {
		for _, p := range g.Ports {
			if !seen[p] {
				seen[p] = true
				out = append(out, p)
			}
		}
	}
	return out
}
