package caserver

import (
	"crypto/sha256"
	"crypto/x509"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/x509check"
)

// maxProofs is how many chains are remembered; more than that, and all are verified
// anew.
const maxProofs = 10_000

// proofs remembers chains that were verified, so that a node's signatures are not
// verified at each of its calls. A chain is known by all of its bytes, below the
// roots that it was verified with, while all of it is valid. The zero value knows
// none. It is safe for concurrent use.
type proofs struct {
	mu    sync.Mutex
	roots []*x509.Certificate         // guarded by mu; that all of these were verified with
	known map[[sha256.Size]byte]proof // guarded by mu; by the hash of the chain
}

// proof is what a chain proves.
type proof struct {
	id         spiffeid.ID
	root       *x509.Certificate
	from, till time.Time
}

// verify is x509check.VerifyRoot with the roots of a trust domain.
func (v *proofs) verify(certs []*x509.Certificate, td spiffeid.TrustDomain, roots []*x509.Certificate, now time.Time) (spiffeid.ID, *x509.Certificate, error) {
	hash := sha256.New()
	for _, c := range certs {
		hash.Write(c.Raw)
	}
	key := [sha256.Size]byte(hash.Sum(nil))
	v.mu.Lock()
	p, ok := v.known[key]
	ok = ok && slices.Equal(v.roots, roots)
	v.mu.Unlock()
	if ok && !now.Before(p.from) && !now.After(p.till) {
		return p.id, p.root, nil
	}
	id, root, err := x509check.VerifyRoot(certs, x509bundle.FromX509Authorities(td, roots), now)
	if err != nil {
		return id, root, err
	}
	p = proof{id: id, root: root, from: root.NotBefore, till: root.NotAfter}
	for _, c := range certs {
		if c.NotBefore.After(p.from) {
			p.from = c.NotBefore
		}
		if c.NotAfter.Before(p.till) {
			p.till = c.NotAfter
		}
	}
	v.mu.Lock()
	defer v.mu.Unlock()
	if v.known == nil || !slices.Equal(v.roots, roots) || len(v.known) >= maxProofs {
		v.roots, v.known = roots, map[[sha256.Size]byte]proof{}
	}
	v.known[key] = p
	return id, root, nil
}
