package caserver

import (
	"context"
	"crypto"
	"crypto/x509"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"google.golang.org/grpc/codes"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
)

// streamed is the JWT bundle of a state.
func streamed(t *testing.T, s *nodev1.NodeState) *jwtbundle.Bundle {
	t.Helper()
	keys := map[string]crypto.PublicKey{}
	for _, k := range s.JwtKeys {
		pub, err := x509.ParsePKIXPublicKey(k.PublicKey)
		if err != nil {
			t.Fatal(err)
		}
		keys[k.KeyId] = pub
	}
	return jwtbundle.FromJWTAuthorities(testDomain, keys)
}

func tokenFor(workload string, audience ...string) *nodev1.IssueJWTRequest {
	return &nodev1.IssueJWTRequest{Workload: workload, Audience: audience}
}

// A node gets a token for a workload on it; go-spiffe accepts it with the keys
// that are streamed to another node, and it is in the issuance log, with the
// node and the workload.
func TestIssueJWT(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	got, err := w.asNode("one").IssueJWT(ctx, tokenFor("shop/web-1", "ledger", "other"))
	if err != nil {
		t.Fatal(err)
	}
	bundle := streamed(t, recv(t, watch(t, w.asNode("two"), "")))
	svid, err := jwtsvid.ParseAndValidate(got.Token, bundle, []string{"ledger"})
	if err != nil || svid.ID != webID || !slices.Equal(svid.Audience, []string{"ledger", "other"}) {
		t.Fatalf("%v, %v", svid, err)
	}
	entry, ok, err := w.authority.IssuanceLog().Find(svid.Claims["jti"].(string))
	if err != nil || !ok || entry.Kind != ca.KindJWT || entry.Node != "one" || entry.Workload != "shop/web-1" {
		t.Errorf("%+v, %t, %v", entry, ok, err)
	}
	if strings.Contains(w.logged.String(), got.Token[strings.LastIndexByte(got.Token, '.'):]) {
		t.Error("the token is in the log")
	}
}

// Only for a workload on the node, by the same rules as for certificates, and
// in the same words.
func TestIssueJWTScope(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	for _, workload := range []string{"shop/db-1", "bank/vault-1", "shop/none", "", "shop/web-1 ", strings.Repeat("x", 5000)} {
		_, err := one.IssueJWT(ctx, tokenFor(workload, "x"))
		wantCode(t, err, codes.PermissionDenied, `is not on node "one"`)
	}
	_, err := one.IssueJWT(ctx, tokenFor("dark/x-1", "x"))
	wantCode(t, err, codes.PermissionDenied, `namespace "dark"`)
	_, err = w.asNode("three").IssueJWT(ctx, tokenFor("shop/web-1", "x"))
	wantCode(t, err, codes.PermissionDenied, `is not on node "three"`)

	w.feed.Set(podView("r2", "u2"))
	for _, uid := range []string{"u1", "", "U2"} {
		_, err := one.IssueJWT(ctx, &nodev1.IssueJWTRequest{Workload: "shop/web-1", Uid: uid, Audience: []string{"x"}})
		wantCode(t, err, codes.PermissionDenied, "is not pod")
	}
	if _, err := one.IssueJWT(ctx, &nodev1.IssueJWTRequest{Workload: "shop/web-1", Uid: "u2", Audience: []string{"x"}}); err != nil {
		t.Error(err)
	}
	if !strings.Contains(w.logged.String(), `call=IssueJWT node=one code=PermissionDenied`) {
		t.Error("the refusals are not in the log")
	}
	w.feed.Set(nil)
	_, err = one.IssueJWT(ctx, tokenFor("shop/web-1", "x"))
	wantCode(t, err, codes.Unavailable, "try again")
}

// What the audience may not be is the caller's fault, and nothing is signed.
func TestIssueJWTAudience(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	for _, audience := range [][]string{nil, {""}, {"a", "a"}, {"a\nb"}, {strings.Repeat("x", ca.MaxAudienceBytes+1)}, make([]string, ca.MaxAudiences+1)} {
		_, err := one.IssueJWT(ctx, tokenFor("shop/web-1", audience...))
		wantCode(t, err, codes.InvalidArgument, "audience")
	}
	entries, err := w.authority.IssuanceLog().Entries(time.Time{})
	if err != nil || slices.ContainsFunc(entries, func(e ca.Entry) bool { return e.Kind == ca.KindJWT }) {
		t.Errorf("%v, %v", entries, err)
	}
}

// A quarantined identity gets no token: those who would take it do not know of
// the quarantine.
func TestIssueJWTQuarantined(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	v := testView()
	v.Revision = "r2"
	v.Model = v.Model.WithQuarantines(testDomain, []authz.Quarantine{{Name: "cut", Identities: []authz.Pattern{mustPattern(webID.String())}}})
	w.feed.Set(v)
	_, err := one.IssueJWT(ctx, tokenFor("shop/web-1", "x"))
	wantCode(t, err, codes.PermissionDenied, `quarantine "cut"`)
}

// Tokens have a rate of their own for each node: who asks for many keeps
// neither certificates from being renewed nor another node from its tokens.
func TestIssueJWTRate(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Rate, c.Burst = 1, 3 })
	ctx := testContext(t)
	one, two := w.asNode("one"), w.asNode("two")
	for range 3 {
		if _, err := one.IssueJWT(ctx, tokenFor("shop/web-1", "x")); err != nil {
			t.Fatal(err)
		}
	}
	_, err := one.IssueJWT(ctx, tokenFor("shop/web-1", "x"))
	wantCode(t, err, codes.ResourceExhausted, "wait")
	_, csr := newKey(t)
	if _, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr}); err != nil {
		t.Errorf("a certificate: %v", err)
	}
	if _, err := two.IssueJWT(ctx, tokenFor("shop/db-1", "x")); err != nil {
		t.Errorf("another node: %v", err)
	}
	w.clock.advance(2 * time.Second)
	if _, err := one.IssueJWT(ctx, tokenFor("shop/web-1", "x")); err != nil {
		t.Errorf("after a wait: %v", err)
	}
}

// A failure of the authority is not told in detail.
func TestIssueJWTWhenAuthorityFails(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	if _, err := one.IssueJWT(ctx, tokenFor("shop/web-1", "x")); err != nil {
		t.Fatal(err)
	}
	w.authority.Close()
	_, err := one.IssueJWT(ctx, tokenFor("shop/web-1", "x"))
	wantCode(t, err, codes.Unavailable, "could not be issued")
}

// Every node is sent the keys at once, and the next key when it is published,
// before anything is signed with it.
func TestWatchJWTKeys(t *testing.T) {
	w := newWorld(t, nil)
	ctx, cancel := context.WithCancel(testContext(t))
	one := w.asNode("one")
	stream := watch(t, one, "")
	if first := recv(t, stream); len(first.JwtKeys) != 1 {
		t.Fatalf("%d keys", len(first.JwtKeys))
	}
	w.clock.advance(ca.DefaultJWTKeyLife * 4 / 5)
	keeping := make(chan struct{})
	go func() { defer close(keeping); w.authority.KeepJWTKeys(ctx) }()
	defer func() { cancel(); <-keeping }()
	next := recv(t, stream)
	if len(next.JwtKeys) != 2 || next.Revision != "r1" {
		t.Fatalf("%d keys in %s", len(next.JwtKeys), next.Revision)
	}
}
