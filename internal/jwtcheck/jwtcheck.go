// Package jwtcheck decides whether a JWT-SVID is good. It lets go-spiffe verify
// the signature, and holds tokens to the specification where libraries are
// lenient: headers, duplicate members, audience, times.
package jwtcheck

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rsa"
	"encoding/base64"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

const (
	// MaxToken is how many bytes of a token are looked at.
	MaxToken = 16 << 10
	// Leeway is how far ahead of this machine's clock the clock of an issuer
	// may be. An expired token gets none.
	Leeway = 10 * time.Second

	maxDate = 253402300799 // the end of the year 9999, in seconds
)

// Token is a JWT-SVID that was found good.
type Token struct {
	ID       spiffeid.ID
	KeyID    string
	Audience []string
	// IssuedAt is zero when the token does not say.
	IssuedAt, ExpiresAt time.Time
	// Claims is the whole payload.
	Claims map[string]any
}

// Validate verifies a token for somebody who goes by the name audience, with
// the keys of the trust domain that the token's subject is in. It may be called
// with hostile input; the error says what is wrong and quotes no signature.
func Validate(token, audience string, bundles jwtbundle.Source) (*Token, error) {
	out, err := validate(token, audience, bundles)
	if err != nil {
		return nil, fmt.Errorf("token: %w", err)
	}
	return out, nil
}

func validate(token, audience string, bundles jwtbundle.Source) (*Token, error) {
	switch {
	case audience == "":
		return nil, errors.New("no audience to look for: say by which name the token should call you")
	case token == "":
		return nil, errors.New("empty")
	case len(token) > MaxToken:
		return nil, fmt.Errorf("%d bytes; at most %d are read", len(token), MaxToken)
	}
	header, payload, err := split(token)
	if err != nil {
		return nil, err
	}
	algorithm, keyID, err := checkHeader(header)
	if err != nil {
		return nil, err
	}
	claims, err := parseClaims(payload)
	if err != nil {
		return nil, err
	}
	td := claims.id.TrustDomain()
	bundle, err := bundles.GetJWTBundleForTrustDomain(td)
	if err != nil {
		return nil, fmt.Errorf("sub: trust domain %q is not one whose keys are known here", td)
	}
	key, ok := bundle.FindJWTAuthority(keyID)
	if !ok {
		return nil, fmt.Errorf("kid: %q is no key of trust domain %q", keyID, td)
	}
	if !fits(algorithm, key) {
		return nil, fmt.Errorf("alg: %s is not for the key that kid names", algorithm)
	}
	if err := claims.check(audience, time.Now()); err != nil {
		return nil, err
	}
	svid, err := jwtsvid.ParseAndValidate(token, bundle, []string{audience})
	if err != nil {
		return nil, fmt.Errorf("not valid: %w", err)
	}
	if svid.ID != claims.id || !svid.Expiry.Equal(claims.expiry.UTC().Truncate(time.Second)) {
		return nil, errors.New("its claims can be read in more than one way")
	}
	return &Token{
		ID: svid.ID, KeyID: keyID, Audience: claims.audience,
		IssuedAt: claims.issuedAt, ExpiresAt: claims.expiry, Claims: svid.Claims,
	}, nil
}

// split decodes the header and the payload of a compact serialization.
func split(token string) (header, payload []byte, err error) {
	parts := strings.Split(token, ".")
	if len(parts) != 3 {
		return nil, nil, fmt.Errorf("%d parts; a JWS in compact serialization has 3", len(parts))
	}
	decoded := make([][]byte, 3)
	for i, name := range []string{"header", "payload", "signature"} {
		// Without padding, and without bits that do not count: one token has
		// one spelling. The decoder skips line breaks.
		if strings.ContainsAny(parts[i], "\r\n") {
			return nil, nil, fmt.Errorf("%s: not base64url", name)
		}
		if decoded[i], err = base64.RawURLEncoding.Strict().DecodeString(parts[i]); err != nil {
			return nil, nil, fmt.Errorf("%s: not base64url", name)
		}
		if len(decoded[i]) == 0 {
			return nil, nil, fmt.Errorf("%s: empty", name)
		}
	}
	return decoded[0], decoded[1], nil
}

// algorithms are those of the specification: signatures by a private key.
var algorithms = []string{"RS256", "RS384", "RS512", "ES256", "ES384", "ES512", "PS256", "PS384", "PS512"}

// checkHeader refuses every header that the specification does not name, which
// holds for all that can bring a key, or a meaning, of their own: crit, b64,
// jwk, jku, x5c, x5u.
func checkHeader(data []byte) (algorithm, keyID string, err error) {
	header, err := object(data)
	if err != nil {
		return "", "", fmt.Errorf("header: %w", err)
	}
	var kind string
	for name, raw := range header {
		into := map[string]*string{"alg": &algorithm, "kid": &keyID, "typ": &kind}[name]
		if into == nil {
			return "", "", fmt.Errorf("header: %.40q is not allowed in a JWT-SVID", name)
		}
		if json.Unmarshal(raw, into) != nil || *into == "" {
			return "", "", fmt.Errorf("%s: not a string with content", name)
		}
	}
	switch {
	case !slices.Contains(algorithms, algorithm):
		return "", "", fmt.Errorf("alg: %.40q is not allowed in a JWT-SVID", algorithm)
	case kind != "" && kind != "JWT" && kind != "JOSE":
		return "", "", fmt.Errorf("typ: %.40q; a JWT-SVID has JWT, JOSE or none", kind)
	case keyID == "":
		return "", "", errors.New("kid: missing; it says which key verifies the token")
	case len(keyID) > 256:
		return "", "", fmt.Errorf("kid: %d bytes; at most 256 are read", len(keyID))
	}
	return algorithm, keyID, nil
}

// fits reports whether a key is of the kind that an algorithm is for.
func fits(algorithm string, key crypto.PublicKey) bool {
	switch k := key.(type) {
	case *ecdsa.PublicKey:
		curve := map[string]elliptic.Curve{"ES256": elliptic.P256(), "ES384": elliptic.P384(), "ES512": elliptic.P521()}[algorithm]
		return curve != nil && k.Curve == curve
	case *rsa.PublicKey:
		return (strings.HasPrefix(algorithm, "RS") || strings.HasPrefix(algorithm, "PS")) && k.N.BitLen() >= 2048
	}
	return false
}

// claims are what the specification says something about.
type claims struct {
	id                          spiffeid.ID
	audience                    []string
	expiry, notBefore, issuedAt time.Time // the last two may be zero
}

func parseClaims(data []byte) (*claims, error) {
	payload, err := object(data)
	if err != nil {
		return nil, fmt.Errorf("payload: %w", err)
	}
	var subject string
	if json.Unmarshal(payload["sub"], &subject) != nil || subject == "" {
		return nil, errors.New("sub: missing, or not a string")
	}
	c := &claims{}
	if c.id, err = spiffeid.FromString(subject); err != nil {
		return nil, fmt.Errorf("sub: %.256q is no SPIFFE ID: %w", subject, err)
	}
	if c.id.Path() == "" {
		return nil, fmt.Errorf("sub: %q is a trust domain, not a workload", c.id)
	}
	if c.audience, err = stringOrList(payload["aud"]); err != nil {
		return nil, fmt.Errorf("aud: %w", err)
	}
	for name, into := range map[string]*time.Time{"exp": &c.expiry, "nbf": &c.notBefore, "iat": &c.issuedAt} {
		raw, ok := payload[name]
		if !ok {
			continue
		}
		if *into, err = date(raw); err != nil {
			return nil, fmt.Errorf("%s: %w", name, err)
		}
	}
	if _, ok := payload["exp"]; !ok {
		return nil, errors.New("exp: missing; a token must end")
	}
	return c, nil
}

func (c *claims) check(audience string, now time.Time) error {
	stamp := func(t time.Time) string { return t.UTC().Format(time.RFC3339) }
	switch {
	case !slices.Contains(c.audience, audience):
		return fmt.Errorf("aud: %.256q does not contain %.256q", c.audience, audience)
	case !now.Before(c.expiry):
		return fmt.Errorf("exp: expired at %s and it is %s", stamp(c.expiry), stamp(now))
	case c.notBefore.After(now.Add(Leeway)):
		return fmt.Errorf("nbf: not valid before %s and it is %s", stamp(c.notBefore), stamp(now))
	case c.issuedAt.After(now.Add(Leeway)):
		return fmt.Errorf("iat: issued at %s and it is %s; check the clocks", stamp(c.issuedAt), stamp(now))
	}
	return nil
}

// object reads one JSON object whose members differ in name. Of two of one name
// this reader might believe the one, and the next the other.
func object(data []byte) (map[string]json.RawMessage, error) {
	d := json.NewDecoder(bytes.NewReader(data))
	if open, err := d.Token(); err != nil || open != json.Delim('{') {
		return nil, errors.New("not a JSON object")
	}
	out := map[string]json.RawMessage{}
	for d.More() {
		name, err := d.Token()
		if err != nil {
			return nil, errors.New("not a JSON object")
		}
		key, ok := name.(string)
		if !ok {
			return nil, errors.New("not a JSON object")
		}
		if _, twice := out[key]; twice {
			return nil, fmt.Errorf("%.40q is there twice", key)
		}
		var value json.RawMessage
		if err := d.Decode(&value); err != nil {
			return nil, errors.New("not a JSON object")
		}
		out[key] = value
	}
	if _, err := d.Token(); err != nil {
		return nil, errors.New("not a JSON object")
	}
	if _, err := d.Token(); err != io.EOF {
		return nil, errors.New("more than one JSON object")
	}
	return out, nil
}

func stringOrList(raw json.RawMessage) ([]string, error) {
	if len(raw) == 0 {
		return nil, errors.New("missing; a token must say who it is for")
	}
	if bytes.HasPrefix(bytes.TrimSpace(raw), []byte{'"'}) {
		var one string
		if err := json.Unmarshal(raw, &one); err != nil {
			return nil, errors.New("not a string")
		}
		return []string{one}, nil
	}
	var list []*string
	if err := json.Unmarshal(raw, &list); err != nil || len(list) == 0 {
		return nil, errors.New("not a string, nor a list of strings with content")
	}
	out := make([]string, len(list))
	for i, value := range list {
		if value == nil {
			return nil, errors.New("not a list of strings")
		}
		out[i] = *value
	}
	return out, nil
}

// date reads seconds since 1970, also a fraction.
func date(raw json.RawMessage) (time.Time, error) {
	var seconds *float64
	if json.Unmarshal(raw, &seconds) != nil || seconds == nil || *seconds < 0 || *seconds > maxDate {
		return time.Time{}, errors.New("not seconds since 1970, up to the year 9999")
	}
	whole := int64(*seconds)
	return time.Unix(whole, int64((*seconds-float64(whole))*1e9)), nil
}
