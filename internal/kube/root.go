package kube

import (
	"context"
	"errors"

	"github.com/signet-mesh/signet/ca"
)

// rootSecret holds the authority's roots.
const rootSecret = "signet-ca"

// Roots keeps the authority's roots in a Secret of the release's namespace, so
// that every replica, and a replica anywhere, signs below the same one: of several
// that make a root at once, the first one's is taken by all. It implements
// ca.RootStore.
type Roots struct{ secret }

// NewRoots returns the Roots of a release.
func NewRoots(client *Client, namespace string) *Roots {
	return &Roots{secret{client, namespace, rootSecret}}
}

// Load implements ca.RootStore; the version is the Secret's.
func (r *Roots) Load(ctx context.Context) (map[string][]byte, string, error) { return r.load(ctx) }

// Save implements ca.RootStore.
func (r *Roots) Save(ctx context.Context, files map[string][]byte, version string) error {
	err := r.save(ctx, files, version)
	if errors.Is(err, errSecretChanged) {
		return ca.ErrRootsChanged
	}
	return err
}
