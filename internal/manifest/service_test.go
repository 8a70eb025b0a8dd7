package manifest

import (
	"net/netip"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/mesh"
)

// An endpoint of another mesh names one workload of a trust domain that there is a
// Federation for. A name that nobody could prove would never be reached, and one that
// is dropped would be called in plain.
func TestForeignEndpoints(t *testing.T) {
	const rest = `apiVersion: signet.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: mesh.example}
---
apiVersion: v1
kind: Namespace
metadata: {name: shop, annotations: {signet.dev/mesh: enforce}}
---
apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: web, namespace: shop}
spec: {serviceAccount: web, capture: {networkNamespace: web, addresses: [10.0.0.1]}}
---
apiVersion: signet.dev/v1alpha1
kind: Federation
metadata: {name: partner}
spec: {trustDomain: partner.example, bundleEndpointURL: https://partner.example/bundle, profile: https_web}
---
apiVersion: signet.dev/v1alpha1
kind: ServiceEntry
metadata: {name: ledger, namespace: shop}
spec: {vips: [10.96.0.5], ports: [{port: 80}], endpoints: [{ENDPOINT}]}
`
	const ledger = "spiffe://partner.example/ns/pay/sa/ledger"
	want := mesh.Endpoint{Addr: netip.MustParseAddr("10.1.0.7"), Identity: spiffeid.RequireFromString(ledger)}
	m, err := Load(write(t, strings.Replace(rest, "ENDPOINT", "address: 10.1.0.7, spiffeID: "+ledger, 1)), "n1")
	if err != nil {
		t.Fatal(err)
	}
	if got := m.State.Services[0].Endpoints; len(got) != 1 || got[0].Addr != want.Addr || got[0].Identity != want.Identity || got[0].Workload != "" {
		t.Errorf("the endpoint is %+v, want %+v", got, want)
	}
	// What speaks mutual TLS itself may be of this mesh, too.
	for _, id := range []string{ledger, "spiffe://mesh.example/ns/shop/sa/batch"} {
		m, err := Load(write(t, strings.Replace(rest, "ENDPOINT", "address: 10.1.0.7, tls: originate, alpn: h2, spiffeID: "+id, 1)), "n1")
		if err != nil {
			t.Fatal(err)
		}
		if e := m.State.Services[0].Endpoints[0]; !e.Originate || e.ALPN != "h2" || e.Identity.String() != id {
			t.Errorf("the endpoint is %+v", e)
		}
	}
	for endpoint, want := range map[string]string{
		"address: 10.1.0.7, spiffeID: spiffe://other.example/ns/pay/sa/ledger":              "add a Federation",
		"address: 10.1.0.7, spiffeID: spiffe://mesh.example/ns/pay/sa/ledger":               "is of this mesh; give the endpoint as workload",
		"address: 10.1.0.7, spiffeID: spiffe://partner.example/ns/pay/sa/*":                 "path segment characters",
		"address: 10.1.0.7, spiffeID: spiffe://partner.example/ledger":                      "can be named",
		"address: 10.1.0.7, tls: originate":                                                 "spec.endpoints[0].spiffeID: is missing; with tls, say who is to answer",
		"address: 10.1.0.7, tls: terminate, spiffeID: " + ledger:                            `"terminate" is not known; write originate`,
		"address: 10.1.0.7, alpn: h2, spiffeID: " + ledger:                                  "spec.endpoints[0].alpn: needs tls: originate",
		`address: 10.1.0.7, tls: originate, alpn: "h2,http/1.1", spiffeID: ` + ledger:       "is no protocol",
		"address: 10.1.0.7, tls: originate, spiffeID: spiffe://mesh.example/signet/node/n1": "is no identity of a workload",
		"workload: web, tls: originate":                                                     "write it in an AllowPolicy",
		"address: 10.1.0.7, spiffeID: spiffe://partner.example":                             "spec.endpoints[0].spiffeID",
		"address: 10.1.0.7, spiffeID: partner":                                              "spec.endpoints[0].spiffeID",
		"workload: web, spiffeID: " + ledger:                                                "has no meaning with workload",
		"spiffeID: " + ledger:                                                               "set exactly one of workload and address",
		"address: 10.0.0.1, spiffeID: " + ledger:                                            "belongs to workload shop/web",
		"address: 10.1.0.7, spiffeID: spiffe://partner.example/ns/pay/sa/a/b/c":             "can be named",
	} {
		if _, err := Load(write(t, strings.Replace(rest, "ENDPOINT", endpoint, 1)), "n1"); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: %v, want %q", endpoint, err, want)
		}
	}
	// A file by itself may be a part of a mesh whose Federations are elsewhere.
	alone := rest[strings.LastIndex(rest, "---\n")+4:]
	if f := Check([]string{write(t, strings.Replace(alone, "ENDPOINT", "address: 10.1.0.7, spiffeID: "+ledger, 1))}); f != nil {
		t.Errorf("a service alone: %v", f)
	}
}
