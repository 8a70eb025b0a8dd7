package manifest

import (
	"fmt"
	"time"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/mesh"
)

// revoked reads the certificates and tokens that nobody is to take any more.
func (b *builder) revoked(d *document, list []v1alpha1.Revocation) {
	if len(list) > mesh.MaxRevocations {
		d.fault(CodeValue, "spec.revoked", "has %d entries; at most %d are allowed, remove those that have expired", len(list), mesh.MaxRevocations)
	}
	first := map[string]int{}
	for i := range list {
		at := fmt.Sprintf("spec.revoked[%d]", i)
		r, field, err := mesh.ParseRevocation(&list[i])
		if err != nil {
			d.fault(CodeValue, at+"."+field, "%v", err)
			continue
		}
		if other, twice := first[r.Serial]; twice {
			d.fault(CodeDuplicate, at+".serial", "is that of spec.revoked[%d]; remove one of them", other)
			continue
		}
		if r.Since.After(time.Now()) {
			d.fault(CodeValue, at+".since", "is still to come; a revocation is in force from when it is written")
		}
		first[r.Serial] = i
		b.state.Revoked = append(b.state.Revoked, r)
	}
}
