package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// MaxCSRBytes is the size of the largest certificate request that is read.
const MaxCSRBytes = 16 << 10

// maxRSABits bounds the work that one request can cause.
const maxRSABits = 4096

var (
	oidExtensionRequest = asn1.ObjectIdentifier{1, 2, 840, 113549, 1, 9, 14}
	oidSAN              = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidBasicConstraints = asn1.ObjectIdentifier{2, 5, 29, 19}
)

// readCSR checks a PKCS#10 request for id and returns its public key, the only
// thing that is taken from it. The subject is not looked at.
func readCSR(der []byte, id spiffeid.ID) (crypto.PublicKey, error) {
	switch {
	case len(der) == 0:
		return nil, errors.New("csr: empty; send a PKCS#10 request in DER")
	case len(der) > MaxCSRBytes:
		return nil, fmt.Errorf("csr: %d bytes; at most %d are read", len(der), MaxCSRBytes)
	case bytes.HasPrefix(der, []byte("-----BEGIN")):
		return nil, errors.New("csr: is PEM; send DER")
	}
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, fmt.Errorf("csr: not a PKCS#10 request in DER: %w", err)
	}
	if csr.Version != 0 {
		return nil, fmt.Errorf("csr: version %d; want 0 (v1)", csr.Version)
	}
	if err := checkPublicKey(csr.PublicKey); err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	switch csr.SignatureAlgorithm {
	case x509.ECDSAWithSHA256, x509.ECDSAWithSHA384, x509.ECDSAWithSHA512,
		x509.SHA256WithRSA, x509.SHA384WithRSA, x509.SHA512WithRSA,
		x509.SHA256WithRSAPSS, x509.SHA384WithRSAPSS, x509.SHA512WithRSAPSS:
	default:
		return nil, fmt.Errorf("csr: signature algorithm %v; sign with SHA-256 or better", csr.SignatureAlgorithm)
	}
	if err := csr.CheckSignature(); err != nil {
		return nil, fmt.Errorf("csr: not signed by its own key: %w", err)
	}
	if err := checkAttributes(csr); err != nil {
		return nil, fmt.Errorf("csr: %w", err)
	}
	for _, ext := range csr.Extensions {
		switch {
		case ext.Id.Equal(oidSAN):
			if err := checkSAN(ext.Value, id); err != nil {
				return nil, fmt.Errorf("csr: subject alternative name: %w", err)
			}
		case ext.Id.Equal(oidBasicConstraints):
			return nil, errors.New("csr: asks for basic constraints; remove them, CA certificates are never issued")
		default:
			return nil, fmt.Errorf("csr: asks for extension %v; remove it, only a subject alternative name may be asked for", ext.Id)
		}
	}
	return csr.PublicKey, nil
}

// checkWhole refuses a request, in which readCSR found nothing wrong, that does not
// say for itself what is to be certified: authorities above copy what they are given.
func checkWhole(der []byte) error {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return err
	}
	if len(csr.Extensions) != 1 || !csr.Extensions[0].Id.Equal(oidSAN) {
		return errors.New("names no identity, and each workload is certified by the authority above, which certifies what the request names; update signet-agent on this node, older ones ask so")
	}
	if !bytes.Equal(csr.RawSubject, []byte{0x30, 0}) {
		return fmt.Errorf("has the subject %.256q, which the authority above would copy; leave it empty", csr.Subject)
	}
	return nil
}

// checkPublicKey refuses keys that are weak or that some peers cannot verify.
func checkPublicKey(pub crypto.PublicKey) error {
	switch k := pub.(type) {
	case *ecdsa.PublicKey:
		if k.Curve == elliptic.P256() || k.Curve == elliptic.P384() {
			return nil
		}
		return fmt.Errorf("public key: ECDSA curve %s; use P-256 or P-384", k.Curve.Params().Name)
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSABits || n > maxRSABits {
			return fmt.Errorf("public key: RSA of %d bits; use %d to %d, or ECDSA P-256", n, minRSABits, maxRSABits)
		}
		if k.N.Bit(0) == 0 || k.E < 65537 || k.E&1 == 0 {
			return errors.New("public key: RSA modulus or exponent is not sound; use an odd modulus and exponent 65537")
		}
		return nil
	case ed25519.PublicKey:
		return errors.New("public key: Ed25519; use ECDSA P-256, the proxies do not verify Ed25519")
	}
	return fmt.Errorf("public key: kind %T; use ECDSA P-256", pub)
}

// checkAttributes reads the attributes that x509 skips over: a request may
// carry one extension request with one value, and nothing else.
func checkAttributes(csr *x509.CertificateRequest) error {
	var tbs struct {
		Version    int
		Subject    asn1.RawValue
		PublicKey  asn1.RawValue
		Attributes []asn1.RawValue `asn1:"tag:0"`
	}
	if rest, err := asn1.Unmarshal(csr.RawTBSCertificateRequest, &tbs); err != nil {
		return fmt.Errorf("attributes: %w", err)
	} else if len(rest) != 0 {
		return errors.New("attributes: followed by trailing bytes")
	}
	if len(tbs.Attributes) > 1 {
		return fmt.Errorf("%d attributes; at most one is allowed, an extension request", len(tbs.Attributes))
	}
	for _, raw := range tbs.Attributes {
		var attr struct {
			ID     asn1.ObjectIdentifier
			Values []asn1.RawValue `asn1:"set"`
		}
		if rest, err := asn1.Unmarshal(raw.FullBytes, &attr); err != nil || len(rest) != 0 {
			return errors.New("attribute cannot be read")
		}
		if !attr.ID.Equal(oidExtensionRequest) {
			return fmt.Errorf("attribute %v; only an extension request may be there", attr.ID)
		}
		if len(attr.Values) != 1 {
			return fmt.Errorf("extension request with %d values; want 1", len(attr.Values))
		}
	}
	return nil
}

// checkSAN accepts exactly one general name, the URI of id. It reads the DER
// itself because x509 passes over kinds of names that it does not know.
func checkSAN(der []byte, id spiffeid.ID) error {
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(der, &names); err != nil {
		return fmt.Errorf("cannot be read: %w", err)
	} else if len(rest) != 0 {
		return errors.New("followed by trailing bytes")
	}
	if len(names) != 1 {
		return fmt.Errorf("%d names; leave the extension out or ask for exactly %s", len(names), id)
	}
	name := names[0]
	if name.Class != asn1.ClassContextSpecific || name.Tag != 6 || name.IsCompound {
		return fmt.Errorf("a name that is not a URI; leave the extension out or ask for exactly %s", id)
	}
	if string(name.Bytes) != id.String() {
		return fmt.Errorf("asks for %.256q, but the only identity for this request is %s", name.Bytes, id)
	}
	return nil
}
