package x509check

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

const web = "spiffe://mesh.test/ns/shop/sa/web"

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// san is the extension with URI names written as they are.
func san(uris ...string) pkix.Extension {
	var names []asn1.RawValue
	for _, u := range uris {
		names = append(names, asn1.RawValue{Class: asn1.ClassContextSpecific, Tag: 6, Bytes: []byte(u)})
	}
	return pkix.Extension{Id: oidSAN, Critical: true, Value: must(asn1.Marshal(names))}
}

// TestVerify: x509svid.Verify accepts each of these leaves, which the test makes
// sure of. Without the check that a case is about, the leaf would be believed on
// every connection to the control plane and to an agent.
func TestVerify(t *testing.T) {
	now := time.Now()
	rootKey := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	root := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "root"},
		NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	root = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, root, root, rootKey.Public(), rootKey))))
	leafKey := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	key := func(k crypto.Signer) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.PublicKey = k.Public() }
	}
	spelled := func(u string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.URIs, c.ExtraExtensions = nil, []pkix.Extension{san(u)} }
	}
	named := func(id string) func(*x509.Certificate) {
		return func(c *x509.Certificate) { c.URIs = []*url.URL{must(url.Parse(id))} }
	}
	both := []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
	for _, c := range []struct {
		name   string
		change func(*x509.Certificate)
		want   string // what the refusal says; empty: accepted
	}{
		{"an ordinary one", func(*x509.Certificate) {}, ""},
		{"without extended key usage", func(c *x509.Certificate) { c.ExtKeyUsage = nil }, ""},
		{"of P-384", key(must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))), ""},
		{"of RSA 2048", key(must(rsa.GenerateKey(rand.Reader, 2048))), ""},
		{"with a DNS name", func(c *x509.Certificate) { c.DNSNames = []string{"web.shop"} }, ""},
		{"the longest ID", named(web + "/" + strings.Repeat("a", 2048-len(web)-1)), ""},

		{"too long an ID", named(web + "/" + strings.Repeat("a", 2048-len(web))), "2049 bytes"},
		{"no path", named("spiffe://mesh.test"), "must have a path"},
		{"a scheme in upper case", spelled("SPIFFE://mesh.test/ns/shop/sa/web"), "is written"},
		{"an empty fragment", spelled(web + "#"), "is written"},
		{"no digitalSignature", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageKeyAgreement }, "digitalSignature"},
		{"no key usage", func(c *x509.Certificate) { c.KeyUsage = 0 }, "digitalSignature"},
		{"key usage that is not critical", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: oidKeyUsage, Value: []byte{3, 2, 7, 0x80}}}
		}, "must be critical"},
		{"for servers only", func(c *x509.Certificate) { c.ExtKeyUsage = both[:1] }, "both"},
		{"for clients only", func(c *x509.Certificate) { c.ExtKeyUsage = both[1:] }, "both"},
		{"for no purpose", func(c *x509.Certificate) {
			c.ExtKeyUsage, c.ExtraExtensions = nil, []pkix.Extension{{Id: oidPurposes, Value: []byte{0x30, 0}}}
		}, "both"},
		{"key usage and more", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: oidKeyUsage, Critical: true, Value: []byte{3, 2, 7, 0x80, 5, 0}}}
		}, "followed by more"},
		{"a path length", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: oidBasic, Critical: true, Value: []byte{0x30, 3, 2, 1, 0}}}
		}, "are an authority's"},
		{"an outspoken no", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: oidBasic, Critical: true, Value: []byte{0x30, 3, 1, 1, 0}}}
		}, ""},
		{"for an unknown purpose", func(c *x509.Certificate) {
			c.ExtKeyUsage, c.UnknownExtKeyUsage = nil, []asn1.ObjectIdentifier{{1, 2, 3}}
		}, "both"},
		{"of P-224", key(must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))), "P-224"},
		{"of RSA 1024", key(must(rsa.GenerateKey(rand.Reader, 1024))), "1024 bits"},
		{"a long serial number", func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 160) }, "serial number"},
	} {
		t.Run(c.name, func(t *testing.T) {
			tmpl := &x509.Certificate{
				SerialNumber: big.NewInt(7), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Minute),
				URIs: []*url.URL{must(url.Parse(web))}, KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: both,
				BasicConstraintsValid: true, PublicKey: leafKey.Public(),
			}
			c.change(tmpl)
			leaf := must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, tmpl, root, tmpl.PublicKey, rootKey))))
			bundle := x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString("mesh.test"), []*x509.Certificate{root})
			if _, _, err := x509svid.Verify([]*x509.Certificate{leaf}, bundle); err != nil {
				t.Fatalf("go-spiffe refuses it: %v; the case shows nothing", err)
			}
			id, err := Verify([]*x509.Certificate{leaf}, bundle, now)
			switch {
			case c.want == "" && err != nil:
				t.Errorf("refused: %v", err)
			case c.want == "" && id.String() != leaf.URIs[0].String():
				t.Errorf("believed to be %q", id)
			case c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)):
				t.Errorf("%v; want a refusal with %q in it", err, c.want)
			}
		})
	}
}

// TestAuthorities: go-spiffe lets each of these sign for the leaf below it.
func TestAuthorities(t *testing.T) {
	now := time.Now()
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	authority := func(serial int64) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(serial), Subject: pkix.Name{SerialNumber: big.NewInt(serial).String()},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(time.Hour),
			BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	root := authority(1)
	root = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, root, root, key.Public(), key))))
	weak := must(rsa.GenerateKey(rand.Reader, 1024))
	for _, c := range []struct {
		name   string
		change func(*x509.Certificate)
		key    crypto.Signer
		want   string
	}{
		{"an ordinary one", func(*x509.Certificate) {}, key, ""},
		{"for both purposes", func(c *x509.Certificate) {
			c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}
		}, key, ""},
		{"for servers only", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth} }, key, "other purposes"},
		{"for code", func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageCodeSigning} }, key, "other purposes"},
		{"a long serial number", func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 160) }, key, "serial number"},
		{"of RSA 1024", func(*x509.Certificate) {}, weak, "1024 bits"},
	} {
		t.Run(c.name, func(t *testing.T) {
			middle := authority(2)
			c.change(middle)
			middle = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, middle, root, c.key.Public(), key))))
			leaf := &x509.Certificate{
				SerialNumber: big.NewInt(7), NotBefore: now.Add(-time.Minute), NotAfter: now.Add(time.Minute),
				URIs: []*url.URL{must(url.Parse(web))}, KeyUsage: x509.KeyUsageDigitalSignature,
			}
			leaf = must(x509.ParseCertificate(must(x509.CreateCertificate(rand.Reader, leaf, middle, key.Public(), c.key))))
			bundle := x509bundle.FromX509Authorities(td, []*x509.Certificate{root})
			chain := []*x509.Certificate{leaf, middle}
			if _, _, err := x509svid.Verify(chain, bundle); err != nil {
				t.Fatalf("go-spiffe refuses it: %v; the case shows nothing", err)
			}
			_, err := Verify(chain, bundle, now)
			if c.want == "" && err != nil || c.want != "" && (err == nil || !strings.Contains(err.Error(), c.want)) {
				t.Errorf("%v; want a refusal with %q in it", err, c.want)
			}
		})
	}
}

// TestVerifyBounds: a stranger's chain costs little to refuse.
func TestVerifyBounds(t *testing.T) {
	bundle := x509bundle.New(spiffeid.RequireTrustDomainFromString("mesh.test"))
	if _, err := Verify(make([]*x509.Certificate, MaxChain+1), bundle, time.Now()); err == nil || !strings.Contains(err.Error(), "at most 8") {
		t.Errorf("%v; want a refusal for its length", err)
	}
	if _, err := Verify(nil, bundle, time.Now()); err == nil {
		t.Error("no certificate at all was accepted")
	}
}
