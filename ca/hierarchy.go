package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/hex"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// backdate is how far NotBefore lies before now, for peers whose clocks are
// a little behind.
const backdate = 10 * time.Second

// newSerial returns a positive serial number with 128 random bits.
func newSerial() (*big.Int, error) {
	var b [16]byte
	for {
		if _, err := rand.Read(b[:]); err != nil {
			return nil, fmt.Errorf("read random serial number: %w", err)
		}
		if n := new(big.Int).SetBytes(b[:]); n.Sign() > 0 {
			return n, nil
		}
	}
}

// formatSerial writes a serial number as Envoy and openssl do but in lower
// case: two digits a byte, so that a small first byte keeps its zero.
func formatSerial(n *big.Int) string { return hex.EncodeToString(n.Bytes()) }

// caTemplate is what the root and the intermediate have in common.
func caTemplate(td spiffeid.TrustDomain, cn string, now, notAfter time.Time) (*x509.Certificate, error) {
	serial, err := newSerial()
	if err != nil {
		return nil, err
	}
	return &x509.Certificate{
		SerialNumber: serial,
		// The number keeps two roots apart where issuers are found by name.
		Subject:               pkix.Name{CommonName: cn, SerialNumber: fmt.Sprintf("%016x", new(big.Int).Rsh(serial, 64).Uint64())},
		NotBefore:             now.Add(-backdate),
		NotAfter:              notAfter,
		URIs:                  []*url.URL{td.ID().URL()},
		BasicConstraintsValid: true,
		IsCA:                  true,
		KeyUsage:              x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}, nil
}

// rootCN is the common name of the roots that are made here.
const rootCN = "signet root"

// newRoot makes a self-signed root.
func newRoot(td spiffeid.TrustDomain, now time.Time, ttl time.Duration) (*pair, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	return selfSigned(td, now, ttl, key)
}

// selfSigned makes a root of a key.
func selfSigned(td spiffeid.TrustDomain, now time.Time, ttl time.Duration, key crypto.Signer) (*pair, error) {
	tmpl, err := caTemplate(td, rootCN, now, now.Add(ttl))
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		return nil, fmt.Errorf("sign the root: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	return &pair{cert: cert, key: key}, nil
}

// newIntermediate makes an intermediate under root that never outlives it.
func newIntermediate(td spiffeid.TrustDomain, root *pair, now time.Time, ttl time.Duration) (*pair, error) {
	notAfter := now.Add(ttl)
	if notAfter.After(root.cert.NotAfter) {
		notAfter = root.cert.NotAfter
	}
	tmpl, err := caTemplate(td, "signet intermediate", now, notAfter)
	if err != nil {
		return nil, err
	}
	tmpl.MaxPathLenZero = true
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, root.cert, key.Public(), root.key)
	if err != nil {
		return nil, fmt.Errorf("sign the intermediate: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, err
	}
	p := &pair{cert: cert, key: key}
	return p, checkIntermediate(td, p, root, now)
}

// checkRoot refuses a root that cannot be the root of the trust domain. A
// root without a SPIFFE ID is accepted: an operator's own may have none.
func checkRoot(td spiffeid.TrustDomain, root *x509.Certificate, now time.Time) error {
	switch {
	case !root.IsCA || !root.BasicConstraintsValid:
		return errors.New("is not a CA certificate (basic constraints without cA); use one that is")
	case root.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("its key usage has no keyCertSign; use a root that may sign certificates")
	case root.MaxPathLen == 0 && root.MaxPathLenZero:
		return errors.New("its path length is 0, but an intermediate has to stand below it; use a root with path length 1 or more")
	case now.Before(root.NotBefore):
		return fmt.Errorf("is not valid before %s and it is %s; check the clock", stamp(root.NotBefore), stamp(now))
	case !now.Before(root.NotAfter):
		return fmt.Errorf("expired at %s; replace root.crt and root.key and give every node the new bundle", stamp(root.NotAfter))
	}
	if err := root.CheckSignatureFrom(root); err != nil {
		return fmt.Errorf("is not self-signed: %w; use a root", err)
	}
	return checkTrustDomain(td, root, false)
}

func checkTrustDomain(td spiffeid.TrustDomain, cert *x509.Certificate, required bool) error {
	if len(cert.URIs) == 0 && !required {
		return nil
	}
	if len(cert.URIs) != 1 {
		return fmt.Errorf("has %d URI names; exactly one is needed, %s", len(cert.URIs), td.IDString())
	}
	id, err := spiffeid.FromURI(cert.URIs[0])
	if err != nil {
		return fmt.Errorf("its name is no SPIFFE ID: %w", err)
	}
	if id.TrustDomain() != td {
		return fmt.Errorf("belongs to trust domain %q, not %q; set the trust domain back, or use another directory for the new one", id.TrustDomain(), td)
	}
	if id.Path() != "" {
		return fmt.Errorf("its name %q has a path; a signing certificate names the trust domain only", id)
	}
	return nil
}

// checkIntermediate verifies an intermediate under root at now.
func checkIntermediate(td spiffeid.TrustDomain, p, root *pair, now time.Time) error {
	if err := checkTrustDomain(td, p.cert, true); err != nil {
		return err
	}
	roots := x509.NewCertPool()
	roots.AddCert(root.cert)
	if _, err := p.cert.Verify(x509.VerifyOptions{
		Roots: roots, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny},
	}); err != nil {
		return fmt.Errorf("intermediate does not verify under the root: %w", err)
	}
	return nil
}

func stamp(t time.Time) string { return t.UTC().Format(time.RFC3339) }
