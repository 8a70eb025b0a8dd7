package kube

import (
	"context"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

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
type JWTKeys struct {
	client    *Client
	namespace string
}

// NewJWTKeys returns the JWTKeys of a release.
func NewJWTKeys(client *Client, namespace string) *JWTKeys { return &JWTKeys{client, namespace} }

// Load implements ca.JWTKeyStore; the version is the Secret's.
func (k *JWTKeys) Load(ctx context.Context) ([]byte, string, error) {
	secret, err := k.client.Core.CoreV1().Secrets(k.namespace).Get(ctx, jwtSecret, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, "", nil
	case err != nil:
		return nil, "", fmt.Errorf("kube: Secret %s/%s: %w", k.namespace, jwtSecret, err)
	}
	return secret.Data[jwtFile], secret.ResourceVersion, nil
}

// Save implements ca.JWTKeyStore.
func (k *JWTKeys) Save(ctx context.Context, data []byte, version string) error {
	secrets := k.client.Core.CoreV1().Secrets(k.namespace)
	secret := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: jwtSecret, Namespace: k.namespace, ResourceVersion: version},
		Type:       corev1.SecretTypeOpaque, Data: map[string][]byte{jwtFile: data},
	}
	var err error
	if version == "" {
		_, err = secrets.Create(ctx, secret, metav1.CreateOptions{})
	} else {
		_, err = secrets.Update(ctx, secret, metav1.UpdateOptions{})
	}
	switch {
	case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err), apierrors.IsNotFound(err):
		return ca.ErrJWTKeysChanged
	case err != nil:
		return fmt.Errorf("kube: Secret %s/%s: %w", k.namespace, jwtSecret, err)
	}
	return nil
}
