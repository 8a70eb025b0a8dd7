package conformance

import (
	"bytes"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"time"
)

// checkCertificates says what is there in place of certificates in DER.
func checkCertificates(der []byte) error {
	certs, err := x509.ParseCertificates(der)
	switch {
	case bytes.HasPrefix(bytes.TrimSpace(der), []byte("-----BEGIN")):
		return errors.New("it is PEM")
	case err != nil:
		return err
	case len(certs) == 0:
		return errors.New("it is empty")
	}
	return nil
}

// Extensions of certificates.
var (
	oidSAN      = asn1.ObjectIdentifier{2, 5, 29, 17}
	oidKeyUsage = asn1.ObjectIdentifier{2, 5, 29, 15}
	oidPurposes = asn1.ObjectIdentifier{2, 5, 29, 37}
)

// extension returns the value of an extension; nil: there is none.
func extension(c *x509.Certificate, id asn1.ObjectIdentifier) (value []byte, critical bool) {
	for _, e := range c.Extensions {
		if e.Id.Equal(id) {
			return e.Value, e.Critical
		}
	}
	return nil, false
}

// uriNames returns the URI names as they are written in a certificate.
func uriNames(c *x509.Certificate) ([]string, error) {
	value, _ := extension(c, oidSAN)
	if value == nil {
		return nil, nil
	}
	var names []asn1.RawValue
	if rest, err := asn1.Unmarshal(value, &names); err != nil || len(rest) > 0 {
		return nil, errors.New("the subject alternative name cannot be read")
	}
	var out []string
	for _, n := range names {
		if n.Class == asn1.ClassContextSpecific && n.Tag == 6 {
			out = append(out, string(n.Bytes))
		}
	}
	return out, nil
}

// verify validates a path as RFC 5280 has it.
func verify(chain, roots []*x509.Certificate) error {
	o := x509.VerifyOptions{Roots: x509.NewCertPool(), Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageAny}, CurrentTime: time.Now()}
	for _, c := range roots {
		o.Roots.AddCert(c)
	}
	for _, c := range chain[1:] {
		o.Intermediates.AddCert(c)
	}
	_, err := chain[0].Verify(o)
	return err
}
