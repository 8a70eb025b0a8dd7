package xds

import (
	"fmt"
	"math/rand/v2"
	"net/netip"
	"strings"
	"testing"

	configrbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// admits evaluates compiled rules as Envoy's RBAC filter does for the matchers
// that are used here, and fails on any other.
func admits(t *testing.T, rules *configrbacv3.RBAC, from, authority string) bool {
	t.Helper()
	matches := func(m *matcherv3.StringMatcher, s string) bool {
		switch p := m.GetMatchPattern().(type) {
		case *matcherv3.StringMatcher_Exact:
			return s == p.Exact
		case *matcherv3.StringMatcher_Prefix:
			return p.Prefix != "" && strings.HasPrefix(s, p.Prefix)
		}
		t.Fatalf("matcher %T is not expected: strings are compared, not turned into patterns", m.GetMatchPattern())
		return false
	}
	for _, p := range rules.GetPolicies() {
		permitted, known := false, false
		for _, perm := range p.GetPermissions() {
			permitted = permitted || matches(perm.GetHeader().GetStringMatch(), authority)
		}
		for _, pr := range p.GetPrincipals() {
			known = known || matches(callerName(t, pr), from)
		}
		if permitted && known {
			return true
		}
	}
	return false
}

// callerName is the comparison of a principal with the name in a caller's
// certificate; any other kind fails.
func callerName(t *testing.T, p *configrbacv3.Principal) *matcherv3.StringMatcher {
	t.Helper()
	if key := p.GetFilterState().GetKey(); key != statePeerURI {
		t.Fatalf("a caller is compared by %q: %v", key, p)
	}
	return p.GetFilterState().GetStringMatch()
}

// TestRulesAgreeWithEvaluator: what is compiled for the proxy admits exactly
// what the evaluator allows, over random policies whose names are prefixes of
// each other, contain dots and dashes, and use wildcards in every place. Each
// disagreement is a hole or an outage.
func TestRulesAgreeWithEvaluator(t *testing.T) {
	const seed = 20261123
	rng := rand.New(rand.NewPCG(seed, seed))
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	names := []string{"a", "ab", "a-b", "a.b", "web", "web-1", "w"}
	pick := func() string { return names[rng.IntN(len(names))] }
	state := &mesh.State{TrustDomain: td, Namespaces: map[string]mesh.Mode{}}
	for i, ns := range names {
		state.Namespaces[ns] = mesh.ModeEnforce
		for j, sa := range names {
			state.Workloads = append(state.Workloads, mesh.Workload{
				Namespace: ns, Name: sa, ServiceAccount: sa, Node: "n1",
				ID:      spiffeid.RequireFromPathf(td, "/ns/%s/sa/%s", ns, sa),
				Capture: &mesh.Capture{NetNS: "/x", Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 0, byte(i), byte(j + 1)})}},
			})
		}
	}
	var identities []spiffeid.ID
	for i := range state.Workloads {
		identities = append(identities, state.Workloads[i].ID)
	}
	allowed, denied := 0, 0
	for round := range 300 {
		var policies []authz.Policy
		for i := range 1 + rng.IntN(4) {
			p := authz.Policy{Namespace: pick(), Name: fmt.Sprint("p", i)}
			if rng.IntN(2) == 0 {
				p.TargetServiceAccount = pick()
			}
			if rng.IntN(3) > 0 {
				p.Ports = []uint16{80, 8080}[:1+rng.IntN(2)]
			}
			for range 1 + rng.IntN(3) {
				text := fmt.Sprintf("spiffe://mesh.test/ns/%s/sa/%s", pick(), pick())
				switch rng.IntN(5) {
				case 0:
					text = fmt.Sprintf("spiffe://mesh.test/ns/%s/sa/*", pick())
				case 1:
					text = fmt.Sprintf("spiffe://mesh.test/ns/*/sa/%s", pick())
				case 2:
					text = "spiffe://mesh.test/*/*/sa/*"
				}
				pattern, err := authz.ParsePattern(text)
				if err != nil {
					t.Fatal(err)
				}
				p.From = append(p.From, pattern)
			}
			policies = append(policies, p)
		}
		model := authz.NewModel(policies)
		b := &builder{view: &mesh.View{State: state, Model: model, Identities: identities}, node: "n1", set: Set{}}
		for range 40 {
			to := &state.Workloads[rng.IntN(len(state.Workloads))]
			from := state.Workloads[rng.IntN(len(state.Workloads))].ID
			port := []uint16{80, 81, 808, 8080}[rng.IntN(4)]
			target := authz.Target{Namespace: to.Namespace, ServiceAccount: to.ServiceAccount}
			rules := b.rbac(to, target).GetRules()
			want := model.Decide(authz.Request{From: from, Target: target, Port: port}).Verdict == authz.Allow
			authority := netip.AddrPortFrom(to.Capture.Addrs[0], port)
			if got := admits(t, rules, from.String(), authority.String()); got != want {
				t.Fatalf("round %d: %s -> %s: rules admit %t, evaluator %t; policies %+v", round, from, authority, got, want, policies)
			}
			if want {
				allowed++
			} else {
				denied++
			}
			// The address is pinned: the same question about another address,
			// or without an identity, is refused whatever the policies say.
			for _, other := range []string{"10.99.0.1:80", "127.0.0.1:80", authority.Addr().String(), "x", "", authority.Addr().String() + "0:80"} {
				if admits(t, rules, from.String(), other) {
					t.Fatalf("rules of %s admit authority %q", to.Key(), other)
				}
			}
			if admits(t, rules, "", authority.String()) || admits(t, rules, from.String()+"/x/y", authority.String()) != false && !prefixed(rules, from.String()) {
				t.Fatalf("rules of %s admit an identity that is not one", to.Key())
			}
		}
	}
	if allowed < 500 || denied < 500 {
		t.Errorf("%d allowed and %d denied questions: too few of one to mean anything", allowed, denied)
	}
}

// prefixed reports whether a wildcard over service accounts admits id. Deeper
// identities under it are never issued; see serviceAccounts.
func prefixed(rules *configrbacv3.RBAC, id string) bool {
	for _, p := range rules.GetPolicies() {
		for _, pr := range p.GetPrincipals() {
			if x := pr.GetFilterState().GetStringMatch().GetPrefix(); x != "" && strings.HasPrefix(id, x) {
				return true
			}
		}
	}
	return false
}

// TestObserveStillPinsTheAddress: observe mode lets every caller through, but
// only to the workload itself; otherwise the proxy would be an open relay.
func TestObserveStillPinsTheAddress(t *testing.T) {
	v := view(t, "shop.yaml")
	w := v.State.Workload("lab/probe")
	b := &builder{view: v, node: "n1", set: Set{}}
	r := b.rbac(w, authz.Target{Namespace: "lab", ServiceAccount: "probe"})
	if len(r.GetRules().GetPolicies()) != 1 || r.GetShadowRules() == nil {
		t.Fatalf("observe mode compiles to %v", r)
	}
	for _, perm := range r.GetRules().GetPolicies()[PolicyObserve].GetPermissions() {
		if got := perm.GetHeader().GetStringMatch().GetPrefix(); got != "10.88.0.4:" {
			t.Errorf("observe mode permits CONNECT to %q, want 10.88.0.4: only", got)
		}
	}
}

// TestQuarantineComesFirst: who is cut off is refused by rules of their own,
// ahead of every grant and in observe mode too, and a target that is cut off
// admits nobody in either mode. Without these a quarantine would wait for
// somebody to edit the policies.
func TestQuarantineComesFirst(t *testing.T) {
	v := view(t, "shop.yaml")
	cut := func(pattern string) *builder {
		p, err := authz.ParsePattern(pattern)
		if err != nil {
			t.Fatal(err)
		}
		quarantined := *v
		quarantined.Model = v.Model.WithQuarantines(v.State.TrustDomain, []authz.Quarantine{{Name: "incident-7", Identities: []authz.Pattern{p}}})
		return &builder{view: &quarantined, node: "n1", set: Set{}}
	}
	b := cut("spiffe://mesh.test/ns/*/sa/web")
	got := b.quarantines().GetPolicies()[PolicyQuarantine+"incident-7"].GetPrincipals()
	if len(got) != 1 || callerName(t, got[0]).GetExact() != "spiffe://mesh.test/ns/shop/sa/web" {
		t.Errorf("the rule names %v, want shop's web", got)
	}
	for _, key := range []string{"shop/web", "lab/probe"} { // enforce and observe
		w := v.State.Workload(key)
		if _, ok := b.perRoute(w, authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount})[quarantineFilter]; !ok {
			t.Errorf("the route of %s does not refuse who is cut off", key)
		}
	}
	w := v.State.Workload("lab/probe")
	target := authz.Target{Namespace: "lab", ServiceAccount: "probe"}
	b = cut("spiffe://mesh.test/ns/lab/sa/*")
	if rules := b.rbac(w, target).GetRules().GetPolicies(); len(rules) != 0 {
		t.Errorf("a target that is cut off admits by %v", rules)
	}
	for name, l := range map[string]string{"outbound": b.outbound(w).String(), "plain": b.plainIn(w).String()} {
		if !strings.Contains(l, clusterRefuse) || strings.Contains(l, clusterPlain) {
			t.Errorf("the %s listener of a workload that is cut off leads somewhere: %s", name, l)
		}
	}
}
