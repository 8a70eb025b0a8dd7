package ca

import (
	"bytes"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Extensions that a leaf has, and whether each is critical. A leaf has these
// and no others.
var leafExtensions = map[string]struct {
	name     string
	critical bool
}{
	"2.5.29.15": {"key usage", true},
	"2.5.29.17": {"subject alternative name", true}, // the subject is empty
	"2.5.29.19": {"basic constraints", true},
	"2.5.29.35": {"authority key identifier", false},
	"2.5.29.37": {"extended key usage", false},
}

const oidSubjectKeyID = "2.5.29.14"

// isKeyID reports whether a subject key identifier is that of the certificate's key:
// SHA-1 of its bits (RFC 5280), or the first 160 bits of SHA-256 (RFC 7093).
func isKeyID(c *x509.Certificate) bool {
	var spki struct {
		Algorithm pkix.AlgorithmIdentifier
		Key       asn1.BitString
	}
	if rest, err := asn1.Unmarshal(c.RawSubjectPublicKeyInfo, &spki); err != nil || len(rest) != 0 {
		return false
	}
	old, short := sha1.Sum(spki.Key.Bytes), sha256.Sum256(spki.Key.Bytes)
	return bytes.Equal(c.SubjectKeyId, old[:]) || bytes.Equal(c.SubjectKeyId, short[:20])
}

// Lint checks that a leaf is an X509-SVID of exactly the kind that this
// authority issues: one SPIFFE ID with a path, no other name, no CA powers, a
// key and a lifetime within limits, and no extension beyond those needed.
func Lint(c *x509.Certificate) error {
	if err := lint(c, false); err != nil {
		return fmt.Errorf("ca: lint: %w", err)
	}
	return nil
}

// lintAbove is Lint for a leaf that an authority above made. It may say, too, which
// its key is: RFC 5280 (4.2.1.2) asks authorities for that, some cannot leave it out,
// and as it follows from the key it says nothing that the leaf does not say already.
func lintAbove(c *x509.Certificate) error {
	if err := lint(c, true); err != nil {
		return fmt.Errorf("ca: lint: %w", err)
	}
	return nil
}

func lint(c *x509.Certificate, keyID bool) error {
	if c.Version != 3 {
		return fmt.Errorf("version %d; want 3", c.Version)
	}
	if c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() > 159 {
		return errors.New("serial number must be positive and at most 20 bytes")
	}
	if len(c.Subject.Names) != 0 {
		return fmt.Errorf("subject %q; want an empty one", c.Subject)
	}
	id, err := x509svid.IDFromCert(c)
	if err != nil {
		return err
	}
	if id.Path() == "" {
		return fmt.Errorf("id %q has no path; a leaf must not name a trust domain only", id)
	}
	if c.URIs[0].String() != id.String() {
		return fmt.Errorf("id %q is not written in its one form %q", c.URIs[0], id)
	}
	switch {
	case c.IsCA || c.MaxPathLen > 0 || c.MaxPathLenZero || !c.BasicConstraintsValid:
		return errors.New("basic constraints must be there and say that it is no CA")
	case c.KeyUsage != x509.KeyUsageDigitalSignature:
		return fmt.Errorf("key usage %#x; want digitalSignature only", int(c.KeyUsage))
	case len(c.UnknownExtKeyUsage) != 0 || !slices.Equal(c.ExtKeyUsage, []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}):
		return errors.New("extended key usage must be serverAuth and clientAuth")
	}
	seen := make(map[string]bool)
	for _, ext := range c.Extensions {
		oid := ext.Id.String()
		if keyID && oid == oidSubjectKeyID {
			if !isKeyID(c) { // nobody can read one that is critical
				return errors.New("subject key identifier must be the hash of the key")
			}
			continue
		}
		want, ok := leafExtensions[oid]
		if !ok {
			return fmt.Errorf("extension %s does not belong in an SVID", oid)
		}
		if ext.Critical != want.critical {
			return fmt.Errorf("%s: critical is %t; want %t", want.name, ext.Critical, want.critical)
		}
		seen[oid] = true
		if ext.Id.Equal(oidSAN) {
			var names []asn1.RawValue
			if rest, err := asn1.Unmarshal(ext.Value, &names); err != nil || len(rest) != 0 || len(names) != 1 {
				return errors.New("subject alternative name must hold the SPIFFE ID and nothing else")
			}
		}
	}
	for oid, want := range leafExtensions {
		if !seen[oid] {
			return fmt.Errorf("%s is missing", want.name)
		}
	}
	if life := c.NotAfter.Sub(c.NotBefore); life <= 0 || life > MaxTTL+backdate+time.Second {
		return fmt.Errorf("lifetime %s; want more than 0 and at most %s", life, MaxTTL+backdate)
	}
	return checkPublicKey(c.PublicKey)
}
