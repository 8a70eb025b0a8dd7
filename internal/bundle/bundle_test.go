package bundle

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"math/big"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("partner.test")

func newKey(t testing.TB, curve elliptic.Curve) *ecdsa.PrivateKey {
	t.Helper()
	key, err := ecdsa.GenerateKey(curve, rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return key
}

func newRoot(t testing.TB, uri string, change func(*x509.Certificate)) *x509.Certificate {
	t.Helper()
	key := newKey(t, elliptic.P256())
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), NotBefore: time.Now(), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if uri != "" {
		u, err := url.Parse(uri)
		if err != nil {
			t.Fatal(err)
		}
		tmpl.URIs = []*url.URL{u}
	}
	if change != nil {
		change(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return cert
}

func good(t testing.TB) *Bundle {
	rsaKey, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	return &Bundle{
		TrustDomain: td, Sequence: 1<<63 + 7, RefreshHint: 90 * time.Second,
		Roots:   []*x509.Certificate{newRoot(t, td.IDString(), nil), newRoot(t, "", nil)},
		JWTKeys: map[string]crypto.PublicKey{"one": newKey(t, elliptic.P256()).Public(), "two": rsaKey.Public()},
	}
}

// What is written is read as it was, by this package and by go-spiffe, and the
// same content is the same bytes: or each poll of each partner would look like a
// change of keys.
func TestRoundTrip(t *testing.T) {
	b := good(t)
	doc, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	got, err := Parse(td, doc)
	if err != nil || got.Digest() != b.Digest() || got.Sequence != b.Sequence || got.RefreshHint != b.RefreshHint || len(got.Ignored) > 0 {
		t.Fatalf("%+v %v", got, err)
	}
	other, err := spiffebundle.Parse(td, doc)
	if err != nil || len(other.X509Authorities()) != 2 || len(other.JWTAuthorities()) != 2 {
		t.Fatal(other, err)
	}
	for range 10 {
		again := &Bundle{TrustDomain: td, Sequence: b.Sequence, RefreshHint: b.RefreshHint, Roots: []*x509.Certificate{b.Roots[1], b.Roots[0]}, JWTKeys: b.JWTKeys}
		if more, err := again.Marshal(); err != nil || !bytes.Equal(more, doc) || again.Digest() != b.Digest() {
			t.Fatalf("the same content is another document: %v\n%s\n%s", err, doc, more)
		}
	}
	var members struct {
		Keys []map[string]any `json:"keys"`
	}
	if err := json.Unmarshal(doc, &members); err != nil {
		t.Fatal(err)
	}
	for _, key := range members.Keys {
		x5c, _ := key["x5c"].([]any)
		switch _, kid := key["kid"]; {
		case key["kty"] == nil:
			t.Errorf("no kty: %v", key)
		case key["use"] == "x509-svid" && (len(x5c) != 1 || kid):
			t.Errorf("a root must have one x5c and no kid: %v", key)
		case key["use"] == "jwt-svid" && !kid:
			t.Errorf("a key of tokens must have a kid: %v", key)
		}
	}
}

// An empty list is a document: everything is revoked. That it is missing is none.
func TestEmpty(t *testing.T) {
	doc, err := (&Bundle{TrustDomain: td}).Marshal()
	if err != nil || string(doc) != `{"keys":[]}` {
		t.Fatalf("%s %v", doc, err)
	}
	if b, err := Parse(td, doc); err != nil || !b.Empty() {
		t.Errorf("%v %v", b, err)
	}
	for _, bad := range []string{``, `{}`, `{"keys":null}`, `{"keys":{}}`, `[]`, `null`, `{"keys":[]`, `{"keys":[],"spiffe_sequence":-1}`, `{"keys":[],"spiffe_sequence":1.5}`, `{"keys":[],"spiffe_sequence":18446744073709551616}`, `<html>`} {
		if b, err := Parse(td, []byte(bad)); err == nil {
			t.Errorf("%q is taken: %+v", bad, b)
		}
	}
	if _, err := Parse(td, bytes.Repeat([]byte(" "), MaxDocument+1)); err == nil {
		t.Error("a document of any length is taken")
	}
	many := `{"keys":[` + strings.Repeat(`{},`, maxKeys) + `{}]}`
	if _, err := Parse(td, []byte(many)); err == nil {
		t.Error("any number of keys is taken")
	}
}

// An entry that is not good vouches for nothing, and the others still do. The
// specification: unknown types and uses, and roots without a certificate, are
// ignored; of several certificates the first counts. That a root names another
// trust domain is the case that would let one speak for another.
func TestEntries(t *testing.T) {
	root := newRoot(t, td.IDString(), nil)
	x5c := func(certs ...*x509.Certificate) string {
		var list []string
		for _, c := range certs {
			list = append(list, base64.StdEncoding.EncodeToString(c.Raw))
		}
		b, err := json.Marshal(list)
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	ec := func(kid, use string, key *ecdsa.PublicKey) string {
		one, err := spiffebundle.FromJWTAuthorities(td, map[string]crypto.PublicKey{"k": key}).Marshal()
		if err != nil {
			t.Fatal(err)
		}
		text := strings.TrimSuffix(strings.TrimPrefix(string(one), `{"keys":[`), `]}`)
		return strings.Replace(strings.Replace(text, `"kid":"k"`, fmt.Sprintf(`"kid":%q`, kid), 1), "jwt-svid", use, 1)
	}
	key := newKey(t, elliptic.P256())
	good := ec("good", "jwt-svid", &key.PublicKey)
	fine := fmt.Sprintf(`{"use":"x509-svid","kty":"EC","x5c":%s}`, x5c(root))
	weak, err := rsa.GenerateKey(rand.Reader, 1024)
	if err != nil {
		t.Fatal(err)
	}
	weakDoc, err := spiffebundle.FromJWTAuthorities(td, map[string]crypto.PublicKey{"weak": weak.Public()}).Marshal()
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		entry       string
		roots, keys int // beside the good one of each
	}{
		"no use":                       {`{"kty":"EC","x5c":` + x5c(newRoot(t, "", nil)) + `}`, 0, 0},
		"unknown use":                  {ec("x", "wit-svid", &key.PublicKey), 0, 0},
		"use in another case":          {ec("x", "JWT-SVID", &key.PublicKey), 0, 0},
		"sig, as in OpenID":            {ec("x", "sig", &key.PublicKey), 0, 0},
		"no kid":                       {ec("", "jwt-svid", &key.PublicKey), 0, 0},
		"unknown type":                 {`{"use":"jwt-svid","kid":"x","kty":"QUANTUM"}`, 0, 0},
		"no key":                       {`{"use":"jwt-svid","kid":"x"}`, 0, 0},
		"symmetric":                    {`{"use":"jwt-svid","kid":"x","kty":"oct","k":"c2VjcmV0c2VjcmV0c2VjcmV0"}`, 0, 0},
		"Ed25519":                      {`{"use":"jwt-svid","kid":"x","kty":"OKP","crv":"Ed25519","x":"11qYAYKxCrfVS_7TyWQHOg7hcvPapiMlrwIaaPcHURo"}`, 0, 0},
		"weak RSA":                     {strings.TrimSuffix(strings.TrimPrefix(string(weakDoc), `{"keys":[`), `]}`), 0, 0},
		"no certificate":               {`{"use":"x509-svid","kty":"EC"}`, 0, 0},
		"empty x5c":                    {`{"use":"x509-svid","x5c":[]}`, 0, 0},
		"no base64":                    {`{"use":"x509-svid","x5c":["*"]}`, 0, 0},
		"no DER":                       {`{"use":"x509-svid","x5c":["AAAA"]}`, 0, 0},
		"two certificates":             {`{"use":"x509-svid","x5c":` + x5c(newRoot(t, "", nil), newRoot(t, "", nil)) + `}`, 1, 0},
		"of another trust domain":      {`{"use":"x509-svid","x5c":` + x5c(newRoot(t, "spiffe://mesh.test", nil)) + `}`, 0, 0},
		"with a path":                  {`{"use":"x509-svid","x5c":` + x5c(newRoot(t, "spiffe://partner.test/ns/a/sa/b", nil)) + `}`, 0, 0},
		"a leaf":                       {`{"use":"x509-svid","x5c":` + x5c(newRoot(t, "", func(c *x509.Certificate) { c.IsCA = false })) + `}`, 0, 0},
		"may not sign":                 {`{"use":"x509-svid","x5c":` + x5c(newRoot(t, "", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign })) + `}`, 0, 0},
		"the same again":               {fine, 0, 0},
		"a number":                     {`7`, 0, 0},
		"another good one":             {ec("more", "jwt-svid", &key.PublicKey), 0, 1},
		"a certificate and use of JWT": {`{"use":"jwt-svid","kid":"x","x5c":` + x5c(newRoot(t, "", nil)) + `}`, 0, 0},
	} {
		b, err := Parse(td, []byte(`{"keys":[`+fine+`,`+c.entry+`,`+good+`]}`))
		if err != nil {
			t.Errorf("%s: the whole document is refused: %v", name, err)
			continue
		}
		if len(b.Roots) != 1+c.roots || len(b.JWTKeys) != 1+c.keys {
			t.Errorf("%s: %d roots and %d keys of tokens, want %d and %d; ignored %q", name, len(b.Roots), len(b.JWTKeys), 1+c.roots, 1+c.keys, b.Ignored)
		}
	}
	// Which of two keys of one name is meant nobody can say.
	twice := ec("good", "jwt-svid", &newKey(t, elliptic.P256()).PublicKey)
	for n, doc := range map[int]string{2: good + "," + twice, 3: good + "," + twice + "," + good} {
		if b, err := Parse(td, []byte(`{"keys":[`+doc+`]}`)); err != nil || len(b.JWTKeys) != 0 {
			t.Errorf("%d keys of one name: %v %v", n, b, err)
		}
	}
}

// Whatever is shown, nothing fails but the document, and what is taken can be
// written and read again.
func FuzzParse(f *testing.F) {
	doc, err := good(f).Marshal()
	if err != nil {
		f.Fatal(err)
	}
	f.Add(doc)
	f.Add([]byte(`{"keys":[{"use":"jwt-svid","kid":"x","kty":"RSA","n":"AQAB","e":"AQAB"}]}`))
	f.Fuzz(func(t *testing.T, data []byte) {
		b, err := Parse(td, data)
		if err != nil {
			return
		}
		out, err := b.Marshal()
		if err != nil {
			t.Fatal(err)
		}
		if again, err := Parse(td, out); err != nil || again.Digest() != b.Digest() {
			t.Fatalf("%v: %s", err, out)
		}
	})
}
