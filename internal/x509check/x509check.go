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
	oidBasic    = asn1.ObjectIdentifier{2, 5, 29, 19}
	oidPurposes = asn1.ObjectIdentifier{2, 5, 29, 37}
)

// Verify verifies a chain, leaf first, against the roots of the trust domain
// that the leaf names, and returns the one identity that the leaf proves at the
// instant now. It may be called with hostile input. With an error the ID, if it
// is not zero, is what the leaf claims to be, for messages only.
func Verify(certs []*x509.Certificate, bundle x509bundle.Source, now time.Time) (spiffeid.ID, error) {
	id, _, err := VerifyRoot(certs, bundle, now)
	return id, err
}

// VerifyRoot is Verify, and returns the root that the chain ends at, too.
func VerifyRoot(certs []*x509.Certificate, bundle x509bundle.Source, now time.Time) (spiffeid.ID, *x509.Certificate, error) {
	if len(certs) > MaxChain {
		return spiffeid.ID{}, nil, fmt.Errorf("the chain has %d certificates; at most %d are read", len(certs), MaxChain)
	}
	id, chains, err := x509svid.Verify(certs, bundle, x509svid.WithTime(now))
	if err != nil {
		return id, nil, err
	}
	if err := checkLeaf(certs[0], id); err != nil {
		return id, nil, fmt.Errorf("certificate of %.256q: %w", id, err)
	}
	for i, c := range certs[1:] {
		if err := checkAuthority(c); err != nil {
			return id, nil, fmt.Errorf("certificate %d of the chain: %w", i+1, err)
		}
	}
	return id, chains[0][len(chains[0])-1], nil // a chain that verifies has a root
}

// checkAuthority holds what comes with a leaf, whether or not the chain needs
// it, to what the proxies ask of it: go-spiffe lets an authority for other
// purposes sign, and any that has a key.
func checkAuthority(c *x509.Certificate) error {
	switch {
	case !goodSerial(c):
		return fmt.Errorf("its serial number must be positive and of at most %d bytes", maxSerial)
	case !purposes(c, x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth):
		return errors.New("is an authority for other purposes than serverAuth and clientAuth")
	}
	return checkKey(c.PublicKey)
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
	case !goodSerial(leaf):
		return fmt.Errorf("its serial number must be positive and of at most %d bytes", maxSerial)
	case leaf.KeyUsage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("lacks the key usage digitalSignature")
	case !extension(leaf, oidKeyUsage).Critical:
		return errors.New("its key usage must be critical")
	case !purposes(leaf, x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth):
		return errors.New("its extended key usage must hold both serverAuth and clientAuth")
	}
	if err := checkForm(leaf); err != nil {
		return err
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

func goodSerial(c *x509.Certificate) bool {
	return c.SerialNumber.Sign() > 0 && c.SerialNumber.BitLen() <= 8*maxSerial
}

// purposes reports whether a certificate is for all of these, as one is that
// does not say what it is for.
func purposes(c *x509.Certificate, want ...x509.ExtKeyUsage) bool {
	if extension(c, oidPurposes).Id == nil {
		return true
	}
	return !slices.ContainsFunc(want, func(u x509.ExtKeyUsage) bool { return !slices.Contains(c.ExtKeyUsage, u) })
}

// checkForm refuses what Go reads leniently in the extensions that say what a
// leaf may do: bytes behind their end, and a leaf with the limits of an authority.
func checkForm(leaf *x509.Certificate) error {
	for _, id := range []asn1.ObjectIdentifier{oidKeyUsage, oidBasic, oidPurposes, oidSAN} {
		e := extension(leaf, id)
		if e.Id == nil {
			continue
		}
		var v asn1.RawValue
		if rest, err := asn1.Unmarshal(e.Value, &v); err != nil || len(rest) != 0 {
			return fmt.Errorf("its extension %s is followed by more", id)
		}
		if id.Equal(oidBasic) && len(v.Bytes) != 0 && !slices.Equal(v.Bytes, []byte{1, 1, 0}) {
			return errors.New("its basic constraints are an authority's")
		}
	}
	return nil
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
