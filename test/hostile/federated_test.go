package hostile

import (
	"encoding/pem"
	"fmt"
	"maps"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/xds"
)

// TestFederated shows the corpus to a proxy of a mesh that is federated with
// another trust domain, whose root is the one that nobody trusts otherwise: callers
// are judged by Envoy's SPIFFE validator then. What it takes and this project's
// programs do not, or the reverse, is in docs/hostile.md, and why.
//
// It defends that the other trust domain's root proves nothing of this one's names,
// and that nobody is let in as another than the certificate says.
func TestFederated(t *testing.T) {
	c := makeCorpus(t, hour())
	n := (&node{pki: c.pki, foreign: []xds.Trust{{
		Domain: spiffeid.RequireTrustDomainFromString("partner.test"),
		PEM:    pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c.foreign.der}),
	}}}).start(t)
	tunnels := n.dialAll(t, c.cases, openAddr, portNamed)
	lines := n.records(t, tunnels)
	var found []disagreement
	var admitted []testCase
	for i := range c.cases {
		tc := &c.cases[i]
		ours, proxy := project(tc, c.pki), proxyVerdict(t, tc, tunnels[i], lines[tunnels[i].from])
		want := refuses + " " + refuses
		if tc.good {
			want = accepts + " " + accepts
		}
		if got := three(tc, ours, proxy); got != want {
			found = append(found, disagreement{tc.String(), got, details(ours, proxy)})
		}
		if proxy.id != "" {
			if id, err := spiffeid.FromString(proxy.id); err != nil || id.TrustDomain().Name() != trustDomain || id.Path() == "" || tc.word(proxy) != accepts {
				t.Errorf("%s: the proxy took it for %q, which is not its one identity in the mesh: %v", tc, proxy.id, err)
			}
			tc := *tc
			tc.id = proxy.id
			admitted = append(admitted, tc)
		}
	}
	hold(t, readRows(t, "Callers of a federated mesh", 2), found)
	if t.Failed() {
		t.Log(grouped(found))
	}
	t.Logf("%d certificates; on %d not both say the same, or what is wanted", len(c.cases), len(found))
	n.testPolicies(t, admitted)
}

// grouped lists disagreements by what was said, for whoever has to explain them.
func grouped(found []disagreement) string {
	groups := map[string][]string{}
	for _, d := range found {
		groups[d.verdicts] = append(groups[d.verdicts], d.name)
	}
	var b strings.Builder
	for _, verdicts := range slices.Sorted(maps.Keys(groups)) {
		fmt.Fprintf(&b, "%s: %d\n\t%s\n", verdicts, len(groups[verdicts]), strings.Join(groups[verdicts], "\n\t"))
	}
	return b.String()
}
