package agent

import (
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/svid"
)

// A certificate that is replaced while a tunnel's life is left of it calls for
// nothing; one that is replaced later, or after it has expired and was withdrawn,
// calls for new tunnels, once.
func TestLate(t *testing.T) {
	const life = 24 * time.Minute
	begin := time.Unix(1_800_000_000, 0)
	id := spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/web")
	cert := func(serial string, until time.Duration) []*svid.SVID {
		return []*svid.SVID{{ID: id, Serial: serial, NotAfter: begin.Add(until)}}
	}
	type step struct {
		at   time.Duration
		all  []*svid.SVID
		late bool
	}
	for name, steps := range map[string][]step{
		"in time":         {{0, cert("1", time.Hour), false}, {33 * time.Minute, cert("2", 93*time.Minute), false}, {34 * time.Minute, cert("2", 93*time.Minute), false}},
		"late":            {{0, cert("1", time.Hour), false}, {37 * time.Minute, cert("2", 97*time.Minute), true}, {37 * time.Minute, cert("2", 97*time.Minute), false}},
		"after it":        {{0, cert("1", time.Hour), false}, {61 * time.Minute, nil, false}, {62 * time.Minute, cert("2", 2*time.Hour), true}},
		"long after it":   {{0, cert("1", time.Hour), false}, {85 * time.Minute, nil, false}, {86 * time.Minute, cert("2", 3*time.Hour), false}},
		"gone meanwhile":  {{0, cert("1", time.Hour), false}, {time.Minute, nil, false}, {2 * time.Minute, cert("2", time.Hour), false}},
		"the first of it": {{0, nil, false}, {0, cert("1", time.Minute), false}},
	} {
		n := newest{}
		for i, s := range steps {
			if got := n.late(s.all, begin.Add(s.at), life); !got.IsZero() != s.late {
				t.Errorf("%s, %d: %q, want late to be %v", name, i, got, s.late)
			}
		}
	}
}
