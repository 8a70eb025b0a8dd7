package ca

import (
	"bytes"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of how long a key signs JWT-SVIDs.
const (
	DefaultJWTKeyLife = 24 * time.Hour
	MinJWTKeyLife     = 10 * time.Second
	MaxJWTKeyLife     = 30 * 24 * time.Hour
)

// retireGrace is how long after the last token that it can have signed a key
// stays in the bundle, for verifiers whose clocks are behind.
const retireGrace = time.Minute

// jwtKey is one key that signs JWT-SVIDs. Its times are fixed when it is made,
// so that every replica which knows it switches at the same instant.
type jwtKey struct {
	id  string // of the public key; see keyID
	key *ecdsa.PrivateKey
	// from is when it begins to sign. It is in the bundle before.
	from time.Time
	// notAfter is when it leaves the bundle at the latest. No token of it is
	// valid for longer.
	notAfter time.Time
}

// ring is the keys that verify now, sorted by when they begin to sign. It is
// replaced whole, never edited.
type ring []*jwtKey

// keyID names a public key by its digest.
func keyID(pub *ecdsa.PublicKey) (string, error) {
	spki, err := x509.MarshalPKIXPublicKey(pub)
	if err != nil {
		return "", err
	}
	sum := sha256.Sum256(spki)
	return hex.EncodeToString(sum[:16]), nil
}

func newJWTKey(from time.Time, life time.Duration) (*jwtKey, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, fmt.Errorf("make a JWT key: %w", err)
	}
	id, err := keyID(&key.PublicKey)
	if err != nil {
		return nil, fmt.Errorf("make a JWT key: %w", err)
	}
	// Twice its life: should its successor be late, it goes on.
	return &jwtKey{id: id, key: key, from: from, notAfter: from.Add(2*life + MaxJWTTTL + retireGrace)}, nil
}

// signs returns the key that signs at an instant, and nil when there is none:
// the one that began last.
func (r ring) signs(now time.Time) *jwtKey {
	for _, k := range slices.Backward(r) {
		if !k.from.After(now) && k.notAfter.After(now) {
			return k
		}
	}
	return nil
}

// publishAhead is how long before it signs a key is published: long enough for
// everybody who asks for the bundle a few times a day.
func publishAhead(life time.Duration) time.Duration { return life / 4 }

// turn returns the ring as it should be at an instant: what nothing can need
// any more is gone, and the next key is published well before it signs. It is
// the same ring when nothing is to be done.
func (r ring) turn(now time.Time, life time.Duration) (ring, error) {
	var next ring
	for i, k := range r {
		retired := i+1 < len(r) && !r[i+1].from.Add(MaxJWTTTL+retireGrace).After(now)
		// A key that begins in the far future is of a clock that was wrong.
		if retired || !k.notAfter.After(now) || k.from.After(now.Add(2*life)) {
			continue
		}
		next = append(next, k)
	}
	add := func(from time.Time) error {
		k, err := newJWTKey(from, life)
		if err != nil {
			return err
		}
		next = append(next, k)
		slices.SortStableFunc(next, func(a, b *jwtKey) int { return a.from.Compare(b.from) })
		return nil
	}
	ahead := publishAhead(life)
	signing := next.signs(now)
	switch {
	case signing == nil: // the first, or the former ones ended while nobody was here
		if err := add(now); err != nil {
			return nil, err
		}
	case next[len(next)-1] == signing && !now.Before(signing.from.Add(life-ahead)):
		from := signing.from.Add(life)
		if soonest := now.Add(ahead); from.Before(soonest) {
			from = soonest
		}
		if err := add(from); err != nil {
			return nil, err
		}
	case len(next) == len(r):
		return r, nil
	}
	return next, nil
}

// due is when turn will next have something to do.
func (r ring) due(now time.Time, life time.Duration) time.Time {
	due := now.Add(life)
	sooner := func(t time.Time) {
		if t.Before(due) {
			due = t
		}
	}
	for i, k := range r {
		sooner(k.notAfter)
		if i+1 < len(r) {
			sooner(r[i+1].from.Add(MaxJWTTTL + retireGrace))
		} else {
			sooner(k.from.Add(life - publishAhead(life)))
		}
	}
	return due
}

// What a ring is stored as.
type (
	storedRing struct {
		TrustDomain string      `json:"trustDomain"`
		Keys        []storedKey `json:"keys"`
	}
	storedKey struct {
		ID       string    `json:"id"`
		Key      string    `json:"key"` // PKCS#8 in PEM
		From     time.Time `json:"from"`
		NotAfter time.Time `json:"notAfter"`
	}
)

// maxJWTKeys bounds what is read. A ring of keys that live for a day has three
// at most, one of keys that live for MinJWTKeyLife some 370.
const maxJWTKeys = 512

func (r ring) encode(td spiffeid.TrustDomain) ([]byte, error) {
	out := storedRing{TrustDomain: td.Name()}
	for _, k := range r {
		text, err := encodeKey(k.key)
		if err != nil {
			return nil, err
		}
		out.Keys = append(out.Keys, storedKey{ID: k.id, Key: string(text), From: k.from.UTC(), NotAfter: k.notAfter.UTC()})
	}
	return json.MarshalIndent(out, "", "  ")
}

// decodeRing reads what encode wrote. The errors never quote a key.
func decodeRing(data []byte, td spiffeid.TrustDomain) (ring, error) {
	var in storedRing
	d := json.NewDecoder(bytes.NewReader(data))
	d.DisallowUnknownFields()
	if err := d.Decode(&in); err != nil {
		return nil, fmt.Errorf("not a ring of JWT keys: %w; restore it from a copy, or remove it to start with new keys", err)
	}
	switch {
	case in.TrustDomain != td.Name():
		return nil, fmt.Errorf("trustDomain: the keys are of %q, not of %q; set the trust domain back, or remove them", in.TrustDomain, td.Name())
	case len(in.Keys) > maxJWTKeys:
		return nil, fmt.Errorf("keys: %d; at most %d are read", len(in.Keys), maxJWTKeys)
	}
	var out ring
	for i, s := range in.Keys {
		k, err := s.decode()
		if err != nil {
			return nil, fmt.Errorf("keys[%d]: %w", i, err)
		}
		out = append(out, k)
	}
	slices.SortStableFunc(out, func(a, b *jwtKey) int { return a.from.Compare(b.from) })
	return out, nil
}

func (s *storedKey) decode() (*jwtKey, error) {
	block, rest := pem.Decode([]byte(s.Key))
	if block == nil || block.Type != "PRIVATE KEY" || len(bytes.TrimSpace(rest)) > 0 {
		return nil, errors.New("key: want one PRIVATE KEY in PEM")
	}
	parsed, err := x509.ParsePKCS8PrivateKey(block.Bytes)
	if err != nil {
		return nil, errors.New("key: cannot be read")
	}
	key, ok := parsed.(*ecdsa.PrivateKey)
	if !ok || key.Curve != elliptic.P256() {
		return nil, errors.New("key: want ECDSA P-256, for ES256")
	}
	id, err := keyID(&key.PublicKey)
	switch {
	case err != nil:
		return nil, err
	case s.ID != id:
		return nil, fmt.Errorf("id: %q is not the key's, %q", s.ID, id)
	case !s.NotAfter.After(s.From):
		return nil, fmt.Errorf("notAfter: %s is not after from, %s", stamp(s.NotAfter), stamp(s.From))
	}
	return &jwtKey{id: id, key: key, from: s.From, notAfter: s.NotAfter}, nil
}
