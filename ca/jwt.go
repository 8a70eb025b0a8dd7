package ca

import (
	"crypto/ecdsa"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"
	"sync/atomic"
	"time"
	"unicode"
	"unicode/utf8"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of the lifetimes of JWT-SVIDs.
const (
	DefaultJWTTTL = 5 * time.Minute
	MinJWTTTL     = time.Second
	MaxJWTTTL     = time.Hour
)

// Bounds of the audiences of one token.
const (
	MaxAudiences     = 16
	MaxAudienceBytes = 2048 // a SPIFFE ID fits
	maxAudienceSum   = 4096
)

// JWTRequest asks for one JWT-SVID. The caller has already decided that the
// workload which will hold the token may have the ID.
type JWTRequest struct {
	// ID is the identity of a workload of the authority's trust domain.
	ID spiffeid.ID
	// Audience is who the token is for: from one to MaxAudiences values.
	Audience []string
	// TTL is from now to exp. It is moved to MinJWTTTL or MaxJWTTTL when it is
	// outside. Zero means DefaultJWTTTL.
	TTL time.Duration
	// Node and Workload (namespace/name) say on whose behalf the token is asked
	// for; they go into the issuance log and nowhere else.
	Node, Workload string
}

// PreparedJWT is a request that was found good. It can be issued once, within a
// minute, by the authority that prepared it.
type PreparedJWT struct {
	authority *Authority
	req       JWTRequest
	at        time.Time
	used      atomic.Bool
}

// IssuedJWT is a signed token.
type IssuedJWT struct {
	// Token is a JWS in compact serialization. Whoever holds it can use it.
	Token string
	// Serial is its jti, under which it is in the issuance log.
	Serial string
	// KeyID is its kid.
	KeyID     string
	ExpiresAt time.Time
}

// PrepareJWT checks a request. It touches no key, writes nothing, and may be
// called with hostile input. The error names the field that is wrong.
func (a *Authority) PrepareJWT(req JWTRequest) (*PreparedJWT, error) {
	if err := checkID(a.td, req.ID); err != nil {
		return nil, fmt.Errorf("ca: prepare a JWT: %w", err)
	}
	// Nodes and the control plane speak mTLS with each other: no token that can
	// be replayed is ever made for them.
	if segments(req.ID)[0] != "ns" {
		return nil, fmt.Errorf("ca: prepare a JWT: id %q: only workloads get tokens", req.ID)
	}
	if err := CheckAudience(req.Audience); err != nil {
		return nil, fmt.Errorf("ca: prepare a JWT: %w", err)
	}
	switch {
	case req.TTL < 0:
		return nil, fmt.Errorf("ca: prepare a JWT: ttl: %s is negative", req.TTL)
	case req.TTL == 0:
		req.TTL = DefaultJWTTTL
	}
	req.TTL = min(max(req.TTL, MinJWTTTL), MaxJWTTTL)
	req.Audience = slices.Clone(req.Audience)
	return &PreparedJWT{authority: a, req: req, at: a.now()}, nil
}

// CheckAudience refuses what cannot be the audience of a token: an empty list
// or value, one twice, too many, too long, or with characters that do not
// print.
func CheckAudience(audience []string) error {
	switch {
	case len(audience) == 0:
		return errors.New("audience: empty; name who the token is for")
	case len(audience) > MaxAudiences:
		return fmt.Errorf("audience: %d values; at most %d, and one is best", len(audience), MaxAudiences)
	}
	sum := 0
	for i, value := range audience {
		sum += len(value)
		switch {
		case value == "":
			return fmt.Errorf("audience[%d]: empty; name who the token is for", i)
		case len(value) > MaxAudienceBytes:
			return fmt.Errorf("audience[%d]: %d bytes; at most %d", i, len(value), MaxAudienceBytes)
		case !utf8.ValidString(value) || strings.ContainsFunc(value, func(r rune) bool { return !unicode.IsPrint(r) }):
			return fmt.Errorf("audience[%d]: has characters that do not print", i)
		case slices.Contains(audience[:i], value):
			return fmt.Errorf("audience[%d]: %q is there twice", i, value)
		}
	}
	if sum > maxAudienceSum {
		return fmt.Errorf("audience: %d bytes together; at most %d", sum, maxAudienceSum)
	}
	return nil
}

// The parts of a token. The specification allows no other header.
type (
	jwtHeader struct {
		Algorithm string `json:"alg"`
		KeyID     string `json:"kid"`
		Type      string `json:"typ"`
	}
	jwtClaims struct {
		Issuer   string   `json:"iss,omitempty"`
		Subject  string   `json:"sub"`
		Audience []string `json:"aud"`
		Expiry   int64    `json:"exp"`
		IssuedAt int64    `json:"iat"`
		ID       string   `json:"jti"`
	}
)

// IssueJWT signs what was prepared. The intent is durable in the issuance log
// before the key is used; when that fails, nothing is signed. The key has been
// in the bundle for a while, but for the authority's first, and stays there
// until the token has expired.
func (a *Authority) IssueJWT(p *PreparedJWT) (*IssuedJWT, error) {
	if p == nil || p.authority != a {
		return nil, errors.New("ca: issue a JWT: the request was not prepared by this authority")
	}
	if !p.used.CompareAndSwap(false, true) {
		return nil, ErrUsed
	}
	now := a.now()
	if age := now.Sub(p.at); age > preparedFor || age < -preparedFor {
		return nil, fmt.Errorf("ca: issue a JWT: the request was prepared %s ago; prepare it again", age)
	}
	key, err := a.jwtSigner(now)
	if err != nil {
		return nil, fmt.Errorf("ca: issue a JWT: %w", err)
	}
	expiry := now.Add(p.req.TTL)
	if latest := key.notAfter.Add(-retireGrace); expiry.After(latest) {
		expiry = latest
	}
	expiry = expiry.Truncate(time.Second) // as exp has it
	if !expiry.After(now) {
		return nil, fmt.Errorf("ca: issue a JWT: the key %s ends at %s and has no successor; see the log for why", key.id, stamp(key.notAfter))
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("ca: issue a JWT: %w", err)
	}
	jti := formatSerial(serial)
	if err := a.issuance.intent(line{
		Time: now, Kind: KindJWT, Serial: jti, ID: p.req.ID.String(), Node: p.req.Node, Workload: p.req.Workload,
		NotBefore: now, NotAfter: expiry, Issuer: key.id, Audience: p.req.Audience,
	}); err != nil {
		return nil, fmt.Errorf("ca: issue a JWT: record the intent: %w", err)
	}
	token, err := signJWT(key, jwtClaims{
		Issuer: a.jwtIssuer, Subject: p.req.ID.String(), Audience: p.req.Audience, Expiry: expiry.Unix(), IssuedAt: now.Unix(), ID: jti,
	})
	outcome := line{Time: a.now(), Serial: jti}
	if err != nil {
		outcome.Error = err.Error()
	}
	if logErr := a.issuance.outcome(outcome); logErr != nil {
		return nil, fmt.Errorf("ca: issue a JWT: record the outcome: %w", errors.Join(logErr, err))
	}
	if err != nil {
		return nil, fmt.Errorf("ca: issue a JWT: %w", err)
	}
	return &IssuedJWT{Token: token, Serial: jti, KeyID: key.id, ExpiresAt: expiry}, nil
}

// jwtSigner returns the key that signs now.
func (a *Authority) jwtSigner(now time.Time) (*jwtKey, error) {
	a.mu.Lock()
	closed := a.closed
	a.mu.Unlock()
	if closed {
		return nil, errClosed
	}
	a.jwtMu.Lock()
	defer a.jwtMu.Unlock()
	if key := a.jwtKeys.signs(now); key != nil {
		return key, nil
	}
	return nil, errors.New("there is no key that signs now; see the log for why, and check the clock")
}

// signJWT makes a token with ES256 and checks the signature before it leaves.
func signJWT(key *jwtKey, claims jwtClaims) (string, error) {
	header, err := json.Marshal(jwtHeader{Algorithm: "ES256", KeyID: key.id, Type: "JWT"})
	if err != nil {
		return "", err
	}
	payload, err := json.Marshal(claims)
	if err != nil {
		return "", err
	}
	encode := base64.RawURLEncoding.EncodeToString
	signed := encode(header) + "." + encode(payload)
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key.key, sum[:])
	if err != nil {
		return "", fmt.Errorf("sign: %w", err)
	}
	if !ecdsa.Verify(&key.key.PublicKey, sum[:], r, s) {
		return "", errors.New("sign: the signature does not verify")
	}
	var signature [64]byte
	r.FillBytes(signature[:32])
	s.FillBytes(signature[32:])
	return signed + "." + encode(signature[:]), nil
}
