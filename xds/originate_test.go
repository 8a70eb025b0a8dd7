package xds

import (
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	internalv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/internal_upstream/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// The TLS that is spoken inside a tunnel wants the one identity of the endpoint that
// the connection went to, by the mesh's own roots: of a service with endpoints of two
// accounts each has its own. Where no policy says that the target speaks TLS, none is
// spoken. It leaves by the same tunnel either way.
func TestOriginateInsideTunnels(t *testing.T) {
	vip := netip.MustParseAddr("10.96.0.5")
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	workload := func(name, addr string) mesh.Workload {
		return mesh.Workload{
			Namespace: "shop", Name: name, ServiceAccount: name, Node: "n2",
			ID:      spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/" + name),
			Capture: &mesh.Capture{Addrs: []netip.Addr{netip.MustParseAddr(addr)}},
		}
	}
	v := &mesh.View{State: &mesh.State{
		TrustDomain: td, SVIDTTL: time.Hour, Namespaces: map[string]mesh.Mode{"shop": mesh.ModeEnforce},
		Workloads: []mesh.Workload{workload("blue", "10.1.0.1"), workload("green", "10.1.0.2"), workload("red", "10.1.0.3")},
		Services: []mesh.Service{{Namespace: "shop", Name: "colours", VIPs: []netip.Addr{vip}, Ports: []mesh.ServicePort{{Port: 80, Target: 8443}, {Port: 81, Target: 8080}},
			Endpoints: []mesh.Endpoint{{Workload: "shop/blue"}, {Workload: "shop/green"}, {Workload: "shop/red"}}}},
	}, Model: authz.NewModel([]authz.Policy{
		{Namespace: "shop", Name: "blue", TargetServiceAccount: "blue", Ports: []uint16{8443}, Originate: true, ALPN: "h2"},
		{Namespace: "shop", Name: "green", TargetServiceAccount: "green", Ports: []uint16{8443}, Originate: true},
	})}
	destination := func(port uint16) *clusterv3.Cluster {
		t.Helper()
		r, ok := Destination(v, "n1", DestinationName(netip.AddrPortFrom(vip, port)))
		var c clusterv3.Cluster
		if !ok || r.Body.UnmarshalTo(&c) != nil {
			t.Fatal("no cluster")
		}
		return &c
	}
	c := destination(80)
	want := map[string]string{"10.1.0.1:8443": "blue h2", "10.1.0.2:8443": "green ", "10.1.0.3:8443": ""}
	for _, e := range c.LoadAssignment.Endpoints[0].LbEndpoints {
		at := e.Metadata.FilterMetadata[metadataKey].AsMap()
		name := e.Metadata.FilterMetadata["envoy.transport_socket_match"].AsMap()[matchInside]
		got := ""
		for _, m := range c.TransportSocketMatches {
			if m.Match.AsMap()[matchInside] == name && name != nil {
				got = insideTLS(t, m)
			}
		}
		if got != want[at[metaAuthority].(string)] || e.GetEndpoint().GetAddress().GetEnvoyInternalAddress().GetServerListenerName() != listenerTunnel {
			t.Errorf("%v: %q is spoken, want %q", at, got, want[at[metaAuthority].(string)])
		}
	}
	if len(c.TransportSocketMatches) != 2 {
		t.Errorf("%d kinds", len(c.TransportSocketMatches))
	}
	if c := destination(81); len(c.TransportSocketMatches) != 0 {
		t.Error("TLS is spoken on a port of which no policy says so")
	}
	v.State.Plain = map[string]bool{"shop": true}
	if c := destination(80); len(c.TransportSocketMatches) != 0 || len(c.LoadAssignment.Endpoints[0].LbEndpoints) != 3 {
		t.Error("TLS is spoken with what is called in plain")
	}
}

// insideTLS says whom a transport wants, and what it offers.
func insideTLS(t *testing.T, m *clusterv3.Cluster_TransportSocketMatch) string {
	t.Helper()
	var (
		internal internalv3.InternalUpstreamTransport
		tls      tlsv3.UpstreamTlsContext
	)
	if err := m.TransportSocket.GetTypedConfig().UnmarshalTo(&internal); err != nil {
		t.Fatal(err)
	}
	if err := internal.TransportSocket.GetTypedConfig().UnmarshalTo(&tls); err != nil {
		t.Fatal(err)
	}
	verified := tls.CommonTlsContext.GetCombinedValidationContext()
	if verified.GetValidationContextSdsSecretConfig().GetName() != BundleSecret || tls.CommonTlsContext.CustomTlsCertificateSelector == nil {
		t.Errorf("%v", tls.CommonTlsContext)
	}
	names := verified.GetDefaultValidationContext().GetMatchTypedSubjectAltNames()
	if len(names) != 1 || names[0].SanType != tlsv3.SubjectAltNameMatcher_URI {
		t.Fatalf("names that are taken: %v", names)
	}
	return strings.TrimPrefix(names[0].GetMatcher().GetExact(), "spiffe://mesh.test/ns/shop/sa/") + " " + strings.Join(tls.CommonTlsContext.AlpnProtocols, ",")
}

// An application that is in no tunnel is called at its own address, by what takes its
// trust domain's names only; and not at all if its name cannot be proven here, or it is
// quarantined.
func TestOriginateOutsideTunnels(t *testing.T) {
	own, partner := spiffeid.RequireTrustDomainFromString("mesh.test"), spiffeid.RequireTrustDomainFromString("partner.test")
	vip := netip.MustParseAddr("10.96.0.5")
	endpoint := mesh.Endpoint{Addr: netip.MustParseAddr("10.1.0.7"), Originate: true, ALPN: "h2"}
	v := &mesh.View{Model: authz.NewModel(nil), State: &mesh.State{
		TrustDomain: own, SVIDTTL: time.Hour, Federations: []mesh.Federation{{TrustDomain: partner}},
		Services: []mesh.Service{{Namespace: "shop", Name: "ledger", VIPs: []netip.Addr{vip}, Ports: []mesh.ServicePort{{Port: 80, Target: 8443}}, Endpoints: []mesh.Endpoint{endpoint}}},
	}}
	called := func(id string) (at, listener string) {
		t.Helper()
		v.State.Services[0].Endpoints[0].Identity = spiffeid.RequireFromString(id)
		r, ok := Destination(v, "n1", DestinationName(netip.AddrPortFrom(vip, 80)))
		var c clusterv3.Cluster
		if !ok || r.Body.UnmarshalTo(&c) != nil {
			t.Fatal("no cluster")
		}
		eps := c.LoadAssignment.Endpoints[0].LbEndpoints
		if len(eps) == 0 {
			return "", ""
		}
		meta := eps[0].Metadata.FilterMetadata[metadataKey].AsMap()
		if meta[metaIdentity] != id || meta[metaALPN] != "h2" || meta[metaTunnel] != nil {
			t.Errorf("%v", meta)
		}
		return meta[metaAuthority].(string), eps[0].GetEndpoint().GetAddress().GetEnvoyInternalAddress().GetServerListenerName()
	}
	set, err := Local(v, "n1", Options{})
	if err != nil {
		t.Fatal(err)
	}
	for id, want := range map[string][]string{
		"spiffe://mesh.test/ns/shop/sa/ledger":   {BundleSecret, `spiffe://mesh\.test/`},
		"spiffe://partner.test/ns/pay/sa/ledger": {ForeignSecret(partner), `spiffe://partner\.test/`},
	} {
		at, listener := called(id)
		if at != "10.1.0.7:8443" || set[TypeListener][listener].Body == nil {
			t.Fatalf("%s is called at %q by %q", id, at, listener)
		}
		var (
			c   clusterv3.Cluster
			tls tlsv3.UpstreamTlsContext
		)
		if err := set[TypeCluster][listener].Body.UnmarshalTo(&c); err != nil {
			t.Fatal(err)
		}
		if err := c.TransportSocket.GetTypedConfig().UnmarshalTo(&tls); err != nil {
			t.Fatal(err)
		}
		verified := tls.CommonTlsContext.GetCombinedValidationContext()
		names := verified.GetDefaultValidationContext().GetMatchTypedSubjectAltNames()
		if verified.GetValidationContextSdsSecretConfig().GetName() != want[0] || len(names) != 1 || !strings.Contains(names[0].GetMatcher().GetSafeRegex().GetRegex(), want[1]) {
			t.Errorf("%s is proven by %v", id, verified)
		}
	}
	if at, _ := called("spiffe://elsewhere.test/ns/pay/sa/ledger"); at != "" {
		t.Errorf("a name that nobody can prove here is called at %s", at)
	}
	pattern, err := authz.ParsePattern("spiffe://mesh.test/ns/shop/sa/ledger")
	if err != nil {
		t.Fatal(err)
	}
	v.Model = v.Model.WithQuarantines(own, []authz.Quarantine{{Name: "incident", Identities: []authz.Pattern{pattern}}})
	if at, _ := called("spiffe://mesh.test/ns/shop/sa/ledger"); at != "" {
		t.Errorf("an application that is quarantined is called at %s", at)
	}
	if at, _ := called("spiffe://partner.test/ns/pay/sa/ledger"); at == "" {
		t.Error("so is another")
	}
	if !slices.Contains(applicationTLS().EcdhCurves, "P-256") || len(tlsParams().EcdhCurves) != 2 {
		t.Error("groups")
	}
}
