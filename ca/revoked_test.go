package ca

import (
	"errors"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// enter writes into the issuance log what an issuance does.
func enter(t *testing.T, a *Authority, serial, kind string, notAfter time.Time) {
	t.Helper()
	if err := a.issuance.intent(line{Time: a.now(), Kind: kind, Serial: serial, ID: "spiffe://mesh.test/ns/shop/sa/web", NotAfter: notAfter}); err != nil {
		t.Fatal(err)
	}
}

// TestRevocations: what is revoked is what was issued and has not expired, it
// outlives a restart, is refused when the holder had its time, and drops out by
// itself. Anything else changes nothing and says why.
func TestRevocations(t *testing.T) {
	c, dir := newClock(), t.TempDir()
	a := openTest(t, dir, func(o *Options) { o.Now = c.now })
	enter(t, a, "0a1b", "", c.now().Add(time.Hour))
	enter(t, a, "0c", "", c.now().Add(-time.Hour))
	enter(t, a, "token", KindJWT, c.now().Add(time.Hour))
	enter(t, a, "0d", KindJWT, c.now().Add(time.Hour))
	_, changed, _ := a.Revoked()
	for _, bad := range []struct {
		serial, reason string
		is             error
	}{
		{"ff", "x", ErrNotIssued}, {"0c", "x", ErrNotRevoked},
		{"0a1b", " ", nil}, {"0a1b", strings.Repeat("x", maxReason+1), nil}, {"0a1b", "a\nb", nil}, {"", "x", nil}, {"zz", "x", nil}, {"000", "x", nil},
	} {
		if _, err := a.Revoke(bad.serial, bad.reason); err == nil || bad.is != nil && !errors.Is(err, bad.is) {
			t.Errorf("Revoke(%q, %.20q) = %v, want %v", bad.serial, bad.reason, err, bad.is)
		}
	}
	if list, _, next := a.Revoked(); len(list) != 0 || !next.IsZero() {
		t.Fatalf("bad input left %v", list)
	}
	if _, err := a.Revoke("0d", "a token"); err != nil {
		t.Errorf("a token: %v", err)
	}
	r, err := a.Revoke("A:1B", "lost")
	if err != nil || r.Serial != "0a1b" || r.Refused(c.now()) {
		t.Fatalf("Revoke = %+v, %v", r, err)
	}
	select {
	case <-changed:
	default:
		t.Error("nobody hears of a revocation")
	}
	if again, err := a.Revoke("0a1b", "once more"); err != nil || again != r {
		t.Errorf("the second time: %+v, %v", again, err)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	a = openTest(t, dir, func(o *Options) { o.Now = c.now })
	list, _, next := a.Revoked()
	if len(list) != 2 || list[1].Reason != "lost" || !next.Equal(r.At.Add(RevokeGrace)) || !a.IsRevoked([]byte{0x0a, 0x1b}) || a.IsRevoked([]byte{0x1b}) {
		t.Fatalf("after a restart: %+v, next at %s", list, next)
	}
	if e, found, err := a.IssuanceLog().Find("0a1b"); err != nil || !found || e.Reason != "lost" || !e.Revoked.Equal(r.At) {
		t.Errorf("the issuance log says %+v, %v", e, err)
	}
	c.advance(RevokeGrace)
	list, _, next = a.Revoked()
	if !list[0].Refused(c.now()) || !next.After(r.NotAfter) {
		t.Errorf("after the grace: %+v, next at %s", list, next)
	}
	c.advance(time.Hour + revokeSkew)
	if list, _, _ = a.Revoked(); len(list) != 0 {
		t.Errorf("it is kept when it has expired: %+v", list)
	}
}

// TestRevokeIdentity: all certificates of an identity that have not expired are
// revoked, and those of nobody else.
func TestRevokeIdentity(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	web := spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/web")
	enter(t, a, "0a", "", c.now().Add(time.Hour))
	enter(t, a, "0b", "", c.now().Add(2*time.Hour))
	enter(t, a, "0c", "", c.now().Add(-time.Hour))
	enter(t, a, "0d", KindJWT, c.now().Add(time.Hour))
	if err := a.issuance.intent(line{Time: c.now(), Serial: "0e", ID: web.String() + "2", NotAfter: c.now().Add(time.Hour)}); err != nil {
		t.Fatal(err)
	}
	first, err := a.Revoke("0b", "first")
	if err != nil {
		t.Fatal(err)
	}
	if _, err := a.RevokeIdentity(spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/none"), "x"); !errors.Is(err, ErrNotIssued) {
		t.Errorf("an identity without certificates: %v", err)
	}
	if _, err := a.RevokeIdentity(web, " "); err == nil {
		t.Error("without a reason")
	}
	all, err := a.RevokeIdentity(web, "stolen")
	if err != nil || len(all) != 2 || all[0].Serial != "0a" || all[1] != first {
		t.Fatalf("%+v, %v", all, err)
	}
	if list, _, _ := a.Revoked(); len(list) != 2 {
		t.Errorf("in force: %+v", list)
	}
}

// TestRevocationsAreBounded: one more than the most is refused, until one expires.
func TestRevocationsAreBounded(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	for i := range MaxRevoked + 1 {
		enter(t, a, fmt.Sprintf("%04x", i+1), "", c.now().Add(time.Duration(i+1)*time.Minute))
	}
	for i := range MaxRevoked {
		if _, err := a.Revoke(fmt.Sprintf("%04x", i+1), "test"); err != nil {
			t.Fatal(err)
		}
	}
	last := fmt.Sprintf("%04x", MaxRevoked+1)
	if _, err := a.Revoke(last, "test"); !errors.Is(err, ErrRevokedFull) {
		t.Errorf("one too many: %v", err)
	}
	c.advance(time.Minute + revokeSkew + time.Second)
	if _, err := a.Revoke(last, "test"); err != nil {
		t.Errorf("when the first had expired: %v", err)
	}
}

// TestDeclared: what is declared is refused beside what the authority revoked
// itself, for as long as it is declared and its certificate has not expired. One
// whose end is not known stays, and one without an instant is refused at once.
func TestDeclared(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	enter(t, a, "0a", "", c.now().Add(time.Hour))
	if _, err := a.Revoke("0a", "own"); err != nil {
		t.Fatal(err)
	}
	serials := func() (out []string) {
		list, _, _ := a.Revoked()
		for _, r := range list {
			out = append(out, fmt.Sprint(r.Serial, " ", r.Refused(c.now())))
		}
		slices.Sort(out)
		return out
	}
	_, changed, _ := a.Revoked()
	a.DeclareRevoked([]Revoked{{Serial: "0a", Reason: "again"}, {Serial: "0b", At: c.now(), NotAfter: c.now().Add(time.Minute)}, {Serial: "0c"}})
	select {
	case <-changed:
	default:
		t.Error("nobody hears of a declaration")
	}
	if got, want := serials(), []string{"0a false", "0b false", "0c true"}; !slices.Equal(got, want) {
		t.Errorf("%q, want %q", got, want)
	}
	if _, _, next := a.Revoked(); !next.Equal(c.now().Add(RevokeGrace)) {
		t.Errorf("it changes by itself at %s", next)
	}
	if !a.IsRevoked([]byte{0x0b}) || !a.IsRevoked([]byte{0x0c}) || a.IsRevoked([]byte{0x0d}) {
		t.Error("not what is declared is revoked")
	}
	c.advance(time.Minute + revokeSkew + time.Second)
	if got, want := serials(), []string{"0a true", "0c true"}; !slices.Equal(got, want) || a.IsRevoked([]byte{0x0b}) {
		t.Errorf("when one had expired: %q, want %q", got, want)
	}
	a.DeclareRevoked(nil)
	if got, want := serials(), []string{"0a true"}; !slices.Equal(got, want) {
		t.Errorf("when nothing was declared any more: %q, want %q", got, want)
	}
}
