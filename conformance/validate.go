package conformance

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"errors"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

var validateChecks = []check{
	{Check{"validate-mandatory", docAPI, "4.5, 6.2.3", Should, "ValidateJWTSVID without a token, or without an audience, is InvalidArgument"}, checkValidateMandatory},
	{Check{"validate-accepts", docAPI, "6.2.3", Must, "ValidateJWTSVID takes a good token, and says whose it is"}, checkAccepts},
	{Check{"validate-claims", docAPI, "6.2.3", Should, "sub, aud and exp are among the claims in its answer"}, checkClaims},
	{Check{"validate-audience", docJWT, "3.2", Must, "it refuses a token for others"}, checkOtherAudience},
	{Check{"validate-signature", docJWT, "4", Must, "it refuses a token with another signature, other claims, or a signature of another key"}, forged(otherSignatures)},
	{Check{"validate-algorithm", docJWT, "2.1", Must, "it refuses alg none, and HMAC with a public key"}, forged(otherAlgorithms)},
	{Check{"validate-domain", docAPI, "6.3", Must, "it refuses a token of a trust domain whose bundle it has not"}, forged(otherDomains)},
	{Check{"validate-serialization", docJWT, "5.1", Must, "it refuses a good token in JSON serialization"}, checkJSONSerialization},
}

// good is a token that ValidateJWTSVID takes.
func (s *session) good(ctx context.Context) (sent, error) {
	all, err := s.tokens(ctx)
	if err != nil {
		return sent{}, err
	}
	return s.taken(ctx, all)
}

// taken returns the first of some tokens, if it is good and taken.
func (s *session) taken(ctx context.Context, all []sent) (sent, error) {
	if err := s.isGood(all[0]); err != nil {
		return sent{}, err
	}
	if _, err := s.validate(ctx, all[0].text, s.Audience); err != nil {
		return sent{}, skip("it does not take a good token; see validate-accepts")
	}
	return all[0], nil
}

// isGood is nil for a token that nobody has a reason to refuse.
func (s *session) isGood(t sent) error {
	switch {
	case checkAlg(t) != nil:
		return skip("the token is not good; see jwt-alg")
	case checkSub(t) != nil:
		return skip("the token is not good; see jwt-sub")
	case checkExp(t) != nil:
		return skip("the token is not good; see jwt-exp")
	case !slices.Contains(t.audience(), s.Audience):
		return skip("the token is not good; see jwt-aud")
	}
	return nil
}

func checkValidateMandatory(ctx context.Context, s *session) (string, error) {
	t, err := s.good(ctx)
	if err != nil {
		return "", err
	}
	if _, err := s.validate(ctx, t.text, ""); status.Code(err) != codes.InvalidArgument {
		return "", fmt.Errorf("without an audience it is answered with %s", describe(err))
	}
	if _, err := s.validate(ctx, "", s.Audience); status.Code(err) != codes.InvalidArgument {
		return "", fmt.Errorf("without a token it is answered with %s", describe(err))
	}
	return "both are", nil
}

func checkAccepts(ctx context.Context, s *session) (string, error) {
	all, err := s.tokens(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d tokens", len(all)), each(all, func(t sent) string { return t.svid.GetSpiffeId() }, func(t sent) error {
		if err := s.isGood(t); err != nil {
			return err
		}
		m, err := s.validate(ctx, t.text, s.Audience)
		switch {
		case err != nil:
			return fmt.Errorf("it is answered with %s", describe(err))
		case m.GetSpiffeId() != t.svid.GetSpiffeId():
			return fmt.Errorf("it is said to be of %q", m.GetSpiffeId())
		}
		return nil
	})
}

func checkClaims(ctx context.Context, s *session) (string, error) {
	t, err := s.good(ctx)
	if err != nil {
		return "", err
	}
	m, err := s.validate(ctx, t.text, s.Audience)
	if err != nil {
		return "", err
	}
	claims := m.GetClaims().GetFields()
	for _, name := range []string{"sub", "aud", "exp"} {
		if _, there := claims[name]; !there {
			return "", fmt.Errorf("there is no %s", name)
		}
	}
	if got := claims["sub"].GetStringValue(); got != t.svid.GetSpiffeId() {
		return "", fmt.Errorf("sub is %q", got)
	}
	return fmt.Sprintf("%d claims", len(claims)), nil
}

// refuses wants a token to be refused.
func (s *session) refuses(ctx context.Context, token, audience string) error {
	_, err := s.validate(ctx, token, audience)
	return refused(err)
}

func checkOtherAudience(ctx context.Context, s *session) (string, error) {
	t, err := s.good(ctx)
	if err != nil {
		return "", err
	}
	others := []string{s.Audience + "-other", "other-" + s.Audience, s.Audience + "," + s.Audience}
	return fmt.Sprintf("%d audiences", len(others)), each(others, func(a string) string { return "as " + a }, func(a string) error { return s.refuses(ctx, t.text, a) })
}

// forged makes a check of tokens that nobody may take, by what they are.
func forged(make func(good sent, key crypto.PublicKey) (map[string]string, error)) func(context.Context, *session) (string, error) {
	return func(ctx context.Context, s *session) (string, error) {
		t, err := s.good(ctx)
		if err != nil {
			return "", err
		}
		id, err := parseID(t.svid.GetSpiffeId())
		if err != nil {
			return "", skip("spiffe_id is no SPIFFE ID; see jwt-sub")
		}
		keys, err := s.keysOf(ctx, id.domain)
		if err != nil {
			return "", err
		}
		var key crypto.PublicKey
		for kid, k := range keys {
			if key == nil || kid == t.textOf(t.header, "kid") {
				key = k
			}
		}
		all, err := make(t, key)
		if err != nil {
			return "", err
		}
		for what, token := range all {
			if err := s.refuses(ctx, token, s.Audience); err != nil {
				return "", fmt.Errorf("%s: %w", what, err)
			}
		}
		return fmt.Sprintf("%d forgeries", len(all)), nil
	}
}

// part is a value as a part of a token.
func part(v any) string {
	raw, err := json.Marshal(v)
	if err != nil {
		panic(err) // what was read from JSON can be written
	}
	return base64.RawURLEncoding.EncodeToString(raw)
}

// changed returns a copy with some members set.
func changed(m map[string]any, members map[string]any) map[string]any {
	out := maps.Clone(m)
	maps.Copy(out, members)
	return out
}

// sign signs with a key that nobody knows, with ES256.
func sign(header, claims map[string]any) (string, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return "", err
	}
	text := part(changed(header, map[string]any{"alg": "ES256"})) + "." + part(claims)
	digest := sha256.Sum256([]byte(text))
	r, v, err := ecdsa.Sign(rand.Reader, key, digest[:])
	if err != nil {
		return "", err
	}
	raw := append(r.FillBytes(make([]byte, 32)), v.FillBytes(make([]byte, 32))...)
	return text + "." + base64.RawURLEncoding.EncodeToString(raw), nil
}

func otherSignatures(t sent, _ crypto.PublicKey) (map[string]string, error) {
	other := append([]byte{}, t.signature...)
	if len(other) == 0 {
		return nil, errors.New("the token has no signature")
	}
	other[len(other)/2] ^= 1
	stranger, err := sign(t.header, t.claims)
	if err != nil {
		return nil, err
	}
	later := changed(t.claims, map[string]any{"exp": time.Now().Add(24 * time.Hour).Unix()})
	elsewhere := changed(t.claims, map[string]any{"sub": t.svid.GetSpiffeId() + "-other"})
	signature := "." + t.parts[2]
	return map[string]string{
		"one bit of the signature turned": t.parts[0] + "." + t.parts[1] + "." + base64.RawURLEncoding.EncodeToString(other),
		"no signature":                    t.parts[0] + "." + t.parts[1] + ".",
		"a later exp":                     t.parts[0] + "." + part(later) + signature,
		"another sub":                     t.parts[0] + "." + part(elsewhere) + signature,
		"signed by another key":           stranger,
	}, nil
}

func otherAlgorithms(t sent, key crypto.PublicKey) (map[string]string, error) {
	out := map[string]string{}
	for _, none := range []string{"none", "None", ""} {
		out[fmt.Sprintf("alg %q", none)] = part(changed(t.header, map[string]any{"alg": none})) + "." + t.parts[1] + "."
	}
	der, err := x509.MarshalPKIXPublicKey(key)
	if err != nil {
		return nil, err
	}
	for form, secret := range map[string][]byte{"DER": der, "PEM": pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: der})} {
		text := part(changed(t.header, map[string]any{"alg": "HS256"})) + "." + t.parts[1]
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(text))
		out["HS256 with the public key in "+form] = text + "." + base64.RawURLEncoding.EncodeToString(mac.Sum(nil))
	}
	return out, nil
}

func otherDomains(t sent, _ crypto.PublicKey) (map[string]string, error) {
	claims := changed(t.claims, map[string]any{"sub": "spiffe://spiffe-conformance-suite.invalid/workload"})
	known, err := sign(t.header, claims)
	if err != nil {
		return nil, err
	}
	unknown, err := sign(changed(t.header, map[string]any{"kid": "spiffe-conformance-suite"}), claims)
	if err != nil {
		return nil, err
	}
	return map[string]string{
		"with the kid of this trust domain": known,
		"with a kid of its own":             unknown,
		"with the signature of a good one":  t.parts[0] + "." + part(claims) + "." + t.parts[2],
	}, nil
}

// checkJSONSerialization has the same header, claims and signature in the forms that
// must not be used; nothing else is wrong with them.
func checkJSONSerialization(ctx context.Context, s *session) (string, error) {
	t, err := s.good(ctx)
	if err != nil {
		return "", err
	}
	signature := map[string]any{"protected": t.parts[0], "signature": t.parts[2]}
	flat, err := json.Marshal(changed(signature, map[string]any{"payload": t.parts[1]}))
	if err != nil {
		return "", err
	}
	general, err := json.Marshal(map[string]any{"payload": t.parts[1], "signatures": []any{signature}})
	if err != nil {
		return "", err
	}
	return "flattened and general", each([]string{string(flat), string(general)}, func(string) string { return "a JWS in JSON" }, func(text string) error { return s.refuses(ctx, text, s.Audience) })
}

// checkExpired waits until a token that was good is refused.
func checkExpired(ctx context.Context, s *session) (string, error) {
	if _, err := s.tokens(ctx); err != nil {
		return "", err
	}
	s.jwts = once[*workload.JWTSVIDResponse]{} // those from before may have expired meanwhile
	all, err := s.tokens(ctx)
	if err != nil {
		return "", err
	}
	t, err := s.taken(ctx, all)
	if err != nil {
		return "", err
	}
	ends, err := t.expiry()
	if err != nil {
		return "", err
	}
	if rest := time.Until(ends); rest > s.Wait {
		return "", skip("the token lives for %s more, and the options give %s to wait", rest.Round(time.Second), s.Wait)
	}
	for {
		_, err := s.validate(ctx, t.text, s.Audience)
		now := time.Now()
		switch {
		case err != nil && refused(err) == nil && now.After(ends.Add(-time.Second)):
			return fmt.Sprintf("refused %s after its end", max(now.Sub(ends).Round(time.Second), 0)), nil
		case err != nil && now.Before(ends.Add(-time.Second)):
			return "", fmt.Errorf("refused %s before its end: %w", ends.Sub(now).Round(time.Second), err)
		case now.After(ends.Add(s.leeway + time.Second)):
			return "", fmt.Errorf("%s after its end it is answered with %s", now.Sub(ends).Round(time.Second), describe(err))
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(min(time.Second, max(time.Until(ends), 200*time.Millisecond))):
		}
	}
}
