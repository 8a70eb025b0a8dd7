package xds

import (
	"maps"
	"slices"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	inspectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/tls_inspector/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// terminated are the ports on which mutual TLS that comes without a tunnel is
// ended in front of the workload, sorted.
func (b *builder) terminated(w *mesh.Workload) []uint16 {
	return slices.Sorted(maps.Keys(b.view.Model.Terminated(authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount})))
}

// terminate has a workload's listener for connections without a tunnel end the
// TLS of those to some ports. The verdict is reached by the same routes as a
// tunnel's, for which the connection goes on, inside the proxy, as a CONNECT
// request: nothing that decides about a bare connection does so before the
// application is contacted. Each port has a chain of its own, so that an edit for
// one leaves the connections of the others alone.
//
// Where plain bytes are let in, what comes first decides which of the two it is.
// A caller that waits for the server to speak first is plain after plainAfter.
func (b *builder) terminate(w *mesh.Workload, l *listenerv3.Listener, plain bool) {
	var elsewhere []*listenerv3.ListenerFilterChainMatchPredicate
	for _, port := range b.terminated(w) {
		chain := b.directChain(w, port)
		if plain {
			chain.FilterChainMatch.TransportProtocol = "tls"
			l.FilterChains = append(l.FilterChains, &listenerv3.FilterChain{
				FilterChainMatch: &listenerv3.FilterChainMatch{DestinationPort: u32(uint32(port))},
				Filters:          l.FilterChains[0].Filters,
			})
			elsewhere = append(elsewhere, outsidePort(port))
		}
		l.FilterChains = append(l.FilterChains, chain)
	}
	if len(elsewhere) > 0 {
		l.ListenerFilters = append(l.ListenerFilters, tlsInspector(elsewhere))
		l.ListenerFiltersTimeout = seconds(plainAfter)
		l.ContinueOnListenerFiltersTimeout = true
	}
}

// plainAfter is how many seconds a caller has to begin TLS where plain bytes are
// let in too.
const plainAfter = 2

// outsidePort matches connections to all other ports.
func outsidePort(port uint16) *listenerv3.ListenerFilterChainMatchPredicate {
	return &listenerv3.ListenerFilterChainMatchPredicate{Rule: &listenerv3.ListenerFilterChainMatchPredicate_NotMatch{
		NotMatch: &listenerv3.ListenerFilterChainMatchPredicate{Rule: &listenerv3.ListenerFilterChainMatchPredicate_DestinationPortRange{
			DestinationPortRange: &typev3.Int32Range{Start: int32(port), End: int32(port) + 1},
		}},
	}}
}

// tlsInspector waits for a caller's first bytes, but for callers of other ports.
func tlsInspector(elsewhere []*listenerv3.ListenerFilterChainMatchPredicate) *listenerv3.ListenerFilter {
	off := elsewhere[0]
	if len(elsewhere) > 1 {
		off = &listenerv3.ListenerFilterChainMatchPredicate{Rule: &listenerv3.ListenerFilterChainMatchPredicate_AndMatch{
			AndMatch: &listenerv3.ListenerFilterChainMatchPredicate_MatchSet{Rules: elsewhere},
		}}
	}
	return &listenerv3.ListenerFilter{
		Name:           "tls_inspector",
		ConfigType:     &listenerv3.ListenerFilter_TypedConfig{TypedConfig: packed(&inspectorv3.TlsInspector{})},
		FilterDisabled: off,
	}
}

// directChain ends a caller's TLS. Only when the caller has proven who it is, it
// goes on.
func (b *builder) directChain(w *mesh.Workload, port uint16) *listenerv3.FilterChain {
	const once = sfsv3.FilterStateValue_ONCE
	return &listenerv3.FilterChain{
		FilterChainMatch:              &listenerv3.FilterChainMatch{DestinationPort: u32(uint32(port))},
		TransportSocketConnectTimeout: seconds(5),
		// What is inside is for caller and application to know. One that offers
		// both kinds of HTTP gets the one that needs no TLS to be agreed on.
		TransportSocket: b.serverTLS(w, "http/1.1", "h2"),
		Filters: []*listenerv3.Filter{
			filter("state", &setstatev3.Config{OnDownstreamTlsHandshake: append(peerState(once),
				// Hashable, and different for each connection: no two share one
				// inside the proxy, which would give all the identity of the first.
				stateValue(stateDirect, "%CONNECTION_ID% %DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_LOCAL_URI_SAN% "+
					"%DOWNSTREAM_TLS_VERSION% %DOWNSTREAM_TLS_CIPHER% %DOWNSTREAM_TLS_GROUP%", hashable, once))}),
			filter("tcp", &tcpv3.TcpProxy{
				StatPrefix:          "direct",
				ClusterSpecifier:    &tcpv3.TcpProxy_Cluster{Cluster: directName(w)},
				IdleTimeout:         seconds(0),
				UpstreamConnectMode: tcpv3.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE,
				MaxEarlyDataBytes:   u32(0),
				AccessLog:           b.accessLog(LineHandshake, "workload", w.Key(), "direct", "%DOWNSTREAM_LOCAL_ADDRESS%", "upstream", "%UPSTREAM_HOST%"),
				TunnelingConfig:     &tcpv3.TcpProxy_TunnelingConfig{Hostname: "%DOWNSTREAM_LOCAL_ADDRESS%"},
			}),
		},
	}
}

// directListener is where connections go on whose TLS was ended.
func (b *builder) directListener(w *mesh.Workload) *listenerv3.Listener {
	return internalListener(directName(w), namespaceState(w), filter("http", b.directManager(w)))
}

// directCluster leads to a workload's directListener, by a connection for each.
func directCluster(w *mesh.Workload) *clusterv3.Cluster {
	name := directName(w)
	return &clusterv3.Cluster{
		Name:                 name,
		CircuitBreakers:      unlimited(),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
		ConnectTimeout:       seconds(5),
		LoadAssignment: &endpointv3.ClusterLoadAssignment{
			ClusterName: name,
			Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{
				HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
					Address: &corev3.Address{Address: &corev3.Address_EnvoyInternalAddress{EnvoyInternalAddress: &corev3.EnvoyInternalAddress{
						AddressNameSpecifier: &corev3.EnvoyInternalAddress_ServerListenerName{ServerListenerName: name},
					}}},
				}},
			}}}},
		},
		TransportSocket: internalUpstream(rawBuffer()),
		TypedExtensionProtocolOptions: map[string]*anypb.Any{
			"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": packed(&httpv3.HttpProtocolOptions{
				CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{MaxRequestsPerConnection: u32(1)},
				UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
					ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
						ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
							Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
								InitialStreamWindowSize:     u32(streamWindow),
								InitialConnectionWindowSize: u32(streamWindow),
							},
						},
					},
				},
			}),
		},
	}
}
