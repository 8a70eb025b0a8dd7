package sdk

import (
	"context"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
)

func id(name string) spiffeid.ID {
	return spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/" + name)
}

func protected(mode string) *sdkv1.Rules {
	return &sdkv1.Rules{
		TrustDomain: "mesh.test", Namespace: "shop", ServiceAccount: "web", Mode: mode,
		Policies:    []*sdkv1.Policy{{Namespace: "shop", Name: "p", TargetServiceAccount: "web", Ports: []uint32{8443}, From: []string{id("client").String(), id("bad").String()}}},
		Quarantined: []*sdkv1.Quarantined{{Name: "q", Identities: []string{id("bad").String()}}},
	}
}

// Decisions are the mesh's, in its words.
func TestDecisions(t *testing.T) {
	const deny = "default deny: 1 policy protects shop/web, it does not admit this caller"
	for _, c := range []struct {
		mode, from string
		port       uint16
		verdict    verdict
		reason     string
	}{
		{"enforce", "client", 8443, allowed, "allowed by shop/p"},
		{"enforce", "client", 8444, denied, deny},
		{"enforce", "other", 8443, denied, deny},
		{"enforce", "bad", 8443, denied, `quarantined by "q": caller spiffe://mesh.test/ns/shop/sa/bad is cut off`},
		{"observe", "other", 8443, observed, deny},
		{"observe", "bad", 8443, denied, `quarantined by "q": caller spiffe://mesh.test/ns/shop/sa/bad is cut off`},
		{"what", "other", 8443, denied, deny}, // no mode that is not known lets anybody through
	} {
		r, err := parse(protected(c.mode))
		if err != nil {
			t.Fatal(err)
		}
		if d := r.inbound(id(c.from), c.port); d.verdict != c.verdict || d.reason != c.reason {
			t.Errorf("%s %s %d: %+v; want %s, %s", c.mode, c.from, c.port, d, c.verdict, c.reason)
		}
	}
	r, err := parse(protected("enforce"))
	if err != nil {
		t.Fatal(err)
	}
	for _, c := range [][3]string{
		{"web", "client", "accepted by the destination"},
		{"web", "bad", `quarantined by "q": target shop/bad is cut off`},
		{"bad", "client", `quarantined by "q": caller spiffe://mesh.test/ns/shop/sa/bad is cut off`},
	} {
		if d := r.outbound(id(c[0]), id(c[1])); d.reason != c[2] || d.refuses() != strings.HasPrefix(c[2], "quarantined") {
			t.Errorf("%s calls %s: %+v", c[0], c[1], d)
		}
	}
}

// A certificate that is revoked is refused whoever shows it, caller or server, and
// whatever the policies say; another one of the same identity is not.
func TestRevokedCertificates(t *testing.T) {
	p := protected("observe")
	p.Revoked = []*sdkv1.Revoked{{Serial: "0a0b", Reason: "copied"}}
	r, err := parse(p)
	if err != nil {
		t.Fatal(err)
	}
	m := &Mesh{rules: r, id: id("web")}
	for accepted, reason := range map[bool]string{true: "the caller's certificate is revoked: copied", false: "the target's certificate is revoked: copied"} {
		if d := m.decide(accepted, id("client"), "0a0b", 8443); !d.refuses() || d.reason != reason {
			t.Errorf("accepted %v: %+v", accepted, d)
		}
		if d := m.decide(accepted, id("client"), "0a0c", 8443); d.refuses() {
			t.Errorf("another certificate, accepted %v: %+v", accepted, d)
		}
	}
	if got := serial(big.NewInt(0x0a0b)); got != "0a0b" {
		t.Errorf("the serial number is written %q, the mesh writes 0a0b", got)
	}
}

// Defends against what a broken agent sends: rules that make no sense are not
// taken, in part neither.
func TestRulesThatMakeNoSense(t *testing.T) {
	for what, change := range map[string]func(*sdkv1.Rules){
		"trust domain": func(r *sdkv1.Rules) { r.TrustDomain = "" },
		"port":         func(r *sdkv1.Rules) { r.Policies[0].Ports[0] = 70000 },
		"caller":       func(r *sdkv1.Rules) { r.Policies[0].From[0] = "spiffe://*/x" },
		"quarantine":   func(r *sdkv1.Rules) { r.Quarantined[0].Identities[0] = "everybody" },
	} {
		r := protected("enforce")
		change(r)
		if got, err := parse(r); err == nil {
			t.Errorf("%s: %+v was taken", what, got)
		}
	}
}

// Without rules nothing is let through, in either direction.
func TestNoRulesRefuse(t *testing.T) {
	m := &Mesh{why: "default deny: no policy is in force yet"}
	for _, accepted := range []bool{true, false} {
		if d := m.decide(accepted, id("client"), "0a", 8443); !d.refuses() || d.reason != m.why {
			t.Errorf("accepted %v: %+v", accepted, d)
		}
	}
}

// Open says what is missing, and does not wait for ever.
func TestOpenWithoutAgent(t *testing.T) {
	ctx, cancel := context.WithTimeout(t.Context(), 200*time.Millisecond)
	defer cancel()
	began := time.Now()
	if _, err := Open(ctx, WithSocket("unix://"+t.TempDir()+"/agent.sock")); err == nil || !strings.Contains(err.Error(), "no identity from the agent at ") || time.Since(began) > 10*time.Second {
		t.Errorf("after %v: %v", time.Since(began), err)
	}
	if _, err := Open(ctx, WithSocket("tcp://127.0.0.1:1")); err == nil || !strings.Contains(err.Error(), "unix socket") {
		t.Errorf("a socket that is no unix socket: %v", err)
	}
}

// Events never hold a connection up: what has no room is counted.
func TestEventsAreBounded(t *testing.T) {
	r := newReporter(&Mesh{})
	for range maxQueue + 3 {
		r.add(&sdkv1.Event{})
	}
	if len(r.queue) != maxQueue || r.lost != 3 {
		t.Errorf("%d in the queue, %d lost", len(r.queue), r.lost)
	}
}

// What authorization adds to a handshake.
func BenchmarkDecide(b *testing.B) {
	r, err := parse(protected("enforce"))
	if err != nil {
		b.Fatal(err)
	}
	m, from := &Mesh{rules: r}, id("client")
	for b.Loop() {
		if m.decide(true, from, "0a", 8443).refuses() {
			b.Fatal("refused")
		}
	}
}
