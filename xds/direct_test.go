package xds

import (
	"maps"
	"slices"
	"testing"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"github.com/signet-mesh/signet/authz"
)

// TestTerminatedPorts: TLS is ended on exactly the ports that the policies name
// for a target; what is in it is judged by the routes and filters of a tunnel; and
// nothing that proved no identity comes near the application where the namespace
// enforces.
//
// What it defends: a chain that would lead to the application itself, one that
// asks for no certificate, and one that does not wait for it.
func TestTerminatedPorts(t *testing.T) {
	v := view(t, "shop.yaml")
	set, err := Local(v, "n1", Options{IPv6: true, AccessLog: "/log"})
	if err != nil {
		t.Fatal(err)
	}
	for key, plain := range map[string]bool{"shop/web": false, "lab/probe": true} {
		w := v.State.Workload(key)
		want := slices.Sorted(maps.Keys(v.Model.Terminated(authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount})))
		if len(want) == 0 {
			t.Fatalf("%s has no such port", key)
		}
		var l listenerv3.Listener
		if err := set[TypeListener][plainInListener(w)].Body.UnmarshalTo(&l); err != nil {
			t.Fatal(err)
		}
		if err := l.ValidateAll(); err != nil {
			t.Error(err)
		}
		var ended []uint16
		for _, chain := range l.FilterChains {
			var proxy tcpv3.TcpProxy
			if err := chain.Filters[len(chain.Filters)-1].GetTypedConfig().UnmarshalTo(&proxy); err != nil {
				t.Fatal(err)
			}
			if chain.TransportSocket == nil {
				if leads := proxy.GetCluster() == clusterPlain; leads != plain {
					t.Errorf("%s: plain bytes go to %s", key, proxy.GetCluster())
				}
				continue
			}
			ended = append(ended, uint16(chain.FilterChainMatch.DestinationPort.GetValue()))
			var tls tlsv3.DownstreamTlsContext
			if err := chain.TransportSocket.GetTypedConfig().UnmarshalTo(&tls); err != nil {
				t.Fatal(err)
			}
			params := tls.CommonTlsContext.TlsParams
			if !tls.RequireClientCertificate.GetValue() || !tls.GetDisableStatelessSessionResumption() || !tls.DisableStatefulSessionResumption ||
				params.TlsMinimumProtocolVersion != tlsv3.TlsParameters_TLSv1_3 || tls.CommonTlsContext.GetCombinedValidationContext() == nil {
				t.Errorf("%s: TLS is ended like %v", key, &tls)
			}
			if proxy.GetCluster() != directName(w) || proxy.TunnelingConfig == nil || proxy.UpstreamConnectMode != tcpv3.UpstreamConnectMode_ON_DOWNSTREAM_TLS_HANDSHAKE {
				t.Errorf("%s: what was in TLS goes on as %v", key, &proxy)
			}
			if plain != (chain.FilterChainMatch.TransportProtocol == "tls") {
				t.Errorf("%s: the chain takes %v", key, chain.FilterChainMatch)
			}
		}
		if !slices.Equal(ended, want) {
			t.Errorf("%s: TLS is ended on %v, want %v", key, ended, want)
		}
		tunnel, direct := manager(t, set, tunnelInListener(w)), manager(t, set, directName(w))
		if direct.GetRds().GetRouteConfigName() != RouteName(w) || tunnel.GetRds().GetRouteConfigName() != RouteName(w) {
			t.Errorf("%s: routes %v and %v", key, tunnel.GetRds(), direct.GetRds())
		}
		// Beyond who the caller is, which came along, and that the certificate has
		// not expired since, they do the same.
		if len(tunnel.HttpFilters) != len(direct.HttpFilters)+2 {
			t.Fatalf("%s: %d filters in a tunnel, %d without", key, len(tunnel.HttpFilters), len(direct.HttpFilters))
		}
		for i, f := range direct.HttpFilters {
			if f.String() != tunnel.HttpFilters[i+2].String() {
				t.Errorf("%s: filter %d is %v, in a tunnel %v", key, i, f, tunnel.HttpFilters[i+2])
			}
		}
	}
	for name := range set[TypeListener] {
		if name == "direct|plain/old" {
			t.Error("a workload without such a port has a listener for it")
		}
	}
}

// manager is the last filter of a listener's one chain.
func manager(t *testing.T, set Set, name string) *hcmv3.HttpConnectionManager {
	t.Helper()
	var l listenerv3.Listener
	if err := set[TypeListener][name].Body.UnmarshalTo(&l); err != nil {
		t.Fatal(err)
	}
	filters := l.FilterChains[0].Filters
	m := &hcmv3.HttpConnectionManager{}
	if err := filters[len(filters)-1].GetTypedConfig().UnmarshalTo(m); err != nil {
		t.Fatal(err)
	}
	return m
}
