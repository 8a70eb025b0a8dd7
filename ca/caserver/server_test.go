package caserver

import (
	"crypto/tls"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"google.golang.org/grpc/codes"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

// A node joins with a token and no certificate, and then calls with what it
// was given.
func TestJoinThenCall(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	token, err := w.tokens.Create("one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	key, csr := newKey(t)
	svid, err := w.dial(nil).Join(ctx, &nodev1.JoinRequest{Token: token, Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	if id, _, err := x509svid.ParseAndVerify(svid.Chain, w.authority, x509svid.WithTime(w.clock.now())); err != nil || id != nodeID("one") {
		t.Fatalf("joined as %q, %v", id, err)
	}
	if len(svid.Bundle) != 1 {
		t.Errorf("bundle of %d; want 1", len(svid.Bundle))
	}
	node := w.dial(&tls.Certificate{Certificate: svid.Chain, PrivateKey: key})
	_, csr = newKey(t)
	renewed, err := node.Renew(ctx, &nodev1.RenewRequest{Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	if got := leaf(t, renewed.Chain); got.URIs[0].String() != nodeID("one").String() || !got.NotAfter.Equal(w.clock.now().Add(DefaultNodeTTL).Truncate(time.Second)) {
		t.Errorf("renewed as %v until %s", got.URIs, got.NotAfter)
	}
	_, csr = newKey(t)
	issued, err := node.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	if err != nil {
		t.Fatal(err)
	}
	got := leaf(t, issued.Chain)
	if got.URIs[0].String() != webID.String() || !got.NotAfter.Equal(w.clock.now().Add(10*time.Minute).Truncate(time.Second)) {
		t.Errorf("issued %v until %s", got.URIs, got.NotAfter)
	}
	e, ok, err := w.authority.IssuanceLog().Find(got.SerialNumber.Text(16))
	if err != nil || !ok || e.Node != "one" || e.Workload != "shop/web-1" {
		t.Errorf("issuance log: %+v, %t, %v", e, ok, err)
	}
}

// A token that was used, is expired or was never made joins nobody.
func TestJoinRefusesTokens(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	client := w.dial(nil)
	_, csr := newKey(t)
	used, err := w.tokens.Create("one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := client.Join(ctx, &nodev1.JoinRequest{Token: used, Csr: csr}); err != nil {
		t.Fatal(err)
	}
	expired, err := w.tokens.Create("one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	w.clock.advance(2 * time.Minute)
	for name, token := range map[string]string{
		"used": used, "expired": expired, "empty": "", "unknown": tokenPrefix + "x",
		"path": tokenPrefix + "../../x", "huge": tokenPrefix + strings.Repeat("x", 1<<20),
	} {
		_, err := client.Join(ctx, &nodev1.JoinRequest{Token: token, Csr: csr})
		if err == nil {
			t.Errorf("%s token joined", name)
			continue
		}
		wantCode(t, err, codes.PermissionDenied, "join token")
	}
	if strings.Contains(w.logged.String(), used) {
		t.Error("a token is in the log")
	}
}

// A node is given certificates for its own workloads in namespaces that take
// part, and for nothing else; it cannot tell what other nodes run.
func TestIssueScope(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	_, csr := newKey(t)
	for _, workload := range []string{"shop/db-1", "bank/vault-1", "shop/none", "", "web-1", "shop/web-1/", "/", "shop/web-1 ", "shop/web-1\x00", strings.Repeat("x", 5000)} {
		_, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: workload, Csr: csr})
		wantCode(t, err, codes.PermissionDenied, `is not on node "one"`)
	}
	_, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "dark/x-1", Csr: csr})
	wantCode(t, err, codes.PermissionDenied, `namespace "dark"`)
	_, err = w.asNode("three").Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	wantCode(t, err, codes.PermissionDenied, `is not on node "three"`)
	if _, err := w.asNode("two").Issue(ctx, &nodev1.IssueRequest{Workload: "shop/db-1", Csr: csr}); err != nil {
		t.Error(err)
	}
	if !strings.Contains(w.logged.String(), "shop/db-1") {
		t.Error("the refusals are not in the log")
	}
	// A workload that moved is gone for its former node at once.
	v := *testView()
	v.State.Workloads[3].Node = "two"
	w.feed.Set(&v)
	_, err = one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	wantCode(t, err, codes.PermissionDenied, `is not on node "one"`)
	w.feed.Set(nil)
	_, err = one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	wantCode(t, err, codes.Unavailable, "try again")
}

// Every hostile request of the authority's corpus is refused over the wire as
// the caller's fault, by Issue and by Renew, and nothing is recorded as issued.
func TestHostileRequests(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	files, err := filepath.Glob("../testdata/csr/*.der")
	if err != nil || len(files) < 48 {
		t.Fatalf("corpus of %d, %v", len(files), err)
	}
	before, err := w.authority.IssuanceLog().Entries(time.Time{})
	if err != nil {
		t.Fatal(err)
	}
	issued := 0
	for _, file := range files {
		der, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		name := strings.TrimSuffix(filepath.Base(file), ".der")
		_, err = one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: der})
		if strings.HasPrefix(name, "good_") {
			issued++
			if err != nil {
				t.Errorf("%s: %v", name, err)
			}
			continue
		}
		if err == nil {
			t.Errorf("%s: issued", name)
			continue
		}
		wantCode(t, err, codes.InvalidArgument, "csr")
		_, err = one.Renew(ctx, &nodev1.RenewRequest{Csr: der})
		wantCode(t, err, codes.InvalidArgument, "csr")
	}
	after, err := w.authority.IssuanceLog().Entries(time.Time{})
	if err != nil || len(after)-len(before) != issued {
		t.Errorf("%d entries for %d certificates, %v", len(after)-len(before), issued, err)
	}
}

// One node cannot exhaust the authority, and does not slow another down.
func TestRateLimit(t *testing.T) {
	w := newWorld(t, func(c *Config) { c.Rate, c.Burst = 1, 3 })
	ctx := testContext(t)
	one, two := w.asNode("one"), w.asNode("two")
	_, csr := newKey(t)
	for range 3 {
		if _, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr}); err != nil {
			t.Fatal(err)
		}
	}
	_, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	wantCode(t, err, codes.ResourceExhausted, "wait")
	_, err = one.Renew(ctx, &nodev1.RenewRequest{Csr: csr})
	wantCode(t, err, codes.ResourceExhausted, "wait")
	if _, err := two.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/db-1", Csr: csr}); err != nil {
		t.Errorf("another node: %v", err)
	}
	w.clock.advance(2 * time.Second)
	if _, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr}); err != nil {
		t.Errorf("after a wait: %v", err)
	}
}

// A failure of the authority is not told to the caller in detail, and is
// never taken for a certificate.
func TestIssueWhenAuthorityFails(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	if _, err := one.Renew(ctx, &nodev1.RenewRequest{}); err == nil { // connects
		t.Fatal("renewed without a request")
	}
	w.authority.Close()
	_, csr := newKey(t)
	_, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	wantCode(t, err, codes.Unavailable, "could not be issued")
}

// New refuses a configuration with a part missing.
func TestNewRefuses(t *testing.T) {
	w := newWorld(t, nil)
	for want, cfg := range map[string]Config{
		"Authority": {Feed: w.feed, Tokens: w.tokens},
		"Feed":      {Authority: w.authority, Tokens: w.tokens},
		"Tokens":    {Authority: w.authority, Feed: w.feed},
		"NodeTTL":   {Authority: w.authority, Feed: w.feed, Tokens: w.tokens, NodeTTL: 2 * ca.MaxTTL},
		"Rate":      {Authority: w.authority, Feed: w.feed, Tokens: w.tokens, Rate: -1},
	} {
		if _, err := New(cfg); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%v; want %q in it", err, want)
		}
	}
	if _, err := ClientTLS(ClientConfig{TrustDomain: testDomain}); err == nil {
		t.Error("a client without a bundle would trust anyone")
	}
	if _, err := ClientTLS(ClientConfig{Bundle: w.authority}); err == nil {
		t.Error("a client without a trust domain would trust anyone")
	}
}
