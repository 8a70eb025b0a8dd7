package hostile

import (
	"crypto/tls"
	"encoding/pem"
	"maps"
	"slices"
	"strings"
	"testing"
	"time"

	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/xds"
)

// TestNoCertificate: who shows no certificate gets no further than the handshake,
// and the audit says why.
//
// What it defends: two settings have a real proxy demand a certificate, the one
// that says so and the names that are wanted in it. Either alone is enough: each
// is tried without the other.
func TestNoCertificate(t *testing.T) {
	p := newPKI(time.Now())
	partner := []xds.Trust{{
		Domain: spiffeid.RequireTrustDomainFromString("partner.test"),
		PEM:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: p.foreign.der}),
	}}
	for name, c := range map[string]struct {
		foreign []xds.Trust
		change  func(*tlsv3.DownstreamTlsContext)
	}{
		"as nodes are configured":  {nil, func(*tlsv3.DownstreamTlsContext) {}},
		"a federated mesh":         {partner, func(*tlsv3.DownstreamTlsContext) {}},
		"no name is wanted":        {nil, wantNoNames},
		"no certificate is wanted": {nil, func(c *tlsv3.DownstreamTlsContext) { c.RequireClientCertificate = nil }},
	} {
		t.Run(name, func(t *testing.T) {
			n := &node{pki: p, foreign: c.foreign}
			n.change = func(set xds.Set) { changeTLS(t, set, c.change) }
			n.start(t)
			tunnels := []tunnel{
				dial(t.Context(), &tls.Certificate{}, openAddr, portNamed),
				dial(t.Context(), &tls.Certificate{}, shopAddr, portNamed),
			}
			lines := n.records(t, tunnels)
			for _, tun := range tunnels {
				if tun.err == nil || strings.Contains(tun.err.Error(), "status ") {
					t.Errorf("the handshake was over: %v", tun.err)
				}
				for _, r := range lines[tun.from] {
					if len(streams([]audit.Record{r})) != 0 || r.Verdict != audit.Denied || !strings.Contains(r.Reason, "the caller proved no identity") || !strings.Contains(r.Reason, "PEER_DID_NOT_RETURN_A_CERTIFICATE") {
						t.Errorf("the audit has %+v", r)
					}
				}
			}
		})
	}
}

func wantNoNames(c *tlsv3.DownstreamTlsContext) {
	c.CommonTlsContext.GetCombinedValidationContext().DefaultValidationContext.MatchTypedSubjectAltNames = nil
}

// changeTLS changes how TLS is ended in all listeners.
func changeTLS(t *testing.T, set xds.Set, change func(*tlsv3.DownstreamTlsContext)) {
	t.Helper()
	changed := 0
	for _, name := range slices.Collect(maps.Keys(set[xds.TypeListener])) {
		var l listenerv3.Listener
		if err := set[xds.TypeListener][name].Body.UnmarshalTo(&l); err != nil {
			t.Fatal(err)
		}
		for _, chain := range l.FilterChains {
			if chain.TransportSocket == nil {
				continue
			}
			var c tlsv3.DownstreamTlsContext
			if err := chain.TransportSocket.GetTypedConfig().UnmarshalTo(&c); err != nil {
				t.Fatal(err)
			}
			change(&c)
			config, err := anypb.New(&c)
			if err != nil {
				t.Fatal(err)
			}
			chain.TransportSocket.GetTypedConfig().Value = config.GetValue()
			changed++
		}
		r, err := xds.NewResource(name, &l)
		if err != nil {
			t.Fatal(err)
		}
		set[xds.TypeListener][name] = r
	}
	if changed < 2 {
		t.Fatalf("TLS is ended in %d places", changed)
	}
}
