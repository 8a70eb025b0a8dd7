package kube

import (
	"cmp"
	"context"
	"crypto/sha256"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/tools/cache"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/federation"
	"github.com/signet-mesh/signet/internal/mesh"
)

// federations are the other trust domains that Federations name.
type federations struct {
	docs   []v1alpha1.Federation // sorted by name
	follow []mesh.Federation     // sorted by trust domain; of those that are valid
	faults map[string]string     // by name, of those that are not
}

// parseFederations reads Federations. Of two for one trust domain the older one
// counts: a second one is no way to say whom the mesh believes.
func parseFederations(own spiffeid.TrustDomain, docs []v1alpha1.Federation) federations {
	out := federations{docs: docs, faults: map[string]string{}}
	byAge := slices.Clone(docs)
	slices.SortFunc(byAge, func(a, b v1alpha1.Federation) int {
		return cmp.Or(a.CreationTimestamp.Compare(b.CreationTimestamp.Time), strings.Compare(a.Name, b.Name))
	})
	first := map[spiffeid.TrustDomain]string{}
	for i := range byAge {
		doc := &byAge[i]
		f, field, err := mesh.ParseFederation(own, doc.Name, &doc.Spec)
		other, twice := first[f.TrustDomain]
		switch {
		case err != nil:
			out.faults[doc.Name] = fmt.Sprintf("%s: %v", field, err)
		case twice:
			out.faults[doc.Name] = fmt.Sprintf("spec.trustDomain: %q has the Federation %q already; remove one of them", f.TrustDomain.Name(), other)
		default:
			first[f.TrustDomain] = doc.Name
			out.follow = append(out.follow, f)
		}
	}
	slices.SortFunc(out.docs, func(a, b v1alpha1.Federation) int { return strings.Compare(a.Name, b.Name) })
	slices.SortFunc(out.follow, func(a, b mesh.Federation) int { return a.TrustDomain.Compare(b.TrustDomain) })
	return out
}

// listFederations takes the objects from their cache.
func listFederations(store cache.Indexer) (docs []v1alpha1.Federation) {
	for _, obj := range store.List() {
		docs = append(docs, *obj.(*v1alpha1.Federation))
	}
	return docs
}

// BundleCopies returns where the last good copy of a trust domain's bundle is kept:
// in the status of its Federation, which goes when that goes. Replicas share it,
// and a replica that starts needs nobody else.
func (w *Watcher) BundleCopies(own spiffeid.TrustDomain, td spiffeid.TrustDomain) federation.Store {
	return &bundleCopy{client: w.client, name: func() string {
		for _, f := range parseFederations(own, listFederations(w.federations)).follow {
			if f.TrustDomain == td {
				return f.Name
			}
		}
		return ""
	}}
}

// bundleCopy is the copy in a Federation's status.
type bundleCopy struct {
	client *Client
	name   func() string // empty: there is no such Federation
}

// copyTries bounds the writes while others write the same object.
const copyTries = 5

// Load implements federation.Store. The version is that of the copy alone: the
// rest of the object is written by others.
func (c *bundleCopy) Load(ctx context.Context) ([]byte, string, error) {
	data, version, _, err := c.load(ctx)
	return data, version, err
}

func (c *bundleCopy) load(ctx context.Context) (data []byte, version string, meta metav1.ObjectMeta, err error) {
	name := c.name()
	if name == "" {
		return nil, "", meta, nil
	}
	got, err := c.client.Objects.Resource(v1alpha1.Resource("federations")).Get(ctx, name, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, "", meta, nil
	case err != nil:
		return nil, "", meta, fmt.Errorf("kube: Federation %s: %w", name, err)
	}
	var f v1alpha1.Federation
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(got.Object, &f); err != nil {
		return nil, "", meta, fmt.Errorf("kube: Federation %s: %w", name, err)
	}
	if f.Status.Copy == "" {
		return nil, "", f.ObjectMeta, nil
	}
	sum := sha256.Sum256([]byte(f.Status.Copy))
	return []byte(f.Status.Copy), hex.EncodeToString(sum[:]), f.ObjectMeta, nil
}

// Save implements federation.Store.
func (c *bundleCopy) Save(ctx context.Context, data []byte, version string) error {
	for try := 1; ; try++ {
		_, now, meta, err := c.load(ctx)
		switch {
		case err != nil:
			return err
		case meta.Name == "" || now != version:
			return federation.ErrChanged
		}
		var text any // null removes it
		if len(data) > 0 {
			text = string(data)
		}
		patch, err := json.Marshal(map[string]any{
			"metadata": map[string]any{"resourceVersion": meta.ResourceVersion, "uid": meta.UID},
			"status":   map[string]any{"copy": text},
		})
		if err != nil {
			return fmt.Errorf("kube: Federation %s: %w", meta.Name, err)
		}
		_, err = c.client.Objects.Resource(v1alpha1.Resource("federations")).Patch(ctx, meta.Name, types.MergePatchType, patch,
			metav1.PatchOptions{FieldManager: copyManager}, "status")
		switch {
		case err == nil:
			return nil
		case !apierrors.IsConflict(err) || try == copyTries:
			return fmt.Errorf("kube: Federation %s: %w", meta.Name, err)
		}
	}
}

// copyManager owns the copy in a status whose other fields the leader applies.
const copyManager = fieldManager + "-federation"

// federationConfigMap holds what other trust domains are shown, under this key.
const (
	federationConfigMap = "signet-federation"
	federationFile      = "published.json"
)

// Published keeps the document that other trust domains are shown in a ConfigMap of
// the release's namespace: its number rises once, whichever replica sees a change
// first. It implements federation.Store.
type Published struct {
	client    *Client
	namespace string
}

// NewPublished returns the Published of a release.
func NewPublished(client *Client, namespace string) *Published { return &Published{client, namespace} }

// Load implements federation.Store; the version is the ConfigMap's.
func (p *Published) Load(ctx context.Context) ([]byte, string, error) {
	got, err := p.client.Core.CoreV1().ConfigMaps(p.namespace).Get(ctx, federationConfigMap, metav1.GetOptions{})
	switch {
	case apierrors.IsNotFound(err):
		return nil, "", nil
	case err != nil:
		return nil, "", fmt.Errorf("kube: ConfigMap %s: %w", federationConfigMap, err)
	}
	return []byte(got.Data[federationFile]), got.ResourceVersion, nil
}

// Save implements federation.Store.
func (p *Published) Save(ctx context.Context, data []byte, version string) error {
	maps := p.client.Core.CoreV1().ConfigMaps(p.namespace)
	want := &corev1.ConfigMap{
		ObjectMeta: metav1.ObjectMeta{Name: federationConfigMap, Namespace: p.namespace, ResourceVersion: version},
		Data:       map[string]string{federationFile: string(data)},
	}
	var err error
	if version == "" {
		_, err = maps.Create(ctx, want, metav1.CreateOptions{})
	} else {
		_, err = maps.Update(ctx, want, metav1.UpdateOptions{})
	}
	switch {
	case apierrors.IsAlreadyExists(err), apierrors.IsConflict(err), apierrors.IsNotFound(err):
		return errors.Join(federation.ErrChanged, err)
	case err != nil:
		return fmt.Errorf("kube: ConfigMap %s: %w", federationConfigMap, err)
	}
	return nil
}
