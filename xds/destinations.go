package xds

import (
	"net/netip"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	internalv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/internal_upstream/v3"
	rawv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/raw_buffer/v3"
	metadatav3 "github.com/envoyproxy/go-control-plane/envoy/type/metadata/v3"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Destination builds the cluster for an address that a workload dialled, by
// its name. It reports false for a name that stands for nothing: a service's
// address with a port that the service does not have, one of the mesh's own
// ports, or, where unknown destinations are refused, an address outside the
// mesh.
func Destination(v *mesh.View, name string) (Resource, bool) {
	addr, ok := ParseDestination(name)
	if !ok || v == nil || v.State == nil {
		return Resource{}, false
	}
	eps, ok := resolve(v.State, addr)
	if !ok {
		return Resource{}, false
	}
	r, err := NewResource(name, destinationCluster(name, eps))
	return r, err == nil
}

// hop is where a connection to a destination may go.
type hop struct {
	addr     netip.AddrPort
	workload *mesh.Workload // nil: outside the mesh, in plain
}

// resolve finds the endpoints behind an address.
func resolve(s *mesh.State, addr netip.AddrPort) ([]hop, bool) {
	switch addr.Port() {
	case 0, mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel:
		return nil, false
	}
	for i := range s.Services {
		svc := &s.Services[i]
		for _, vip := range svc.VIPs {
			if vip == addr.Addr() {
				return serviceHops(s, svc, addr.Port())
			}
		}
	}
	if w := workloadAt(s, addr.Addr()); w != nil {
		return []hop{{addr, meshed(s, w)}}, true
	}
	if s.RefuseUnknown {
		return nil, false
	}
	return []hop{{addr: addr}}, true
}

func serviceHops(s *mesh.State, svc *mesh.Service, port uint16) ([]hop, bool) {
	for _, p := range svc.Ports {
		if p.Port != port {
			continue
		}
		var out []hop
		for _, e := range svc.Endpoints {
			if e.Workload == "" {
				out = append(out, hop{addr: netip.AddrPortFrom(e.Addr, p.Target)})
				continue
			}
			w := s.Workload(e.Workload)
			if w == nil || w.Capture == nil || len(w.Capture.Addrs) == 0 {
				continue
			}
			out = append(out, hop{netip.AddrPortFrom(w.Capture.Addrs[0], p.Target), meshed(s, w)})
		}
		return out, true
	}
	return nil, false
}

// meshed returns w if connections to it must go through a tunnel.
func meshed(s *mesh.State, w *mesh.Workload) *mesh.Workload {
	if s.Mode(w.Namespace) == mesh.ModeOff {
		return nil
	}
	return w
}

func workloadAt(s *mesh.State, a netip.Addr) *mesh.Workload {
	for i := range s.Workloads {
		if c := s.Workloads[i].Capture; c != nil {
			for _, own := range c.Addrs {
				if own == a {
					return &s.Workloads[i]
				}
			}
		}
	}
	return nil
}

// destinationCluster: an endpoint of the mesh is the internal tunnel listener
// with metadata that says where the tunnel goes and who must answer; an
// endpoint outside the mesh is its address.
func destinationCluster(name string, hops []hop) *clusterv3.Cluster {
	var eps []*endpointv3.LbEndpoint
	plain := false
	for _, h := range hops {
		if h.workload == nil {
			plain = true
			eps = append(eps, plainEndpoint(h.addr))
			continue
		}
		eps = append(eps, tunnelEndpoint(h))
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
		TransportSocket: internalUpstream(),
	}
	if plain {
		c.UpstreamBindConfig = insideNamespace()
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

func tunnelEndpoint(h hop) *endpointv3.LbEndpoint {
	meta := map[string]string{
		metaTunnel:    netip.AddrPortFrom(h.addr.Addr(), mesh.PortTunnel).String(),
		metaAuthority: h.addr.String(),
		metaIdentity:  h.workload.ID.String(),
		metaWorkload:  h.workload.Key(),
	}
	fields := map[string]*structpb.Value{}
	for k, v := range meta {
		fields[k] = structpb.NewStringValue(v)
	}
	return &endpointv3.LbEndpoint{
		Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metadataKey: {Fields: fields}}},
		HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
			Address: &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
				AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: listenerTunnel},
				EndpointId:           h.addr.String(),
			}}},
		}},
	}
}

func internalUpstream() *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name: "envoy.transport_sockets.internal_upstream",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: packed(&internalv3.InternalUpstreamTransport{
			PassthroughMetadata: []*internalv3.InternalUpstreamTransport_MetadataValueSource{{
				Kind: &metadatav3.MetadataKind{Kind: &metadatav3.MetadataKind_Host_{Host: &metadatav3.MetadataKind_Host{}}},
				Name: metadataKey,
			}},
			TransportSocket: &corev3.TransportSocket{
				Name:       "envoy.transport_sockets.raw_buffer",
				ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: packed(&rawv3.RawBuffer{})},
			},
		})},
	}
}

// allowedDestinations pushes ahead what local identities may reach by policy,
// so that those connections neither wait for a round trip nor need the
// control plane. Default deny keeps the set small.
func (b *builder) allowedDestinations() {
	s := b.view.State
	locals := b.captured()
	admits := func(w *mesh.Workload, port uint16) bool {
		if s.Mode(w.Namespace) == mesh.ModeOff {
			return false
		}
		for i := range locals {
			d := b.view.Model.Decide(authz.Request{
				From:   locals[i].ID,
				Target: authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount},
				Port:   port,
			})
			if d.Verdict == authz.Allow {
				return true
			}
		}
		return false
	}
	push := func(a netip.AddrPort) {
		name := DestinationName(a)
		if r, ok := Destination(b.view, name); ok {
			b.set.Put(r)
		}
	}
	for i := range s.Services {
		svc := &s.Services[i]
		for _, p := range svc.Ports {
			for _, e := range svc.Endpoints {
				if w := s.Workload(e.Workload); w != nil && admits(w, p.Target) {
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
