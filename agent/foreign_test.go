package agent

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
)

// TestParseForeign: a bundle that would speak for the mesh itself, or a second one
// for a trust domain, is not taken, and neither is the state that it came with.
func TestParseForeign(t *testing.T) {
	own := spiffeid.RequireTrustDomainFromString("mesh.test")
	one := func(td string) *nodev1.ForeignBundle { return &nodev1.ForeignBundle{TrustDomain: td} }
	if got, err := parseForeign(own, []*nodev1.ForeignBundle{one("b.test"), one("a.test")}); err != nil || len(got) != 2 || got[0].TrustDomain.Name() != "a.test" {
		t.Errorf("%v %v", got, err)
	}
	for what, bad := range map[string][]*nodev1.ForeignBundle{
		"the mesh itself": {one("mesh.test")},
		"one twice":       {one("a.test"), one("a.test")},
		"no name":         {one("")},
		"a broken root":   {{TrustDomain: "a.test", Roots: [][]byte{{1}}}},
		"a broken key":    {{TrustDomain: "a.test", JwtKeys: []*nodev1.JWTKey{{KeyId: "k", PublicKey: []byte{1}}}}},
	} {
		if got, err := parseForeign(own, bad); err == nil {
			t.Errorf("%s: %v", what, got)
		}
	}
}
