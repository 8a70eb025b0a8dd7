package hostile

import (
	"fmt"
	"strings"
	"time"
)

// goodOnes are what everybody must accept, or the refusals show nothing.
func (c *corpus) goodOnes() {
	for _, id := range append(aims, idServer,
		"spiffe://mesh.test/ns/shop/sa/Web", "spiffe://mesh.test/ns/shop/sa/web-1.2_3", "spiffe://mesh.test/ns/.../sa/..a", "spiffe://mesh.test/ns/-/sa/_", "spiffe://mesh.test/ns/ns/sa/sa",
		"spiffe://mesh.test/a", "spiffe://mesh.test/a/b/c/d/e/f/g/h", "spiffe://mesh.test/...", "spiffe://mesh.test/.a/..b/-/_", "spiffe://mesh.test/ns/shop/sa/web/more", "spiffe://mesh.test/0") {
		family := "good"
		if segments := strings.Split(id, "/"); len(segments) != 7 || segments[3] != "ns" || segments[5] != "sa" {
			family = "no workload"
		}
		c.good(family, id, id, c.issue(id))
	}
	longest := idWeb + strings.Repeat("a", 2048-len(idWeb))
	c.good("good", "identity of 2048 bytes", longest, c.issue(longest))

	put := func(name string, edits ...edit) { c.good("good", name, idWeb, c.issue(idWeb, edits...)) }
	put("no extended key usage", replace(oidEKU))
	put("critical extended key usage", replace(oidEKU, criticalExt(oidEKU, seq(serverAuth, clientAuth))))
	put("a third purpose", replace(oidEKU, ext(oidEKU, seq(clientAuth, serverAuth, codeSigning))))
	put("no basic constraints", replace(oidBasic))
	put("no authority key identifier", replace(oidAKI))
	put("key usage for RSA", replace(oidKeyUsage, criticalExt(oidKeyUsage, keyUsage(digitalSignature, keyEncipherment, keyAgreement))))
	put("a DNS name", replace(oidSAN, san(uri(idWeb), dns("web.shop"))))
	put("a DNS name first", replace(oidSAN, san(dns("web.shop"), uri(idWeb))))
	put("an address", replace(oidSAN, san(uri(idWeb), tlv(0x87, []byte{10, 88, 0, 1}))))
	put("a mail address", replace(oidSAN, san(uri(idWeb), email("web@shop.example"))))
	put("a subject", func(c *cert) { c.subject = commonName("web") })
	put("a subject that names another", func(c *cert) { c.subject = commonName(idServer) })
	put("SAN that is not critical, with a subject", func(c *cert) { c.subject = commonName("web") }, replace(oidSAN, ext(oidSAN, seq(uri(idWeb)))))
	put("an extension that nobody knows", add(ext(oid(1, 2, 3, 4), derNull)))
	// Not as it should be written, but everybody reads it alike.
	put("name constraints of its own, which bind nobody", add(criticalExt(oidConstraints, seq(tlv(0xa1, seq(uri("mesh.test")))))))
	put("NULL for the signature's parameters", func(c *cert) { c.alg = seq(oid(1, 2, 840, 10045, 4, 3, 2), derNull) })
	put("criticality that says no", replace(oidEKU, seq(oidEKU, derFalse, tlv(4, seq(serverAuth, clientAuth)))))
	put("basic constraints with an outspoken no", replace(oidBasic, criticalExt(oidBasic, seq(derFalse))))
	put("serial number 1", func(c *cert) { c.serial = []byte{1} })
	put("serial number of 20 bytes", func(c *cert) { c.serial = append([]byte{0x7f}, make([]byte, 19)...) })
	put("until 2050", func(c *cert) { c.to = stamp(time.Date(2050, 1, 1, 0, 0, 0, 0, time.UTC)) })
	put("until the end of time", func(c *cert) { c.to = tlv(0x18, []byte("99991231235959Z")) })

	for name, key := range map[string]testCase{
		"P-384": {key: c.keys.p384}, "RSA 2048": {key: c.keys.rsa2048},
	} {
		c.add(testCase{family: "good", name: "key " + name, good: true, id: idWeb, key: key.key,
			chain: [][]byte{c.issue(idWeb, func(k *cert) { k.spki = spki(key.key.Public()) }), c.intermediate.der}})
	}

	// Chains.
	c.add(testCase{family: "good", name: "below the root", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.leaf(c.root, idWeb)}})
	c.add(testCase{family: "good", name: "with the root", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.issue(idWeb), c.intermediate.der, c.root.der}})
	third := c.authority("third", "third", c.intermediate)
	c.add(testCase{family: "good", name: "two intermediates", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.leaf(third, idWeb), third.der, c.intermediate.der}})
	c.add(testCase{family: "good", name: "in another order", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.leaf(third, idWeb), c.intermediate.der, third.der}})
	c.add(testCase{family: "good", name: "with a stranger", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.issue(idWeb), c.foreign.der, c.intermediate.der}})
	for i, limit := range [][]byte{
		seq(derTrue, tlv(2, []byte{0})), seq(derTrue, tlv(2, []byte{5})),
	} {
		a := c.authority("limited", fmt.Sprint("limited", i), c.root, replace(oidBasic, criticalExt(oidBasic, limit)))
		c.add(testCase{family: "good", name: fmt.Sprint("path length within its limit ", i), good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.leaf(a, idWeb), a.der}})
	}
	for name, permitted := range map[string]string{"the host": "mesh.test"} {
		a := c.authority("constrained", "permitted", c.root, add(criticalExt(oidConstraints, seq(tlv(0xa0, seq(uri(permitted)))))))
		c.add(testCase{family: "good", name: "name constraints permit " + name, good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.leaf(a, idWeb), a.der}})
	}
	a := c.authority("excluding", "excluded", c.root, add(criticalExt(oidConstraints, seq(tlv(0xa1, seq(uri("other.test")))))))
	c.add(testCase{family: "good", name: "name constraints exclude another", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.leaf(a, idWeb), a.der}})
	a = c.authority("pathless", "no id", c.root, replace(oidSAN))
	c.add(testCase{family: "good", name: "an intermediate without SPIFFE ID", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.leaf(a, idWeb), a.der}})
	// Cross-signed: the same authority has a certificate of a root that nobody
	// trusts as well. One way up is enough.
	cross := newAuthority(c.caCert(c.intermediate.name, c.intermediate.key, c.foreign), c.intermediate.key)
	c.add(testCase{family: "good", name: "cross-signed, the trusted way last", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.issue(idWeb), cross.der, c.intermediate.der}})
	c.add(testCase{family: "good", name: "cross-signed, the trusted way first", good: true, id: idWeb, key: c.keys.p256, chain: [][]byte{c.issue(idWeb), c.intermediate.der, cross.der}})
}
