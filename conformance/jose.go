package conformance

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	_ "crypto/sha256" // the hashes of algorithms
	_ "crypto/sha512" // the hashes of algorithms
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"math/big"
	"slices"
	"strings"
	"unicode/utf8"
)

// token is a JWS in compact serialization, taken apart and not believed.
type token struct {
	text      string
	parts     []string
	header    map[string]any
	claims    map[string]any
	signature []byte
}

// parseToken reads a token; what it says is the caller's to judge.
func parseToken(text string) (*token, error) {
	t := &token{text: text, parts: strings.Split(text, ".")}
	if len(t.parts) != 3 {
		return nil, fmt.Errorf("it has %d parts, and not three", len(t.parts))
	}
	var raw [3][]byte
	for i, part := range t.parts {
		var err error
		if raw[i], err = base64.RawURLEncoding.DecodeString(part); err != nil {
			return nil, fmt.Errorf("part %d: %w", i+1, err)
		}
	}
	t.signature = raw[2]
	if err := readJSON(raw[0], &t.header); err != nil {
		return nil, fmt.Errorf("header: %w", err)
	}
	if err := readJSON(raw[1], &t.claims); err != nil {
		return nil, fmt.Errorf("claims: %w", err)
	}
	return t, nil
}

// readJSON reads one value, in UTF-8, and nothing behind it.
func readJSON(raw []byte, into any) error {
	if !utf8.Valid(raw) {
		return errors.New("it is not UTF-8")
	}
	d := json.NewDecoder(bytes.NewReader(raw))
	d.UseNumber()
	if err := d.Decode(into); err != nil {
		return err
	}
	if _, err := d.Token(); err != io.EOF {
		return errors.New("something follows")
	}
	return nil
}

func (t *token) textOf(m map[string]any, name string) string {
	s, _ := m[name].(string)
	return s
}

// audience is the claim aud, whichever of its two forms it has.
func (t *token) audience() []string {
	switch aud := t.claims["aud"].(type) {
	case string:
		return []string{aud}
	case []any:
		var out []string
		for _, v := range aud {
			s, _ := v.(string)
			out = append(out, s)
		}
		return out
	}
	return nil
}

// algorithms are those that the specification allows.
var algorithms = map[string]struct {
	kty   string
	hash  crypto.Hash
	pss   bool
	curve elliptic.Curve
}{
	"RS256": {"RSA", crypto.SHA256, false, nil}, "RS384": {"RSA", crypto.SHA384, false, nil}, "RS512": {"RSA", crypto.SHA512, false, nil},
	"PS256": {"RSA", crypto.SHA256, true, nil}, "PS384": {"RSA", crypto.SHA384, true, nil}, "PS512": {"RSA", crypto.SHA512, true, nil},
	"ES256": {"EC", crypto.SHA256, false, elliptic.P256()}, "ES384": {"EC", crypto.SHA384, false, elliptic.P384()}, "ES512": {"EC", crypto.SHA512, false, elliptic.P521()},
}

// signedBy verifies the signature with a key.
func (t *token) signedBy(key crypto.PublicKey) error {
	alg, ok := algorithms[t.textOf(t.header, "alg")]
	if !ok {
		return errors.New("its algorithm is none of those that are allowed")
	}
	h := alg.hash.New()
	h.Write([]byte(t.parts[0] + "." + t.parts[1]))
	digest := h.Sum(nil)
	switch key := key.(type) {
	case *rsa.PublicKey:
		switch {
		case alg.kty != "RSA":
			return errors.New("the key is RSA, and the algorithm is not")
		case alg.pss:
			return rsa.VerifyPSS(key, alg.hash, digest, t.signature, &rsa.PSSOptions{SaltLength: rsa.PSSSaltLengthEqualsHash})
		}
		return rsa.VerifyPKCS1v15(key, alg.hash, digest, t.signature)
	case *ecdsa.PublicKey:
		size := (key.Curve.Params().BitSize + 7) / 8
		switch {
		case alg.curve != key.Curve:
			return errors.New("the algorithm is not the one of the key")
		case len(t.signature) != 2*size:
			return fmt.Errorf("a signature of %d bytes, want %d", len(t.signature), 2*size)
		case !ecdsa.Verify(key, digest, new(big.Int).SetBytes(t.signature[:size]), new(big.Int).SetBytes(t.signature[size:])):
			return errors.New("it is not of this key")
		}
		return nil
	}
	return fmt.Errorf("a key of type %T", key)
}

// jwk is an entry of a JWK set.
type jwk map[string]any

func (k jwk) text(name string) string {
	s, _ := k[name].(string)
	return s
}

// parseSet reads a JWK set.
func parseSet(raw []byte) (set map[string]any, keys []jwk, err error) {
	if err := readJSON(raw, &set); err != nil {
		return nil, nil, err
	}
	list, ok := set["keys"].([]any)
	if !ok {
		return set, nil, errors.New("it has no array keys")
	}
	for i, v := range list {
		k, ok := v.(map[string]any)
		if !ok {
			return set, nil, fmt.Errorf("key %d is no object", i+1)
		}
		keys = append(keys, k)
	}
	return set, keys, nil
}

// public reads the public key.
func (k jwk) public() (crypto.PublicKey, error) {
	number := func(name string) (*big.Int, error) {
		raw, err := base64.RawURLEncoding.DecodeString(k.text(name))
		if err != nil || len(raw) == 0 {
			return nil, fmt.Errorf("%s is no number in base64url", name)
		}
		return new(big.Int).SetBytes(raw), nil
	}
	switch k.text("kty") {
	case "RSA":
		n, err := number("n")
		if err != nil {
			return nil, err
		}
		e, err := number("e")
		if err != nil {
			return nil, err
		}
		if !e.IsInt64() || e.Int64() > 1<<31-1 {
			return nil, errors.New("e is too large")
		}
		return &rsa.PublicKey{N: n, E: int(e.Int64())}, nil
	case "EC":
		curves := map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384(), "P-521": elliptic.P521()}
		curve, ok := curves[k.text("crv")]
		if !ok {
			return nil, fmt.Errorf("crv %q is not known", k.text("crv"))
		}
		x, err := number("x")
		if err != nil {
			return nil, err
		}
		y, err := number("y")
		if err != nil {
			return nil, err
		}
		size := (curve.Params().BitSize + 7) / 8
		if (x.BitLen()+7)/8 > size || (y.BitLen()+7)/8 > size {
			return nil, errors.New("the point is not on the curve")
		}
		point := append([]byte{4}, append(x.FillBytes(make([]byte, size)), y.FillBytes(make([]byte, size))...)...)
		return ecdsa.ParseUncompressedPublicKey(curve, point)
	}
	return nil, fmt.Errorf("kty %q is not known", k.text("kty"))
}

// secret names a member that is of a private or symmetric key.
func (k jwk) secret() string {
	for _, name := range []string{"d", "p", "q", "dp", "dq", "qi", "oth", "k"} {
		if _, there := k[name]; there {
			return name
		}
	}
	return ""
}

// certificate reads x5c, which has to have exactly one.
func (k jwk) certificate() (*x509.Certificate, error) {
	list, ok := k["x5c"].([]any)
	if !ok {
		return nil, errors.New("it has no array x5c")
	}
	if len(list) != 1 {
		return nil, fmt.Errorf("x5c has %d values", len(list))
	}
	text, _ := list[0].(string)
	der, err := base64.StdEncoding.DecodeString(text)
	if err != nil {
		return nil, fmt.Errorf("x5c: %w", err)
	}
	return x509.ParseCertificate(der)
}

// with returns the keys that have a use.
func with(keys []jwk, use string) (out []jwk) {
	return slices.DeleteFunc(slices.Clone(keys), func(k jwk) bool { return k.text("use") != use })
}
