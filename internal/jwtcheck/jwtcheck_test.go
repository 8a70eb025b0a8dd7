package jwtcheck

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/hmac"
	"crypto/rand"
	"crypto/rsa"
	"crypto/sha256"
	"crypto/x509"
	"encoding/base64"
	"encoding/json"
	"encoding/pem"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var td = spiffeid.RequireTrustDomainFromString("mesh.test")

const (
	me      = "ledger"
	subject = "spiffe://mesh.test/ns/shop/sa/web"
)

// forge is an issuer that signs whatever it is told.
type forge struct {
	ec, other *ecdsa.PrivateKey // kid "ec"; a key that nobody trusts
	rsa       *rsa.PrivateKey   // kid "rsa"
	bundle    *jwtbundle.Bundle
}

func newForge(t testing.TB) *forge {
	t.Helper()
	f := &forge{}
	var err error
	for _, k := range []**ecdsa.PrivateKey{&f.ec, &f.other} {
		if *k, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	if f.rsa, err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	f.bundle = jwtbundle.FromJWTAuthorities(td, map[string]crypto.PublicKey{"ec": f.ec.Public(), "rsa": f.rsa.Public()})
	return f
}

var encode = base64.RawURLEncoding.EncodeToString

// es256 signs header and payload, as they are.
func es256(t testing.TB, key *ecdsa.PrivateKey, header, payload string) string {
	t.Helper()
	signed := encode([]byte(header)) + "." + encode([]byte(payload))
	sum := sha256.Sum256([]byte(signed))
	r, s, err := ecdsa.Sign(rand.Reader, key, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	var sig [64]byte
	r.FillBytes(sig[:32])
	s.FillBytes(sig[32:])
	return signed + "." + encode(sig[:])
}

func rs256(t testing.TB, key *rsa.PrivateKey, header, payload string) string {
	t.Helper()
	signed := encode([]byte(header)) + "." + encode([]byte(payload))
	sum := sha256.Sum256([]byte(signed))
	sig, err := rsa.SignPKCS1v15(rand.Reader, key, crypto.SHA256, sum[:])
	if err != nil {
		t.Fatal(err)
	}
	return signed + "." + encode(sig)
}

// payload is good claims with some replaced; nil removes one.
func payload(edit map[string]any) string {
	c := map[string]any{
		"sub": subject, "aud": []string{me}, "exp": time.Now().Add(time.Minute).Unix(), "iat": time.Now().Unix(),
	}
	for k, v := range edit {
		if c[k] = v; v == nil {
			delete(c, k)
		}
	}
	raw, err := json.Marshal(c)
	if err != nil {
		panic(err)
	}
	return string(raw)
}

const header = `{"alg":"ES256","kid":"ec","typ":"JWT"}`

// Tokens that the specification allows are taken, and read right.
func TestGood(t *testing.T) {
	f := newForge(t)
	for name, token := range map[string]string{
		"as issued here":       es256(t, f.ec, header, payload(nil)),
		"typ JOSE":             es256(t, f.ec, `{"alg":"ES256","kid":"ec","typ":"JOSE"}`, payload(nil)),
		"no typ":               es256(t, f.ec, `{"alg":"ES256","kid":"ec"}`, payload(nil)),
		"RS256":                rs256(t, f.rsa, `{"alg":"RS256","kid":"rsa"}`, payload(nil)),
		"one audience":         es256(t, f.ec, header, payload(map[string]any{"aud": me})),
		"a list of audiences":  es256(t, f.ec, header, payload(map[string]any{"aud": []string{"a", me, "b"}})),
		"private claims":       es256(t, f.ec, header, payload(map[string]any{"role": map[string]any{"x": []int{1}}, "jti": "7"})),
		"no iat":               es256(t, f.ec, header, payload(map[string]any{"iat": nil})),
		"a clock a bit ahead":  es256(t, f.ec, header, payload(map[string]any{"iat": time.Now().Add(Leeway / 2).Unix(), "nbf": time.Now().Add(Leeway / 2).Unix()})),
		"a fraction of second": es256(t, f.ec, header, payload(map[string]any{"exp": float64(time.Now().Add(time.Minute).Unix()) + 0.5})),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Validate(token, me, f.bundle)
			if err != nil {
				t.Fatal(err)
			}
			if got.ID.String() != subject || !slices.Contains(got.Audience, me) || got.Claims["sub"] != subject || time.Until(got.ExpiresAt) < 50*time.Second {
				t.Errorf("%+v", got)
			}
		})
	}
}

// Each defence, and a token that gets through without it. All but those whose
// name says so carry a valid signature of a trusted key.
func TestHostile(t *testing.T) {
	f := newForge(t)
	now := time.Now()
	good := es256(t, f.ec, header, payload(nil))
	parts := strings.Split(good, ".")
	spki, err := x509.MarshalPKIXPublicKey(f.ec.Public())
	if err != nil {
		t.Fatal(err)
	}
	hs256 := func(secret []byte, kid string) string {
		signed := encode(fmt.Appendf(nil, `{"alg":"HS256","kid":%q,"typ":"JWT"}`, kid)) + "." + encode([]byte(payload(nil)))
		mac := hmac.New(sha256.New, secret)
		mac.Write([]byte(signed))
		return signed + "." + encode(mac.Sum(nil))
	}
	jwk := fmt.Sprintf(`{"kty":"EC","crv":"P-256","x":%q,"y":%q}`, encode(f.other.X.FillBytes(make([]byte, 32))), encode(f.other.Y.FillBytes(make([]byte, 32)))) //nolint:staticcheck // the coordinates are what a JWK has
	with := func(edit map[string]any) string { return es256(t, f.ec, header, payload(edit)) }
	head := func(h string) string { return es256(t, f.ec, h, payload(nil)) }
	for name, c := range map[string]struct{ token, want string }{
		"empty":                 {"", "empty"},
		"alg none":              {encode([]byte(`{"alg":"none","kid":"ec"}`)) + "." + parts[1] + ".", "signature: empty"},
		"alg none, signed":      {head(`{"alg":"none","kid":"ec"}`), "is not allowed in a JWT-SVID"},
		"alg None":              {head(`{"alg":"None","kid":"ec"}`), "is not allowed in a JWT-SVID"},
		"no alg":                {head(`{"kid":"ec"}`), "is not allowed in a JWT-SVID"},
		"alg of another case":   {head(`{"alg":"es256","kid":"ec"}`), "is not allowed in a JWT-SVID"},
		"alg ES256K":            {head(`{"alg":"ES256K","kid":"ec"}`), "is not allowed in a JWT-SVID"},
		"alg EdDSA":             {head(`{"alg":"EdDSA","kid":"ec"}`), "is not allowed in a JWT-SVID"},
		"alg is a list":         {head(`{"alg":["ES256"],"kid":"ec"}`), "alg"},
		"HS256, public key DER": {hs256(spki, "ec"), "is not allowed in a JWT-SVID"},
		"HS256, public key PEM": {hs256(pem.EncodeToMemory(&pem.Block{Type: "PUBLIC KEY", Bytes: spki}), "ec"), "is not allowed in a JWT-SVID"},
		"ES256 with the RSA key's kid": {
			head(`{"alg":"ES256","kid":"rsa"}`), "alg: ES256 is not for the key"},
		"RS256 with the EC key's kid": {
			rs256(t, f.rsa, `{"alg":"RS256","kid":"ec"}`, payload(nil)), "alg: RS256 is not for the key"},
		"ES384 with a P-256 key": {head(`{"alg":"ES384","kid":"ec"}`), "alg: ES384 is not for the key"},
		"no kid":                 {head(`{"alg":"ES256"}`), "kid: missing"},
		"empty kid":              {head(`{"alg":"ES256","kid":""}`), "kid"},
		"kid is a number":        {head(`{"alg":"ES256","kid":1}`), "kid"},
		"unknown kid":            {head(`{"alg":"ES256","kid":"other"}`), `kid: "other" is no key`},
		"a long kid":             {head(`{"alg":"ES256","kid":"` + strings.Repeat("x", 300) + `"}`), "kid"},
		"another key's signature": {
			es256(t, f.other, header, payload(nil)), "not valid"},
		"an embedded key":       {es256(t, f.other, `{"alg":"ES256","kid":"ec","jwk":`+jwk+`}`, payload(nil)), `header: "jwk"`},
		"a key's address":       {head(`{"alg":"ES256","kid":"ec","jku":"http://127.0.0.1/keys"}`), `header: "jku"`},
		"certificates":          {head(`{"alg":"ES256","kid":"ec","x5c":["MIIB"]}`), `header: "x5c"`},
		"crit":                  {head(`{"alg":"ES256","kid":"ec","crit":["exp"],"exp":1}`), "is not allowed"},
		"crit b64":              {head(`{"alg":"ES256","kid":"ec","crit":["b64"],"b64":true}`), "is not allowed"},
		"b64":                   {head(`{"alg":"ES256","kid":"ec","b64":false}`), `header: "b64"`},
		"compressed":            {head(`{"alg":"ES256","kid":"ec","zip":"DEF"}`), `header: "zip"`},
		"a private header":      {head(`{"alg":"ES256","kid":"ec","tenant":"x"}`), `header: "tenant"`},
		"alg twice":             {head(`{"alg":"ES256","alg":"none","kid":"ec"}`), "twice"},
		"kid twice":             {head(`{"alg":"ES256","kid":"ec","kid":"rsa"}`), "twice"},
		"header is a list":      {head(`["alg"]`), "not a JSON object"},
		"two headers":           {head(header + header), "more than one"},
		"typ at+jwt":            {head(`{"alg":"ES256","kid":"ec","typ":"at+jwt"}`), "typ"},
		"typ wit+jwt":           {head(`{"alg":"ES256","kid":"ec","typ":"wit+jwt"}`), "typ"},
		"typ of another case":   {head(`{"alg":"ES256","kid":"ec","typ":"jwt"}`), "typ"},
		"typ is null":           {head(`{"alg":"ES256","kid":"ec","typ":null}`), "typ"},
		"expired":               {with(map[string]any{"exp": now.Add(-time.Hour).Unix()}), "exp: expired"},
		"just expired":          {with(map[string]any{"exp": now.Unix()}), "exp: expired"},
		"no exp":                {with(map[string]any{"exp": nil}), "exp: missing"},
		"exp is text":           {with(map[string]any{"exp": fmt.Sprint(now.Add(time.Hour).Unix())}), "exp"},
		"exp is null":           {es256(t, f.ec, header, `{"sub":"`+subject+`","aud":"ledger","exp":null}`), "exp"},
		"exp beyond all time":   {es256(t, f.ec, header, `{"sub":"`+subject+`","aud":"ledger","exp":1e300}`), "exp"},
		"exp twice":             {es256(t, f.ec, header, `{"sub":"`+subject+`","aud":"ledger","exp":1,"exp":4e9}`), "twice"},
		"not yet valid":         {with(map[string]any{"nbf": now.Add(40 * time.Second).Unix()}), "nbf"},
		"nbf is text":           {with(map[string]any{"nbf": "soon"}), "nbf"},
		"issued in the future":  {with(map[string]any{"iat": now.Add(40 * time.Second).Unix()}), "iat"},
		"no aud":                {with(map[string]any{"aud": nil}), "aud: missing"},
		"an empty aud":          {with(map[string]any{"aud": ""}), "aud"},
		"an empty list":         {with(map[string]any{"aud": []string{}}), "aud"},
		"aud is null":           {es256(t, f.ec, header, `{"sub":"`+subject+`","aud":null,"exp":4e9}`), "aud"},
		"null in the list":      {with(map[string]any{"aud": []any{me, nil}}), "aud"},
		"aud is an object":      {with(map[string]any{"aud": map[string]any{me: true}}), "aud"},
		"another aud":           {with(map[string]any{"aud": "bank"}), "does not contain"},
		"a list of others":      {with(map[string]any{"aud": []string{"bank", "Ledger", "ledger "}}), "does not contain"},
		"part of aud":           {with(map[string]any{"aud": "ledger.shop"}), "does not contain"},
		"aud twice":             {es256(t, f.ec, header, `{"sub":"`+subject+`","aud":"bank","aud":"ledger","exp":4e9}`), "twice"},
		"no sub":                {with(map[string]any{"sub": nil}), "sub: missing"},
		"sub is no SPIFFE ID":   {with(map[string]any{"sub": "web"}), "sub"},
		"sub is a trust domain": {with(map[string]any{"sub": "spiffe://mesh.test"}), "sub"},
		"sub with dots":         {with(map[string]any{"sub": "spiffe://mesh.test/ns/../sa/web"}), "sub"},
		"sub of another case":   {with(map[string]any{"sub": "SPIFFE://mesh.test/ns/shop/sa/web"}), "sub"},
		"foreign trust domain":  {with(map[string]any{"sub": "spiffe://other.test/ns/shop/sa/web"}), `trust domain "other.test"`},
		"payload is a list":     {es256(t, f.ec, header, `["sub"]`), "not a JSON object"},
		"payload is cut":        {es256(t, f.ec, header, payload(nil)[:30]), "not a JSON object"},
		"oversize":              {with(map[string]any{"x": strings.Repeat("x", MaxToken)}), "at most"},
		"two parts":             {parts[0] + "." + parts[1], "2 parts"},
		"four parts":            {good + ".x", "4 parts"},
		"no signature":          {parts[0] + "." + parts[1] + ".", "signature: empty"},
		"a changed signature":   {parts[0] + "." + parts[1] + "." + encode(bytes.Repeat([]byte{7}, 64)), "not valid"},
		"a short signature":     {parts[0] + "." + parts[1] + "." + encode([]byte{1}), "not valid"},
		"a changed payload":     {parts[0] + "." + encode([]byte(payload(map[string]any{"sub": "spiffe://mesh.test/ns/bank/sa/vault"}))) + "." + parts[2], "not valid"},
		"padding":               {parts[0] + "=." + parts[1] + "." + parts[2], "not base64url"},
		"a line break":          {parts[0] + "\n." + parts[1] + "." + parts[2], "not base64url"},
		"a space":               {" " + good, "not base64url"},
		"JSON serialization": {fmt.Sprintf(`{"payload":%q,"signatures":[{"protected":%q,"signature":%q}]}`, parts[1], parts[0], parts[2]),
			"1 parts"},
		"encrypted": {parts[0] + "." + parts[1] + "." + parts[1] + "." + parts[1] + "." + parts[2], "5 parts"},
	} {
		t.Run(name, func(t *testing.T) {
			got, err := Validate(c.token, me, f.bundle)
			if err == nil {
				t.Fatalf("taken: %+v", got)
			}
			if !strings.Contains(err.Error(), c.want) {
				t.Errorf("refused with %q, want %q in it", err, c.want)
			}
		})
	}
	if _, err := Validate(good, "", f.bundle); err == nil {
		t.Error("taken by somebody without a name")
	}
}

// Bits of the last character that do not count must be zero: one token has one
// spelling, so that who keeps a list of used ones is not fooled.
func TestOneSpelling(t *testing.T) {
	f := newForge(t)
	good := es256(t, f.ec, header, payload(nil))
	const alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
	last := strings.IndexByte(alphabet, good[len(good)-1]) // 64 bytes: four bits do not count
	taken := 0
	for low := range 16 {
		if _, err := Validate(good[:len(good)-1]+string(alphabet[last&^15|low]), me, f.bundle); err == nil {
			taken++
		}
	}
	if taken != 1 {
		t.Errorf("%d spellings of one token", taken)
	}
}

// Whatever the token: no panic, and what is taken has a good signature.
func FuzzValidate(f *testing.F) {
	forge := newForge(f)
	f.Add(es256(f, forge.ec, header, payload(nil)))
	f.Add("..")
	f.Add("e30.e30.e30")
	f.Add(es256(f, forge.other, header, payload(nil)))
	f.Fuzz(func(t *testing.T, token string) {
		got, err := Validate(token, me, forge.bundle)
		if err == nil && (got.ID.TrustDomain() != td || !slices.Contains(got.Audience, me)) {
			t.Errorf("taken: %+v", got)
		}
	})
}
