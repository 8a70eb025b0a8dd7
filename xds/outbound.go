package xds

import (
	"net/netip"
	"slices"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	odstv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/listener/original_dst/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/set_filter_state/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	typev3 "github.com/envoyproxy/go-control-plane/envoy/type/v3"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/internal/mesh"
)

// workloadListeners adds the three listeners of each captured workload, and a
// fourth where TLS is ended on ports of its own.
func (b *builder) workloadListeners() {
	for _, w := range b.captured() {
		b.add(outboundListener(&w), b.outbound(&w))
		b.add(tunnelInListener(&w), b.tunnelIn(&w))
		b.add(plainInListener(&w), b.plainIn(&w))
		if len(b.terminated(&w)) > 0 {
			b.add(directName(&w), b.directListener(&w))
			b.add(directName(&w), directCluster(&w))
		}
	}
}

// outbound takes what the workload's processes dial. The identity of the
// connection is the listener's: whoever can connect to it is in the
// workload's network namespace.
func (b *builder) outbound(w *mesh.Workload) *listenerv3.Listener {
	const (
		transitive = sfsv3.FilterStateValue_TRANSITIVE
		once       = sfsv3.FilterStateValue_ONCE
		none       = sfsv3.FilterStateValue_NONE
	)
	extra := []string{"workload", w.Key(), "self", w.ID.String()}
	cluster := stateValue("envoy.tcp_proxy.cluster", destinationPrefix+"%DOWNSTREAM_LOCAL_ADDRESS%", "", none)
	if name, cut := b.view.Model.Quarantined(w.ID); cut {
		extra = append(extra, "quarantine", name)
		cluster = stateValue("envoy.tcp_proxy.cluster", clusterRefuse, "", none)
	}
	return &listenerv3.Listener{
		Name:    outboundListener(w),
		Address: inNamespace(w, anyIPv4, mesh.PortOutbound),

		AdditionalAddresses: b.alsoIPv6(w, mesh.PortOutbound),

		ListenerFilters: originalDst(),
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{
			setState(
				// Hashable, so that the tunnel pool is partitioned by it:
				// otherwise one workload's connections could travel in a
				// tunnel opened with another workload's certificate, or from
				// another's namespace. It is the only hashable value that
				// reaches the tunnel: the proxy hashes them in no fixed order,
				// so two would give one workload several pools for the same.
				stateValue(statePool, ClientSecret(w.ID)+" "+w.Capture.NetNS, hashable, transitive),
				stateValue("envoy.tls.certificate_mappers.on_demand_secret", ClientSecret(w.ID), "envoy.string", transitive),
				stateValue("envoy.network.upstream_bind_override.network_namespace", w.Capture.NetNS, "envoy.string", transitive),
				cluster,
				// Hashable, so that no two connections share a pool towards the
				// tunnel listener: a pool hands the state of the connection
				// that made it to every later one. Once, so that it ends there
				// and the tunnels themselves are shared.
				stateValue(stateConn, connState(w), hashable, once),
			),
			filter("tcp", &tcpv3.TcpProxy{
				StatPrefix:       "out",
				HashPolicy:       hashPolicy(),
				ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: clusterRefuse},
				OnDemand:         &tcpv3.TcpProxy_OnDemand{OdcdsConfig: ads(), Timeout: seconds(5)},
				IdleTimeout:      seconds(0),
				AccessLog:        b.accessLog(LineOutbound, extra...),
			}),
		}}},
	}
}

// hashPolicy is looked at by destinations with session affinity only: the
// caller's address chooses the endpoint.
func hashPolicy() []*typev3.HashPolicy {
	return []*typev3.HashPolicy{{
		PolicySpecifier: &typev3.HashPolicy_SourceIp_{SourceIp: &typev3.HashPolicy_SourceIp{}},
	}}
}

// connState describes the captured connection to the audit line that the
// tunnel writes: workload, client address, dialled address.
func connState(w *mesh.Workload) string {
	return w.Key() + " %DOWNSTREAM_REMOTE_ADDRESS% %DOWNSTREAM_LOCAL_ADDRESS%"
}

const hashable = "envoy.hashable_string"

const (
	anyIPv4 = "0.0.0.0"
	anyIPv6 = "::"
)

func inNamespace(w *mesh.Workload, addr string, port uint32) *corev3.Address {
	return &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
		Address:                  addr,
		PortSpecifier:            &corev3.SocketAddress_PortValue{PortValue: port},
		NetworkNamespaceFilepath: w.Capture.NetNS,
	}}}
}

// alsoIPv6 has a listener take IPv6 too where the workload can be reached by
// it. Elsewhere the capture rules refuse.
func (b *builder) alsoIPv6(w *mesh.Workload, port uint32) []*listenerv3.AdditionalAddress {
	if !b.opts.IPv6 || !slices.ContainsFunc(w.Capture.Addrs, netip.Addr.Is6) {
		return nil
	}
	return []*listenerv3.AdditionalAddress{{Address: inNamespace(w, anyIPv6, port)}}
}

func originalDst() []*listenerv3.ListenerFilter {
	return []*listenerv3.ListenerFilter{{
		Name:       "original_dst",
		ConfigType: &listenerv3.ListenerFilter_TypedConfig{TypedConfig: packed(&odstv3.OriginalDst{})},
	}}
}

func filter(name string, m proto.Message) *listenerv3.Filter {
	return &listenerv3.Filter{Name: name, ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: packed(m)}}
}

func setState(values ...*sfsv3.FilterStateValue) *listenerv3.Filter {
	return filter("state", &setstatev3.Config{OnNewConnection: values})
}

// stateValue sets one filter state object from a format string. An empty
// factory means the one that Envoy registers under the key itself.
func stateValue(key, format, factory string, shared sfsv3.FilterStateValue_SharedWithUpstream) *sfsv3.FilterStateValue {
	return &sfsv3.FilterStateValue{
		Key:                &sfsv3.FilterStateValue_ObjectKey{ObjectKey: key},
		FactoryKey:         factory,
		Value:              &sfsv3.FilterStateValue_FormatString{FormatString: textFormat(format)},
		SharedWithUpstream: shared,
	}
}

func textFormat(s string) *corev3.SubstitutionFormatString {
	return &corev3.SubstitutionFormatString{
		Format: &corev3.SubstitutionFormatString_TextFormatSource{TextFormatSource: &corev3.DataSource{
			Specifier: &corev3.DataSource_InlineString{InlineString: s},
		}},
	}
}
