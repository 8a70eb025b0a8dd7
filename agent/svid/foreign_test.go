package svid

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"log/slog"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/bundle"
)

// TestForeignKeys: keys of another trust domain verify its own tokens only, a
// change of them wakes who waits, and none takes the place of the mesh's.
func TestForeignKeys(t *testing.T) {
	own, partner := spiffeid.RequireTrustDomainFromString("mesh.test"), spiffeid.RequireTrustDomainFromString("partner.test")
	keys := func(id string) map[string]crypto.PublicKey {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		return map[string]crypto.PublicKey{id: key.Public()}
	}
	m := New(Config{Log: slog.New(slog.DiscardHandler)})
	state := State{TrustDomain: own, JWTKeys: keys("mine")}
	m.Update(state)
	changed := m.Changed()
	state.Foreign = []*bundle.Bundle{{TrustDomain: own, JWTKeys: keys("forged")}, {TrustDomain: partner, JWTKeys: keys("theirs")}}
	m.Update(state)
	select {
	case <-changed:
	default:
		t.Error("a new trust domain is no change")
	}
	changed = m.Changed()
	m.Update(state)
	select {
	case <-changed:
		t.Error("the same bundles are a change")
	default:
	}
	set := m.JWTBundles()
	for td, want := range map[spiffeid.TrustDomain]string{own: "mine", partner: "theirs"} {
		b, err := set.GetJWTBundleForTrustDomain(td)
		if err != nil || len(b.JWTAuthorities()) != 1 || !b.HasJWTAuthority(want) {
			t.Errorf("%s: %v %v", td, b, err)
		}
	}
}
