package hostile

import (
	"bytes"
	"fmt"
	"math/rand/v2"
	"slices"
	"time"
)

// encodings: a good certificate that is written otherwise, cut short or changed
// in one bit.
func (c *corpus) encodings() {
	good := c.issue(idWeb)
	put := func(name string, der []byte) { c.hostile("encoding", name, der) }
	body := good[4:] // the header has two bytes of length
	put("empty", nil)
	put("trailing byte", append(bytes.Clone(good), 0))
	put("trailing certificate", append(bytes.Clone(good), c.foreign.der...))
	put("indefinite length", slices.Concat([]byte{0x30, 0x80}, body, []byte{0, 0}))
	put("length that is not minimal", slices.Concat([]byte{0x30, 0x83, 0}, good[2:]))
	put("a set", slices.Concat([]byte{0x31}, good[1:]))
	put("twice wrapped", seq(good))
	put("PEM", []byte("-----BEGIN CERTIFICATE-----\nMAA=\n-----END CERTIFICATE-----\n"))
	put("text", []byte("spiffe://mesh.test/ns/shop/sa/web"))
	put("length beyond its end", slices.Concat([]byte{0x30, 0x84, 0x7f, 0xff, 0xff, 0xff}, body))
	for i := range 40 {
		put(fmt.Sprintf("cut short at %d/40", i), good[:len(good)*i/40])
	}
	rng := rand.New(rand.NewPCG(seed, 1))
	seen := map[int]bool{}
	for len(seen) < 300 {
		bit := rng.IntN(8 * len(good))
		if seen[bit] {
			continue
		}
		seen[bit] = true
		changed := bytes.Clone(good)
		changed[bit/8] ^= 1 << (bit % 8)
		put(fmt.Sprintf("bit %d changed", bit), changed)
	}
}

// chains: what does not lead from the leaf to the root.
func (c *corpus) chains() {
	put := func(name string, chain ...[]byte) {
		c.add(testCase{family: "chain", name: name, key: c.keys.p256, chain: chain})
	}
	below := func(name string, a *authority, more ...[]byte) {
		put(name, append([][]byte{c.leaf(a, idWeb), a.der}, more...)...)
		put(name+", for the control plane", append([][]byte{c.leaf(a, idControl), a.der}, more...)...)
	}
	put("without the intermediate", c.issue(idWeb))
	put("the wrong intermediate", c.issue(idWeb), c.authority("signet intermediate", "other", c.root).der)
	put("the root in the place of the intermediate", c.issue(idWeb), c.root.der)
	put("of the foreign root", c.leaf(c.foreign, idWeb))
	put("of the foreign root, with it", c.leaf(c.foreign, idWeb), c.foreign.der)
	put("of the foreign root, with the real one", c.leaf(c.foreign, idWeb), c.root.der)
	put("a certificate of another leads", c.leaf(c.foreign, idServer), c.issue(idWeb), c.intermediate.der)
	put("the intermediate leads", c.intermediate.der, c.issue(idWeb))
	put("the intermediate alone", c.intermediate.der)
	put("the root alone", c.root.der)

	self := func(name string, edits ...edit) {
		put(name, c.leaf(&authority{name: commonName("web"), key: c.keys.p256, id: c.root.id}, idWeb, append(edits, func(k *cert) { k.subject = commonName("web") })...))
	}
	self("signed by itself")
	self("signed by itself as an authority", replace(oidBasic, criticalExt(oidBasic, seq(derTrue))))
	put("signed by itself in the root's name", c.leaf(&authority{name: c.root.name, key: c.keys.p256, id: c.root.id}, idWeb, func(k *cert) { k.subject = c.root.name }))

	foreign := c.authority("signet intermediate", "foreign intermediate", c.foreign)
	below("a foreign intermediate", foreign)
	below("a foreign intermediate with its root", foreign, c.foreign.der)
	below("a foreign intermediate with the real root", foreign, c.root.der)
	cross := newAuthority(c.caCert(c.intermediate.name, c.intermediate.key, c.foreign), c.intermediate.key)
	below("cross-signed, the foreign way only", cross)
	below("cross-signed, the foreign way and its root", cross, c.foreign.der)

	for name, edits := range map[string][]edit{
		"says that it is none":          {replace(oidBasic, criticalExt(oidBasic, seq()))},
		"does not say that it is one":   {replace(oidBasic)},
		"may not sign certificates":     {replace(oidKeyUsage, criticalExt(oidKeyUsage, keyUsage(digitalSignature)))},
		"may sign revocations only":     {replace(oidKeyUsage, criticalExt(oidKeyUsage, keyUsage(crlSign)))},
		"has expired":                   {func(k *cert) { k.to = stamp(c.now.Add(-time.Hour)) }},
		"is not valid yet":              {func(k *cert) { k.from = stamp(c.now.Add(3 * time.Hour)) }},
		"was signed by another":         {func(k *cert) { k.signer = c.foreign.key }},
		"was signed with SHA-1":         {func(k *cert) { k.alg, k.hash = ecdsaSHA1, 3 }},
		"is of version 1":               {func(k *cert) { k.version, k.noExts = []byte{}, true }},
		"has an unknown critical part":  {add(criticalExt(oid(1, 2, 3, 4), derNull))},
		"is for servers only":           {add(ext(oidEKU, seq(serverAuth)))},
		"is for signing code":           {add(ext(oidEKU, seq(codeSigning)))},
		"may name another domain only":  {add(criticalExt(oidConstraints, seq(tlv(0xa0, seq(uri("other.test"))))))},
		"may name hosts below only":     {add(criticalExt(oidConstraints, seq(tlv(0xa0, seq(uri(".mesh.test"))))))},
		"may not name this domain":      {add(criticalExt(oidConstraints, seq(tlv(0xa1, seq(uri("mesh.test"))))))},
		"has constraints, not critical": {add(ext(oidConstraints, seq(tlv(0xa1, seq(uri("mesh.test"))))))},
		"has garbled constraints":       {add(criticalExt(oidConstraints, derNull))},
		"has an empty constraint":       {add(criticalExt(oidConstraints, seq(tlv(0xa0))))},
		"has a constraint by address":   {add(criticalExt(oidConstraints, seq(tlv(0xa0, seq(uri("10.0.0.1"))))))},
		"has the issuer's name wrong":   {func(k *cert) { k.issuer = commonName("another root") }},
		"has a huge serial number":      {func(k *cert) { k.serial = append([]byte{1}, make([]byte, 64)...) }},
		"has a negative serial number":  {func(k *cert) { k.serial = []byte{0xff} }},
	} {
		below("an intermediate that "+name, c.authority("signet intermediate", "bad "+name, c.root, edits...))
	}

	// Path lengths.
	zero := c.authority("signet intermediate", "zero", c.root, replace(oidBasic, criticalExt(oidBasic, seq(derTrue, tlv(2, []byte{0})))))
	lower := c.authority("lower", "lower", zero)
	below("an authority below one of path length 0", lower, zero.der)
	one := c.authority("one", "one", c.root, replace(oidBasic, criticalExt(oidBasic, seq(derTrue, tlv(2, []byte{1})))))
	second := c.authority("second", "second", one)
	third := c.authority("third", "third below one", second)
	below("three below one of path length 1", third, second.der, one.der)

	// A workload that signs for others.
	leaf := c.keys.p256
	worker := &authority{name: commonName("worker"), key: leaf, id: c.root.id}
	worker.der = c.issue(idServer, func(k *cert) { k.subject = worker.name })
	below("a workload signs", worker, c.intermediate.der)
	worker = &authority{name: commonName("worker 2"), key: leaf, id: c.root.id}
	worker.der = c.issue(idServer, func(k *cert) { k.subject = worker.name },
		replace(oidKeyUsage, criticalExt(oidKeyUsage, keyUsage(digitalSignature, keyCertSign))))
	below("a workload signs that may sign", worker, c.intermediate.der)

	// Chains that take long to look at.
	for _, n := range []int{9, 12, 20} {
		by := c.intermediate
		chain := [][]byte{by.der}
		for i := range n {
			by = c.authority(fmt.Sprint("link ", i), fmt.Sprint("link ", n, i), by)
			chain = append([][]byte{by.der}, chain...)
		}
		put(fmt.Sprintf("of %d authorities", n+1), append([][]byte{c.leaf(by, idWeb)}, chain...)...)
	}
	var many [][]byte
	for i := range 60 {
		many = append(many, c.authority("signet intermediate", fmt.Sprint("many ", i), c.root).der)
	}
	put("with 60 authorities of one name", append([][]byte{c.issue(idWeb)}, many...)...)
	loop := c.authority("loop a", "loop a", &authority{name: commonName("loop b"), key: c.keys.other, id: c.foreign.id})
	back := newAuthority(c.caCert(commonName("loop b"), c.keys.other, loop), c.keys.other)
	put("that goes round", c.leaf(loop, idWeb), loop.der, back.der)
}
