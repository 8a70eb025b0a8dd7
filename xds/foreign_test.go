package xds

import (
	"net/netip"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Connections to a workload of another mesh go by tunnels in which its trust domain's
// roots, and no others, prove its trust domain's names, and no others. Of a trust
// domain that nobody is federated with nothing is reached, and nothing in plain.
func TestForeignDestination(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("partner.test")
	ledger := spiffeid.RequireFromString("spiffe://partner.test/ns/pay/sa/ledger")
	vip := netip.MustParseAddr("10.96.0.5")
	state := &mesh.State{
		TrustDomain: spiffeid.RequireTrustDomainFromString("mesh.test"), SVIDTTL: time.Hour,
		Federations: []mesh.Federation{{TrustDomain: td}},
		Services: []mesh.Service{{Namespace: "shop", Name: "ledger", VIPs: []netip.Addr{vip}, Ports: []mesh.ServicePort{{Port: 80, Target: 8080}},
			Endpoints: []mesh.Endpoint{{Addr: netip.MustParseAddr("10.1.0.7"), Identity: ledger}}}},
	}
	v := &mesh.View{Revision: "1", Model: authz.NewModel(nil), State: state}
	name := DestinationName(netip.AddrPortFrom(vip, 80))
	endpoints := func() *clusterv3.Cluster {
		t.Helper()
		r, ok := Destination(v, "n1", name)
		var c clusterv3.Cluster
		if !ok || r.Body.UnmarshalTo(&c) != nil {
			t.Fatal("no cluster")
		}
		return &c
	}
	e := endpoints().LoadAssignment.Endpoints[0].LbEndpoints[0]
	meta := e.Metadata.FilterMetadata[metadataKey].AsMap()
	for key, want := range map[string]any{metaTunnel: "10.1.0.7:15008", metaAuthority: "10.1.0.7:8080", metaIdentity: ledger.String(), metaWorkload: nil} {
		if meta[key] != want {
			t.Errorf("%s: %v, want %v", key, meta[key], want)
		}
	}
	to := e.GetEndpoint().GetAddress().GetEnvoyInternalAddress().GetServerListenerName()

	set, err := Local(v, "n1", Options{})
	if err != nil {
		t.Fatal(err)
	}
	var (
		l     listenerv3.Listener
		proxy tcpv3.TcpProxy
		c     clusterv3.Cluster
		tls   tlsv3.UpstreamTlsContext
	)
	if err := set[TypeListener][to].Body.UnmarshalTo(&l); err != nil {
		t.Fatalf("listener %q: %v", to, err)
	}
	filters := l.FilterChains[0].Filters
	if err := filters[len(filters)-1].GetTypedConfig().UnmarshalTo(&proxy); err != nil {
		t.Fatal(err)
	}
	if err := set[TypeCluster][proxy.GetCluster()].Body.UnmarshalTo(&c); err != nil {
		t.Fatalf("cluster %q: %v", proxy.GetCluster(), err)
	}
	if err := c.TransportSocket.GetTypedConfig().UnmarshalTo(&tls); err != nil {
		t.Fatal(err)
	}
	verified := tls.CommonTlsContext.GetCombinedValidationContext()
	if got := verified.GetValidationContextSdsSecretConfig().GetName(); got != ForeignSecret(td) || got == BundleSecret {
		t.Errorf("names are proven by %q", got)
	}
	names := verified.GetDefaultValidationContext().GetMatchTypedSubjectAltNames()
	if len(names) != 1 || !strings.Contains(names[0].GetMatcher().GetSafeRegex().GetRegex(), `spiffe://partner\.test/`) {
		t.Errorf("names that are taken: %v", names)
	}

	state.Federations = nil
	if eps := endpoints().LoadAssignment.Endpoints[0].LbEndpoints; len(eps) != 0 {
		t.Errorf("without a Federation it is reached at %v", eps)
	}
}
