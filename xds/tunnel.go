package xds

import (
	"fmt"
	"math"
	"regexp"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	lasv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/local_address_selectors/filter_state_override/v3"
	mapperv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_mappers/filter_state_override/v3"
	selectorv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/cert_selectors/on_demand_secret/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/internal/mesh"
)

// Flow control windows of a tunnel. What comes back from servers may be large
// and its reader slow, and a server that closes while data waits for a window
// loses that data in this version of Envoy: hence the wide window in that
// direction, and the narrow one, which is also the mark at which the proxy
// stops reading from the application, in the other. See docs/decisions.md.
const (
	streamWindow     = 20 << 20                     // per connection, towards the caller
	connectionWindow = tunnelStreams * streamWindow // per tunnel, towards the caller
	inboundWindow    = 2 * 65535                    // per connection, towards the server
	inboundTunnel    = 16 << 20                     // per tunnel, towards the server
	// tunnelStreams bounds the connections that share one tunnel, and so
	// what one broken tunnel can take with it.
	tunnelStreams = 100
	// tunnelLifetime bounds the connections that one tunnel carries in its
	// life; then a new one takes over and the old one ends with its last
	// connection. The HTTP/2 library at the other end breaks a tunnel in which
	// 1,000 streams were reset in short time (later 33 more a second), with
	// every connection in it, and cannot be told not to. Below that number no
	// client's resets can come so far.
	tunnelLifetime = 900
)

// sharedClusters adds the four clusters that every node has.
func (b *builder) sharedClusters() {
	b.add(clusterTunnel, b.tunnelCluster(clusterTunnel, BundleSecret, b.view.State.TrustDomain))
	local := b.dialled(clusterLocal)
	// Read from the application one chunk at a time, so that its end of
	// data is noticed after the chunks before it and not with them; see
	// docs/decisions.md, "Servers that close first".
	local.PerConnectionBufferLimitBytes = u32(1)
	local.LbConfig = &clusterv3.Cluster_OriginalDstLbConfig_{OriginalDstLbConfig: &clusterv3.Cluster_OriginalDstLbConfig{
		UseHttpHeader:  true,
		HttpHeaderName: ":authority",
	}}
	b.add(clusterLocal, local)
	b.add(clusterPlain, b.dialled(clusterPlain))
	b.add(clusterRefuse, &clusterv3.Cluster{
		Name:                 clusterRefuse,
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
	})
}

// dialled is a cluster of whatever address each connection is for, which is dialled
// from inside the network namespace that the connection is of.
func (b *builder) dialled(name string) *clusterv3.Cluster {
	return &clusterv3.Cluster{
		Name:                 name,
		CircuitBreakers:      unlimited(),
		ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_ORIGINAL_DST},
		LbPolicy:             clusterv3.Cluster_CLUSTER_PROVIDED,
		ConnectTimeout:       seconds(5),
		UpstreamBindConfig:   insideNamespace(b.opts.IPv6),
	}
}

// unlimited takes away the proxy's default of 1,024 connections at a time for
// a cluster. All tunnels of a node are one cluster, and all callers of a
// service share one: any of them could use the number up and have the
// connections of the others refused. What bounds a node is its file limit.
func unlimited() *clusterv3.CircuitBreakers {
	return &clusterv3.CircuitBreakers{Thresholds: []*clusterv3.CircuitBreakers_Thresholds{{
		MaxConnections:     u32(math.MaxUint32),
		MaxPendingRequests: u32(math.MaxUint32),
		MaxRequests:        u32(math.MaxUint32),
	}}}
}

// tunnelCluster is the one cluster through which all mTLS tunnels to a trust domain
// leave. Three things vary per connection, and arrive as filter state: the address to dial,
// the identity that the peer must prove, and the certificate to present.
func (b *builder) tunnelCluster(name, secret string, td spiffeid.TrustDomain) *clusterv3.Cluster {
	c := b.dialled(name)
	c.Metadata = b.tunnelsSince()
	// How long a destination that nobody uses keeps its pooled tunnels.
	c.CleanupInterval = seconds(60)
	c.LbConfig = &clusterv3.Cluster_OriginalDstLbConfig_{OriginalDstLbConfig: &clusterv3.Cluster_OriginalDstLbConfig{
		UpstreamPortOverride: u32(mesh.PortTunnel),
	}}
	c.TypedExtensionProtocolOptions = map[string]*anypb.Any{
		"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": packed(&httpv3.HttpProtocolOptions{
			CommonHttpProtocolOptions: &corev3.HttpProtocolOptions{
				MaxRequestsPerConnection: u32(tunnelLifetime),
				// The other end says so earlier, but its timers stand still
				// while its machine is suspended.
				MaxConnectionDuration: durationpb.New(b.tunnelLife()),
			},
			UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
				ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
					ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
						Http2ProtocolOptions: &corev3.Http2ProtocolOptions{
							MaxConcurrentStreams:        u32(tunnelStreams),
							InitialStreamWindowSize:     u32(streamWindow),
							InitialConnectionWindowSize: u32(connectionWindow),
						},
					},
				},
			},
		}),
	}
	c.TransportSocket = clientTLS(tlsParams(), validation(secret, workloadName(td)), "h2")
	return c
}

// clientTLS speaks mutual TLS with the certificate that filter state names.
func clientTLS(params *tlsv3.TlsParameters, peer *tlsv3.CommonTlsContext_CombinedValidationContext, alpn ...string) *corev3.TransportSocket {
	return &corev3.TransportSocket{
		Name: "tls",
		ConfigType: &corev3.TransportSocket_TypedConfig{TypedConfig: packed(&tlsv3.UpstreamTlsContext{
			CommonTlsContext: &tlsv3.CommonTlsContext{
				TlsParams:     params,
				AlpnProtocols: alpn,
				CustomTlsCertificateSelector: &corev3.TypedExtensionConfig{
					Name: "on-demand",
					TypedConfig: packed(&selectorv3.Config{
						ConfigSource: ads(),
						CertificateMapper: &corev3.TypedExtensionConfig{
							Name:        "identity",
							TypedConfig: packed(&mapperv3.Config{DefaultValue: "none"}),
						},
					}),
				},
				ValidationContextType: peer,
			},
			MaxSessionKeys: u32(0), // no resumption: identities are proven anew each time
		})},
	}
}

// tunnelsSince says nothing to the proxy but that the cluster is another one than
// before: it takes a new one in its place, whose pools are empty, and the old one
// goes when its tunnels are.
func (b *builder) tunnelsSince() *corev3.Metadata {
	if b.opts.Tunnels.IsZero() {
		return nil
	}
	return &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metadataKey: {Fields: map[string]*structpb.Value{
		"tunnels_since": structpb.NewStringValue(b.opts.Tunnels.UTC().Format(time.RFC3339Nano)),
	}}}}
}

// tlsParams: TLS 1.3 only. The maximum must be named, or Envoy takes 1.2 for
// clients and fails every handshake. The hybrid post-quantum group is preferred.
func tlsParams() *tlsv3.TlsParameters {
	return &tlsv3.TlsParameters{
		TlsMinimumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		TlsMaximumProtocolVersion: tlsv3.TlsParameters_TLSv1_3,
		EcdhCurves:                []string{"X25519MLKEM768", "X25519"},
	}
}

// validation accepts peers of a name whose chain ends in a bundle, and whom the secret adds to them (see InboundTrust). Which of them may do what is decided elsewhere, by comparing names, so
// a name must be a SPIFFE ID in its one spelling: no other program may read it as
// another's, and none is deeper than a service account's.
func validation(secret string, name *tlsv3.SubjectAltNameMatcher) *tlsv3.CommonTlsContext_CombinedValidationContext {
	return &tlsv3.CommonTlsContext_CombinedValidationContext{
		CombinedValidationContext: &tlsv3.CommonTlsContext_CombinedCertificateValidationContext{
			DefaultValidationContext: &tlsv3.CertificateValidationContext{
				MatchTypedSubjectAltNames: []*tlsv3.SubjectAltNameMatcher{name},
				MaxVerifyDepth:            u32(maxAuthorities),
			},
			ValidationContextSdsSecretConfig: &tlsv3.SdsSecretConfig{Name: secret, SdsConfig: ads()},
		},
	}
}

// maxAuthorities is how many authorities may stand between a peer and the root:
// as many as the project's own programs read.
const maxAuthorities = 7

// idPattern matches the whole of a workload's SPIFFE ID in a trust domain, and
// nothing else: /ns/<namespace>/sa/<service account>, with letters, digits, dots,
// dashes and underscores in segments that are not of one or two dots only. Nodes
// and the control plane open no tunnels.
func idPattern(td spiffeid.TrustDomain) string {
	const segment = `([A-Za-z0-9_-][A-Za-z0-9._-]*|\.[A-Za-z0-9_-][A-Za-z0-9._-]*|\.\.[A-Za-z0-9._-]+)`
	return regexp.QuoteMeta(td.IDString()) + `/ns/` + segment + `/sa/` + segment
}

// insideNamespace makes a cluster's sockets inside the network namespace that
// filter state names, of IPv6 as well if six, marked so that the capture rules
// leave them alone.
func insideNamespace(six bool) *corev3.BindConfig {
	out := &corev3.BindConfig{
		SourceAddress: &corev3.SocketAddress{
			Address:       anyIPv4,
			PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 0},
		},
		SocketOptions: []*corev3.SocketOption{
			{
				// The kernel picks the source port at connect, when it knows
				// the destination, so ports are shared between destinations.
				Description: "IP_BIND_ADDRESS_NO_PORT",
				Level:       0, Name: 24,
				Value: &corev3.SocketOption_IntValue{IntValue: 1},
				State: corev3.SocketOption_STATE_PREBIND,
			},
			{
				Description: "SO_MARK",
				Level:       1, Name: 36,
				Value: &corev3.SocketOption_IntValue{IntValue: mesh.SocketMark},
				State: corev3.SocketOption_STATE_PREBIND,
			},
		},
		LocalAddressSelector: &corev3.TypedExtensionConfig{
			Name:        "envoy.upstream.local_address_selector.filter_state_override",
			TypedConfig: packed(&lasv3.Config{}),
		},
	}
	if six { // of the two, the one of the destination's family is taken
		out.ExtraSourceAddresses = []*corev3.ExtraSourceAddress{{Address: &corev3.SocketAddress{
			Address:       anyIPv6,
			PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 0},
		}}}
	}
	return out
}

// tunnelListener is the internal listener that every meshed connection passes:
// the endpoint's metadata becomes the tunnel's address, expected peer and
// CONNECT authority.
func (b *builder) tunnelListener() {
	b.add(listenerTunnel, b.listenerInto(listenerTunnel, clusterTunnel))
}

// listenerInto has what it takes leave by the tunnels of a cluster.
func (b *builder) listenerInto(name, cluster string) *listenerv3.Listener {
	const once = sfsv3.FilterStateValue_ONCE
	return internalListener(name,
		setState(
			// Not shared with the tunnel's connection: it would be one
			// more hashable value there; see statePool.
			stateValue("envoy.network.transport_socket.original_dst_address", endpointMeta(metaTunnel), "", sfsv3.FilterStateValue_NONE),
			stateValue("envoy.network.upstream_subject_alt_names", endpointMeta(metaIdentity), "", once),
		),
		filter("tcp", &tcpv3.TcpProxy{
			StatPrefix:       "tunnel",
			ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: cluster},
			IdleTimeout:      seconds(0), // the application decides how long it may idle
			AccessLog:        b.accessLog(LineTunnel),
			AccessLogOptions: &tcpv3.TcpProxy_TcpAccessLogOptions{FlushAccessLogOnConnected: true},
			TunnelingConfig: &tcpv3.TcpProxy_TunnelingConfig{
				Hostname:                 endpointMeta(metaAuthority),
				PropagateResponseHeaders: true,
			},
		}))
}

// internalListener takes connections from inside the proxy.
func internalListener(name string, filters ...*listenerv3.Filter) *listenerv3.Listener {
	return &listenerv3.Listener{
		Name:              name,
		ListenerSpecifier: &listenerv3.Listener_InternalListener{InternalListener: &listenerv3.Listener_InternalListenerConfig{}},
		FilterChains:      []*listenerv3.FilterChain{{Filters: filters}},
	}
}

// foreignTunnels adds the same for each trust domain whose roots are known. They are
// apart so that each trust domain's names are proven by its own roots only.
func (b *builder) foreignTunnels() {
	for i := range b.view.State.Federations {
		td := b.view.State.Federations[i].TrustDomain
		name := foreignTunnel(td)
		b.add(name, b.tunnelCluster(name, ForeignSecret(td), td))
		b.add(name, b.listenerInto(name, name))
	}
}

// Keys of an endpoint's metadata.
const (
	metaTunnel    = "tunnel"    // address of the tunnel's listener
	metaAuthority = "authority" // the application's address
	metaIdentity  = "identity"  // the SPIFFE ID that the endpoint must prove
	metaWorkload  = "workload"  // namespace/name
	metaALPN      = "alpn"      // what is offered to an application that speaks TLS
)

func endpointMeta(key string) string {
	return fmt.Sprintf("%%DYNAMIC_METADATA(%s:%s)%%", metadataKey, key)
}

func boolValue(b bool) *wrapperspb.BoolValue { return wrapperspb.Bool(b) }
