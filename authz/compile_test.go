package authz

import (
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

var td = spiffeid.RequireTrustDomainFromString("td")

func allowPolicy(namespace, name, target string, ports []int32, from ...v1alpha1.Peer) v1alpha1.AllowPolicy {
	return v1alpha1.AllowPolicy{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       v1alpha1.AllowPolicySpec{Target: v1alpha1.Target{ServiceAccount: target}, Ports: ports, From: from},
	}
}

func TestCompile(t *testing.T) {
	m, diagnostics := Compile(td, []v1alpha1.AllowPolicy{
		allowPolicy("shop", "b", "web", []int32{443, 80},
			v1alpha1.Peer{ServiceAccount: "client"},
			v1alpha1.Peer{ServiceAccount: "ops/backup.v2"},
			v1alpha1.Peer{Namespace: "mon"},
			v1alpha1.Peer{SPIFFEID: "spiffe://td/host/*"}),
		allowPolicy("shop", "a", "", nil, v1alpha1.Peer{Namespace: "shop"}),
	})
	if len(diagnostics) != 0 {
		t.Fatalf("diagnostics: %+v", diagnostics)
	}
	var got []string
	for _, p := range m.Policies() {
		got = append(got, p.Key()+" "+p.TargetServiceAccount+" "+list(p.Ports, "all")+": "+list(p.From, "nobody"))
	}
	want := []string{
		"shop/a  all: spiffe://td/ns/shop/sa/*",
		"shop/b web 80, 443: spiffe://td/host/*, spiffe://td/ns/mon/sa/*, spiffe://td/ns/ops/sa/backup.v2, spiffe://td/ns/shop/sa/client",
	}
	if !slices.Equal(got, want) {
		t.Errorf("got\n%s\nwant\n%s", strings.Join(got, "\n"), strings.Join(want, "\n"))
	}
}

// One fault anywhere voids the whole policy: half of what somebody meant may
// be more than they meant. Each row has a good peer beside the fault.
func TestCompileInvalidGrantsNothing(t *testing.T) {
	good := v1alpha1.Peer{ServiceAccount: "client"}
	peer := func(p v1alpha1.Peer) v1alpha1.AllowPolicy { return allowPolicy("shop", "p", "web", nil, good, p) }
	ports := func(p ...int32) v1alpha1.AllowPolicy { return allowPolicy("shop", "p", "web", p, good) }
	tls := func(value string, p ...int32) v1alpha1.AllowPolicy {
		doc := ports(p...)
		doc.Spec.TLS = value
		return doc
	}
	for _, test := range []struct {
		doc            v1alpha1.AllowPolicy
		field, message string
	}{
		{tls("terminate"), "spec.tls", "needs spec.ports"},
		{tls("Terminate", 80), "spec.tls", `"Terminate" is not known; write terminate`},
		{tls("passthrough", 80), "spec.tls", "is not known"},
		{allowPolicy("shop", "p", "web", nil), "spec.from", "is empty"},
		{peer(v1alpha1.Peer{}), "spec.from[1]", "has 0 fields set"},
		{peer(v1alpha1.Peer{ServiceAccount: "a", Namespace: "b"}), "spec.from[1]", "has 2 fields set"},
		{peer(v1alpha1.Peer{ServiceAccount: "a", Namespace: "b", SPIFFEID: "c"}), "spec.from[1]", "has 3 fields set"},
		{peer(v1alpha1.Peer{SPIFFEID: "spiffe://td/we*"}), "spec.from[1].spiffeID", "mixes *"},
		{peer(v1alpha1.Peer{SPIFFEID: "spiffe://*/x"}), "spec.from[1].spiffeID", "trust domain"},
		{peer(v1alpha1.Peer{SPIFFEID: "spiffe://td2/ns/a/sa/b"}), "spec.from[1].spiffeID", `of trust domain "td2", and nobody of that is known here; this mesh is "td", write spiffe://td/ns/a/sa/b, or add a Federation for "td2"`},
		{peer(v1alpha1.Peer{SPIFFEID: "spiffe://td.evil/ns/a/sa/*"}), "spec.from[1].spiffeID", `this mesh is "td"`},
		{peer(v1alpha1.Peer{Namespace: "*"}), "spec.from[1].namespace", "no valid name"},
		{peer(v1alpha1.Peer{Namespace: "a.b"}), "spec.from[1].namespace", "holds a dot"},
		{peer(v1alpha1.Peer{Namespace: "a/sa/x"}), "spec.from[1].namespace", "no valid name"},
		{peer(v1alpha1.Peer{Namespace: "Shop"}), "spec.from[1].namespace", "no valid name"},
		{peer(v1alpha1.Peer{Namespace: strings.Repeat("a", 64)}), "spec.from[1].namespace", "64 bytes"},
		{peer(v1alpha1.Peer{ServiceAccount: "*"}), "spec.from[1].serviceAccount", "no valid name"},
		{peer(v1alpha1.Peer{ServiceAccount: "a/b/c"}), "spec.from[1].serviceAccount", "more than one slash"},
		{peer(v1alpha1.Peer{ServiceAccount: "/b"}), "spec.from[1].serviceAccount", "is empty"},
		{peer(v1alpha1.Peer{ServiceAccount: "a/"}), "spec.from[1].serviceAccount", "is empty"},
		{peer(v1alpha1.Peer{ServiceAccount: "../x"}), "spec.from[1].serviceAccount", "holds a dot"},
		{peer(v1alpha1.Peer{ServiceAccount: "a..b"}), "spec.from[1].serviceAccount", "no valid name"},
		{peer(v1alpha1.Peer{ServiceAccount: "a%2fb"}), "spec.from[1].serviceAccount", "no valid name"},
		{peer(v1alpha1.Peer{ServiceAccount: "a\x00"}), "spec.from[1].serviceAccount", "no valid name"},
		{peer(v1alpha1.Peer{ServiceAccount: "wéb"}), "spec.from[1].serviceAccount", "no valid name"},
		{peer(v1alpha1.Peer{ServiceAccount: strings.Repeat("a", 254)}), "spec.from[1].serviceAccount", "254 bytes"},
		{ports(80, 0), "spec.ports[1]", "is no port"},
		{ports(-1), "spec.ports[0]", "is no port"},
		{ports(65536), "spec.ports[0]", "is no port"},
		{ports(65536 + 80), "spec.ports[0]", "is no port"}, // would be 80 if it wrapped
		{ports(portOutbound), "spec.ports[0]", "belongs to the mesh"},
		{ports(portInbound), "spec.ports[0]", "belongs to the mesh"},
		{ports(portTunnel), "spec.ports[0]", "belongs to the mesh"},
		{allowPolicy("shop", "p", "*", nil, good), "spec.target.serviceAccount", "no valid name"},
		{allowPolicy("shop", "p", "web/db", nil, good), "spec.target.serviceAccount", "no valid name"},
		{allowPolicy("", "p", "", nil, good), "metadata.namespace", "is empty"},
		{allowPolicy("shop.x", "p", "", nil, good), "metadata.namespace", "holds a dot"},
		{allowPolicy("shop", "", "", nil, good), "metadata.name", "is empty"},
		{allowPolicy("shop", "P", "", nil, good), "metadata.name", "no valid name"},
	} {
		m, diagnostics := Compile(td, []v1alpha1.AllowPolicy{test.doc})
		if len(m.Policies()) != 0 {
			t.Errorf("%s %s: the policy still grants something", test.field, test.message)
		}
		if !slices.ContainsFunc(diagnostics, func(d Diagnostic) bool {
			return d.Field == test.field && strings.Contains(d.Message, test.message) && d.Policy == test.doc.Namespace+"/"+test.doc.Name
		}) {
			t.Errorf("want %s %s, got %+v", test.field, test.message, diagnostics)
		}
	}
}

func TestCompileReportsEveryFault(t *testing.T) {
	_, diagnostics := Compile(td, []v1alpha1.AllowPolicy{
		allowPolicy("shop", "p", "W", []int32{0, 15008}, v1alpha1.Peer{}, v1alpha1.Peer{Namespace: "*"}),
	})
	var fields []string
	for _, d := range diagnostics {
		fields = append(fields, d.Field)
	}
	want := []string{"spec.target.serviceAccount", "spec.ports[0]", "spec.ports[1]", "spec.from[0]", "spec.from[1].namespace"}
	if !slices.Equal(fields, want) {
		t.Errorf("got %v, want %v", fields, want)
	}
}

// The second of two policies with one name is void, also when the first is
// void for another reason; neighbours are not touched.
func TestCompileDuplicates(t *testing.T) {
	a, b := v1alpha1.Peer{ServiceAccount: "a"}, v1alpha1.Peer{ServiceAccount: "b"}
	m, diagnostics := Compile(td, []v1alpha1.AllowPolicy{
		allowPolicy("shop", "p", "", nil, a), allowPolicy("shop", "p", "", nil, b),
		allowPolicy("shop", "q", "", nil), allowPolicy("shop", "q", "", nil, b),
		allowPolicy("shop2", "p", "", nil, b),
	})
	var keys []string
	for _, p := range m.Policies() {
		keys = append(keys, p.Key()+" "+list(p.From, ""))
	}
	want := []string{"shop/p spiffe://td/ns/shop/sa/a", "shop2/p spiffe://td/ns/shop2/sa/b"}
	if !slices.Equal(keys, want) || len(diagnostics) != 3 || diagnostics[0].Field != "metadata.name" || diagnostics[2].Field != "metadata.name" {
		t.Errorf("got %v, %+v", keys, diagnostics)
	}
}

func TestCompileWithoutTrustDomainGrantsNothing(t *testing.T) {
	m, diagnostics := Compile(spiffeid.TrustDomain{}, []v1alpha1.AllowPolicy{
		allowPolicy("shop", "p", "", nil, v1alpha1.Peer{SPIFFEID: "spiffe://td/x"}),
	})
	if len(m.Policies()) != 0 || len(diagnostics) == 0 {
		t.Errorf("got %+v, %+v", m.Policies(), diagnostics)
	}
}

func FuzzCompile(f *testing.F) {
	for _, name := range hostileNames {
		f.Add("shop", name, "web", int32(80), name, "", "", "spiffe://td/ns/shop/sa/"+name)
		f.Add(name, "p", name, int32(15008), "", name, "", "spiffe://td/ns/"+name+"/sa/web")
		f.Add("shop", "p", "", int32(-1), "", "", "spiffe://td/ns/"+name+"/sa/*", "spiffe://td/ns/shop/sa/web")
		f.Add("shop", "p", "web", int32(80), "ops/"+name, "", "", "spiffe://td/ns/ops/sa/"+name)
		f.Add("shop", "p", "web", int32(80), "", name, "", "spiffe://td/ns/"+name+"/sa/x/y")
	}
	f.Fuzz(func(t *testing.T, namespace, name, target string, port int32, sa, ns, spiffe, caller string) {
		docs := []v1alpha1.AllowPolicy{allowPolicy(namespace, name, target, []int32{port}, v1alpha1.Peer{ServiceAccount: sa, Namespace: ns, SPIFFEID: spiffe})}
		m, diagnostics := Compile(td, docs)
		policies := m.Policies()
		if (len(policies) == 1) == (len(diagnostics) > 0) {
			t.Fatalf("%d policies with %+v", len(policies), diagnostics)
		}
		from, err := spiffeid.FromString(caller)
		if err != nil || len(policies) == 0 {
			return
		}
		// What the document says, written another way.
		var admits bool
		switch {
		case sa != "" && strings.Contains(sa, "/"):
			who := strings.Split(sa, "/")
			admits = caller == "spiffe://td/ns/"+who[0]+"/sa/"+who[1]
		case sa != "":
			admits = caller == "spiffe://td/ns/"+namespace+"/sa/"+sa
		case ns != "":
			admits = reference("spiffe://td/ns/"+ns+"/sa/*", caller)
		default:
			admits = reference(spiffe, caller)
		}
		to := Target{Namespace: namespace, ServiceAccount: target}
		if target == "" {
			to.ServiceAccount = "any"
		}
		if got := m.Decide(Request{from, to, uint16(port)}); (got.Verdict == Allow) != admits {
			t.Fatalf("%+v, want admits = %v", got, admits)
		}
		for _, r := range []Request{
			{from, Target{namespace + "x", to.ServiceAccount}, uint16(port)},
			{from, to, uint16(port) + 1},
			{spiffeid.ID{}, to, uint16(port)},
		} {
			if got := m.Decide(r); got.Verdict == Allow {
				t.Fatalf("%+v is allowed", r)
			}
		}
	})
}
