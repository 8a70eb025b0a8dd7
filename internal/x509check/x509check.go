// Package x509check decides whether a peer's certificate is a good X509-SVID.
// It lets go-spiffe verify the chain, and holds the leaf to the specification
// where libraries are lenient: how the SPIFFE ID is written, key usage, keys,
// serial numbers, the length of the chain.
package x509check

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const (
	// MaxChain is how many certificates of a chain are looked at.
	MaxChain = 8

	maxID          = 2048 // bytes of a SPIFFE ID
	maxTrustDomain = 255  // bytes of its trust domain
	maxSerial      = 20   // bytes of a serial number
	minRSA         = 2048 // bits of a modulus
	maxRSA         = 4096
)

var (
	oidSAN      = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
)

// Verify verifies a chain, leaf first, against the roots of the trust domain
// that the leaf names, and returns the one identity that the leaf proves at the
// instant now. It may be called with hostile input. With an error the ID, if it
// is not zero, is what the leaf claims to be, for messages only.
func Verify(certs []*x509.Certificate, bundle x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	if len(certs) > MaxChain {
		return spiffeid.ID{}, fmt.Errorf("the chain has %d certificates; at most %d are read", len(certs), MaxChain)
	}
	id, _, err := x509svid.Verify(certs, bundle, x509svid.WithTime(now))
	if err != nil {
		return id, err
	}
	if err := checkLeaf(certs[0], id); err != nil {
		return id, fmt.Errorf("certificate of %.256q: %w", id, err)
	}
	return id, nil
}

// checkLeaf has what x509svid.Verify leaves open.
func checkLeaf(leaf *x509.Certificate, id spiffeid.ID) error {
	switch {
	case id.Path() == "":
		return errors.New("names a trust domain and nobody in it; a leaf's SPIFFE ID must have a path")
	case len(id.String()) > maxID:
		return fmt.Errorf("its SPIFFE ID has %d bytes; at most %d are allowed", len(id.String()), maxID)
	case len(id.TrustDomain().Name()) > maxTrustDomain:
		return fmt.Errorf("its trust domain has %d bytes; at most %d are allowed", len(id.TrustDomain().Name()), maxTrustDomain)
	case leaf.Version != 3:
		return fmt.Errorf("is of version %d; want 3", leaf.Version)
	case leaf.SerialNumber.Sign() <= 0 || leaf.SerialNumber.BitLen() > 8*maxSerial:
		return fmt.Errorf("its serial number must be positive and of at most %d bytes", maxSerial)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("lacks the key usage digitalSignature")
	case !extension(leaf, oidKeyUsage).Critical:
		return errors.New("its key usage must be critical")
	case !bothUsages(leaf):
		return errors.New("its extended key usage must hold both serverAuth and clientAuth")
	}
	if err := checkSpelling(extension(leaf, oidSAN).Value, id); err != nil {
		return err
	}
	return checkKey(leaf.PublicKey)
}

// checkSpelling compares what the certificate really says with the ID that was
// read from it. Go reads a URI before go-spiffe sees it, and forgives a scheme
// in upper case and an empty fragment. An ID has one spelling, or what is equal
// for one program is two names for another.
func checkSpelling(san []byte, id spiffeid.ID) error {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(san, &names); err != nil || len(rest) != 0 {
		return errors.New("its subject alternative name cannot be read")
	}
	const uri = 6
	for _, name := range names {
		if name.Class == asn1.ClassContextSpecific && name.Tag == uri && string(name.Bytes) != id.String() {
			return fmt.Errorf("the SPIFFE ID is written %.256q", name.Bytes)
		}
	}
	return nil
}

// checkKey refuses keys that the authority would refuse.
func checkKey(pub any) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("its key is of curve %s; want P-256 or P-384", k.Curve.Params().Name)
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSA || n > maxRSA || k.E < 65537 {
			return fmt.Errorf("its key is RSA of %d bits with exponent %d; want %d to %d bits, and 65537 or more", n, k.E, minRSA, maxRSA)
		}
		return nil
	}
	return fmt.Errorf("its key is of kind %T; want ECDSA P-256", pub)
}

func bothUsages(c *x509.Certificate) bool {
	if len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) == 0 {
		return true
	}
	return slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) && slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)
}

// extension returns one of a certificate's extensions; a zero one if it has none
// of this kind. Go refuses certificates that have two.
func extension(c *x509.Certificate, id asn1.ObjectIdentifier) pkix.Extension {
	i := slices.IndexFunc(c.Extensions, func(e pkix.Extension) bool { return e.Id.Equal(id) })
	if i < 0 {
		return pkix.Extension{}
	}
	return c.Extensions[i]
}
