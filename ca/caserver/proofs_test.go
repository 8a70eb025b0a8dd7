package caserver

import (
	"bytes"
	"crypto/tls"
	"crypto/x509"
	"testing"
	"time"
)

func parsed(t *testing.T, cert *tls.Certificate) []*x509.Certificate {
	t.Helper()
	var out []*x509.Certificate
	for _, der := range cert.Certificate {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

// Defends: that a chain was verified once proves nothing of another chain, with other
// roots, or when a part of it is not valid.
func TestProofs(t *testing.T) {
	w := newWorld(t, nil)
	other := foreignAuthority(t)
	roots, now := w.authority.Bundle(), w.clock.now()
	chain := parsed(t, certFor(t, w.authority, nodeID("one"), time.Hour))
	theirs := parsed(t, certFor(t, other, nodeID("one"), time.Hour))
	var v proofs
	good := func(why string) {
		t.Helper()
		id, root, err := v.verify(chain, testDomain, roots, now)
		if err != nil || id != nodeID("one") || !root.Equal(roots[0]) {
			t.Fatalf("%s: %s, %v", why, id, err)
		}
	}
	good("at first")
	if len(v.known) != 1 {
		t.Fatalf("%d chains are remembered", len(v.known))
	}
	good("again")

	signed := bytes.Clone(chain[0].Raw)
	signed[len(signed)-1] ^= 1
	forged, err := x509.ParseCertificate(signed)
	if err != nil {
		t.Fatal(err)
	}
	ends := chain[0].NotAfter
	for why, tc := range map[string]struct {
		chain []*x509.Certificate
		roots []*x509.Certificate
		now   time.Time
	}{
		"the same leaf with another signature": {[]*x509.Certificate{forged, chain[1]}, roots, now},
		"below another intermediate":           {[]*x509.Certificate{chain[0], theirs[1]}, roots, now},
		"the leaf alone":                       {chain[:1], roots, now},
		"none":                                 {nil, roots, now},
		"another authority's":                  {theirs, roots, now},
		"other roots":                          {chain, other.Bundle(), now},
		"no roots":                             {chain, nil, now},
		"expired":                              {chain, roots, ends.Add(time.Second)},
		"not valid yet":                        {chain, roots, chain[0].NotBefore.Add(-time.Second)},
	} {
		for range 2 {
			if id, root, err := v.verify(tc.chain, testDomain, tc.roots, tc.now); err == nil {
				t.Errorf("%s: proves to be %s below %v", why, id, root.Subject)
			}
		}
		good("after " + why)
	}
	if _, _, err := v.verify(chain, testDomain, append(other.Bundle(), roots...), now); err != nil {
		t.Errorf("with a root more: %v", err)
	}
	if len(v.known) != 1 {
		t.Error("proofs with other roots are kept")
	}
	for i := range maxProofs {
		v.known[[32]byte{byte(i), byte(i >> 8)}] = proof{}
	}
	if good("among many"); len(v.known) > maxProofs {
		t.Errorf("%d chains are remembered", len(v.known))
	}
}
