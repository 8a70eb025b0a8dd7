package kube

import (
	"bytes"
	"context"
	"errors"
	"maps"
	"path/filepath"
	"slices"
	"sync"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/ca"
)

// Replicas that start at once, and one that starts anew, sign tokens with one
// key; of two that write at once one is told so, also when the Secret was
// removed meanwhile; one that was emptied is filled again.
func testJWTKeys(t *testing.T, c, as *Client) {
	ctx := t.Context()
	store := NewJWTKeys(as, release)
	replicas := make([]*ca.Authority, 4)
	open := func() *ca.Authority {
		a, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: testDomain, JWTKeyStore: store, JWTKeyLife: time.Minute})
		if err != nil {
			t.Error(err)
			return nil
		}
		t.Cleanup(func() { a.Close() })
		return a
	}
	var wg sync.WaitGroup
	for i := range replicas {
		wg.Go(func() { replicas[i] = open() })
	}
	wg.Wait()
	kids := map[string]bool{}
	for _, a := range append(replicas, open()) {
		keys, _ := a.JWTKeys()
		for _, k := range keys {
			kids[k.ID] = true
		}
	}
	if len(kids) != 1 {
		t.Errorf("%d keys of replicas that share them: %v", len(kids), slices.Collect(maps.Keys(kids)))
	}

	data, version, err := store.Load(ctx)
	if err != nil || len(data) == 0 || version == "" {
		t.Fatalf("%d bytes, version %q, %v", len(data), version, err)
	}
	if err := store.Save(ctx, append(data, '\n'), version); err != nil {
		t.Fatal(err)
	}
	for _, stale := range []string{version, ""} {
		if err := store.Save(ctx, []byte("stale"), stale); !errors.Is(err, ca.ErrJWTKeysChanged) {
			t.Errorf("version %q: %v", stale, err)
		}
	}
	if now, _, err := store.Load(ctx); err != nil || !bytes.Equal(now, append(data, '\n')) {
		t.Errorf("%q, %v", now, err)
	}

	// Somebody empties it, and then removes it: it holds the same keys again.
	secrets := c.Core.CoreV1().Secrets(release)
	if _, err := secrets.Update(ctx, &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: jwtSecret, Namespace: release}}, metav1.UpdateOptions{}); err != nil {
		t.Fatal(err)
	}
	again := func(what string) {
		t.Helper()
		keeping, cancel := context.WithCancel(ctx)
		wg.Go(func() { replicas[0].KeepJWTKeys(keeping) }) // looks every few seconds
		eventually(t, 20*time.Second, func() error {
			now, _, err := store.Load(ctx)
			if err == nil && !bytes.Equal(now, data) {
				err = errors.New("other keys, or none")
			}
			return err
		})
		cancel()
		wg.Wait()
	}
	again("emptied")
	_, version, err = store.Load(ctx)
	if err != nil {
		t.Fatal(err)
	}
	if err := secrets.Delete(ctx, jwtSecret, metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	if err := store.Save(ctx, data, version); !errors.Is(err, ca.ErrJWTKeysChanged) {
		t.Errorf("a Secret that is gone: %v", err)
	}
	again("removed")
}
