package workloadapi

import (
	"context"
	"crypto"
	"encoding/base64"
	"encoding/json"
	"errors"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

// fetch asks for tokens of all identities, or of one.
func (a *agent) fetch(id string, audience ...string) (*workload.JWTSVIDResponse, error) {
	a.t.Helper()
	return a.client().FetchJWTSVID(call(a.t), &workload.JWTSVIDRequest{Audience: audience, SpiffeId: id})
}

func (a *agent) validate(token, audience string) (*workload.ValidateJWTSVIDResponse, error) {
	a.t.Helper()
	return a.client().ValidateJWTSVID(call(a.t), &workload.ValidateJWTSVIDRequest{Svid: token, Audience: audience})
}

func (a *agent) bundles() grpc.ServerStreamingClient[workload.JWTBundlesResponse] {
	a.t.Helper()
	s, err := a.client().FetchJWTBundles(call(a.t), &workload.JWTBundlesRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	return s
}

// token is a token of the one identity of the test's process.
func (a *agent) token(audience ...string) string {
	a.t.Helper()
	got, err := a.fetch("", audience...)
	if err != nil {
		a.t.Fatal(err)
	}
	return got.Svids[0].Svid
}

// go-spiffe's JWTSource obtains a token, and validates it in each of the ways
// that it has: with the streamed keys, and by asking the agent.
func TestJWTSource(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	ctx := call(t)
	src, err := workloadapi.NewJWTSource(ctx, a.option())
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	got, err := src.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "ledger", ExtraAudiences: []string{"bank"}, Subject: sa("web")})
	if err != nil || got.ID != sa("web") || !slices.Equal(got.Audience, []string{"ledger", "bank"}) {
		t.Fatalf("%v, %v", got, err)
	}
	for _, audience := range []string{"ledger", "bank"} {
		if svid, err := jwtsvid.ParseAndValidate(got.Marshal(), src, []string{audience}); err != nil || svid.ID != sa("web") {
			t.Errorf("%v, %v", svid, err)
		}
		if svid, err := workloadapi.ValidateJWTSVID(ctx, got.Marshal(), audience, workloadapi.WithAddr("unix://"+a.socket)); err != nil || svid.ID != sa("web") {
			t.Errorf("%v, %v", svid, err)
		}
	}
	if _, err := workloadapi.ValidateJWTSVID(ctx, got.Marshal(), "mail", workloadapi.WithAddr("unix://"+a.socket)); err == nil {
		t.Error("valid for another audience")
	}
	// The same token again, until it is due.
	if again := a.token("ledger", "bank"); again != got.Marshal() {
		t.Error("another token")
	}
	if twice := a.token("ledger", "bank", "ledger"); twice != got.Marshal() {
		t.Error("another token for an audience named twice")
	}
}

// All identities unless one is named, sorted; and only the caller's own.
func TestJWTIdentities(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)}, rule{"db", "db", self(t)}, rule{"mail", "mail", mesh.Attest{UID: ptr(4321)}})
	names := func(id string) (out []string) {
		t.Helper()
		got, err := a.fetch(id, "ledger")
		if err != nil {
			t.Fatal(err)
		}
		for _, s := range got.Svids {
			parsed, err := jwtsvid.ParseInsecure(s.Svid, []string{"ledger"})
			if err != nil || parsed.ID.String() != s.SpiffeId || s.Hint != "" {
				t.Errorf("%v is of %v, %v", s, parsed, err)
			}
			out = append(out, s.SpiffeId)
		}
		return out
	}
	if got, want := names(""), []string{sa("db").String(), sa("web").String()}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	if got, want := names(sa("web").String()), []string{sa("web").String()}; !slices.Equal(got, want) {
		t.Errorf("%v, want %v", got, want)
	}
	for _, id := range []string{sa("mail").String(), sa("none").String(), "spiffe://other.test/ns/default/sa/web", "spiffe://mesh.test"} {
		_, err := a.fetch(id, "ledger")
		ends(t, err, codes.PermissionDenied, "spiffe_id")
	}
	_, err := a.fetch("web", "ledger")
	ends(t, err, codes.InvalidArgument, "spiffe_id")
}

// Without an audience, or with one that no token may have, there is no token.
func TestJWTAudience(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	for _, audience := range [][]string{nil, {""}, {"ledger", ""}, {"a\nb"}, {strings.Repeat("x", ca.MaxAudienceBytes+1)}} {
		_, err := a.fetch("", audience...)
		ends(t, err, codes.InvalidArgument, "audience")
	}
}

// A stranger gets no token, no keys, and no opinion on a token, even a good one.
func TestJWTStranger(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	token := a.token("ledger")
	a.set(rule{"web", "web", mesh.Attest{UID: ptr(4321)}})
	_, err := a.fetch("", "ledger")
	ends(t, err, codes.PermissionDenied, "no identity issued")
	_, err = a.fetch(sa("web").String(), "ledger")
	ends(t, err, codes.PermissionDenied, "no identity issued")
	_, err = a.bundles().Recv()
	ends(t, err, codes.PermissionDenied, "no identity issued")
	_, err = a.validate(token, "ledger")
	ends(t, err, codes.PermissionDenied, "no identity issued")
}

// An identity that is taken away while its token is asked for: the token is not
// given out. Without the second look at the caller this test gets one.
func TestJWTEntitlementIsLostMeanwhile(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	asked, goOn := make(chan struct{}), make(chan struct{})
	a.issuer.slow(func() { close(asked); <-goOn })
	result := make(chan error, 1)
	go func() {
		_, err := a.fetch("", "ledger")
		result <- err
	}()
	<-asked
	a.attestor.SetWorkloads(nil)
	close(goOn)
	ends(t, <-result, codes.PermissionDenied, "no identity issued")
}

// The same when one of several identities is taken away.
func TestJWTOneEntitlementIsLostMeanwhile(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)}, rule{"db", "db", self(t)})
	asked, goOn := make(chan struct{}), make(chan struct{})
	a.issuer.slow(func() { close(asked); <-goOn })
	result := make(chan error, 1)
	go func() {
		_, err := a.fetch("", "ledger")
		result <- err
	}()
	<-asked
	a.attestor.SetWorkloads([]mesh.Workload{{Namespace: "default", Name: "db", ID: sa("db"), Attest: ptrTo(self(t))}})
	close(goOn)
	ends(t, <-result, codes.PermissionDenied, "taken away meanwhile")
}

// The same keys are the same bytes, or clients would be told of changes that are
// none.
func TestKeysAreSorted(t *testing.T) {
	keys := map[string]crypto.PublicKey{}
	for range 4 {
		for id, key := range newIssuer(t).jwtKeys() {
			keys[id] = key
		}
	}
	first, err := marshalKeys(jwtbundle.FromJWTAuthorities(td, keys))
	if err != nil {
		t.Fatal(err)
	}
	for range 30 {
		if again, err := marshalKeys(jwtbundle.FromJWTAuthorities(td, keys)); err != nil || string(again) != string(first) {
			t.Fatalf("%s and %s, %v", first, again, err)
		}
	}
}

// While the agent starts, and while the control plane is away, the answer is to
// come back; a token that is held is given all the same.
func TestJWTUnavailable(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.ready.Store(false) }, rule{"web", "web", self(t)})
	_, err := a.fetch("", "ledger")
	ends(t, err, codes.Unavailable, "starting")
	_, err = a.validate("x.y.z", "ledger")
	ends(t, err, codes.Unavailable, "starting")
	a.ready.Store(true)
	token := a.token("ledger")
	a.issuer.set(func(i *issuer) { i.refuse = errors.New("dial control.sock: secret reason") })
	if again := a.token("ledger"); again != token {
		t.Error("another token")
	}
	_, err = a.fetch("", "bank")
	ends(t, err, codes.Unavailable, "log says why")
	if strings.Contains(err.Error(), "secret") || !strings.Contains(a.log.String(), "secret reason") {
		t.Errorf("the reason belongs into the log: %v", err)
	}
	// An identity that svid hears of a moment later than the attestor.
	begin := time.Now()
	a.attestor.SetWorkloads([]mesh.Workload{{Namespace: "default", Name: "late", ID: sa("late"), Attest: ptrTo(self(t))}})
	_, err = a.fetch("", "ledger")
	ends(t, err, codes.Unavailable, "")
	if took := time.Since(begin); took < issueWait {
		t.Errorf("gave up after %s", took)
	}
}

func ptrTo(a mesh.Attest) *mesh.Attest { return &a }

// The bundle: keyed by the trust domain's ID, a JWK set of keys for tokens and
// of no others, public only; sent at once, when keys change, and not otherwise.
func TestJWTBundles(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	s := a.bundles()
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	raw := m.Bundles["spiffe://mesh.test"]
	var set struct {
		Keys []map[string]string `json:"keys"`
	}
	if err := json.Unmarshal(raw, &set); err != nil || len(m.Bundles) != 1 || len(set.Keys) != 1 {
		t.Fatalf("%s, %v", raw, err)
	}
	for name, want := range map[string]string{"use": "jwt-svid", "kty": "EC", "crv": "P-256", "d": ""} {
		if set.Keys[0][name] != want {
			t.Errorf("%s is %q, want %q", name, set.Keys[0][name], want)
		}
	}
	if set.Keys[0]["kid"] == "" {
		t.Error("no kid")
	}
	bundle, err := jwtbundle.Parse(td, raw)
	if err != nil {
		t.Fatal(err)
	}
	before := a.token("ledger")
	if _, err := jwtsvid.ParseAndValidate(before, bundle, []string{"ledger"}); err != nil {
		t.Error(err)
	}

	got := make(chan *workload.JWTBundlesResponse, 1)
	go func() {
		m, _ := s.Recv()
		got <- m
	}()
	a.set(rule{"web", "web", self(t)}, rule{"db", "db", mesh.Attest{UID: ptr(4321)}}) // no key changes
	select {
	case m := <-got:
		t.Fatalf("sent without a change: %v", m)
	case <-time.After(300 * time.Millisecond):
	}
	next := newIssuer(t)
	a.issuer.set(func(i *issuer) { i.tokens = next.tokens })
	a.set(rule{"web", "web", self(t)})
	if m = <-got; m == nil || string(m.Bundles["spiffe://mesh.test"]) == string(raw) {
		t.Fatalf("no news of the new key: %v", m)
	}
	// The former key is gone from the bundle: its tokens are worth nothing, nor
	// are they given out.
	_, err = a.validate(before, "ledger")
	ends(t, err, codes.InvalidArgument, "kid")
	if _, err := a.validate(a.token("ledger"), "ledger"); err != nil {
		t.Error(err)
	}
}

// What is said of a good token: who, and every claim.
func TestValidate(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	got, err := a.validate(a.token("ledger"), "ledger")
	if err != nil || got.SpiffeId != sa("web").String() {
		t.Fatalf("%v, %v", got, err)
	}
	claims := got.Claims.AsMap()
	if claims["sub"] != sa("web").String() || claims["aud"].([]any)[0] != "ledger" || claims["exp"].(float64) < float64(time.Now().Unix()) || claims["jti"] == "" {
		t.Errorf("%v", claims)
	}
}

// A token that is not good, and a question that is not complete, are the
// request's fault. What makes a token bad is package jwtcheck's to show; that it
// is asked, with this node's keys, is shown here.
func TestValidateRefuses(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	good := a.token("ledger")
	parts := strings.Split(good, ".")
	foreign := newIssuer(t)
	foreign.ids["default/web"] = sa("web")
	other, err := foreign.IssueJWT(context.Background(), "default/web", []string{"ledger"})
	if err != nil {
		t.Fatal(err)
	}
	none := base64.RawURLEncoding.EncodeToString([]byte(`{"alg":"none"}`)) + "." + parts[1] + "."
	for name, c := range map[string]struct{ token, audience, want string }{
		"no token":             {"", "ledger", "svid: empty"},
		"no audience":          {good, "", "audience: empty"},
		"another audience":     {good, "bank", "aud"},
		"two audiences in one": {good, "ledger,bank", "aud"},
		"alg none":             {none, "ledger", "svid: token"},
		"another signature":    {parts[0] + "." + parts[1] + "." + strings.Repeat("A", 86), "ledger", "not valid"},
		"another's key":        {other, "ledger", "kid"},
		"text":                 {"hello", "ledger", "1 parts"},
		"oversize":             {strings.Repeat("x", 20<<10), "ledger", "at most"},
	} {
		t.Run(name, func(t *testing.T) {
			_, err := a.validate(c.token, c.audience)
			ends(t, err, codes.InvalidArgument, c.want)
		})
	}
	_, err = a.validate(strings.Repeat("x", maxRequest+1), "ledger")
	ends(t, err, codes.ResourceExhausted, "")
}

// An agent whose control plane has sent no keys knows nothing to be valid.
func TestNoJWTKeys(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.issuer.noKeys = true }, rule{"web", "web", self(t)})
	_, err := a.fetch("", "ledger")
	ends(t, err, codes.Unavailable, "")
	_, err = a.validate("x.y.z", "ledger")
	ends(t, err, codes.Unavailable, "not known yet")
	_, err = a.bundles().Recv()
	ends(t, err, codes.Unavailable, "not there yet")
}

// One identity that asks for ever new tokens is told to stop, and does not keep
// another from its own.
func TestJWTRate(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)}, rule{"db", "db", self(t)})
	c := a.client()
	var err error
	for i := 0; i < 2000 && err == nil; i++ {
		_, err = c.FetchJWTSVID(call(t), &workload.JWTSVIDRequest{SpiffeId: sa("web").String(), Audience: []string{strings.Repeat("x", i+1)}})
	}
	ends(t, err, codes.Unavailable, "too many tokens")
	if _, err := a.fetch(sa("db").String(), "ledger"); err != nil {
		t.Errorf("another identity: %v", err)
	}
}

// An identity that is quarantined gets no token, not even one that is held, and
// its tokens from before are not good any more, whoever asks.
func TestJWTQuarantine(t *testing.T) {
	web, db := rule{"web", "web", self(t)}, rule{"db", "db", self(t)}
	a := startAgent(t, nil, web, db)
	got, err := a.fetch("", "ledger")
	if err != nil {
		t.Fatal(err)
	}
	a.cutOff = sa("web")
	a.set(web, db)
	_, err = a.fetch(sa("web").String(), "ledger")
	ends(t, err, codes.PermissionDenied, "quarantined")
	_, err = a.validate(got.Svids[1].Svid, "ledger")
	ends(t, err, codes.InvalidArgument, "quarantined")
	if _, err := a.validate(got.Svids[0].Svid, "ledger"); err != nil {
		t.Errorf("another identity: %v", err)
	}
	if _, err := a.fetch(sa("db").String(), "ledger"); err != nil {
		t.Errorf("another identity: %v", err)
	}
}

// A token that is revoked is good for nothing at the agent, and nobody is given it
// again: who asks gets another, which is good.
func TestJWTRevoked(t *testing.T) {
	web := rule{"web", "web", self(t)}
	a := startAgent(t, nil, web)
	got, err := a.fetch("", "ledger")
	if err != nil {
		t.Fatal(err)
	}
	first := got.Svids[0].Svid
	answer, err := a.validate(first, "ledger")
	if err != nil {
		t.Fatal(err)
	}
	a.revoked = answer.Claims.Fields["jti"].GetStringValue()
	if a.revoked == "" {
		t.Fatal("the token has no jti")
	}
	a.set(web)
	_, err = a.validate(first, "ledger")
	ends(t, err, codes.InvalidArgument, "revoked")
	if got, err = a.fetch("", "ledger"); err != nil || got.Svids[0].Svid == first {
		t.Fatalf("the revoked token is given again, %v", err)
	}
	if _, err := a.validate(got.Svids[0].Svid, "ledger"); err != nil {
		t.Errorf("the next token: %v", err)
	}
}
