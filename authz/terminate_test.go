package authz

import (
	"maps"
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
