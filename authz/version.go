package authz

import (
	"crypto/sha256"
	"encoding/hex"
	"fmt"
)

// Version names the policy state of one target: a hash over the policies that
// protect it. It changes exactly when one of them does, so that an edit
// elsewhere in the mesh leaves it alone.
func (m *Model) Version(t Target) string {
	h := sha256.New()
	fmt.Fprintf(h, "%q\n", t.String())
	for _, g := range m.Grants(t) {
		fmt.Fprintf(h, "%q %v %q\n", g.Policy, g.Ports, g.From)
	}
	return hex.EncodeToString(h.Sum(nil)[:8])
}
