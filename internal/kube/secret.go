package kube

import (
	"context"
	"errors"
	"fmt"

	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// secret is one Secret of the release's namespace, which replicas share.
type secret struct {
	client          *Client
	namespace, name string
}

// errSecretChanged is returned by save when another replica was first.
var errSecretChanged = errors.New("the Secret was changed meanwhile")

func (s *secret) String() string { return "Secret " + s.namespace + "/" + s.name }

// load returns the Secret's data and its version; both are zero when there is no
// such Secret.
func (s *secret) load(ctx context.Context) (map[string][]byte, string, error) {
	got, err := s.client.Core.CoreV1().Secrets(s.namespace).Get(ctx, s.name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, "", nil
	case err != nil:
		return nil, "", fmt.Errorf("kube: %s: %w", s, err)
	}
	return got.Data, got.ResourceVersion, nil
}

// save replaces what load returned with that version.
func (s *secret) save(ctx context.Context, data map[string][]byte, version string) error {
	secrets := s.client.Core.CoreV1().Secrets(s.namespace)
	want := &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: s.name, Namespace: s.namespace, ResourceVersion: version},
		Type:       corev1.SecretTypeOpaque, Data: data,
	}
	var err error
	if version == "" {
		_, err = secrets.Create(ctx, want, metav1.CreateOptions{})
	} else {
		_, err = secrets.Update(ctx, want, metav1.UpdateOptions{})
	}
	switch {
	case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err), apierrors.IsNotFound(err):
		return errSecretChanged
	case err != nil:
		return fmt.Errorf("kube: %s: %w", s, err)
	}
	return nil
}
