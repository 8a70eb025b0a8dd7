package kube

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/wholefile"
)

// rootSecret holds the authority's root, in these files.
const rootSecret = "signet-ca"

var rootFiles = []string{"root.key", "root.crt"} // in the order they are written

// Root keeps the authority's root in a Secret of the release's namespace, so
// that every replica, and a replica anywhere, signs below the same root.
type Root struct {
	client    *Client
	namespace string
	log       *slog.Logger
}

// NewRoot returns the Root of a release.
func NewRoot(client *Client, namespace string, log *slog.Logger) *Root {
	return &Root{client, namespace, log}
}

// Place puts the root's certificate and key into dir (0700), which should be
// in memory, for ca.Open. Where the Secret does not exist it makes a root: of
// several replicas that do so at once the first one's is taken by all.
func (r *Root) Place(ctx context.Context, dir string, td spiffeid.TrustDomain) error {
	secrets := r.client.Core.CoreV1().Secrets(r.namespace)
	secret, err := secrets.Get(ctx, rootSecret, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		var made map[string][]byte
		if made, err = newRoot(dir, td, r.log); err != nil {
			return fmt.Errorf("kube: make a root: %w", err)
		}
		secret, err = secrets.Create(ctx, &corev1.Secret{
			ObjectMeta: metav1.ObjectMeta{Name: rootSecret, Namespace: r.namespace},
			Type:       corev1.SecretTypeOpaque, Data: made,
		}, metav1.CreateOptions{})
		switch {
		case apierrors.IsAlreadyExists(err):
			secret, err = secrets.Get(ctx, rootSecret, metav1.GetOptions{})
		case err == nil:
			r.log.InfoContext(ctx, "made a root and stored it", "secret", r.namespace+"/"+rootSecret)
		}
	}
	if err != nil {
		return fmt.Errorf("kube: Secret %s/%s: %w", r.namespace, rootSecret, err)
	}
	for _, name := range rootFiles {
		if len(secret.Data[name]) == 0 {
			return fmt.Errorf("kube: Secret %s/%s: data.%s is missing; restore it from a copy, or delete the Secret to start a new mesh with another root", r.namespace, rootSecret, name)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return fmt.Errorf("kube: %w", err)
	}
	for _, name := range rootFiles {
		if err := wholefile.Write(filepath.Join(dir, name), secret.Data[name]); err != nil {
			return fmt.Errorf("kube: place the root: %w", err)
		}
	}
	return nil
}

// newRoot lets an authority make a root beside dir, and takes it from there.
func newRoot(dir string, td spiffeid.TrustDomain, log *slog.Logger) (_ map[string][]byte, err error) {
	if err := os.MkdirAll(filepath.Dir(dir), 0o700); err != nil {
		return nil, err
	}
	tmp, err := os.MkdirTemp(filepath.Dir(dir), ".root-*") // mode 0700
	if err != nil {
		return nil, err
	}
	defer func() { err = errors.Join(err, os.RemoveAll(tmp)) }()
	authority, err := ca.Open(ca.Options{Dir: tmp, TrustDomain: td, Log: log})
	if err != nil {
		return nil, err
	}
	if err := authority.Close(); err != nil {
		return nil, err
	}
	out := map[string][]byte{}
	for _, name := range rootFiles {
		if out[name], err = os.ReadFile(filepath.Join(tmp, name)); err != nil {
			return nil, err
		}
	}
	return out, nil
}
