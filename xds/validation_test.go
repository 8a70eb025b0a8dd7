package xds

import (
	"math/rand/v2"
	"regexp"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// TestIDPattern: the proxy takes exactly the names for a workload's identity that
// go-spiffe takes, in the trust domain. With a mere prefix, a name such as
// ".../sa/web/../db" would get in, and be another's for whoever reads it
// leniently, and ".../sa/web/x" would pass for one of ".../sa/*". Go's
// expressions are the proxy's.
func TestIDPattern(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	pattern := regexp.MustCompile("^(?:" + idPattern(td) + ")$")
	const seed = 20261124
	rng := rand.New(rand.NewPCG(seed, seed))
	alphabet := []string{"/", "//", ".", "..", "/./", "/../", "...", "a", "Z", "7", "-", "_", "%", "%2e", "\x00", "\n", "#", "?", ":", "@", ",", " ", "~", "é", "spiffe://", "mesh.test", "meshxtest"}
	accepted, refused := 0, 0
	check := func(s string) {
		id, err := spiffeid.FromString(s)
		path := strings.Split(id.Path(), "/")
		want := err == nil && id.MemberOf(td) && len(path) == 5 && path[1] == "ns" && path[3] == "sa"
		if got := pattern.MatchString(s); got != want {
			t.Errorf("%q: the proxy would say %v, go-spiffe says %v", s, got, want)
		}
		if want {
			accepted++
		} else {
			refused++
		}
	}
	for _, s := range []string{"", "spiffe://mesh.test", "spiffe://mesh.test/", "spiffe://meshxtest/a", "spiffe://mesh.test/a\n", "SPIFFE://mesh.test/a", "spiffe://mesh.test/a#", "spiffe://mesh.test/" + strings.Repeat("a", 2029)} {
		check(s)
	}
	for range 50_000 {
		s := []byte("spiffe://mesh.test/ns/shop/sa/web")
		for range 1 + rng.IntN(4) {
			at := rng.IntN(len(s) + 1)
			if rng.IntN(4) == 0 {
				s = slices.Delete(s, at, min(len(s), at+1+rng.IntN(4)))
				continue
			}
			s = slices.Insert(s, at, []byte(alphabet[rng.IntN(len(alphabet))])...)
		}
		check(string(s))
	}
	if accepted < 1000 || refused < 20_000 {
		t.Errorf("%d names were accepted and %d refused; this shows little", accepted, refused)
	}
}
