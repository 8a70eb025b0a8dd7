package ca

import (
	"crypto"
	"encoding/base64"
	"encoding/json"
	"fmt"
	"maps"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
)

// jwtBundle is what an authority publishes, as go-spiffe has it.
func jwtBundle(a *Authority) *jwtbundle.Bundle {
	keys, _ := a.JWTKeys()
	out := map[string]crypto.PublicKey{}
	for _, k := range keys {
		out[k.ID] = k.Key
	}
	return jwtbundle.FromJWTAuthorities(a.TrustDomain(), out)
}

func issueJWT(t testing.TB, a *Authority, ttl time.Duration, audience ...string) *IssuedJWT {
	t.Helper()
	p, err := a.PrepareJWT(JWTRequest{ID: corpusID, Audience: audience, TTL: ttl, Node: "one", Workload: "shop/web-1"})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := a.IssueJWT(p)
	if err != nil {
		t.Fatal(err)
	}
	return issued
}

// part decodes the header or the claims of a token.
func part(t testing.TB, token string, n int) map[string]any {
	t.Helper()
	raw, err := base64.RawURLEncoding.DecodeString(strings.Split(token, ".")[n])
	if err != nil {
		t.Fatal(err)
	}
	out := map[string]any{}
	if err := json.Unmarshal(raw, &out); err != nil {
		t.Fatal(err)
	}
	return out
}

// A token is what was asked for, is accepted by go-spiffe and by it only for
// its audience, has the headers of the specification and no other, lives for
// five minutes, and is in the log under its jti.
func TestIssueJWT(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	before := time.Now()
	issued := issueJWT(t, a, 0, "ledger", "spiffe://mesh.example/ns/pay/sa/ledger")
	svid, err := jwtsvid.ParseAndValidate(issued.Token, jwtBundle(a), []string{"ledger"})
	if err != nil {
		t.Fatal(err)
	}
	if svid.ID != corpusID || !slices.Equal(svid.Audience, []string{"ledger", "spiffe://mesh.example/ns/pay/sa/ledger"}) {
		t.Errorf("%s for %q", svid.ID, svid.Audience)
	}
	if _, err := jwtsvid.ParseAndValidate(issued.Token, jwtBundle(a), []string{"ledge"}); err == nil {
		t.Error("accepted for another audience")
	}
	if ttl := svid.Expiry.Sub(before); ttl > DefaultJWTTTL+time.Second || ttl < DefaultJWTTTL-2*time.Second || !svid.Expiry.Equal(issued.ExpiresAt) {
		t.Errorf("lives for %s", ttl)
	}
	if h := part(t, issued.Token, 0); len(h) != 3 || h["alg"] != "ES256" || h["typ"] != "JWT" || h["kid"] != issued.KeyID || issued.KeyID == "" {
		t.Errorf("header %v", h)
	}
	claims := part(t, issued.Token, 1)
	if names := slices.Sorted(maps.Keys(claims)); !slices.Equal(names, []string{"aud", "exp", "iat", "jti", "sub"}) {
		t.Errorf("claims %v", names)
	}
	if iat := int64(claims["iat"].(float64)); iat < before.Unix() || iat > time.Now().Unix() || claims["jti"] != issued.Serial {
		t.Errorf("claims %v", claims)
	}
	e, ok, err := a.IssuanceLog().Find(issued.Serial)
	if err != nil || !ok {
		t.Fatalf("jti not in the log: %t, %v", ok, err)
	}
	if e.Kind != KindJWT || e.Outcome != OutcomeIssued || e.ID != corpusID.String() || e.Node != "one" || e.Workload != "shop/web-1" ||
		e.Issuer != issued.KeyID || len(e.Audience) != 2 || !e.NotAfter.Equal(issued.ExpiresAt) {
		t.Errorf("entry is %+v", e)
	}
}

// What the token may not be is refused before a key is touched, by the name of
// the field.
func TestPrepareJWTRefuses(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	id := func(s string) spiffeid.ID { return spiffeid.RequireFromString(s) }
	var many []string
	for i := range MaxAudiences + 1 {
		many = append(many, fmt.Sprint(i))
	}
	long := strings.Repeat("x", MaxAudienceBytes)
	for name, c := range map[string]struct {
		req  JWTRequest
		want string
	}{
		"no id":                {JWTRequest{Audience: []string{"a"}}, "id: empty"},
		"foreign trust domain": {JWTRequest{ID: id("spiffe://other.example/ns/shop/sa/web"), Audience: []string{"a"}}, "not in trust domain"},
		"a node":               {JWTRequest{ID: id("spiffe://mesh.example/signet/node/one"), Audience: []string{"a"}}, "only workloads"},
		"the control plane":    {JWTRequest{ID: ControlID(testDomain), Audience: []string{"a"}}, "only workloads"},
		"the trust domain":     {JWTRequest{ID: id("spiffe://mesh.example"), Audience: []string{"a"}}, "path must be"},
		"no audience":          {JWTRequest{ID: corpusID}, "audience: empty"},
		"an empty audience":    {JWTRequest{ID: corpusID, Audience: []string{"a", ""}}, "audience[1]: empty"},
		"too many":             {JWTRequest{ID: corpusID, Audience: many}, "at most 16"},
		"too long":             {JWTRequest{ID: corpusID, Audience: []string{long + "x"}}, "at most 2048"},
		"too long together":    {JWTRequest{ID: corpusID, Audience: []string{long, "y" + long[1:], "z"}}, "at most 4096"},
		"twice":                {JWTRequest{ID: corpusID, Audience: []string{"a", "a"}}, "twice"},
		"a line break":         {JWTRequest{ID: corpusID, Audience: []string{"a\nb"}}, "do not print"},
		"no UTF-8":             {JWTRequest{ID: corpusID, Audience: []string{"a\xff"}}, "do not print"},
		"negative TTL":         {JWTRequest{ID: corpusID, Audience: []string{"a"}, TTL: -1}, "ttl"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := a.PrepareJWT(c.req)
			wantError(t, err, c.want)
		})
	}
	if entries, err := a.IssuanceLog().Entries(time.Time{}); err != nil || len(entries) != 0 {
		t.Errorf("in the log: %v, %v", entries, err)
	}
}

// The lifetime is moved into its bounds.
func TestJWTTTLIsClamped(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	for ttl, want := range map[time.Duration]time.Duration{
		0: DefaultJWTTTL, time.Millisecond: MinJWTTTL, 10 * time.Minute: 10 * time.Minute, 48 * time.Hour: MaxJWTTTL,
	} {
		if got := issueJWT(t, a, ttl, "x").ExpiresAt.Sub(c.now()); got != want {
			t.Errorf("asked for %s: %s, want %s", ttl, got, want)
		}
	}
}

// A prepared request yields at most one token, soon, from its own authority.
func TestIssueJWTOnce(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	prepare := func() *PreparedJWT {
		p, err := a.PrepareJWT(JWTRequest{ID: corpusID, Audience: []string{"x"}})
		if err != nil {
			t.Fatal(err)
		}
		return p
	}
	p := prepare()
	var good atomic.Int32
	var wg sync.WaitGroup
	for range 8 {
		wg.Go(func() {
			if _, err := a.IssueJWT(p); err == nil {
				good.Add(1)
			}
		})
	}
	wg.Wait()
	if good.Load() != 1 {
		t.Errorf("%d tokens of one request", good.Load())
	}
	late := prepare()
	c.advance(2 * preparedFor)
	_, err := a.IssueJWT(late)
	wantError(t, err, "prepare it again")
	other := openTest(t, t.TempDir(), nil)
	_, err = other.IssueJWT(prepare())
	wantError(t, err, "not prepared by this authority")
	closing := prepare()
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	_, err = a.IssueJWT(closing)
	wantError(t, err, "closed")
}

// Nothing is signed whose intent is not in the log.
func TestJWTNeedsTheLog(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	p, err := a.PrepareJWT(JWTRequest{ID: corpusID, Audience: []string{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	a.issuance.mu.Lock()
	a.issuance.err = fmt.Errorf("the disk is full")
	a.issuance.mu.Unlock()
	_, err = a.IssueJWT(p)
	wantError(t, err, "record the intent: the disk is full")
}
