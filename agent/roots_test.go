package agent

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
)

// signer is a CA certificate with its key.
type signer struct {
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

// below makes a CA below another; nil: a root.
func below(t *testing.T, parent *signer) *signer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	// All have one name, as an authority's roots may.
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "ca"}, NotAfter: time.Now().Add(time.Hour), IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign}
	if parent == nil {
		parent = &signer{tmpl, key}
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent.cert, key.Public(), parent.key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &signer{cert, key}
}

// Defends rotations of the root against a node that says too early that it is
// ready: while a part of it is behind, it trusts only what that part trusts too,
// and uses what that part may still use.
func TestReportRoots(t *testing.T) {
	old, next := below(t, nil), below(t, nil)
	chain := func(root *signer) [][]byte { return [][]byte{[]byte("leaf"), below(t, root).cert.Raw} }
	oldChain, nextChain := chain(old), chain(next)
	f := func(all ...*signer) (out [][]byte) {
		for _, s := range all {
			print := ca.FingerprintOf(s.cert)
			out = append(out, print[:])
		}
		slices.SortFunc(out, func(a, b []byte) int { return slices.Compare(a, b) })
		return out
	}
	bundle := func(all ...*signer) (out []*x509.Certificate) {
		for _, s := range all {
			out = append(out, s.cert)
		}
		return out
	}
	behind := []string{"the proxy is behind"}
	var r roots
	for _, step := range []struct {
		name          string
		bundle        []*x509.Certificate
		chains        [][][]byte
		waits         []string
		trusted, used [][]byte
	}{
		{"at the start, before anything is known of the parts", bundle(old), [][][]byte{oldChain}, behind, nil, f(old)},
		{"in one piece", bundle(old), [][][]byte{oldChain}, nil, f(old), f(old)},
		{"the next root is known, and the proxy is behind", bundle(old, next), [][][]byte{oldChain}, behind, f(old), f(old)},
		{"the proxy knows it", bundle(old, next), [][][]byte{oldChain}, nil, f(old, next), f(old)},
		{"another root signs, one certificate is renewed", bundle(next, old), [][][]byte{oldChain, nextChain}, nil, f(old, next), f(old, next)},
		{"all are renewed, and the proxy is behind", bundle(next, old), [][][]byte{nextChain}, behind, f(old, next), f(old, next)},
		{"the proxy has them", bundle(next, old), [][][]byte{nextChain}, nil, f(old, next), f(next)},
		{"the old root is withdrawn, and the proxy is behind", bundle(next), [][][]byte{nextChain}, behind, f(next), f(next)},
		{"a chain that ends nowhere", bundle(next), [][][]byte{nextChain, oldChain, nil, {[]byte("x")}}, nil, f(next), f(next)},
	} {
		got := r.report(step.bundle, step.chains, step.waits)
		if !slices.EqualFunc(got.Trusted, step.trusted, slices.Equal) || !slices.EqualFunc(got.Used, step.used, slices.Equal) || (got.Waits == "") != (step.waits == nil) {
			t.Errorf("%s: trusted %x, used %x, waits %q; want %x and %x", step.name, got.Trusted, got.Used, got.Waits, step.trusted, step.used)
		}
	}
}
