package kube

import (
	"context"
	"errors"

	"github.com/signet-mesh/signet/ca"
)

// jwtSecret holds the keys that sign JWT-SVIDs, under this key.
const (
	jwtSecret = "signet-jwt"
	jwtFile   = "keys.json"
)

// JWTKeys keeps the keys that sign JWT-SVIDs in a Secret of the release's
// namespace: every replica, and a replica that starts anew, signs and verifies
// with the same. It implements ca.JWTKeyStore.
type JWTKeys struct{ secret }

// NewJWTKeys returns the JWTKeys of a release.
func NewJWTKeys(client *Client, namespace string) *JWTKeys {
	return &JWTKeys{secret{client, namespace, jwtSecret}}
}

// Load implements ca.JWTKeyStore; the version is the Secret's.
func (k *JWTKeys) Load(ctx context.Context) ([]byte, string, error) {
	data, version, err := k.load(ctx)
	return data[jwtFile], version, err
}

// Save implements ca.JWTKeyStore.
func (k *JWTKeys) Save(ctx context.Context, data []byte, version string) error {
	err := k.save(ctx, map[string][]byte{jwtFile: data}, version)
	if errors.Is(err, errSecretChanged) {
		return ca.ErrJWTKeysChanged
	}
	return err
}
