package xds

import (
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	configrbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	celv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/filters/cel/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	routerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/router/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"google.golang.org/protobuf/types/known/durationpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Names of filters that routes configure.
const (
	rbacFilter       = "rbac"
	quarantineFilter = "quarantine"
)

// tunnelIn terminates the mTLS tunnels to a workload. Authorization runs on
// the CONNECT request's headers, before the application is contacted.
func (b *builder) tunnelIn(w *mesh.Workload) *listenerv3.Listener {
	return &listenerv3.Listener{
		Name:    tunnelInListener(w),
		Address: inNamespace(w, anyIPv4, mesh.PortTunnel),

		AdditionalAddresses: b.alsoIPv6(w, mesh.PortTunnel),

		AccessLog: b.accessLog(LineHandshake, "workload", w.Key()),
		FilterChains: []*listenerv3.FilterChain{{
			TransportSocketConnectTimeout: seconds(5),
			TransportSocket:               b.serverTLS(w, "h2"),
			Filters: []*listenerv3.Filter{
				namespaceState(w),
				filter("http", b.connectManager(w)),
			},
		}},
	}
}

// serverTLS has callers prove an identity, each time anew, and proves the
// workload's to them.
func (b *builder) serverTLS(w *mesh.Workload, alpn ...string) *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name: "tls",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: packed(&tlsv3.DownstreamTlsContext{
			// The names that are wanted of callers have the proxy demand a certificate
			// too. That is a habit of its validators; this is what they are told.
			RequireClientCertificate:         boolValue(true),
			SessionTicketKeysType:            &tlsv3.DownstreamTlsContext_DisableStatelessSessionResumption{DisableStatelessSessionResumption: true},
			DisableStatefulSessionResumption: true,
			CommonTlsContext: &tlsv3.CommonTlsContext{
				TlsParams:             tlsParams(),
				AlpnProtocols:         alpn,
				ValidationContextType: validation(InboundSecret, workloadName(b.view.State.TrustDomain)),
				TlsCertificateSdsSecretConfigs: []*tlsv3.SdsSecretConfig{{
					Name: ServerSecret(w.ID), SdsConfig: ads(),
				}},
			},
		})},
	}
}

// namespaceState makes the connection's upstream socket in the workload's
// namespace.
func namespaceState(w *mesh.Workload) *listenerv3.Filter {
	return setState(stateValue("envoy.network.upstream_bind_override.network_namespace",
		w.Capture.NetNS, hashable, sfsv3.FilterStateValue_ONCE))
}

// connectManager takes the CONNECT requests in a tunnel.
func (b *builder) connectManager(w *mesh.Workload) *hcmv3.HttpConnectionManager {
	m := b.manager(w, "in", LineInbound)
	m.CommonHttpProtocolOptions.MaxConnectionDuration = durationpb.New(b.toldToGo())
	m.LocalReplyConfig.Mappers = append([]*hcmv3.ResponseMapper{refusal(deniedBy(PolicyExpired), authz.CallerExpired)}, m.LocalReplyConfig.Mappers...)
	m.HttpFilters = append([]*hcmv3.HttpFilter{peerNames(), unexpired()}, m.HttpFilters...)
	return m
}

// directManager takes the one CONNECT request of a connection whose TLS was ended
// on the workload's own port. Who the caller is came along with it.
func (b *builder) directManager(w *mesh.Workload) *hcmv3.HttpConnectionManager {
	return b.manager(w, "direct", LineDirect)
}

// manager takes CONNECT requests of callers whose names are in filter state, and
// leads those that are let in to the application.
func (b *builder) manager(w *mesh.Workload, stats, line string) *hcmv3.HttpConnectionManager {
	return &hcmv3.HttpConnectionManager{
		StatPrefix:        stats,
		CodecType:         hcmv3.HttpConnectionManager_HTTP2,
		StreamIdleTimeout: seconds(0), // a database connection may idle for days
		CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
			HeadersWithUnderscoresAction: corev3.HttpProtocolOptions_REJECT_REQUEST,
		},
		RequestHeadersTimeout: seconds(5),
		Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
			AllowConnect:                true,
			InitialStreamWindowSize:     u32(inboundWindow),
			InitialConnectionWindowSize: u32(inboundTunnel),
		},
		UpgradeConfigs: []*hcmv3.HttpConnectionManager_UpgradeConfig{{UpgradeType: "CONNECT"}},
		AccessLog:      b.accessLog(line, "workload", w.Key()),
		AccessLogOptions: &hcmv3.HttpConnectionManager_HcmAccessLogOptions{
			FlushLogOnTunnelSuccessfullyEstablished: true,
		},
		LocalReplyConfig: denialReply(),
		HttpFilters: []*hcmv3.HttpFilter{
			oneIdentity(),
			applicationPort(),
			{
				// Each route's configuration names who is cut off.
				Name:       quarantineFilter,
				ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&rbacv3.RBAC{})},
			},
			{
				// Without a route's policy this denies: ALLOW with no policies.
				Name: rbacFilter,
				ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&rbacv3.RBAC{
					Rules: &configrbacv3.RBAC{Action: configrbacv3.RBAC_ALLOW},
				})},
			},
			{
				Name:       "router",
				ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&routerv3.Router{})},
			},
		},
		RouteSpecifier: &hcmv3.HttpConnectionManager_Rds{Rds: &hcmv3.Rds{
			RouteConfigName: RouteName(w), ConfigSource: ads(),
		}},
	}
}

// denialReply lets the reason travel: the 403 says it in a header, which the
// caller's proxy writes into its own audit record.
func denialReply() *hcmv3.LocalReplyConfig {
	return &hcmv3.LocalReplyConfig{Mappers: []*hcmv3.ResponseMapper{
		refusal(&accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_StatusCodeFilter{
			StatusCodeFilter: &accesslogv3.StatusCodeFilter{Comparison: &accesslogv3.ComparisonFilter{
				Op:    accesslogv3.ComparisonFilter_EQ,
				Value: &corev3.RuntimeUInt32{DefaultValue: 403, RuntimeKey: "signet.none"},
			}},
		}}, routeMeta(metaDeny)),
	}}
}

func refusal(of *accesslogv3.AccessLogFilter, reason string) *hcmv3.ResponseMapper {
	return &hcmv3.ResponseMapper{
		Filter: of,
		HeadersToAdd: []*corev3.HeaderValueOption{
			{Header: &corev3.HeaderValue{Key: HeaderReason, Value: reason}},
			{Header: &corev3.HeaderValue{Key: HeaderRevision, Value: routeMeta(metaRevision)}},
		},
		BodyFormatOverride: textFormat(reason + "\n"),
	}
}

// deniedBy matches requests that a rule of the proxy's own refused.
func deniedBy(rule string) *accesslogv3.AccessLogFilter {
	return &accesslogv3.AccessLogFilter{FilterSpecifier: &accesslogv3.AccessLogFilter_ExtensionFilter{
		ExtensionFilter: &accesslogv3.ExtensionFilter{
			Name: "envoy.access_loggers.extension_filters.cel",
			ConfigType: &accesslogv3.ExtensionFilter_TypedConfig{TypedConfig: packed(&celv3.ExpressionFilter{
				Expression: `response.code_details == "rbac_access_denied_matched_policy[` + rule + `]"`,
			})},
		},
	}}
}

// Headers of the answer to a CONNECT. The agent reads them back from the
// caller's access log.
const (
	HeaderReason   = "x-signet-reason" // of a refusal
	HeaderPolicy   = "x-signet-policy" // that admitted
	HeaderShadow   = "x-signet-shadow" // what enforce would have done, in observe mode
	HeaderRevision = "x-signet-revision"
	HeaderWorkload = "x-signet-workload" // that was reached; its certificate names only its account
)

// plainIn takes what reaches the workload without a tunnel: refused in
// enforce mode, let through and recorded in observe mode.
func (b *builder) plainIn(w *mesh.Workload) *listenerv3.Listener {
	cluster := clusterRefuse
	extra := []string{"workload", w.Key(), "mode", b.view.State.Mode(w.Namespace).String()}
	if name, cut := b.view.Model.Quarantined(w.ID); cut {
		extra = append(extra, "quarantine", name)
	} else if b.view.State.Mode(w.Namespace) == mesh.ModeObserve {
		cluster = clusterPlain
	}
	plain := []*listenerv3.Filter{
		namespaceState(w),
		filter("tcp", &tcpv3.TcpProxy{
			StatPrefix:       "plain",
			ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: cluster},
			IdleTimeout:      seconds(0),
			AccessLog:        b.accessLog(LinePlain, extra...),
		}),
	}
	out := &listenerv3.Listener{
		Name:    plainInListener(w),
		Address: inNamespace(w, anyIPv4, mesh.PortInbound),

		AdditionalAddresses: b.alsoIPv6(w, mesh.PortInbound),

		ListenerFilters: originalDst(),
		FilterChains:    []*listenerv3.FilterChain{{Filters: plain}},
	}
	b.terminate(w, out, cluster == clusterPlain)
	return out
}
