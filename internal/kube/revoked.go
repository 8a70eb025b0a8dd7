package kube

import (
	"fmt"
	"slices"
	"time"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

// revocations are what the MeshConfig says is revoked. One goroutine uses it.
type revocations struct {
	list    []mesh.Revocation // replaced whole
	seen    map[string]time.Time
	refused int  // of list, when it was last looked
	edited  bool // since it was last looked
}

// read takes up the list of a MeshConfig, and returns the faults in it. Whatever
// else is wrong with the MeshConfig, what can be read is in force. One of no trust
// domain is none at all, and leaves the list as it was.
func (r *revocations) read(spec *v1alpha1.MeshConfigSpec, now time.Time) (faults []string) {
	if spec.TrustDomain == "" {
		return nil
	}
	var list []mesh.Revocation
	seen := map[string]time.Time{}
	for i := range spec.Revoked {
		one, field, err := mesh.ParseRevocation(&spec.Revoked[i])
		if err != nil {
			faults = append(faults, fmt.Sprintf("spec.revoked[%d].%s: %v", i, field, err))
		}
		if _, twice := seen[one.Serial]; one.Serial == "" || twice {
			continue
		}
		at, known := r.seen[one.Serial]
		if !known {
			at = now
		}
		seen[one.Serial] = at
		if one.Since.After(at) { // somebody's clock is ahead
			one.Since = at
		}
		list = append(list, one)
	}
	if !slices.Equal(list, r.list) {
		r.edited = true
	}
	r.list, r.seen = list, seen
	return faults
}

// named says what is revoked and why, in the same words at every replica: since when
// is what each has seen itself.
func (r *revocations) named() (out []string) {
	for _, one := range r.list {
		out = append(out, one.Serial+" "+one.Reason)
	}
	return out
}

// look counts what is refused by now, and reports whether anything has changed.
func (r *revocations) look(now time.Time) bool {
	refused := 0
	for _, one := range r.list {
		if (&ca.Revoked{At: one.Since}).Refused(now) {
			refused++
		}
	}
	changed := r.edited || refused != r.refused
	r.refused, r.edited = refused, false
	return changed
}

// pending reports whether the holders of some have time to renew left.
func (r *revocations) pending() bool { return r.refused < len(r.list) }
