package ca

import (
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"
)

// check finds out which root an answer's chain ends at, and whether it will do.
func (e *Enrolment) check(answer *UpstreamAnswer, key crypto.Signer, now time.Time) (*pair, *x509.Certificate, error) {
	if len(answer.Chain) == 0 {
		return nil, nil, errors.New("the answer has no certificate")
	}
	if len(answer.Chain)+len(answer.Roots) > 4*maxAbove {
		return nil, nil, fmt.Errorf("the answer has %d certificates", len(answer.Chain)+len(answer.Roots))
	}
	var candidates []*x509.Certificate
	between := x509.NewCertPool()
	for _, c := range slices.Concat(answer.Chain[1:], answer.Roots) {
		if c.CheckSignatureFrom(c) == nil {
			candidates = append(candidates, c)
		} else {
			between.AddCert(c)
		}
	}
	if e.cfg.Roots != nil {
		candidates = e.cfg.Roots
	}
	err := errors.New("it does not say which root its chain ends at; have ca.crt of the issuer be the self-signed root")
	for _, root := range candidates {
		pool := x509.NewCertPool()
		pool.AddCert(root)
		chains, bad := answer.Chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}})
		if bad != nil {
			err = fmt.Errorf("its certificate does not verify under its root %.256q: %w", root.Subject, bad)
			continue
		}
		if len(chains[0]) < 2 {
			return nil, nil, errors.New("it issued a root, not an intermediate below one; use an issuer that has a CA")
		}
		if err := checkRoot(e.cfg.TrustDomain, root, now); err != nil {
			return nil, nil, fmt.Errorf("its root %.256q: %w", root.Subject, err)
		}
		p := &pair{cert: answer.Chain[0], key: key, above: chains[0][1 : len(chains[0])-1]}
		if err := checkBelow(e.cfg.TrustDomain, root, p, now); err != nil {
			return nil, nil, err
		}
		if end := p.ends(root); end.Sub(now) < leastValidity {
			return nil, nil, fmt.Errorf("what it issued, or what stands above, ends at %s already", stamp(end))
		}
		return p, root, nil
	}
	return nil, nil, err
}

// place puts an intermediate where it belongs. What signs is replaced by one below
// the same root only; another root is published first, unless nothing that is valid
// is below the present one any more.
func place(s rootSet, root *x509.Certificate, p *pair, now time.Time) (rootSet, error) {
	signs := func(c *pair) bool { return c != nil && c.cert.Equal(root) }
	further := func(c *x509.Certificate) bool { return c.Equal(root) }
	switch {
	case slices.Contains(s.distrusted, FingerprintOf(root)):
		return s, fmt.Errorf("it still signs below the root %s, which is distrusted; replace the issuer's certificate and key", FingerprintOf(root))
	case s.signs == nil || signs(s.signs):
		s.signs, s.below = &pair{cert: root}, p
		s.next, s.nextBelow = nil, nil // it has signed nothing, and would not be renewed
	case s.below != nil && !now.Before(s.below.ends(s.signs.cert)):
		s.further = append([]*x509.Certificate{s.signs.cert}, slices.DeleteFunc(slices.Clone(s.further), further)...)
		s.signs, s.below, s.next, s.nextBelow = &pair{cert: root}, p, nil, nil
	case len(s.further) > 0 && !signs(s.next) && !slices.ContainsFunc(s.further, further):
		return s, fmt.Errorf("its root %s is another once more, while one is still being replaced", FingerprintOf(root))
	default:
		s.further = slices.DeleteFunc(slices.Clone(s.further), further)
		s.next, s.nextBelow = &pair{cert: root}, p
	}
	return s, nil
}
