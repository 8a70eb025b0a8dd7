package agent

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"slices"
	"strings"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

// roots remembers which roots everything on the node trusted, and which its
// certificates chained to, when the node was last in one piece: while some part
// is behind, it has what was then. Only the goroutine that reports uses it.
type roots struct {
	trusted, used []ca.Fingerprint
}

// report says which roots the node trusts and uses. What is behind trusts the
// roots of before, so only those of both times are trusted by everything; and it
// uses what was used before too.
func (r *roots) report(bundle []*x509.Certificate, chains [][][]byte, waits []string) *nodev1.Roots {
	trusted, used := fingerprints(bundle), usedBy(chains, bundle)
	if len(waits) == 0 {
		r.trusted, r.used = trusted, used
	} else {
		trusted = slices.DeleteFunc(trusted, func(f ca.Fingerprint) bool { return !slices.Contains(r.trusted, f) })
		used = append(used, r.used...)
	}
	return &nodev1.Roots{Trusted: sorted(trusted), Used: sorted(used), Waits: bounded(strings.Join(waits, "; "))}
}

// reportRoots gathers what the node trusts and uses by a state.
func (a *agent) reportRoots(s *nodeState) *nodev1.Roots {
	var waits []string
	bundle, svids := a.svids.Bundle(), a.svids.All()
	if !sameCerts(bundle, s.bundle) {
		waits = append(waits, "the node's certificates are kept by older roots")
	}
	held, taken := a.relay.Held()
	if !taken || !sameCerts(held.Bundle, bundle) || !slices.Equal(held.SVIDs, svids) {
		waits = append(waits, "the proxy has not taken the newest certificates and roots yet")
	}
	if n := a.workloads.Behind(); n > 0 {
		waits = append(waits, fmt.Sprintf("%d streams of the Workload API have not been sent the newest certificates and roots yet", n))
	}
	var chains [][][]byte
	for _, one := range slices.Concat(held.SVIDs, svids) {
		chains = append(chains, one.Chain)
	}
	if cert, err := a.node.certificate(); err == nil {
		chains = append(chains, cert.Certificate)
	}
	return a.roots.report(s.bundle, chains, waits)
}

func sameCerts(a, b []*x509.Certificate) bool {
	return slices.EqualFunc(a, b, (*x509.Certificate).Equal)
}

func fingerprints(certs []*x509.Certificate) []ca.Fingerprint {
	out := make([]ca.Fingerprint, len(certs))
	for i, c := range certs {
		out[i] = ca.FingerprintOf(c)
	}
	return out
}

// usedBy lists the roots of the bundle that chains end at. A chain that ends at
// none of them is of no use to anybody any more.
func usedBy(chains [][][]byte, bundle []*x509.Certificate) (used []ca.Fingerprint) {
	seen := map[string]bool{} // issuers, of which there are few
	for _, chain := range chains {
		if len(chain) == 0 || seen[string(chain[len(chain)-1])] {
			continue
		}
		if len(chain) > 1 {
			seen[string(chain[len(chain)-1])] = true
		}
		if root, ok := rootOf(chain, bundle); ok {
			used = append(used, ca.FingerprintOf(root))
		}
	}
	return used
}

// rootOf returns which root a chain of DER, without the root, ends at.
func rootOf(chain [][]byte, bundle []*x509.Certificate) (*x509.Certificate, bool) {
	if len(chain) == 0 {
		return nil, false
	}
	last, err := x509.ParseCertificate(chain[len(chain)-1])
	if err != nil {
		return nil, false
	}
	for _, root := range bundle {
		if last.CheckSignatureFrom(root) == nil {
			return root, true
		}
	}
	return nil, false
}

// sorted is the set of fingerprints as messages have it.
func sorted(set []ca.Fingerprint) [][]byte {
	out := make([][]byte, len(set))
	for i, f := range set {
		out[i] = f[:]
	}
	slices.SortFunc(out, bytes.Compare)
	return slices.CompactFunc(out, bytes.Equal)
}
