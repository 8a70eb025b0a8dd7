package authz

import (
	"reflect"
	"slices"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var web = Target{Namespace: "shop", ServiceAccount: "web"}

func patterns(t testing.TB, texts ...string) []Pattern {
	var out []Pattern
	for _, text := range texts {
		out = append(out, pattern(t, text))
	}
	return out
}

// One row for each sentence of the meaning of policies.
func TestDecide(t *testing.T) {
	client := id("spiffe://td/ns/shop/sa/client")
	allowClient := Policy{Namespace: "shop", Name: "allow-client", TargetServiceAccount: "web",
		Ports: []uint16{80, 443}, From: patterns(t, "spiffe://td/ns/shop/sa/client")}
	whole := Policy{Namespace: "shop", Name: "whole", From: patterns(t, "spiffe://td/ns/ops/sa/*")}
	empty := Policy{Namespace: "shop", Name: "empty"}
	all := []Policy{whole, allowClient, empty}

	for _, test := range []struct {
		sentence string
		policies []Policy
		request  Request
		want     Decision
	}{
		{"nothing is allowed that no policy allows", nil, Request{client, web, 80},
			Decision{Reason: "default deny: no policy protects shop/web"}},
		{"a policy admits the caller that it names", all, Request{client, web, 80},
			Decision{Verdict: Allow, Policy: "shop/allow-client", Reason: "allowed by shop/allow-client"}},
		{"every listed port is admitted", all, Request{client, web, 443},
			Decision{Verdict: Allow, Policy: "shop/allow-client", Reason: "allowed by shop/allow-client"}},
		{"other ports are not", []Policy{allowClient}, Request{client, web, 8080},
			Decision{Reason: "default deny: 1 policy protects shop/web, it does not admit this caller",
				Near: []NearMiss{{"shop/allow-client", "port 8080, policy admits 80, 443"}}}},
		{"no ports means every port", all, Request{id("spiffe://td/ns/ops/sa/x"), web, 9},
			Decision{Verdict: Allow, Policy: "shop/whole", Reason: "allowed by shop/whole"}},
		{"port 0 is no port", []Policy{whole}, Request{id("spiffe://td/ns/ops/sa/x"), web, 0},
			Decision{Reason: "default deny: 1 policy protects shop/web, it does not admit this caller",
				Near: []NearMiss{{"shop/whole", "port 0 is no port"}}}},
		{"other callers are refused, and each policy says why", all, Request{id("spiffe://td/ns/shop/sa/client2"), web, 22},
			Decision{Reason: "default deny: 3 policies protect shop/web, none admits this caller", Near: []NearMiss{
				{"shop/allow-client", "caller is spiffe://td/ns/shop/sa/client2, policy admits spiffe://td/ns/shop/sa/client; port 22, policy admits 80, 443"},
				{"shop/empty", "caller is spiffe://td/ns/shop/sa/client2, policy admits nobody"},
				{"shop/whole", "caller is spiffe://td/ns/shop/sa/client2, policy admits spiffe://td/ns/ops/sa/*"},
			}}},
		{"a caller without identity is refused", []Policy{whole}, Request{spiffeid.ID{}, web, 80},
			Decision{Reason: "default deny: 1 policy protects shop/web, it does not admit this caller",
				Near: []NearMiss{{"shop/whole", "caller has no identity, policy admits spiffe://td/ns/ops/sa/*"}}}},
		{"a caller of another trust domain is another caller", []Policy{allowClient}, Request{id("spiffe://td2/ns/shop/sa/client"), web, 80},
			Decision{Reason: "default deny: 1 policy protects shop/web, it does not admit this caller",
				Near: []NearMiss{{"shop/allow-client", "caller is spiffe://td2/ns/shop/sa/client, policy admits spiffe://td/ns/shop/sa/client"}}}},
		{"a policy protects its own namespace only", all, Request{client, Target{"shop2", "web"}, 80},
			Decision{Reason: "default deny: no policy protects shop2/web"}},
		{"a policy with a target protects that service account only", []Policy{allowClient}, Request{client, Target{"shop", "web2"}, 80},
			Decision{Reason: "default deny: no policy protects shop/web2"}},
		{"a policy without a target protects the whole namespace", []Policy{whole}, Request{id("spiffe://td/ns/ops/sa/x"), Target{"shop", "db"}, 80},
			Decision{Verdict: Allow, Policy: "shop/whole", Reason: "allowed by shop/whole"}},
		{"a target without a service account is nobody", []Policy{whole}, Request{id("spiffe://td/ns/ops/sa/x"), Target{"shop", ""}, 80},
			Decision{Reason: "default deny: no policy protects shop/"}},
		{"of several policies that admit, the first by name is named",
			[]Policy{{Namespace: "shop", Name: "z", From: patterns(t, "spiffe://td/ns/shop/sa/*")}, {Namespace: "shop", Name: "b", From: patterns(t, "spiffe://td/*/*/*/*")}},
			Request{client, web, 80}, Decision{Verdict: Allow, Policy: "shop/b", Reason: "allowed by shop/b"}},
		{"a name that is given twice counts once, the first time",
			[]Policy{empty, {Namespace: "shop", Name: "empty", From: patterns(t, "spiffe://td/ns/shop/sa/*")}}, Request{client, web, 80},
			Decision{Reason: "default deny: 1 policy protects shop/web, it does not admit this caller",
				Near: []NearMiss{{"shop/empty", "caller is spiffe://td/ns/shop/sa/client, policy admits nobody"}}}},
	} {
		// Order has no meaning: every rotation gives the same answer.
		distinct := NewModel(test.policies).Policies()
		for range max(len(distinct), 1) {
			got := NewModel(distinct).Decide(test.request)
			if !reflect.DeepEqual(got, test.want) {
				t.Errorf("%s:\n got %+v\nwant %+v", test.sentence, got, test.want)
			}
			if len(distinct) > 1 {
				distinct = append(distinct[1:], distinct[0])
			}
		}
	}
}

// Whoever lost the model must not come to allow anything.
func TestNilAndZeroModelDeny(t *testing.T) {
	for _, m := range []*Model{nil, {}} {
		d := m.Decide(Request{id("spiffe://td/x"), web, 80})
		if d.Verdict != Deny || d.Reason != "default deny: no policy protects shop/web" {
			t.Errorf("decision %+v", d)
		}
		if m.Grants(web) != nil || len(m.Policies()) != 0 {
			t.Error("an empty model grants something")
		}
	}
	var v Verdict
	if v != Deny || v.String() != "denied" || Allow.String() != "allowed" || Verdict(7).String() != "denied" {
		t.Error("the zero verdict must refuse")
	}
}

// A model is shared between goroutines: what goes in or comes out must not be
// a way to change it.
func TestModelCannotBeChangedFromOutside(t *testing.T) {
	in := []Policy{{Namespace: "shop", Name: "p", Ports: []uint16{443, 80, 80}, From: patterns(t, "spiffe://td/b", "spiffe://td/a", "spiffe://td/a")}}
	m := NewModel(in)
	want := Grant{Policy: "shop/p", Ports: []uint16{80, 443}, From: patterns(t, "spiffe://td/a", "spiffe://td/b")}
	in[0].Ports[0], in[0].From[0] = 1, Pattern{}
	out := m.Policies()
	out[0].Ports[0], out[0].From[0] = 2, Pattern{}
	g := m.Grants(web)
	g[0].Ports[0], g[0].From[0] = 3, Pattern{}
	if got := m.Grants(web); !reflect.DeepEqual(got, []Grant{want}) {
		t.Errorf("got %+v", got)
	}
}

func TestGrantsAgreeWithDecide(t *testing.T) {
	m := NewModel([]Policy{
		{Namespace: "shop", Name: "b", From: patterns(t, "spiffe://td/ns/a/sa/*"), Ports: []uint16{80}},
		{Namespace: "shop", Name: "a", TargetServiceAccount: "web", From: patterns(t, "spiffe://td/ns/*/sa/x")},
		{Namespace: "shop-2", Name: "a", From: patterns(t, "spiffe://td/ns/a/sa/x")},
		{Namespace: "s", Name: "hop/web", From: patterns(t, "spiffe://td/ns/a/sa/x")},
	})
	for _, target := range []Target{web, {"shop", "db"}, {"shop-2", "web"}, {"other", "web"}} {
		for _, from := range []string{"spiffe://td/ns/a/sa/x", "spiffe://td/ns/a/sa/y", "spiffe://td/ns/b/sa/x", "spiffe://td/ns/b/sa/y"} {
			for _, port := range []uint16{80, 81} {
				var names []string
				for _, g := range m.Grants(target) {
					if slices.ContainsFunc(g.From, func(p Pattern) bool { return p.Matches(id(from)) }) && (len(g.Ports) == 0 || slices.Contains(g.Ports, port)) {
						names = append(names, g.Policy)
					}
				}
				if !slices.IsSorted(names) {
					t.Errorf("grants are not sorted: %v", names)
				}
				d := m.Decide(Request{id(from), target, port})
				if (d.Verdict == Allow) != (len(names) > 0) || len(names) > 0 && d.Policy != names[0] {
					t.Errorf("%v from %s port %d: %+v, grants say %v", target, from, port, d, names)
				}
			}
		}
	}
}

// A near miss is for people: a policy that names hundreds must not fill pages.
func TestNearMissIsBounded(t *testing.T) {
	var p Policy
	p.Namespace, p.Name = "shop", "p"
	p.From = patterns(t, "spiffe://td/a")
	for i := range 12 {
		p.Ports = append(p.Ports, uint16(100+i))
	}
	d := NewModel([]Policy{p}).Decide(Request{id("spiffe://td/a"), web, 80})
	want := "port 80, policy admits 100, 101, 102, 103, 104, 105, 106, 107 and 4 more"
	if len(d.Near) != 1 || d.Near[0].Why != want {
		t.Errorf("got %+v", d.Near)
	}
}
