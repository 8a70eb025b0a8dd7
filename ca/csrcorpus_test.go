package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/asn1"
	"encoding/pem"
	"math/big"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// corpusID is the identity that every request of the corpus is made for.
var corpusID = spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/web")

// tlv writes one DER element.
func tlv(tag byte, parts ...[]byte) []byte {
	body := slices.Concat(parts...)
	out := []byte{tag}
	switch n := len(body); {
	case n < 0x80:
		out = append(out, byte(n))
	case n < 0x100:
		out = append(out, 0x81, byte(n))
	case n < 0x10000:
		out = append(out, 0x82, byte(n>>8), byte(n))
	default:
		out = append(out, 0x83, byte(n>>16), byte(n>>8), byte(n))
	}
	return append(out, body...)
}

func oid(ids ...int) []byte {
	b, err := asn1.Marshal(asn1.ObjectIdentifier(ids))
	if err != nil {
		panic(err)
	}
	return b
}

// Pieces of requests, in DER.
var (
	oidECDSA256 = oid(1, 2, 840, 10045, 4, 3, 2)
	oidECDSA1   = oid(1, 2, 840, 10045, 4, 1)
	oidRSA256   = oid(1, 2, 840, 113549, 1, 1, 11)
	oidRSA1     = oid(1, 2, 840, 113549, 1, 1, 5)
	oidRSAMD5   = oid(1, 2, 840, 113549, 1, 1, 4)
	oidRSAKey   = oid(1, 2, 840, 113549, 1, 1, 1)
	oidECKey    = oid(1, 2, 840, 10045, 2, 1)
	oidP256     = oid(1, 2, 840, 10045, 3, 1, 7)
	derNull     = []byte{5, 0}
	derTrue     = []byte{1, 1, 0xff}
)

func attr(id []byte, values ...[]byte) []byte { return tlv(0x30, id, tlv(0x31, values...)) }

func extReq(exts ...[]byte) []byte {
	return attr(oid(1, 2, 840, 113549, 1, 9, 14), tlv(0x30, exts...))
}

func ext(id, value []byte) []byte         { return tlv(0x30, id, tlv(4, value)) }
func criticalExt(id, value []byte) []byte { return tlv(0x30, id, derTrue, tlv(4, value)) }

var sanOID = oid(2, 5, 29, 17)

func san(names ...[]byte) []byte { return ext(sanOID, tlv(0x30, names...)) }
func uri(s string) []byte        { return tlv(0x86, []byte(s)) }

// rawCSR is a request whose every part can be wrong.
type rawCSR struct {
	version byte
	subject []byte
	spki    []byte
	attrs   [][]byte
	alg     []byte // AlgorithmIdentifier
	signer  crypto.Signer
	hash    crypto.Hash
	badSig  bool // sign something else
}

func (r rawCSR) der(t testing.TB) []byte {
	t.Helper()
	if r.subject == nil {
		r.subject = tlv(0x30)
	}
	if r.spki == nil {
		r.spki = spkiOf(t, r.signer.Public())
	}
	if r.alg == nil {
		r.alg = tlv(0x30, oidECDSA256)
	}
	if r.hash == 0 {
		r.hash = crypto.SHA256
	}
	info := tlv(0x30, tlv(2, []byte{r.version}), r.subject, r.spki, tlv(0xa0, r.attrs...))
	signed := info
	if r.badSig {
		signed = append([]byte{0}, info...)
	}
	var digest []byte
	switch r.hash {
	case crypto.SHA1:
		s := sha1.Sum(signed)
		digest = s[:]
	default:
		s := sha256.Sum256(signed)
		digest = s[:]
	}
	sig, err := r.signer.Sign(rand.Reader, digest, r.hash)
	if err != nil {
		t.Fatal(err)
	}
	return tlv(0x30, info, r.alg, tlv(3, []byte{0}, sig))
}

func spkiOf(t testing.TB, pub crypto.PublicKey) []byte {
	t.Helper()
	der, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func rsaSPKI(n *big.Int, e int) []byte {
	key, err := asn1.Marshal(struct {
		N *big.Int
		E int
	}{n, e})
	if err != nil {
		panic(err)
	}
	return tlv(0x30, tlv(0x30, oidRSAKey, derNull), tlv(3, []byte{0}, key))
}

func ecSPKI(point []byte) []byte {
	return tlv(0x30, tlv(0x30, oidECKey, oidP256), tlv(3, []byte{0}, point))
}

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

// csrCase is one request and what the refusal has to say; an empty want means
// that the request is good.
type csrCase struct {
	name string
	der  []byte
	want string
}

// csrCorpus builds every case anew.
func csrCorpus(t testing.TB) []csrCase {
	key := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	p384 := must(ecdsa.GenerateKey(elliptic.P384(), rand.Reader))
	rsa2048 := must(rsa.GenerateKey(rand.Reader, 2048))
	rsa1024 := must(rsa.GenerateKey(rand.Reader, 1024))
	other := must(ecdsa.GenerateKey(elliptic.P256(), rand.Reader))
	std := func(signer crypto.Signer, tmpl x509.CertificateRequest) []byte {
		return must(x509.CreateCertificateRequest(rand.Reader, &tmpl, signer))
	}
	with := func(attrs ...[]byte) []byte { return rawCSR{signer: key, attrs: attrs}.der(t) }
	withExt := func(exts ...[]byte) []byte { return with(extReq(exts...)) }
	withURI := func(s string) []byte { return withExt(san(uri(s))) }
	withKey := func(spki []byte) []byte { return rawCSR{signer: key, spki: spki}.der(t) }
	id := corpusID.String()
	plain := with()
	big2048 := new(big.Int).Lsh(big.NewInt(1), 2047)
	big8192 := new(big.Int).Add(new(big.Int).Lsh(big.NewInt(1), 8191), big.NewInt(1))
	point := must(key.PublicKey.Bytes())
	offCurve := slices.Clone(point)
	offCurve[len(offCurve)-1] ^= 1
	compressed := append([]byte{2 + point[64]&1}, point[1:33]...)
	flipped := slices.Clone(plain)
	flipped[len(flipped)-1] ^= 1
	otherBytes := rawCSR{signer: key, badSig: true}.der(t)
	selfSigned := func() []byte {
		tmpl := &x509.Certificate{SerialNumber: big.NewInt(1), NotBefore: time.Unix(0, 0), NotAfter: time.Unix(1, 0)}
		return must(x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key))
	}()
	indefinite := slices.Concat([]byte{0x30, 0x80}, content(plain), []byte{0, 0})
	longForm := slices.Concat([]byte{0x30, 0x83, 0}, lengthBytes(plain), content(plain))
	_, edKey, _ := ed25519.GenerateKey(rand.Reader)
	p224 := must(ecdsa.GenerateKey(elliptic.P224(), rand.Reader))
	p521 := must(ecdsa.GenerateKey(elliptic.P521(), rand.Reader))
	rsaAlg := func(id []byte) []byte { return tlv(0x30, id, derNull) }
	basic := oid(2, 5, 29, 19)

	return []csrCase{
		{"good_p256", std(key, x509.CertificateRequest{}), ""},
		{"good_p384", std(p384, x509.CertificateRequest{}), ""},
		{"good_rsa2048", std(rsa2048, x509.CertificateRequest{}), ""},
		{"good_rsa2048_pss", std(rsa2048, x509.CertificateRequest{SignatureAlgorithm: x509.SHA256WithRSAPSS}), ""},
		{"good_own_uri", withURI(id), ""},
		{"good_own_uri_critical", withExt(criticalExt(sanOID, tlv(0x30, uri(id)))), ""},
		{"good_subject_ignored", std(key, x509.CertificateRequest{Subject: pkix.Name{CommonName: "root", Organization: []string{"x"}}}), ""},
		{"good_no_attributes", plain, ""},

		{"fail_empty", nil, "empty"},
		{"fail_garbage", []byte("not a request"), "not a PKCS#10"},
		{"fail_pem", pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: plain}), "is PEM"},
		{"fail_too_big", rawCSR{signer: key, subject: tlv(0x30, tlv(0x31, tlv(0x30, oid(2, 5, 4, 3), tlv(0x0c, make([]byte, MaxCSRBytes)))))}.der(t), "at most"},
		{"fail_trailing_byte", append(slices.Clone(plain), 0), "trailing"},
		{"fail_truncated", plain[:len(plain)-1], "not a PKCS#10"},
		{"fail_certificate", selfSigned, "not a PKCS#10"},
		{"fail_version_1", rawCSR{signer: key, version: 1}.der(t), "version 1"},
		{"fail_indefinite_length", indefinite, "not a PKCS#10"},
		{"fail_length_not_minimal", longForm, "not a PKCS#10"},
		{"fail_signature_flipped", flipped, "csr: "},
		{"fail_signature_of_other_bytes", otherBytes, "not signed by its own key"},
		{"fail_signature_by_other_key", rawCSR{signer: other, spki: spkiOf(t, key.Public())}.der(t), "not signed by its own key"},
		{"fail_signature_algorithm_of_other_kind", rawCSR{signer: key, alg: rsaAlg(oidRSA256)}.der(t), "not signed by its own key"},
		{"fail_signature_ecdsa_sha1", rawCSR{signer: key, alg: tlv(0x30, oidECDSA1), hash: crypto.SHA1}.der(t), "SHA-256 or better"},
		{"fail_signature_rsa_sha1", rawCSR{signer: rsa2048, alg: rsaAlg(oidRSA1), hash: crypto.SHA1}.der(t), "SHA-256 or better"},
		{"fail_signature_rsa_md5", rawCSR{signer: rsa2048, alg: rsaAlg(oidRSAMD5)}.der(t), "SHA-256 or better"},
		{"fail_signature_algorithm_unknown", rawCSR{signer: key, alg: tlv(0x30, oid(1, 2, 3, 4))}.der(t), "SHA-256 or better"},
		{"fail_key_ed25519", std(edKey, x509.CertificateRequest{}), "Ed25519"},
		{"fail_key_p224", std(p224, x509.CertificateRequest{}), "P-224"},
		{"fail_key_p521", std(p521, x509.CertificateRequest{}), "P-521"},
		{"fail_key_rsa1024", rawCSR{signer: rsa1024, alg: rsaAlg(oidRSA256)}.der(t), "RSA of 1024 bits"},
		{"fail_key_rsa8192", withKey(rsaSPKI(big8192, 65537)), "RSA of 8192 bits"},
		{"fail_key_rsa_even_modulus", withKey(rsaSPKI(big2048, 65537)), "not sound"},
		{"fail_key_rsa_exponent_3", withKey(rsaSPKI(rsa2048.N, 3)), "not sound"},
		{"fail_key_rsa_exponent_even", withKey(rsaSPKI(rsa2048.N, 65538)), "not sound"},
		{"fail_key_rsa_exponent_0", withKey(rsaSPKI(rsa2048.N, 0)), "csr: "},
		{"fail_key_rsa_negative_modulus", withKey(rsaSPKI(big.NewInt(-3), 65537)), "csr: "},
		{"fail_key_off_curve", withKey(ecSPKI(offCurve)), "csr: "},
		{"fail_key_infinity", withKey(ecSPKI([]byte{0})), "csr: "},
		{"fail_key_compressed_point", withKey(ecSPKI(compressed)), "csr: "},
		{"fail_key_x25519", withKey(tlv(0x30, tlv(0x30, oid(1, 3, 101, 110)), tlv(3, []byte{0}, make([]byte, 32)))), "public key"},
		{"fail_key_unknown_kind", withKey(tlv(0x30, tlv(0x30, oid(1, 2, 3)), tlv(3, []byte{0, 1}))), "public key"},
		{"fail_san_two_uris_same", withExt(san(uri(id), uri(id))), "2 names"},
		{"fail_san_two_uris", withExt(san(uri(id), uri("spiffe://mesh.example/ns/shop/sa/db"))), "2 names"},
		{"fail_san_other_account", withURI("spiffe://mesh.example/ns/shop/sa/db"), "asks for"},
		{"fail_san_other_trust_domain", withURI("spiffe://evil.example/ns/shop/sa/web"), "asks for"},
		{"fail_san_control", withURI("spiffe://mesh.example/signet/control"), "asks for"},
		{"fail_san_node", withURI("spiffe://mesh.example/signet/node/a"), "asks for"},
		{"fail_san_trust_domain_only", withURI("spiffe://mesh.example"), "asks for"},
		{"fail_san_scheme_upper_case", withURI("SPIFFE://mesh.example/ns/shop/sa/web"), "asks for"},
		{"fail_san_trailing_slash", withURI(id + "/"), "asks for"},
		{"fail_san_query", withURI(id + "?a=b"), "csr: "},
		{"fail_san_fragment", withURI(id + "#a"), "csr: "},
		{"fail_san_percent_encoded", withURI("spiffe://mesh.example/ns/shop/sa/w%65b"), "asks for"},
		{"fail_san_dot_segments", withURI("spiffe://mesh.example/ns/shop/sa/x/../web"), "asks for"},
		{"fail_san_port", withURI("spiffe://mesh.example:80/ns/shop/sa/web"), "asks for"},
		{"fail_san_user", withURI("spiffe://u@mesh.example/ns/shop/sa/web"), "asks for"},
		{"fail_san_nul", withURI(id + "\x00.evil"), "csr: "},
		{"fail_san_homograph", withURI("spiffe://mesh.ex\u0430mple/ns/shop/sa/web"), "csr: "},
		{"fail_san_empty_uri", withURI(""), "csr: "},
		{"fail_san_uri_constructed", withExt(san(tlv(0xa6, []byte(id)))), "csr: "},
		{"fail_san_dns", withExt(san(tlv(0x82, []byte("web.shop")))), "not a URI"},
		{"fail_san_ip", withExt(san(tlv(0x87, []byte{10, 0, 0, 1}))), "not a URI"},
		{"fail_san_email", withExt(san(tlv(0x81, []byte("a@b.example")))), "not a URI"},
		{"fail_san_uri_and_dns", withExt(san(uri(id), tlv(0x82, []byte("web.shop")))), "2 names"},
		{"fail_san_uri_and_other_name", withExt(san(uri(id), tlv(0xa0, oid(1, 2, 3), tlv(0xa0, tlv(0x0c, []byte("x")))))), "2 names"},
		{"fail_san_directory_name", withExt(san(tlv(0xa4, tlv(0x30)))), "not a URI"},
		{"fail_san_registered_id", withExt(san(tlv(0x88, []byte{42, 3}))), "not a URI"},
		{"fail_san_no_names", withExt(san()), "0 names"},
		{"fail_san_trailing_bytes", withExt(ext(sanOID, append(tlv(0x30, uri(id)), 5, 0))), "csr: "},
		{"fail_san_twice", withExt(san(uri(id)), san(uri(id))), "csr: "},
		{"fail_ca_true", withExt(criticalExt(basic, tlv(0x30, derTrue))), "basic constraints"},
		{"fail_ca_false", withExt(ext(basic, tlv(0x30))), "basic constraints"},
		{"fail_key_usage_cert_sign", withExt(criticalExt(oid(2, 5, 29, 15), tlv(3, []byte{2, 4}))), "extension 2.5.29.15"},
		{"fail_ext_key_usage_any", withExt(ext(oid(2, 5, 29, 37), tlv(0x30, oid(2, 5, 29, 37, 0)))), "extension 2.5.29.37"},
		{"fail_name_constraints", withExt(ext(oid(2, 5, 29, 30), tlv(0x30))), "extension 2.5.29.30"},
		{"fail_subject_key_id", withExt(ext(oid(2, 5, 29, 14), tlv(4, []byte{1}))), "extension 2.5.29.14"},
		{"fail_unknown_extension", withExt(ext(oid(1, 2, 3, 4), derNull)), "extension 1.2.3.4"},
		{"fail_extension_beside_uri", withExt(san(uri(id)), ext(oid(1, 2, 3, 4), derNull)), "extension 1.2.3.4"},
		{"fail_two_extension_requests", with(extReq(san(uri(id))), extReq(san(uri(id)))), "csr: "},
		{"fail_extension_request_two_values", with(attr(oid(1, 2, 840, 113549, 1, 9, 14), tlv(0x30, san(uri(id))), tlv(0x30, ext(basic, tlv(0x30, derTrue))))), "csr: "},
		{"fail_extension_request_no_value", with(attr(oid(1, 2, 840, 113549, 1, 9, 14))), "csr: "},
		{"fail_challenge_password", with(attr(oid(1, 2, 840, 113549, 1, 9, 7), tlv(0x0c, []byte("secret")))), "attribute 1.2.840.113549.1.9.7"},
		{"fail_unknown_attribute", with(attr(oid(1, 2, 3, 4), derNull)), "attribute 1.2.3.4"},
		{"fail_attribute_beside_extension_request", with(extReq(san(uri(id))), attr(oid(1, 2, 3, 4), derNull)), "2 attributes"},
		{"fail_attribute_not_a_sequence", with(derNull), "csr: "},
	}
}

// lengthBytes returns the outer length of a request as two bytes.
func lengthBytes(der []byte) []byte {
	n := len(content(der))
	return []byte{byte(n >> 8), byte(n)}
}

// content returns what is inside the outer element.
func content(der []byte) []byte {
	var v asn1.RawValue
	if _, err := asn1.Unmarshal(der, &v); err != nil {
		panic(err)
	}
	return v.Bytes
}
