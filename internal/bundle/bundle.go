// Package bundle reads and writes the document that a trust domain shows to
// others: a JWK set with the keys that its certificates and tokens end at, as
// SPIFFE Trust Domain and Bundle has it. One bundle is of one trust domain, and
// nothing here joins two.
package bundle

import (
	"bytes"
	"cmp"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"maps"
	"math"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Bounds of a document.
const (
	// MaxDocument is how many bytes of a document are read.
	MaxDocument = 1 << 20

	maxKeys  = 256
	maxKeyID = 512 // bytes
	minRSA   = 2048
	maxRSA   = 8192
)

// The uses of a key.
const (
	useX509 = "x509-svid"
	useJWT  = "jwt-svid"
)

// Bundle is what one trust domain trusts itself by. It is immutable, and may be
// shared between goroutines.
type Bundle struct {
	TrustDomain spiffeid.TrustDomain
	// Roots are what certificates end at. Empty: no certificate is trusted.
	Roots []*x509.Certificate
	// JWTKeys verify tokens, by kid. Empty: no token is trusted.
	JWTKeys map[string]crypto.PublicKey
	// Sequence rises with each change of the content; 0: the document does not say.
	Sequence uint64
	// RefreshHint is how often the trust domain wants to be asked; 0: it does not say.
	RefreshHint time.Duration
	// Ignored says which entries were not taken, and why.
	Ignored []string
}

// Parse reads a document of a trust domain. An entry that is of no use here, or
// is not good, is left out, as the specification has it: what it would have
// vouched for is not trusted. It may be called with hostile input.
func Parse(td spiffeid.TrustDomain, data []byte) (*Bundle, error) {
	if td.IsZero() {
		return nil, errors.New("bundle: no trust domain")
	}
	if len(data) > MaxDocument {
		return nil, fmt.Errorf("bundle of %s: %d bytes; at most %d are read", td, len(data), MaxDocument)
	}
	var doc struct {
		Keys     *[]json.RawMessage `json:"keys"`
		Sequence *uint64            `json:"spiffe_sequence"`
		Hint     *int64             `json:"spiffe_refresh_hint"`
	}
	if err := json.Unmarshal(data, &doc); err != nil {
		return nil, fmt.Errorf("bundle of %s: not a JWK set: %w", td, err)
	}
	if doc.Keys == nil {
		return nil, fmt.Errorf("bundle of %s: keys: is missing; a trust domain without keys has an empty list", td)
	}
	if len(*doc.Keys) > maxKeys {
		return nil, fmt.Errorf("bundle of %s: keys: %d; at most %d are read", td, len(*doc.Keys), maxKeys)
	}
	b := &Bundle{TrustDomain: td, JWTKeys: map[string]crypto.PublicKey{}}
	if doc.Sequence != nil {
		b.Sequence = *doc.Sequence
	}
	if doc.Hint != nil && *doc.Hint > 0 {
		b.RefreshHint = time.Duration(min(*doc.Hint, math.MaxInt32)) * time.Second
	}
	for i, raw := range *doc.Keys {
		if err := b.add(raw); err != nil {
			b.Ignored = append(b.Ignored, fmt.Sprintf("keys[%d]: %v", i, err))
		}
	}
	maps.DeleteFunc(b.JWTKeys, func(_ string, key crypto.PublicKey) bool { return key == nil })
	return b, nil
}

func (b *Bundle) add(raw json.RawMessage) error {
	var key struct {
		Use   string   `json:"use"`
		KeyID string   `json:"kid"`
		X5C   []string `json:"x5c"`
	}
	if err := json.Unmarshal(raw, &key); err != nil {
		return err
	}
	switch key.Use {
	case useX509:
		if len(key.X5C) == 0 {
			return errors.New("x5c: is missing")
		}
		return b.addRoot(key.X5C[0]) // the specification ignores the others
	case useJWT:
		return b.addJWTKey(key.KeyID, raw)
	}
	return fmt.Errorf("use: %.64q is not known here", key.Use)
}

func (b *Bundle) addRoot(text string) error {
	der, err := base64.StdEncoding.Strict().DecodeString(text)
	if err != nil {
		return fmt.Errorf("x5c: %w", err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("x5c: %w", err)
	}
	if err := checkRoot(b.TrustDomain, root); err != nil {
		return err
	}
	if !slices.ContainsFunc(b.Roots, root.Equal) {
		b.Roots = append(b.Roots, root)
	}
	return nil
}

// checkRoot refuses what cannot be a root of the trust domain. A certificate
// that names another is not one, whoever shows it.
func checkRoot(td spiffeid.TrustDomain, root *x509.Certificate) error {
	switch {
	case !root.IsCA || !root.BasicConstraintsValid:
		return errors.New("the certificate is no authority's")
	case root.KeyUsage != 0 && root.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("the certificate may not sign others")
	}
	for _, uri := range root.URIs {
		id, err := spiffeid.FromURI(uri)
		switch {
		case err != nil:
			return fmt.Errorf("the certificate names %.256q: %w", uri.String(), err)
		case id.TrustDomain() != td:
			return fmt.Errorf("the certificate is of trust domain %s", id.TrustDomain())
		case id.Path() != "":
			return fmt.Errorf("the certificate names %.256q, and an authority has no path", id)
		}
	}
	return nil
}

func (b *Bundle) addJWTKey(id string, raw json.RawMessage) error {
	if id == "" || len(id) > maxKeyID {
		return fmt.Errorf("kid: %d bytes; want 1 to %d", len(id), maxKeyID)
	}
	one, err := json.Marshal(map[string]any{"keys": []json.RawMessage{raw}})
	if err != nil {
		return err
	}
	parsed, err := spiffebundle.Parse(b.TrustDomain, one)
	if err != nil {
		return err
	}
	key, ok := parsed.FindJWTAuthority(id)
	if !ok {
		return errors.New("no key")
	}
	if err := CheckJWTKey(key); err != nil {
		return err
	}
	if _, twice := b.JWTKeys[id]; twice {
		b.JWTKeys[id] = nil // and not a third one either
		return fmt.Errorf("kid: %.64q is there twice, and neither is taken", id)
	}
	b.JWTKeys[id] = key
	return nil
}

// CheckJWTKey refuses a key that no JWT-SVID may be signed with.
func CheckJWTKey(key crypto.PublicKey) error {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		if k.Curve != elliptic.P256() && k.Curve != elliptic.P384() && k.Curve != elliptic.P521() {
			return fmt.Errorf("a key on the curve %s", k.Curve.Params().Name)
		}
	case *rsa.PublicKey:
		if n := k.N.BitLen(); n < minRSA || n > maxRSA {
			return fmt.Errorf("an RSA key of %d bits; want %d to %d", n, minRSA, maxRSA)
		}
	default:
		return fmt.Errorf("a %T; want ECDSA or RSA", key)
	}
	return nil
}

// Marshal writes the document. The same content is the same bytes, in whatever
// order it was given.
func (b *Bundle) Marshal() ([]byte, error) {
	both := spiffebundle.FromX509Authorities(b.TrustDomain, b.Roots)
	for id, key := range b.JWTKeys {
		if err := both.AddJWTAuthority(id, key); err != nil {
			return nil, err
		}
	}
	raw, err := both.Marshal()
	if err != nil {
		return nil, err
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(raw, &set); err != nil {
		return nil, err
	}
	slices.SortFunc(set.Keys, func(a, b json.RawMessage) int { return bytes.Compare(a, b) })
	out := map[string]any{"keys": append([]json.RawMessage{}, set.Keys...)} // never null
	if b.Sequence > 0 {
		out["spiffe_sequence"] = b.Sequence
	}
	if b.RefreshHint > 0 {
		out["spiffe_refresh_hint"] = int64((b.RefreshHint + time.Second - 1) / time.Second)
	}
	return json.Marshal(out)
}

// Digest names the keys, and nothing else of the document.
func (b *Bundle) Digest() [sha256.Size]byte {
	h := sha256.New()
	var roots [][]byte
	for _, c := range b.Roots {
		roots = append(roots, c.Raw)
	}
	slices.SortFunc(roots, bytes.Compare)
	for _, der := range roots {
		fmt.Fprintf(h, "root %d\n", len(der))
		h.Write(der)
	}
	for _, id := range slices.SortedFunc(maps.Keys(b.JWTKeys), cmp.Compare[string]) {
		der, err := x509.MarshalPKIXPublicKey(b.JWTKeys[id])
		if err != nil { // a key that was checked can be written
			der = fmt.Appendf(nil, "%v", b.JWTKeys[id])
		}
		fmt.Fprintf(h, "jwt %q %d\n", id, len(der))
		h.Write(der)
	}
	return [sha256.Size]byte(h.Sum(nil))
}

// Empty reports whether nothing of the trust domain is trusted.
func (b *Bundle) Empty() bool { return len(b.Roots) == 0 && len(b.JWTKeys) == 0 }
