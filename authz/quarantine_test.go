package authz

import (
	"reflect"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

func quarantine(name string, spec v1alpha1.QuarantineSpec) v1alpha1.Quarantine {
	if spec.Reason == "" {
		spec.Reason = "leaked key"
	}
	return v1alpha1.Quarantine{ObjectMeta: metav1.ObjectMeta{Name: name}, Spec: spec}
}

// everyone is a model in which everyone in td may reach everything in shop.
func everyone(t *testing.T, quarantines ...v1alpha1.Quarantine) *Model {
	t.Helper()
	m, diagnostics := Compile(td, []v1alpha1.AllowPolicy{
		allowPolicy("shop", "all", "", nil, v1alpha1.Peer{SPIFFEID: "spiffe://td/*/*/*/*"}),
	}, quarantines...)
	if len(diagnostics) != 0 {
		t.Fatalf("diagnostics %+v", diagnostics)
	}
	return m
}

// One row for each way to name whom to cut off: a grant does not help, as
// caller or as target, and neighbours are not touched.
func TestQuarantineCutsOffBothWays(t *testing.T) {
	client := id("spiffe://td/ns/ops/sa/client")
	for _, test := range []struct {
		spec                     v1alpha1.QuarantineSpec
		from                     spiffeid.ID
		target                   Target
		callerCutOff, targetCuts bool
	}{
		{v1alpha1.QuarantineSpec{ServiceAccounts: []string{"ops/client"}}, client, web, true, false},
		{v1alpha1.QuarantineSpec{ServiceAccounts: []string{"shop/web"}}, client, web, false, true},
		{v1alpha1.QuarantineSpec{ServiceAccounts: []string{"shop/client", "ops/web", "shop/web2"}}, client, web, false, false},
		{v1alpha1.QuarantineSpec{Namespaces: []string{"ops"}}, client, web, true, false},
		{v1alpha1.QuarantineSpec{Namespaces: []string{"shop"}}, client, web, false, true},
		{v1alpha1.QuarantineSpec{Namespaces: []string{"shop", "ops"}}, client, web, true, true},
		{v1alpha1.QuarantineSpec{Namespaces: []string{"op", "sho"}}, client, web, false, false},
		{v1alpha1.QuarantineSpec{Identities: []string{"spiffe://td/ns/*/sa/client"}}, client, web, true, false},
		{v1alpha1.QuarantineSpec{Identities: []string{"spiffe://td/ns/*/sa/web"}}, client, web, false, true},
		{v1alpha1.QuarantineSpec{Nodes: []string{"node-1"}}, client, web, false, false},
	} {
		m := everyone(t, quarantine("incident-7", test.spec))
		d := m.Decide(Request{test.from, test.target, 80})
		want := Decision{Verdict: Allow, Policy: "shop/all", Reason: "allowed by shop/all"}
		switch {
		case test.callerCutOff:
			want = Decision{Quarantine: "incident-7", Reason: `quarantined by "incident-7": caller spiffe://td/ns/ops/sa/client is cut off`}
		case test.targetCuts:
			want = Decision{Quarantine: "incident-7", Reason: `quarantined by "incident-7": target shop/web is cut off`}
		}
		if !reflect.DeepEqual(d, want) {
			t.Errorf("%+v:\n got %+v\nwant %+v", test.spec, d, want)
		}
		if _, ok := m.Quarantined(test.from); ok != test.callerCutOff {
			t.Errorf("%+v: caller cut off = %v", test.spec, ok)
		}
		// Proxies act by grants and are told the words ahead.
		if got := m.Grants(test.target); (len(got) == 0) != test.targetCuts {
			t.Errorf("%+v: grants %+v", test.spec, got)
		}
		if got := m.DenyReason(test.target); strings.HasPrefix(got, "quarantined by") != test.targetCuts {
			t.Errorf("%+v: words %q", test.spec, got)
		}
	}
}

// Unlike a grant, what is valid of an invalid quarantine is in force: a typing
// error beside the identity that leaked must not let it through. Each row has
// a good service account beside the fault.
func TestInvalidQuarantineStillCuts(t *testing.T) {
	for _, test := range []struct {
		name           string
		spec           v1alpha1.QuarantineSpec
		field, message string
	}{
		{"q", v1alpha1.QuarantineSpec{Identities: []string{"spiffe://td/we*"}}, "spec.identities[0]", "mixes *"},
		{"q", v1alpha1.QuarantineSpec{Identities: []string{""}}, "spec.identities[0]", "must start with"},
		{"q", v1alpha1.QuarantineSpec{Identities: []string{"spiffe://*/ns/a/sa/b"}}, "spec.identities[0]", "trust domain"},
		{"q", v1alpha1.QuarantineSpec{Identities: []string{"spiffe://td2/ns/*/sa/*"}}, "spec.identities[0]", `this mesh is "td", write spiffe://td/ns/*/sa/*`},
		{"q", v1alpha1.QuarantineSpec{ServiceAccounts: []string{"shop/web", "client"}}, "spec.serviceAccounts[1]", "names no namespace"},
		{"q", v1alpha1.QuarantineSpec{ServiceAccounts: []string{"shop/web", "a/b/c"}}, "spec.serviceAccounts[1]", "more than one slash; write namespace/name"},
		{"q", v1alpha1.QuarantineSpec{ServiceAccounts: []string{"shop/web", "*/b"}}, "spec.serviceAccounts[1]", "no valid name"},
		{"q", v1alpha1.QuarantineSpec{Namespaces: []string{"*"}}, "spec.namespaces[0]", "no valid name"},
		{"q", v1alpha1.QuarantineSpec{Namespaces: []string{"a.b"}}, "spec.namespaces[0]", "holds a dot"},
		{"q", v1alpha1.QuarantineSpec{Nodes: []string{"Node_1"}}, "spec.nodes[0]", "no valid name"},
		{"q", v1alpha1.QuarantineSpec{Reason: strings.Repeat("é", 257)}, "spec.reason", "257 characters"},
		{"Q", v1alpha1.QuarantineSpec{}, "metadata.name", "no valid name"},
	} {
		if test.spec.ServiceAccounts == nil {
			test.spec.ServiceAccounts = []string{"shop/web"}
		}
		m, diagnostics := Compile(td, nil, quarantine(test.name, test.spec))
		if name, ok := m.Quarantined(id("spiffe://td/ns/shop/sa/web")); !ok || name != test.name {
			t.Errorf("%s %s: what is valid is not in force", test.field, test.message)
		}
		if len(diagnostics) != 1 || diagnostics[0].Field != test.field || diagnostics[0].Quarantine != test.name ||
			diagnostics[0].Policy != "" || !strings.Contains(diagnostics[0].Message, test.message) {
			t.Errorf("want %s %s, got %+v", test.field, test.message, diagnostics)
		}
	}

	_, diagnostics := Compile(td, nil, v1alpha1.Quarantine{ObjectMeta: metav1.ObjectMeta{Name: "q"}})
	if len(diagnostics) != 2 || diagnostics[0].Field != "spec.reason" || diagnostics[1].Field != "spec" {
		t.Errorf("an empty quarantine: %+v", diagnostics)
	}
}

// Of two quarantines of one name neither may be lost.
func TestQuarantinesOfOneNameAreJoined(t *testing.T) {
	m, diagnostics := Compile(td, nil,
		quarantine("q", v1alpha1.QuarantineSpec{Namespaces: []string{"a"}, Nodes: []string{"n2", "n1"}}),
		quarantine("q", v1alpha1.QuarantineSpec{Namespaces: []string{"b", "a"}, Nodes: []string{"n3"}}))
	want := []Quarantine{{Name: "q", Reason: "leaked key", Nodes: []string{"n1", "n2", "n3"},
		Identities: patterns(t, "spiffe://td/ns/a/sa/*", "spiffe://td/ns/b/sa/*")}}
	if got := m.Quarantines(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	if len(diagnostics) != 1 || diagnostics[0].Field != "metadata.name" {
		t.Errorf("diagnostics %+v", diagnostics)
	}
	for _, node := range []string{"n1", "n2", "n3"} {
		if name, ok := m.QuarantinedNode(node); !ok || name != "q" {
			t.Errorf("node %s: %q %v", node, name, ok)
		}
	}
	if name, ok := m.QuarantinedNode("n4"); ok {
		t.Errorf("node n4 is cut off by %q", name)
	}
}

// Without a trust domain nothing can be said of service accounts, but what is
// spelled out is cut off.
func TestQuarantineWithoutTrustDomain(t *testing.T) {
	m, diagnostics := Compile(spiffeid.TrustDomain{}, nil, quarantine("q", v1alpha1.QuarantineSpec{
		Identities: []string{"spiffe://td/x"}, Namespaces: []string{"shop"}, Nodes: []string{"n"},
	}))
	if _, ok := m.Quarantined(id("spiffe://td/x")); !ok || len(diagnostics) != 1 || diagnostics[0].Field != "spec" {
		t.Errorf("cut off = %v, %+v", ok, diagnostics)
	}
	if _, ok := m.QuarantinedNode("n"); !ok {
		t.Error("the node is not cut off")
	}
}

// The first by name is named, whatever the order, and the model cannot be
// changed by what went in or came out.
func TestQuarantinesAreSortedAndCopied(t *testing.T) {
	in := []Quarantine{
		{Name: "b", Identities: patterns(t, "spiffe://td/b", "spiffe://td/a", "spiffe://td/a"), Nodes: []string{"n"}},
		{Name: "a", Identities: patterns(t, "spiffe://td/*"), Nodes: []string{"n"}},
	}
	base := NewModel(nil)
	m := base.WithQuarantines(td, in)
	in[0].Identities[0], in[0].Nodes[0] = Pattern{}, "x"
	out := m.Quarantines()
	out[1].Identities[0], out[1].Nodes[0] = Pattern{}, "y"
	want := []Quarantine{
		{Name: "a", Identities: patterns(t, "spiffe://td/*"), Nodes: []string{"n"}},
		{Name: "b", Identities: patterns(t, "spiffe://td/a", "spiffe://td/b"), Nodes: []string{"n"}},
	}
	if got := m.Quarantines(); !reflect.DeepEqual(got, want) {
		t.Errorf("got %+v", got)
	}
	if name, _ := m.Quarantined(id("spiffe://td/b")); name != "a" {
		t.Errorf("named %q", name)
	}
	if base.Quarantines() != nil && len(base.Quarantines()) != 0 {
		t.Error("the model that it was made from has changed")
	}
	var none *Model
	if _, ok := none.Quarantined(id("spiffe://td/b")); ok || none.Quarantines() != nil {
		t.Error("a nil model cuts somebody off")
	}
	if _, ok := none.WithQuarantines(td, in).Quarantined(id("spiffe://td/a")); !ok {
		t.Error("a nil model loses its quarantines")
	}
	if _, ok := m.Quarantined(spiffeid.ID{}); ok {
		t.Error("nobody is cut off")
	}
}

// The version names what a verdict was reached by, so it changes with whom a
// quarantine cuts off, and with nothing else of it.
func TestVersionChangesWithQuarantine(t *testing.T) {
	m := everyone(t)
	before := m.Version(web)
	versions := []string{before}
	for _, spec := range []v1alpha1.QuarantineSpec{
		{ServiceAccounts: []string{"shop/web"}},
		{ServiceAccounts: []string{"ops/client"}},
		{Namespaces: []string{"shop"}},
	} {
		versions = append(versions, everyone(t, quarantine("q", spec)).Version(web))
	}
	slices.Sort(versions)
	if distinct := slices.Compact(slices.Clone(versions)); len(distinct) != len(versions) {
		t.Errorf("versions %v", versions)
	}
	if everyone(t, quarantine("q", v1alpha1.QuarantineSpec{Nodes: []string{"n"}})).Version(web) != before {
		t.Error("a quarantine of a node changes every target's version")
	}
	a := everyone(t, quarantine("q", v1alpha1.QuarantineSpec{Namespaces: []string{"x"}, Reason: "one"}))
	b := everyone(t, quarantine("q", v1alpha1.QuarantineSpec{Namespaces: []string{"x"}, Reason: "two"}))
	if a.Version(web) != b.Version(web) {
		t.Error("a reason changes the version")
	}
}

// Whatever a quarantine says beside it, the service account shop/web is cut
// off in both directions, and nothing becomes allowed that was not before.
func FuzzQuarantine(f *testing.F) {
	for _, name := range hostileNames {
		f.Add(name, "spiffe://td/ns/"+name+"/sa/x", name, "ops/"+name, name, "spiffe://td/ns/"+name+"/sa/"+name)
	}
	f.Fuzz(func(t *testing.T, name, identity, namespace, account, node, caller string) {
		doc := quarantine(name, v1alpha1.QuarantineSpec{
			Identities: []string{identity}, Namespaces: []string{namespace},
			ServiceAccounts: []string{account, "shop/web"}, Nodes: []string{node},
		})
		policies := []v1alpha1.AllowPolicy{
			allowPolicy("shop", "all", "", nil, v1alpha1.Peer{SPIFFEID: "spiffe://td/ns/*/sa/*"}),
			allowPolicy("ops", "all", "", nil, v1alpha1.Peer{SPIFFEID: "spiffe://td/ns/*/sa/*"}),
		}
		with, _ := Compile(td, policies, doc)
		without, _ := Compile(td, policies)
		from, err := spiffeid.FromString(caller)
		if err != nil {
			return
		}
		for _, r := range []Request{{from, web, 80}, {id("spiffe://td/ns/shop/sa/web"), Target{"ops", "db"}, 80}} {
			if d := with.Decide(r); d.Verdict == Allow || d.Quarantine != name {
				t.Fatalf("%+v: %+v", r, d)
			}
		}
		r := Request{from, Target{"ops", "db"}, 80}
		allowed := with.Decide(r).Verdict == Allow
		if allowed && without.Decide(r).Verdict != Allow {
			t.Fatalf("%+v is allowed by a quarantine", r)
		}
		if p, err := ParsePattern(identity); allowed && err == nil && reference(p.String(), caller) {
			t.Fatalf("%s is allowed, and %s is cut off", caller, identity)
		}
	})
}
