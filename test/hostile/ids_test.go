package hostile

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/xds"
)

// TestStrings: every parser of the project reads a string as the same SPIFFE ID
// that go-spiffe reads, letter for letter, or as none. What Envoy makes of such
// strings in a certificate is in TestCertificates, families spelling and stray.
//
// A parser that would clean a string up, or cut it at a NUL, would let one name
// pass a comparison that is meant for another.
func TestStrings(t *testing.T) {
	var all []string
	for _, id := range aims {
		for _, s := range spellingsOf(id) {
			all = append(all, s.uri)
		}
	}
	all = append(all, randomIDs(20_000)...)
	good := 0
	for _, s := range all {
		want, err := spiffeid.FromString(s)
		valid := err == nil
		if valid && want.String() != s {
			t.Errorf("%.200q: go-spiffe reads %q", s, want)
		}
		// As the name of a secret, which the proxy asks for.
		if id, ok := xds.SecretID(s); ok != valid || id != want {
			t.Errorf("%.200q: as a secret %v, %q; go-spiffe: %v", s, ok, id, err)
		}
		// In a policy: a name without a wildcard is one identity of a leaf.
		p, perr := authz.ParsePattern(s)
		switch leaf := valid && want.Path() != "" && len(s) <= 2048; {
		case leaf:
			if exact, ok := p.Exact(); perr != nil || !ok || exact != want || !p.Matches(want) || p.String() != s {
				t.Errorf("%.200q: in a policy %q, %v", s, exact, perr)
			}
			good++
		case perr == nil:
			if _, exact := p.Exact(); exact || !strings.Contains(s, "*") || valid && p.Matches(want) {
				t.Errorf("%.200q: a policy takes it for %q; go-spiffe: %v", s, p, err)
			}
		}
		// Of a node: only a name of three segments below the trust domain.
		if name, ok := ca.NodeName(want); ok {
			if id, err := ca.NodeID(want.TrustDomain(), name); err != nil || id != want {
				t.Errorf("%.200q: node %q, which is %q, %v", s, name, id, err)
			}
		}
	}
	t.Logf("%d strings, %d of them names of leaves", len(all), good)
	if good < 500 || len(all)-good < 10_000 {
		t.Error("this shows little")
	}

	// And a policy that names somebody admits no other string's identity.
	model := authz.NewModel([]authz.Policy{{Namespace: "shop", Name: "p", From: []authz.Pattern{must(authz.ParsePattern(idWeb))}}})
	for _, s := range all {
		id, err := spiffeid.FromString(s)
		if err != nil {
			continue
		}
		d := model.Decide(authz.Request{From: id, Target: authz.Target{Namespace: "shop", ServiceAccount: "server"}, Port: 80})
		if (d.Verdict == authz.Allow) != (s == idWeb) {
			t.Errorf("%.200q: %s", s, d.Verdict)
		}
	}
}
