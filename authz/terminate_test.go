package authz

import (
	"maps"
	"slices"
	"testing"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

// On which ports TLS is ended is what the policies that protect a target say
// together, whatever their order; it lets nobody in, and only a policy that says
// so changes a target's version.
func TestTerminated(t *testing.T) {
	policy := func(name, target, tls string, ports []int32, from string) v1alpha1.AllowPolicy {
		doc := allowPolicy("shop", name, target, ports, v1alpha1.Peer{ServiceAccount: from})
		doc.Spec.TLS = tls
		return doc
	}
	docs := []v1alpha1.AllowPolicy{
		policy("c", "web", "terminate", []int32{8443, 9443}, "client"),
		policy("b", "", "terminate", []int32{8443}, "other"),
		policy("a", "web", "", []int32{8443, 80}, "third"),
		policy("d", "db", "terminate", []int32{5432}, "client"),
		policy("bad", "web", "terminate", nil, "client"), // and so nothing
	}
	m, diagnostics := Compile(td, docs)
	if len(diagnostics) != 1 {
		t.Fatalf("diagnostics %+v", diagnostics)
	}
	for target, want := range map[Target]map[uint16]string{
		{"shop", "web"}:   {8443: "shop/b", 9443: "shop/c"},
		{"shop", "db"}:    {8443: "shop/b", 5432: "shop/d"},
		{"shop", "other"}: {8443: "shop/b"},
		{"ops", "web"}:    {},
		{"shop", ""}:      {},
		{"", ""}:          {},
	} {
		if got := m.Terminated(target); !maps.Equal(got, want) {
			t.Errorf("%s: %v, want %v", target, got, want)
		}
	}
	if got := (*Model)(nil).Terminated(Target{"shop", "web"}); len(got) != 0 {
		t.Errorf("no model: %v", got)
	}

	target := Target{"shop", "web"}
	plain := docs[0]
	plain.Spec.TLS = ""
	without, _ := Compile(td, []v1alpha1.AllowPolicy{plain})
	with, _ := Compile(td, []v1alpha1.AllowPolicy{docs[0]})
	if without.Version(target) == with.Version(target) {
		t.Error("the version is the same with and without tls: terminate")
	}
	for _, from := range []string{"client", "other"} {
		id, _ := identity(td, "shop", from)
		for _, port := range []uint16{80, 8443, 9443} {
			r := Request{From: id, Target: target, Port: port}
			if a, b := without.Decide(r), with.Decide(r); a.Verdict != b.Verdict || a.Reason != b.Reason {
				t.Errorf("%s, port %d: %+v without, %+v with", from, port, a, b)
			}
		}
	}
}

// Which ports a target speaks TLS on itself is what its policies say together. There is
// nothing to end in front of it there, whatever another policy says, and nobody is let
// in by it.
func TestOriginated(t *testing.T) {
	policy := func(name, target, tls, alpn string, ports ...int32) v1alpha1.AllowPolicy {
		doc := allowPolicy("shop", name, target, ports, v1alpha1.Peer{ServiceAccount: "client"})
		doc.Spec.TLS, doc.Spec.ALPN = tls, alpn
		return doc
	}
	docs := []v1alpha1.AllowPolicy{
		policy("c", "web", "originate", "h2", 8443, 9443),
		policy("b", "", "originate", "", 8443),
		policy("d", "web", "originate", "http/1.1", 8443),
		policy("a", "web", "terminate", "", 8443, 7443),
	}
	m, diagnostics := Compile(td, append(slices.Clone(docs),
		policy("bad1", "web", "originate", ""), policy("bad2", "web", "", "h2", 80), policy("bad3", "web", "terminate", "h2", 80),
		policy("bad4", "web", "originate", "h2,spdy", 80), policy("bad5", "web", "originate", "a b", 80)))
	if len(diagnostics) != 5 || len(m.Policies()) != len(docs) {
		t.Fatalf("diagnostics %+v", diagnostics)
	}
	for port, want := range map[uint16]Origination{
		8443: {"shop/b", []string{"h2", "http/1.1"}}, 9443: {"shop/c", []string{"h2"}}, 7443: {}, 80: {}, 0: {},
	} {
		if got, ok := m.Originated(Target{"shop", "web"}, port); ok != (want.Policy != "") || got.Policy != want.Policy || !slices.Equal(got.ALPN, want.ALPN) {
			t.Errorf("%d: %+v, want %+v", port, got, want)
		}
	}
	if got := m.Terminated(Target{"shop", "web"}); !maps.Equal(got, map[uint16]string{7443: "shop/a"}) {
		t.Errorf("ended are %v", got)
	}
	for _, other := range []Target{{"ops", "web"}, {"shop", ""}, {"", "web"}} {
		if _, ok := m.Originated(other, 8443); ok {
			t.Errorf("%s speaks TLS", other)
		}
	}
	if _, ok := (*Model)(nil).Originated(Target{"shop", "web"}, 8443); ok {
		t.Error("without policies somebody speaks TLS")
	}
	seen := map[string]bool{}
	for _, tls := range []string{"", "terminate", "originate"} {
		for _, alpn := range []string{"", "h2"} {
			if alpn != "" && tls != "originate" {
				continue
			}
			one, _ := Compile(td, []v1alpha1.AllowPolicy{policy("p", "web", tls, alpn, 8443)})
			seen[one.Version(Target{"shop", "web"})] = true
			id, _ := identity(td, "shop", "other")
			if one.Decide(Request{From: id, Target: Target{"shop", "web"}, Port: 8443}).Verdict == Allow {
				t.Errorf("tls %q lets somebody in", tls)
			}
		}
	}
	if len(seen) != 4 {
		t.Errorf("%d versions of 4 policies", len(seen))
	}
}
