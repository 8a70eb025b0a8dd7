package hostile

import (
	"encoding/asn1"
	"slices"
	"time"
)

// DER is written by hand, since Go refuses to write most of what is wanted here.

// tlv writes one element.
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

func seq(parts ...[]byte) []byte { return tlv(0x30, parts...) }
func set(parts ...[]byte) []byte { return tlv(0x31, parts...) }

// bits is a BIT STRING of whole bytes.
func bits(b []byte) []byte { return tlv(3, []byte{0}, b) }

func oid(ids ...int) []byte { return must(asn1.Marshal(asn1.ObjectIdentifier(ids))) }

func must[T any](v T, err error) T {
	if err != nil {
		panic(err)
	}
	return v
}

var (
	derNull  = []byte{5, 0}
	derTrue  = []byte{1, 1, 0xff}
	derFalse = []byte{1, 1, 0}
)

// Extensions.
var (
	oidSKI         = oid(2, 5, 29, 14)
	oidKeyUsage    = oid(2, 5, 29, 15)
	oidSAN         = oid(2, 5, 29, 17)
	oidBasic       = oid(2, 5, 29, 19)
	oidConstraints = oid(2, 5, 29, 30)
	oidPolicies    = oid(2, 5, 29, 32)
	oidAKI         = oid(2, 5, 29, 35)
	oidPolicyLimit = oid(2, 5, 29, 36)
	oidEKU         = oid(2, 5, 29, 37)
)

func ext(id, value []byte) []byte         { return seq(id, tlv(4, value)) }
func criticalExt(id, value []byte) []byte { return seq(id, derTrue, tlv(4, value)) }

// Names in a subject alternative name.
func uri(s string) []byte   { return tlv(0x86, []byte(s)) }
func dns(s string) []byte   { return tlv(0x82, []byte(s)) }
func email(s string) []byte { return tlv(0x81, []byte(s)) }

// san is the extension as it must be where there is no subject: critical.
func san(names ...[]byte) []byte { return criticalExt(oidSAN, seq(names...)) }

// rdn is a Name with one attribute.
func rdn(attr []byte, kind byte, value string) []byte {
	return seq(set(seq(attr, tlv(kind, []byte(value)))))
}

func commonName(s string) []byte { return rdn(oid(2, 5, 4, 3), 0x0c, s) }

// Times. What X.509 wants is UTCTime until 2049 and GeneralizedTime after.
func utc(t time.Time) []byte         { return tlv(0x17, []byte(t.UTC().Format("060102150405Z"))) }
func generalized(t time.Time) []byte { return tlv(0x18, []byte(t.UTC().Format("20060102150405Z"))) }

func stamp(t time.Time) []byte {
	if t.UTC().Year() < 2050 {
		return utc(t)
	}
	return generalized(t)
}

// keyUsage numbers bits as RFC 5280 does: 0 is digitalSignature.
func keyUsage(numbers ...int) []byte {
	var b [2]byte
	last := -1
	for _, n := range numbers {
		b[n/8] |= 0x80 >> (n % 8)
		last = max(last, n)
	}
	if last < 0 {
		return tlv(3, []byte{0})
	}
	return tlv(3, []byte{byte(7 - last%8)}, b[:last/8+1])
}

const (
	digitalSignature = 0
	keyEncipherment  = 2
	keyAgreement     = 4
	keyCertSign      = 5
	crlSign          = 6
)

// Purposes.
var (
	serverAuth  = oid(1, 3, 6, 1, 5, 5, 7, 3, 1)
	clientAuth  = oid(1, 3, 6, 1, 5, 5, 7, 3, 2)
	codeSigning = oid(1, 3, 6, 1, 5, 5, 7, 3, 3)
	anyPurpose  = oid(2, 5, 29, 37, 0)
)

// Signature algorithms and kinds of keys.
var (
	ecdsaSHA1   = seq(oid(1, 2, 840, 10045, 4, 1))
	ecdsaSHA256 = seq(oid(1, 2, 840, 10045, 4, 3, 2))
	ecdsaSHA384 = seq(oid(1, 2, 840, 10045, 4, 3, 3))
	rsaMD5      = seq(oid(1, 2, 840, 113549, 1, 1, 4), derNull)
	rsaSHA1     = seq(oid(1, 2, 840, 113549, 1, 1, 5), derNull)
	rsaSHA256   = seq(oid(1, 2, 840, 113549, 1, 1, 11), derNull)
	rsaKey      = seq(oid(1, 2, 840, 113549, 1, 1, 1), derNull)
	ecKey       = oid(1, 2, 840, 10045, 2, 1)
	curveP256   = oid(1, 2, 840, 10045, 3, 1, 7)
)
