package caserver

import (
	"maps"
	"slices"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/bundle"
)

// foreignMessages encodes the bundles of other trust domains, in the order of
// their names. One of the mesh's own name would speak for the mesh, and is left
// out.
func foreignMessages(own string, bundles []*bundle.Bundle) ([]*nodev1.ForeignBundle, error) {
	var out []*nodev1.ForeignBundle
	for _, b := range bundles {
		if b.TrustDomain.Name() == own {
			continue
		}
		var keys []ca.JWTKey
		for _, id := range slices.Sorted(maps.Keys(b.JWTKeys)) {
			keys = append(keys, ca.JWTKey{ID: id, Key: b.JWTKeys[id]})
		}
		encoded, err := jwtKeyMessages(keys)
		if err != nil {
			return nil, err
		}
		out = append(out, &nodev1.ForeignBundle{TrustDomain: b.TrustDomain.Name(), Roots: rawCerts(b.Roots), JwtKeys: encoded})
	}
	slices.SortFunc(out, func(a, b *nodev1.ForeignBundle) int {
		if a.GetTrustDomain() < b.GetTrustDomain() {
			return -1
		}
		return 1
	})
	return out, nil
}
