package kube

import (
	"context"
	"errors"
	"fmt"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/federation"
)

var partnerDomain = spiffeid.RequireTrustDomainFromString("partner.example")

// webFederation is a Federation that needs no bundle to begin with.
func webFederation(name, domain string) string {
	return fmt.Sprintf("kind: Federation\nmetadata: {name: %s}\nspec: {trustDomain: %s, bundleEndpointURL: \"https://partner.example/bundle\", profile: https_web}", name, domain)
}

// Of Federations with mistakes nobody is believed, of two for one trust domain the
// older one counts, and the mesh's own name is nobody else's.
func TestParseFederations(t *testing.T) {
	doc := func(name, domain string, age time.Duration) v1alpha1.Federation {
		return v1alpha1.Federation{
			ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(time.Now().Add(-age))},
			Spec:       v1alpha1.FederationSpec{TrustDomain: domain, BundleEndpointURL: "https://x.example/bundle", Profile: v1alpha1.ProfileWeb},
		}
	}
	bad := doc("c", "bad.example", time.Hour)
	bad.Spec.Bundle = "no document"
	got := parseFederations(testDomain, []v1alpha1.Federation{doc("z", "partner.example", time.Hour), doc("a", "partner.example", time.Minute), doc("own", testDomain.Name(), time.Hour), bad, doc("b", "b.example", 0)})
	var follow []string
	for _, f := range got.follow {
		follow = append(follow, f.TrustDomain.Name()+" by "+f.Name)
	}
	if s := strings.Join(follow, ", "); s != "b.example by b, partner.example by z" {
		t.Errorf("followed: %s", s)
	}
	for name, want := range map[string]string{"a": `has the Federation "z" already`, "own": "which is this mesh", "c": "spec.bundle: "} {
		if !strings.Contains(got.faults[name], want) {
			t.Errorf("%s: %q, want %q", name, got.faults[name], want)
		}
	}
	if len(got.faults) != 3 {
		t.Errorf("faults %q", got.faults)
	}
}

// testFederation: Federations of an API server reach the view, policies may name whom
// they name, the copy of a bundle is shared by replicas and outlives what the leader
// writes beside it, and all of it goes with the object.
func testFederation(t *testing.T, c, as *Client) {
	ctx := t.Context()
	w, o := runWatcher(t, as)
	createObject(t, c, "federations", "", webFederation("partner", partnerDomain.Name()))
	time.Sleep(1100 * time.Millisecond) // a server's times have whole seconds
	createObject(t, c, "federations", "", webFederation("again", partnerDomain.Name()))
	createObject(t, c, "allowpolicies", "shop", "kind: AllowPolicy\nmetadata: {name: partner}\nspec: {target: {serviceAccount: web}, from: [{spiffeID: \"spiffe://partner.example/ns/a/sa/b\"}]}")
	var own spiffeid.TrustDomain
	allows := func() bool {
		view, _ := o.get()
		for _, p := range view.Model.Policies() {
			if p.Name == "partner" {
				return true
			}
		}
		return false
	}
	eventually(t, 10*time.Second, func() error {
		view, rejected := o.get()
		if view == nil || len(view.State.Federations) != 1 || view.State.Federations[0].Name != "partner" || !allows() {
			return fmt.Errorf("view %+v, rejected %v", view, rejected)
		}
		own = view.State.TrustDomain
		return nil
	})

	for name, replicas := range map[string][2]federation.Store{
		"copy":  {w.BundleCopies(own, partnerDomain), w.BundleCopies(own, partnerDomain)},
		"shown": {NewPublished(as, release), NewPublished(as, release)},
	} {
		one, two := replicas[0], replicas[1]
		if data, version, err := one.Load(ctx); err != nil || len(data) > 0 || version != "" {
			t.Fatalf("%s: at first %q %q %v", name, data, version, err)
		}
		if err := one.Save(ctx, []byte(`{"a":1}`), ""); err != nil {
			t.Fatalf("%s: %v", name, err)
		}
		if err := two.Save(ctx, []byte(`{"a":2}`), ""); !errors.Is(err, federation.ErrChanged) {
			t.Errorf("%s: the second of two replicas: %v", name, err)
		}
		data, version, err := two.Load(ctx)
		if err != nil || string(data) != `{"a":1}` {
			t.Errorf("%s: %q %v", name, data, err)
		}
		if err := two.Save(ctx, []byte(`{"a":3}`), version); err != nil {
			t.Errorf("%s: %v", name, err)
		}
		if err := one.Save(ctx, []byte(`{"a":4}`), version); !errors.Is(err, federation.ErrChanged) {
			t.Errorf("%s: with an old version: %v", name, err)
		}
	}

	var how atomic.Pointer[federation.Status]
	how.Store(&federation.Status{Name: "partner", TrustDomain: partnerDomain})
	authority, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: own})
	if err != nil {
		t.Fatal(err)
	}
	defer authority.Close()
	leader := &Leader{Client: as, Namespace: release, Identity: "r2", Watcher: w, Reports: func() []caserver.NodeReport { return nil },
		Federations: func() []federation.Status { return []federation.Status{*how.Load()} }, Bundle: authority.BundleUpdates, Log: testLog(t)}
	led, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); _ = leader.Run(led) }()
	defer func() { cancel(); <-done }()
	status := func(name string, wants ...string) {
		t.Helper()
		eventually(t, 30*time.Second, func() error {
			got, err := c.Objects.Resource(v1alpha1.Resource("federations")).Get(ctx, name, metav1.GetOptions{})
			if err != nil {
				return err
			}
			list, _, _ := unstructured.NestedSlice(got.Object, "status", "conditions")
			parts := []string{fmt.Sprint(got.Object["status"].(map[string]any)["sequence"], " ", got.Object["status"].(map[string]any)["fetchedAt"])}
			for _, item := range list {
				c := item.(map[string]any)
				parts = append(parts, fmt.Sprint(c["type"], " ", c["status"], " ", c["message"]))
			}
			said := strings.Join(parts, "; ")
			for _, want := range wants {
				if !strings.Contains(said, want) {
					return fmt.Errorf("%s: %s, want %q", name, said, want)
				}
			}
			return nil
		})
	}
	status("partner", "Accepted True valid", "Fetched False it is not fetched yet")
	status("again", "Accepted False nobody of it is believed", `has the Federation "partner" already`)
	at := time.Now()
	how.Store(&federation.Status{Name: "partner", TrustDomain: partnerDomain, FetchedAt: at, Sequence: 7, Roots: 1, JWTKeys: 2})
	status("partner", "7 "+at.UTC().Format(time.RFC3339), "Fetched True bundle 7, 1 roots, 2 keys of tokens")
	how.Store(&federation.Status{Name: "partner", TrustDomain: partnerDomain, FetchedAt: at, Sequence: 7, Error: "connection refused"})
	status("partner", "7 ", "Fetched False what was fetched before stays believed: connection refused")
	if data, _, err := w.BundleCopies(own, partnerDomain).Load(ctx); err != nil || string(data) != `{"a":3}` {
		t.Errorf("after the leader wrote the status the copy is %q, %v", data, err)
	}

	for _, name := range []string{"again", "partner"} {
		if err := c.Objects.Resource(v1alpha1.Resource("federations")).Delete(ctx, name, metav1.DeleteOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	eventually(t, 10*time.Second, func() error {
		if view, _ := o.get(); len(view.State.Federations) > 0 || allows() {
			return errors.New("a Federation that is gone is followed, or its people are allowed")
		}
		return nil
	})
	if data, version, err := w.BundleCopies(own, partnerDomain).Load(ctx); err != nil || len(data) > 0 || version != "" {
		t.Errorf("a copy outlives its Federation: %q %v", data, err)
	}
}
