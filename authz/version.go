package authz

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// Version names the policy state of one target: a hash over the policies that
// protect it and over the identities that are cut off from everything. It
// changes exactly when one of them does, so that an edit elsewhere in the mesh
// leaves it alone; so does an edit of a quarantine's reason or nodes.
func (m *Model) Version(t Target) string {
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", t.String())
	for _, p := range m.protecting(t) {
		fmt.Fprintf(h, "%q %v %q\n", p.Key(), p.Ports, p.From)
	}
	if m != nil {
		for _, q := range m.quarantines {
			if len(q.Identities) > 0 {
				fmt.Fprintf(h, "cut off %q %q\n", q.Name, q.Identities)
			}
		}
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}
