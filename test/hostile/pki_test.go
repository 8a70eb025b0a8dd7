package hostile

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/md5" //nolint:gosec // so that it can be refused
	"crypto/rsa"
	"crypto/sha1" //nolint:gosec // so that it can be refused
	"crypto/sha256"
	"crypto/sha512"
	"crypto/x509"
	"io"
	"math/big"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

const (
	trustDomain = "mesh.test"
	idWeb       = "spiffe://mesh.test/ns/shop/sa/web" // may call, by name
	idDB        = "spiffe://mesh.test/ns/shop/sa/db"  // may call, by a pattern
	idOther     = "spiffe://mesh.test/ns/else/sa/web" // may not
	idControl   = "spiffe://mesh.test/signet/control"
	idNode      = "spiffe://mesh.test/signet/node/n1"
	idServer    = "spiffe://mesh.test/ns/shop/sa/server"
)

// aims are whom a hostile certificate may want to be taken for.
var aims = []string{idWeb, idDB, idOther, idControl, idNode}

// seed makes the corpus the same in every run, with the clock's hour.
const seed = 20261123

// keys are those that leaves are for.
type keys struct {
	p256, p384, p521, p224, other *ecdsa.PrivateKey
	rsa2048, rsa1024              *rsa.PrivateKey
	ed25519                       ed25519.PrivateKey
}

// curveKey derives a key from its name.
func curveKey(curve elliptic.Curve, name string) *ecdsa.PrivateKey {
	sum := sha512.Sum512([]byte(name))
	b := make([]byte, (curve.Params().BitSize+7)/8)
	copy(b[1:], sum[:]) // the first byte is zero: below the order of every curve
	return must(ecdsa.ParseRawPrivateKey(curve, b))
}

// rsaFrom derives a key from its name. It does so itself: the standard library makes
// RSA keys from the process's random source alone, and to replace that is a race with
// each connection that a test before has left to end.
func rsaFrom(name string, size int) *rsa.PrivateKey {
	stream := rand.NewChaCha8(sha256.Sum256([]byte(name)))
	one, e := big.NewInt(1), big.NewInt(65537)
	for {
		p, q := primeFrom(stream, size/2), primeFrom(stream, size/2)
		phi := new(big.Int).Mul(new(big.Int).Sub(p, one), new(big.Int).Sub(q, one))
		d := new(big.Int).ModInverse(e, phi)
		if d == nil || p.Cmp(q) == 0 {
			continue
		}
		k := &rsa.PrivateKey{PublicKey: rsa.PublicKey{N: new(big.Int).Mul(p, q), E: int(e.Int64())}, D: d, Primes: []*big.Int{p, q}}
		k.Precompute()
		if err := k.Validate(); err != nil {
			panic(err)
		}
		return k
	}
}

// primeFrom is the first prime of that many bits, a multiple of 8, in a stream.
func primeFrom(stream io.Reader, size int) *big.Int {
	b := make([]byte, size/8)
	for {
		_, _ = io.ReadFull(stream, b) // the stream does not end
		b[0] |= 0xc0                  // a product of two such has twice the bits
		b[len(b)-1] |= 1
		if p := new(big.Int).SetBytes(b); p.ProbablyPrime(20) {
			return p
		}
	}
}

// leafKeys are the same in every run.
var leafKeys = sync.OnceValue(func() keys {
	sum := sha256.Sum256([]byte("ed25519"))
	return keys{
		p256: curveKey(elliptic.P256(), "leaf"), other: curveKey(elliptic.P256(), "other"),
		p384: curveKey(elliptic.P384(), "leaf"), p521: curveKey(elliptic.P521(), "leaf"), p224: curveKey(elliptic.P224(), "leaf"),
		rsa2048: rsaFrom("leaf", 2048), rsa1024: rsaFrom("leaf", 1024),
		ed25519: ed25519.NewKeyFromSeed(sum[:]),
	}
})

// authority signs whatever it is told to.
type authority struct {
	der  []byte // its certificate
	name []byte // its subject
	key  crypto.Signer
	id   []byte // of its key
}

func spki(pub crypto.PublicKey) []byte { return must(x509.MarshalPKIXPublicKey(pub)) }

// cert is a certificate whose every part can be wrong.
type cert struct {
	version    []byte // the whole field; nil: v3
	serial     []byte // content of the INTEGER; nil: one that follows from the rest
	alg, outer []byte // AlgorithmIdentifier; outer nil: the same
	issuer     []byte
	from, to   []byte
	subject    []byte
	spki       []byte
	exts       [][]byte
	noExts     bool
	hash       crypto.Hash // zero: SHA-256
	signer     crypto.Signer
	signature  func(sig []byte) []byte // what becomes of the signature
	after      func(der []byte) []byte // what becomes of the certificate
}

// edit changes a certificate before it is signed.
type edit func(*cert)

func (c *cert) der() []byte {
	version := c.version
	if version == nil {
		version = tlv(0xa0, tlv(2, []byte{2}))
	}
	outer := c.outer
	if outer == nil {
		outer = c.alg
	}
	serial := c.serial
	if serial == nil {
		serial = c.ownSerial()
	}
	parts := [][]byte{version, tlv(2, serial), c.alg, c.issuer, seq(c.from, c.to), c.subject, c.spki}
	if !c.noExts {
		parts = append(parts, tlv(0xa3, seq(c.exts...)))
	}
	tbs := seq(parts...)
	sig := signed(c.signer, c.hash, tbs)
	if c.signature != nil {
		sig = c.signature(sig)
	}
	out := seq(tbs, outer, bits(sig))
	if c.after != nil {
		out = c.after(out)
	}
	return out
}

// ownSerial is a serial number of 16 bytes that follows from the rest.
func (c *cert) ownSerial() []byte {
	rest := slices.Concat(c.version, c.alg, c.outer, c.issuer, c.from, c.to, c.subject, c.spki, spki(c.signer.Public()), slices.Concat(c.exts...))
	sum := sha256.Sum256(rest)
	sum[0] = sum[0]&0x3f | 0x40 // positive, and of full length
	return sum[:16]
}

// signed signs the same bytes in the same way in every run.
func signed(key crypto.Signer, hash crypto.Hash, what []byte) []byte {
	var digest []byte
	switch hash {
	case crypto.MD5:
		s := md5.Sum(what) //nolint:gosec // so that it can be refused
		digest = s[:]
	case crypto.SHA1:
		s := sha1.Sum(what) //nolint:gosec // so that it can be refused
		digest = s[:]
	case crypto.SHA384:
		s := sha512.Sum384(what)
		digest = s[:]
	default:
		hash = crypto.SHA256
		s := sha256.Sum256(what)
		digest = s[:]
	}
	if _, ok := key.(ed25519.PrivateKey); ok {
		return must(key.Sign(nil, what, crypto.Hash(0)))
	}
	return must(key.Sign(nil, digest, hash))
}

// pki is a mesh's authorities, and others'.
type pki struct {
	now          time.Time
	keys         keys
	root         *authority // what everybody trusts
	intermediate *authority
	foreign      *authority // a root that nobody trusts, with the same name
}

// clock is the real one: the proxy has no other.
func (p *pki) clock() time.Time { return time.Now() }

func newPKI(now time.Time) *pki {
	p := &pki{now: now, keys: leafKeys()}
	p.root = p.selfSigned("signet root", "root")
	p.foreign = p.selfSigned("signet root", "foreign")
	p.intermediate = p.authority("signet intermediate", "intermediate", p.root)
	return p
}

// caCert is the certificate of an authority, as this project's own look.
func (p *pki) caCert(name []byte, key crypto.Signer, by *authority, edits ...edit) *cert {
	id := sha256.Sum256(spki(key.Public()))
	c := &cert{
		alg: ecdsaSHA256, issuer: name, subject: name,
		from: stamp(p.now.Add(-24 * time.Hour)), to: stamp(p.now.Add(10 * 365 * 24 * time.Hour)),
		spki: spki(key.Public()), signer: key,
		exts: [][]byte{
			criticalExt(oidBasic, seq(derTrue)), criticalExt(oidKeyUsage, keyUsage(keyCertSign, crlSign)),
			ext(oidSAN, seq(uri("spiffe://"+trustDomain))), ext(oidSKI, tlv(4, id[:20])),
		},
	}
	if by != nil {
		c.issuer, c.signer = by.name, by.key
		c.exts = append(c.exts, ext(oidAKI, seq(tlv(0x80, by.id))))
	}
	for _, e := range edits {
		e(c)
	}
	return c
}

func (p *pki) selfSigned(name, key string) *authority {
	k := curveKey(elliptic.P256(), key)
	return newAuthority(p.caCert(commonName(name), k, nil), k)
}

// authority makes one below another.
func (p *pki) authority(name, key string, by *authority, edits ...edit) *authority {
	k := curveKey(elliptic.P256(), key)
	return newAuthority(p.caCert(commonName(name), k, by, edits...), k)
}

func newAuthority(c *cert, key crypto.Signer) *authority {
	id := sha256.Sum256(spki(key.Public()))
	return &authority{der: c.der(), name: c.subject, key: key, id: id[:20]}
}

// leaf is a good certificate for id, as this project's authority issues them,
// unless edits say otherwise.
func (p *pki) leaf(by *authority, id string, edits ...edit) []byte {
	c := &cert{
		alg: ecdsaSHA256, issuer: by.name, subject: seq(),
		from: stamp(p.now.Add(-2 * time.Hour)), to: stamp(p.now.Add(6 * time.Hour)),
		spki: spki(p.keys.p256.Public()), signer: by.key,
		exts: [][]byte{
			criticalExt(oidKeyUsage, keyUsage(digitalSignature)),
			ext(oidEKU, seq(serverAuth, clientAuth)),
			criticalExt(oidBasic, seq()),
			ext(oidAKI, seq(tlv(0x80, by.id))),
			san(uri(id)),
		},
	}
	for _, e := range edits {
		e(c)
	}
	return c.der()
}

// replace puts other extensions, none or several, in the place of those of a kind.
func replace(id []byte, with ...[]byte) edit {
	return func(c *cert) {
		var out [][]byte
		for _, e := range c.exts {
			if !isExt(e, id) {
				out = append(out, e)
			}
		}
		c.exts = append(out, with...)
	}
}

// add appends extensions.
func add(exts ...[]byte) edit {
	return func(c *cert) { c.exts = append(c.exts[:len(c.exts):len(c.exts)], exts...) }
}

func isExt(e, id []byte) bool {
	for head := 2; head <= 4; head++ { // the header's length
		if len(e) >= head+len(id) && string(e[head:head+len(id)]) == string(id) {
			return true
		}
	}
	return false
}

// bundle is what Go's judges trust.
func (p *pki) bundle() *x509bundle.Bundle {
	return x509bundle.FromX509Authorities(spiffeid.RequireTrustDomainFromString(trustDomain),
		[]*x509.Certificate{must(x509.ParseCertificate(p.root.der))})
}
