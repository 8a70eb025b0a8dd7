package xds

import (
	"maps"
	"slices"
	"strings"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/structpb"
)

// Some applications ask for mutual TLS themselves. For callers that speak none the
// proxy speaks it, with the caller's certificate and to one identity only: inside the
// tunnel if the application is captured, so that its own proxy decides first, as ever;
// and from a listener and cluster for each trust domain if it is not.

// matchInside is the key by which an endpoint says what is spoken inside its tunnel.
const matchInside = "inside"

// insideTunnel names what is spoken with an application inside its tunnel.
func (h *hop) insideTunnel() string {
	return strings.Join(append([]string{h.identity.String()}, h.alpn...), " ")
}

// insideTunnels is what is spoken inside tunnels to the hops, one of each kind. Since
// all of it is known when the destination is, nothing of it varies by connection but
// the certificate.
func (d destination) insideTunnels() []*clusterv3.Cluster_TransportSocketMatch {
	kinds := map[string]*clusterv3.Cluster_TransportSocketMatch{}
	for i := range d.hops {
		h := &d.hops[i]
		if h.workload == nil || !h.originate {
			continue
		}
		name := h.insideTunnel()
		if kinds[name] != nil {
			continue
		}
		kinds[name] = &clusterv3.Cluster_TransportSocketMatch{
			Name:  name,
			Match: &structpb.Struct{Fields: map[string]*structpb.Value{matchInside: structpb.NewStringValue(name)}},
			TransportSocket: internalUpstream(
				clientTLS(applicationTLS(), validation(BundleSecret, exactName(h.identity)), h.alpn...), endpointMetadata()),
		}
	}
	var out []*clusterv3.Cluster_TransportSocketMatch
	for _, name := range slices.Sorted(maps.Keys(kinds)) {
		out = append(out, kinds[name])
	}
	return out
}

// exactName matches one identity.
func exactName(id spiffeid.ID) *tlsv3.SubjectAltNameMatcher {
	return &tlsv3.SubjectAltNameMatcher{
		SanType: tlsv3.SubjectAltNameMatcher_URI,
		Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: id.String()}},
	}
}

// applicationTLS is as in tunnels, with one more group: what applications are built
// with is not for the mesh to say.
func applicationTLS() *tlsv3.TlsParameters {
	out := tlsParams()
	out.EcdhCurves = append(out.EcdhCurves, "P-256")
	return out
}

// originators adds what speaks with applications that are not captured, for each trust
// domain apart, as foreignTunnels does for tunnels.
func (b *builder) originators() {
	b.originator(b.view.State.TrustDomain, BundleSecret)
	for i := range b.view.State.Federations {
		td := b.view.State.Federations[i].TrustDomain
		b.originator(td, ForeignSecret(td))
	}
}

func (b *builder) originator(td spiffeid.TrustDomain, secret string) {
	name := originateName(td)
	const once = sfsv3.FilterStateValue_ONCE
	alpn := stateValue("envoy.network.application_protocols", endpointMeta(metaALPN), "", once)
	alpn.SkipIfEmpty, alpn.GetFormatString().OmitEmptyValues = true, true
	b.add(name, internalListener(name,
		setState(
			stateValue("envoy.network.transport_socket.original_dst_address", endpointMeta(metaAuthority), "", sfsv3.FilterStateValue_NONE),
			stateValue("envoy.network.upstream_subject_alt_names", endpointMeta(metaIdentity), "", once),
			alpn,
		),
		filter("tcp", &tcpv3.TcpProxy{
			StatPrefix:       "originate",
			ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: name},
			IdleTimeout:      seconds(0),
			AccessLog:        b.accessLog(LineOriginate),
			AccessLogOptions: &tcpv3.TcpProxy_TcpAccessLogOptions{FlushAccessLogOnConnected: true},
		})))
	c := b.dialled(name)
	c.CleanupInterval = seconds(60)
	c.TransportSocket = clientTLS(applicationTLS(), validation(secret, workloadName(td)))
	b.add(name, c)
}
