package agent

import (
	"crypto/ecdsa"
	"crypto/ed25519"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"strings"
	"testing"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
)

// The keys that verify tokens are taken over by their ids; a state with one that
// makes no sense is refused as a whole, so that the last good keys stay.
func TestStateJWTKeys(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	pub, _, err := ed25519.GenerateKey(rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	encode := func(k any) []byte {
		der, err := x509.MarshalPKIXPublicKey(k)
		if err != nil {
			t.Fatal(err)
		}
		return der
	}
	good := encode(key.Public())
	state := func(keys ...*nodev1.JWTKey) *nodev1.NodeState {
		return &nodev1.NodeState{TrustDomain: "mesh.test", JwtKeys: keys}
	}
	s, err := parseState(state(&nodev1.JWTKey{KeyId: "a", PublicKey: good}, &nodev1.JWTKey{KeyId: "b", PublicKey: good}), "one")
	if err != nil || len(s.jwtKeys) != 2 || !key.PublicKey.Equal(s.jwtKeys["b"]) {
		t.Errorf("%v, %v", s, err)
	}
	for name, keys := range map[string][]*nodev1.JWTKey{
		"no id":             {{PublicKey: good}},
		"one id twice":      {{KeyId: "a", PublicKey: good}, {KeyId: "a", PublicKey: good}},
		"no key":            {{KeyId: "a"}},
		"bytes":             {{KeyId: "a", PublicKey: []byte("key")}},
		"another sort":      {{KeyId: "a", PublicKey: encode(pub)}},
		"more than a key":   {{KeyId: "a", PublicKey: append(good[:len(good):len(good)], 0)}},
		"one of two is bad": {{KeyId: "a", PublicKey: good}, {KeyId: "b"}},
	} {
		if _, err := parseState(state(keys...), "one"); err == nil || !strings.Contains(err.Error(), "JWT key") {
			t.Errorf("%s: %v", name, err)
		}
	}
}
