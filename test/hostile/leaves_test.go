package hostile

import (
	"bytes"
	"crypto"
	"fmt"
	"slices"
	"strings"
	"time"
)

// names: what else may stand in, or in the place of, the subject alternative name.
func (c *corpus) names() {
	other := func(value []byte) []byte {
		return tlv(0xa0, oid(1, 3, 6, 1, 4, 1, 311, 20, 2, 3), tlv(0xa0, value)) // a user principal name
	}
	for _, id := range aims {
		_, who, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
		put := func(name string, edits ...edit) { c.hostile("names", name+", "+who, c.issue(id, edits...)) }
		sans := func(name string, names ...[]byte) { put(name, replace(oidSAN, san(names...))) }
		sans("the same URI twice", uri(id), uri(id))
		sans("two identities, the other first", uri(idServer), uri(id))
		sans("two identities, the other last", uri(id), uri(idServer))
		sans("an identity and a web address", uri(id), uri("https://example.com/"))
		sans("a web address and an identity", uri("https://example.com/"), uri(id))
		sans("an identity and the trust domain", uri(id), uri("spiffe://mesh.test"))
		sans("the trust domain and an identity", uri("spiffe://mesh.test"), uri(id))
		sans("an identity and nothing", uri(id), uri(""))
		sans("nothing and an identity", uri(""), uri(id))
		sans("an identity and one of another trust domain", uri(id), uri("spiffe://other.test/ns/shop/sa/web"))
		sans("one of another trust domain and an identity", uri("spiffe://other.test/ns/shop/sa/web"), uri(id))
		sans("two identities, one in upper case", uri(id), uri(strings.ToUpper(id)))
		sans("two identities around a DNS name", uri(id), dns("web.shop"), uri(idServer))
		sans("ten identities", slices.Collect(func(yield func([]byte) bool) {
			for i := range 10 {
				if !yield(uri(fmt.Sprintf("%s%d", id, i))) {
					return
				}
			}
		})...)
		sans("as DNS name only", dns(id))
		sans("as mail address only", email(id))
		sans("as other name only", other(tlv(0x0c, []byte(id))))
		sans("as directory name only", tlv(0xa4, commonName(id)))
		sans("as address only", tlv(0x87, []byte(id)))
		sans("as registered ID only", tlv(0x88, []byte(id)))
		sans("another as DNS name", uri(idServer+"-x"), dns(id))
		sans("a DNS name with a port", uri(id), dns("web.shop:443"))
		sans("a constructed URI", tlv(0xa6, []byte(id)))
		sans("a URI in a UTF8String", tlv(0xa6, tlv(0x0c, []byte(id))))
		sans("a URI in an IA5String", tlv(0xa6, tlv(0x16, []byte(id))))
		sans("a bare IA5String", tlv(0x16, []byte(id)))
		sans("a bare UTF8String", tlv(0x0c, []byte(id)))
		sans("a BMPString", tlv(0x1e, []byte(id)))
		sans("an unknown kind of name", tlv(0x89, []byte(id)))
		sans("no names")
		put("no extension", replace(oidSAN))
		put("not a sequence", replace(oidSAN, criticalExt(oidSAN, uri(id))))
		put("trailing bytes", replace(oidSAN, criticalExt(oidSAN, append(seq(uri(id)), 5, 0))))
		put("empty", replace(oidSAN, criticalExt(oidSAN, nil)))
		put("twice the same", add(san(uri(id))))
		put("twice, another first", replace(oidSAN, san(uri(idServer)), san(uri(id))))
		put("twice, another last", replace(oidSAN, san(uri(id)), san(uri(idServer))))
		put("as common name only", replace(oidSAN), func(k *cert) { k.subject = commonName(id) })
		put("as common name beside a DNS name", replace(oidSAN, san(dns("web.shop"))), func(k *cert) { k.subject = commonName(id) })
		put("as common name in a BMPString", replace(oidSAN), func(k *cert) { k.subject = rdn(oid(2, 5, 4, 3), 0x1e, id) })
		put("as serial number of the subject", replace(oidSAN), func(k *cert) { k.subject = rdn(oid(2, 5, 4, 5), 0x13, id) })
		put("in the issuer's alternative name", replace(oidSAN, ext(oid(2, 5, 29, 18), seq(uri(id)))))
	}
}

// usages: every combination of key usages and purposes that is not a leaf's.
func (c *corpus) usages() {
	for n := range 1 << 7 {
		var numbers []int
		for bit := range 7 {
			if n>>bit&1 == 1 {
				numbers = append(numbers, bit)
			}
		}
		leaf := c.issue(idWeb, replace(oidKeyUsage, criticalExt(oidKeyUsage, keyUsage(numbers...))))
		name := fmt.Sprintf("bits %v", numbers)
		if n&1 == 1 && n>>keyCertSign == 0 {
			c.good("key usage", name, idWeb, leaf)
			continue
		}
		c.hostile("key usage", name, leaf)
	}
	put := func(family, name string, edits ...edit) { c.hostile(family, name, c.issue(idWeb, edits...)) }
	put("key usage", "none", replace(oidKeyUsage))
	put("key usage", "not critical", replace(oidKeyUsage, ext(oidKeyUsage, keyUsage(digitalSignature))))
	put("key usage", "twice", add(criticalExt(oidKeyUsage, keyUsage(digitalSignature))))
	put("key usage", "twice, differing", add(criticalExt(oidKeyUsage, keyUsage(keyCertSign))))
	put("key usage", "an integer", replace(oidKeyUsage, criticalExt(oidKeyUsage, tlv(2, []byte{1}))))
	put("key usage", "trailing bytes", replace(oidKeyUsage, criticalExt(oidKeyUsage, append(keyUsage(digitalSignature), 5, 0))))
	put("key usage", "wrong padding", replace(oidKeyUsage, criticalExt(oidKeyUsage, tlv(3, []byte{9, 0x80}))))
	put("key usage", "empty", replace(oidKeyUsage, criticalExt(oidKeyUsage, nil)))

	purposes := [][]byte{serverAuth, clientAuth, codeSigning, anyPurpose, oid(1, 2, 3, 4)}
	words := []string{"server", "client", "code", "any", "unknown"}
	for n := range 1 << len(purposes) {
		var of [][]byte
		var name []string
		for i := range purposes {
			if n>>i&1 == 1 {
				of, name = append(of, purposes[i]), append(name, words[i])
			}
		}
		if n&3 != 3 { // the good ones have both
			put("purposes", "for "+strings.Join(name, " "), replace(oidEKU, ext(oidEKU, seq(of...))))
			put("purposes", "critical, for "+strings.Join(name, " "), replace(oidEKU, criticalExt(oidEKU, seq(of...))))
		}
	}
	put("purposes", "twice", add(ext(oidEKU, seq(serverAuth, clientAuth))))
	put("purposes", "twice, differing", replace(oidEKU, ext(oidEKU, seq(serverAuth)), ext(oidEKU, seq(clientAuth))))
	put("purposes", "trailing bytes", replace(oidEKU, ext(oidEKU, append(seq(serverAuth, clientAuth), 5, 0))))
	put("purposes", "not a sequence", replace(oidEKU, ext(oidEKU, clientAuth)))

	signs := replace(oidKeyUsage, criticalExt(oidKeyUsage, keyUsage(digitalSignature, keyCertSign)))
	for name, value := range map[string][]byte{
		"CA": seq(derTrue), "CA of path length 0": seq(derTrue, tlv(2, []byte{0})), "CA of path length 3": seq(derTrue, tlv(2, []byte{3})),
	} {
		for _, id := range aims {
			_, who, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
			ca := replace(oidBasic, criticalExt(oidBasic, value))
			c.hostile("authority as leaf", name+", "+who, c.issue(id, ca))
			c.hostile("authority as leaf", name+" that may sign, "+who, c.issue(id, ca, signs))
			c.hostile("authority as leaf", name+" that may only sign, "+who, c.issue(id, ca, replace(oidKeyUsage, criticalExt(oidKeyUsage, keyUsage(keyCertSign, crlSign)))))
			c.hostile("authority as leaf", name+", not critical, "+who, c.issue(id, replace(oidBasic, ext(oidBasic, value))))
		}
	}
	for name, value := range map[string][]byte{
		"no sequence": derTrue, "a number for a truth": seq(tlv(2, []byte{1})), "a negative path length": seq(derTrue, tlv(2, []byte{0xff})),
		"trailing bytes": append(seq(), 5, 0), "a third field": seq(derTrue, tlv(2, []byte{0}), derNull), "empty": nil,
		"half a truth": seq(tlv(1, []byte{1})), "two bytes of truth": seq(tlv(1, []byte{0xff, 0xff})),
	} {
		put("basic constraints", name, replace(oidBasic, criticalExt(oidBasic, value)))
	}
	put("basic constraints", "no CA with a path length", replace(oidBasic, criticalExt(oidBasic, seq(tlv(2, []byte{0})))))
	put("basic constraints", "twice", add(criticalExt(oidBasic, seq())))
	put("basic constraints", "twice, differing", add(criticalExt(oidBasic, seq(derTrue))))
}

// fields: version, serial number, issuer and subject.
func (c *corpus) fields() {
	put := func(family, name string, e edit) { c.hostile(family, name, c.issue(idWeb, e)) }
	for name, v := range map[string][]byte{
		"0": tlv(2, []byte{0}), "1": tlv(2, []byte{1}), "3": tlv(2, []byte{3}), "255": tlv(2, []byte{0, 255}), "negative": tlv(2, []byte{0xff}),
		"of no bytes": tlv(2, nil), "a string": tlv(0x0c, []byte("3")), "not minimal": tlv(2, []byte{0, 2}),
	} {
		put("version", name, func(k *cert) { k.version = tlv(0xa0, v) })
	}
	put("version", "none, with extensions", func(k *cert) { k.version = []byte{} })
	put("version", "none, without extensions", func(k *cert) { k.version, k.noExts = []byte{}, true })
	put("version", "3, without extensions", func(k *cert) { k.noExts = true })
	for name, v := range map[string][]byte{
		"zero": {0}, "minus one": {0xff}, "a large negative": append([]byte{0x80}, make([]byte, 15)...), "of 21 bytes": append([]byte{1}, make([]byte, 20)...),
		"of 64 bytes": append([]byte{1}, make([]byte, 63)...), "of 1000 bytes": append([]byte{1}, make([]byte, 999)...), "of no bytes": {}, "not minimal": {0, 0, 1}, "not minimal, negative": {0xff, 0xff},
		"negative of 21 bytes": append([]byte{0x80}, make([]byte, 20)...),
	} {
		put("serial", name, func(k *cert) { k.serial = v })
	}
	for name, n := range map[string][]byte{
		"empty": seq(), "another": commonName("signet root"), "in upper case": commonName("SIGNET INTERMEDIATE"), "with two spaces": commonName("signet  intermediate"),
		"in another type of string": rdn(oid(2, 5, 4, 3), 0x13, "signet intermediate"), "with NUL": commonName("signet intermediate\x00"), "cut short": commonName("signet"),
		"as organization": rdn(oid(2, 5, 4, 10), 0x0c, "signet intermediate"), "not a sequence": set(), "twice": seq(set(seq(oid(2, 5, 4, 3), tlv(0x0c, []byte("signet intermediate")))), set(seq(oid(2, 5, 4, 3), tlv(0x0c, []byte("signet intermediate"))))),
	} {
		put("issuer", name, func(k *cert) { k.issuer = n })
	}
	for name, n := range map[string][]byte{
		"not a sequence": set(), "an attribute that is no pair": seq(set(seq(oid(2, 5, 4, 3)))), "no UTF-8": commonName("\xff"), "an odd BMPString": rdn(oid(2, 5, 4, 3), 0x1e, "abc"), "a garbled PrintableString": rdn(oid(2, 5, 4, 3), 0x13, "a\x00b"), "an empty set": seq(set()),
	} {
		put("subject", name, func(k *cert) { k.subject = n })
	}
}

// times: when it is not valid, and times that are none.
func (c *corpus) times() {
	put := func(name string, from, to []byte) {
		c.hostile("validity", name, c.issue(idWeb, func(k *cert) { k.from, k.to = from, to }))
	}
	past, future := func(d time.Duration) []byte { return stamp(c.now.Add(-d)) }, func(d time.Duration) []byte { return stamp(c.now.Add(d)) }
	const day = 24 * time.Hour
	for name, d := range map[string]time.Duration{"a second": time.Second, "a minute": time.Minute, "an hour": time.Hour, "a day": day, "a year": 365 * day, "ten years": 3650 * day, "forty years": 40 * 365 * day} {
		put("expired "+name+" ago", past(d+60*365*day/2), past(d))
		put("valid in "+name+" and two hours", future(d+2*time.Hour), future(d+100*day))
		put("turned round by "+name, future(d), past(d))
	}
	put("a moment long, in the past", past(day), past(day))
	put("since 1950", utc(time.Date(1950, 1, 1, 0, 0, 0, 0, time.UTC)), past(day))
	put("until 1950", past(day), utc(time.Date(1950, 1, 1, 0, 0, 0, 0, time.UTC)))
	put("from 2050", stamp(time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC)), tlv(0x18, []byte("99991231235959Z")))
	put("until year 0", past(day), tlv(0x18, []byte("00000101000000Z")))
	good := future(6 * time.Hour)
	for name, from := range map[string][]byte{
		"no seconds": tlv(0x17, []byte("2001010000Z")), "an offset": tlv(0x17, []byte("200101000000+0100")), "no zone": tlv(0x17, []byte("200101000000")),
		"month 13": tlv(0x17, []byte("201301000000Z")), "30 February": tlv(0x17, []byte("200230000000Z")), "hour 24": tlv(0x17, []byte("200101240000Z")), "second 61": tlv(0x17, []byte("200101000061Z")),
		"fractions": tlv(0x18, []byte("20200101000000.5Z")), "a GeneralizedTime with offset": tlv(0x18, []byte("20200101000000+0100")), "empty": tlv(0x17), "letters": tlv(0x17, []byte("yesterday!!!Z")),
		"an integer": tlv(2, []byte{1}), "NUL in it": tlv(0x17, []byte("20010100000\x00Z")), "trailing letters": tlv(0x17, []byte("200101000000Zx")), "spaces": tlv(0x17, []byte("20 101000000Z")), "a sign": tlv(0x17, []byte("-20101000000Z")),
	} {
		put("from "+name, from, good)
		put("until "+name, past(day), bytes.Replace(from, []byte("20"), []byte("40"), 1))
	}
}

// signatures: whatever does not prove that the authority signed this.
func (c *corpus) signatures() {
	put := func(name string, e edit) { c.hostile("signature", name, c.issue(idWeb, e)) }
	put("of another key", func(k *cert) { k.signer = c.keys.other })
	put("of the leaf's own key", func(k *cert) { k.signer = c.keys.p256 })
	put("of the foreign root", func(k *cert) { k.signer = c.foreign.key })
	put("of the root", func(k *cert) { k.signer = c.root.key })
	put("with SHA-1", func(k *cert) { k.alg, k.hash = ecdsaSHA1, crypto.SHA1 })
	put("said to be SHA-384", func(k *cert) { k.alg = ecdsaSHA384 })
	put("said to be RSA", func(k *cert) { k.alg = rsaSHA256 })
	put("said to be RSA with SHA-1", func(k *cert) { k.alg = rsaSHA1 })
	put("said to be RSA with MD5", func(k *cert) { k.alg = rsaMD5 })
	put("said to be Ed25519", func(k *cert) { k.alg = seq(oid(1, 3, 101, 112)) })
	put("of an unknown kind", func(k *cert) { k.alg = seq(oid(1, 2, 3, 4)) })
	put("said otherwise outside: SHA-384", func(k *cert) { k.outer = ecdsaSHA384 })
	put("said otherwise outside: SHA-1", func(k *cert) { k.outer = ecdsaSHA1 })
	put("said otherwise inside", func(k *cert) { k.alg, k.outer = ecdsaSHA384, ecdsaSHA256 })
	put("empty", func(k *cert) { k.signature = func([]byte) []byte { return nil } })
	put("of zeros", func(k *cert) { k.signature = func(s []byte) []byte { return make([]byte, len(s)) } })
	put("of two zeros", func(k *cert) { k.signature = func([]byte) []byte { return seq(tlv(2, []byte{0}), tlv(2, []byte{0})) } })
	put("of two ones", func(k *cert) { k.signature = func([]byte) []byte { return seq(tlv(2, []byte{1}), tlv(2, []byte{1})) } })
	put("of two negatives", func(k *cert) {
		k.signature = func([]byte) []byte { return seq(tlv(2, []byte{0xff}), tlv(2, []byte{0xff})) }
	})
	put("with trailing bytes", func(k *cert) { k.signature = func(s []byte) []byte { return append(s, 0) } })
	put("cut short", func(k *cert) { k.signature = func(s []byte) []byte { return s[:len(s)-1] } })
	for i := range 24 {
		put(fmt.Sprintf("with byte %d changed", 4+2*i), func(k *cert) {
			k.signature = func(s []byte) []byte { s = bytes.Clone(s); s[4+2*i] ^= 1; return s }
		})
	}
	for _, a := range []struct {
		name string
		alg  []byte
		hash crypto.Hash
	}{{"RSA with MD5", rsaMD5, crypto.MD5}, {"RSA with SHA-1", rsaSHA1, crypto.SHA1}, {"RSA of 1024 bits", rsaSHA256, crypto.SHA256}} {
		var key crypto.Signer = c.keys.rsa2048
		if a.hash == crypto.SHA256 {
			key = c.keys.rsa1024
		}
		by := newAuthority(c.caCert(commonName("rsa "+a.name), c.root.key, c.root, func(k *cert) { k.spki = spki(key.Public()) }), key)
		c.add(testCase{family: "signature", name: "of an authority with " + a.name, key: c.keys.p256,
			chain: [][]byte{c.leaf(by, idWeb, func(k *cert) { k.alg, k.hash = a.alg, a.hash }), by.der}})
	}
}

// publicKey is a key, in DER, and with what a presenter would prove it.
type publicKey struct {
	name string
	spki []byte
	key  crypto.Signer
}

// publicKeysOf are keys that are weak, broken, or not for signing.
func publicKeysOf(p *pki) (out []publicKey) {
	with := func(name string, spki []byte, key crypto.Signer) { out = append(out, publicKey{name, spki, key}) }
	point := must(p.keys.p256.PublicKey.Bytes())
	ec := func(curve, point []byte) []byte { return seq(seq(ecKey, curve), bits(point)) }
	change := func(i int) []byte { q := bytes.Clone(point); q[i] ^= 1; return q }
	with("P-224", spki(p.keys.p224.Public()), p.keys.p224)
	with("P-521", spki(p.keys.p521.Public()), p.keys.p521)
	with("Ed25519", spki(p.keys.ed25519.Public()), p.keys.ed25519)
	with("RSA 1024", spki(p.keys.rsa1024.Public()), p.keys.rsa1024)
	with("X25519", seq(seq(oid(1, 3, 101, 110)), bits(make([]byte, 32))), p.keys.p256)
	with("of an unknown kind", seq(seq(oid(1, 2, 3, 4)), bits(point)), p.keys.p256)
	with("DSA", seq(seq(oid(1, 2, 840, 10040, 4, 1), seq(tlv(2, []byte{7}), tlv(2, []byte{3}), tlv(2, []byte{2}))), bits(tlv(2, []byte{2}))), p.keys.p256)
	with("a point off the curve", ec(curveP256, change(64)), p.keys.p256)
	with("a point off the curve, the other coordinate", ec(curveP256, change(1)), p.keys.p256)
	with("infinity", ec(curveP256, []byte{0}), p.keys.p256)
	with("zeros", ec(curveP256, append([]byte{4}, make([]byte, 64)...)), p.keys.p256)
	with("too large a coordinate", ec(curveP256, append([]byte{4}, bytes.Repeat([]byte{0xff}, 64)...)), p.keys.p256)
	with("a compressed point", ec(curveP256, append([]byte{2 + point[64]&1}, point[1:33]...)), p.keys.p256)
	with("a hybrid point", ec(curveP256, append([]byte{6 + point[64]&1}, point[1:]...)), p.keys.p256)
	with("half a point", ec(curveP256, point[:33]), p.keys.p256)
	with("a point and more", ec(curveP256, append(bytes.Clone(point), 0)), p.keys.p256)
	with("a point of another curve", ec(oid(1, 3, 132, 0, 34), point), p.keys.p256)
	with("secp256k1", ec(oid(1, 3, 132, 0, 10), point), p.keys.p256)
	with("brainpool", ec(oid(1, 3, 36, 3, 3, 2, 8, 1, 1, 7), point), p.keys.p256)
	with("no curve", seq(seq(ecKey), bits(point)), p.keys.p256)
	with("NULL for a curve", ec(derNull, point), p.keys.p256)
	with("a curve of its own", ec(seq(tlv(2, []byte{1})), point), p.keys.p256)
	with("no bits", ec(curveP256, nil), p.keys.p256)
	with("unused bits", seq(seq(ecKey, curveP256), tlv(3, []byte{1}, point)), p.keys.p256)
	rsaOf := func(n []byte, e ...byte) []byte { return seq(rsaKey, bits(seq(tlv(2, n), tlv(2, e)))) }
	n := append([]byte{0}, p.keys.rsa2048.N.Bytes()...)
	even := bytes.Clone(n)
	even[len(even)-1] &^= 1
	with("RSA with exponent 3", rsaOf(n, 3), p.keys.rsa2048)
	with("RSA with exponent 1", rsaOf(n, 1), p.keys.rsa2048)
	with("RSA with exponent 0", rsaOf(n, 0), p.keys.rsa2048)
	with("RSA with an even exponent", rsaOf(n, 1, 0, 2), p.keys.rsa2048)
	with("RSA with a negative exponent", rsaOf(n, 0xff), p.keys.rsa2048)
	with("RSA with a huge exponent", rsaOf(n, bytes.Repeat([]byte{0x7f}, 64)...), p.keys.rsa2048)
	with("RSA with an even modulus", rsaOf(even, 1, 0, 1), p.keys.rsa2048)
	with("RSA with a negative modulus", rsaOf(n[1:], 1, 0, 1), p.keys.rsa2048)
	with("RSA with modulus 0", rsaOf([]byte{0}, 1, 0, 1), p.keys.rsa2048)
	with("RSA of 32768 bits", rsaOf(append([]byte{0x7f}, bytes.Repeat([]byte{0xff}, 4095)...), 1, 0, 1), p.keys.rsa2048)
	with("RSA without parameters", seq(seq(oid(1, 2, 840, 113549, 1, 1, 1)), bits(seq(tlv(2, n), tlv(2, []byte{1, 0, 1})))), p.keys.rsa2048)
	with("RSA for PSS only", seq(seq(oid(1, 2, 840, 113549, 1, 1, 10)), bits(seq(tlv(2, n), tlv(2, []byte{1, 0, 1})))), p.keys.rsa2048)
	return out
}

// publicKeys: each of those in a certificate, and good ones without their key.
func (c *corpus) publicKeys() {
	for _, k := range publicKeysOf(c.pki) {
		c.add(testCase{family: "public key", name: k.name, key: k.key, chain: [][]byte{c.issue(idWeb, func(e *cert) { e.spki = k.spki }), c.intermediate.der}})
	}

	// A certificate that was seen on the wire, without its key.
	for _, id := range append(aims, idServer) {
		c.add(testCase{family: "without its key", name: "another key of its kind, " + id, key: c.keys.other, chain: [][]byte{c.issue(id), c.intermediate.der}})
		c.add(testCase{family: "without its key", name: "a key of another kind, " + id, key: c.keys.rsa2048, chain: [][]byte{c.issue(id), c.intermediate.der}})
	}
}

// extensions: those that must be understood, and are not, and those that are
// there twice.
func (c *corpus) extensions() {
	put := func(name string, edits ...edit) { c.hostile("extension", name, c.issue(idWeb, edits...)) }
	unknown := oid(1, 2, 3, 4)
	put("unknown and critical", add(criticalExt(unknown, derNull)))
	put("unknown and critical, empty", add(criticalExt(unknown, nil)))
	put("unknown and critical, first", func(k *cert) { k.exts = append([][]byte{criticalExt(unknown, derNull)}, k.exts...) })
	put("unknown, twice", add(ext(unknown, derNull), ext(unknown, derNull)))
	put("unknown, critical once", add(ext(unknown, derNull), criticalExt(unknown, derNull)))
	put("poison", add(criticalExt(oid(1, 3, 6, 1, 4, 1, 11129, 2, 4, 3), derNull)))
	put("policy constraints that want a policy", add(criticalExt(oidPolicyLimit, seq(tlv(0x80, []byte{0})))))
	put("policies that cannot be read", add(criticalExt(oidPolicies, derNull)))
	put("inhibit any policy, garbled", add(criticalExt(oid(2, 5, 29, 54), derNull)))
	put("authority key identifier of another", replace(oidAKI, ext(oidAKI, seq(tlv(0x80, c.foreign.id)))))
	put("authority key identifier twice", add(ext(oidAKI, seq(tlv(0x80, c.intermediate.id)))))
	put("authority key identifier, garbled", replace(oidAKI, ext(oidAKI, derNull)))
	put("subject key identifier twice", add(ext(oidSKI, tlv(4, []byte{1})), ext(oidSKI, tlv(4, []byte{1}))))
	put("subject key identifier, garbled", add(ext(oidSKI, derNull)))
	put("criticality of another value", replace(oidEKU, seq(oidEKU, tlv(1, []byte{1}), tlv(4, seq(serverAuth, clientAuth)))))
	put("without a value", add(seq(unknown)))
	put("with two values", add(seq(unknown, tlv(4, derNull), tlv(4, derNull))))
	put("a value that is no OCTET STRING", add(seq(unknown, derNull)))
	put("without a name", add(seq(tlv(6), tlv(4, derNull))))
	put("a number for a name", add(seq(tlv(2, []byte{1}), tlv(4, derNull))))
	put("no extensions in the list", func(k *cert) { k.exts = nil })
	for name, critical := range map[string][]byte{"key usage": oidKeyUsage, "extended key usage": oidEKU, "basic constraints": oidBasic, "subject alternative name": oidSAN} {
		put("garbled "+name, replace(critical, criticalExt(critical, []byte{0x30, 0x7f, 1})))
	}
}
