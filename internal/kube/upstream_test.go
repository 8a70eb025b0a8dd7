package kube

import (
	"context"
	"fmt"
	"strings"
	"sync"
	"testing"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/ca"
)

// upstreamStatus is a status that the test sets.
type upstreamStatus struct {
	mu      sync.Mutex
	s       ca.UpstreamStatus // guarded by mu
	changed chan struct{}     // guarded by mu
}

func (u *upstreamStatus) get() (ca.UpstreamStatus, <-chan struct{}) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.s, u.changed
}

func (u *upstreamStatus) set(s ca.UpstreamStatus) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.s = s
	close(u.changed)
	u.changed = make(chan struct{})
}

// The condition Authority says what is true, beside the others and without touching
// them, by the replica that leads or, while none does, any; who has to do something
// finds an event. Without an authority above it goes.
func testAuthority(t *testing.T, c, as *Client) {
	ctx := t.Context()
	configs := c.Objects.Resource(v1alpha1.Resource("meshconfigs"))
	if _, err := configs.Get(ctx, v1alpha1.MeshConfigName, metav1.GetOptions{}); err != nil {
		createObject(t, c, "meshconfigs", "", "kind: MeshConfig\nmetadata: {name: mesh}\nspec: {trustDomain: "+testDomain.Name()+"}")
	}
	body := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"conditions": []any{map[string]any{
		"type": v1alpha1.ConditionAccepted, "status": "True", "reason": v1alpha1.ReasonValid, "message": "valid", "lastTransitionTime": "2026-01-01T00:00:00Z"}}}}}
	body.SetGroupVersionKind(v1alpha1.Kind(v1alpha1.KindMeshConfig))
	body.SetName(v1alpha1.MeshConfigName)
	if _, err := configs.ApplyStatus(ctx, v1alpha1.MeshConfigName, body, metav1.ApplyOptions{FieldManager: fieldManager, Force: true}); err != nil {
		t.Fatal(err)
	}
	is := func(want string) {
		t.Helper()
		eventually(t, 15*time.Second, func() error {
			obj, err := configs.Get(ctx, v1alpha1.MeshConfigName, metav1.GetOptions{})
			if err != nil {
				return err
			}
			var doc v1alpha1.MeshConfig
			if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.Object, &doc); err != nil {
				return err
			}
			got, accepted := "", false
			for _, c := range doc.Status.Conditions {
				accepted = accepted || c.Type == v1alpha1.ConditionAccepted
				if c.Type == v1alpha1.ConditionAuthority {
					got = fmt.Sprintf("%s %s: %s", c.Status, c.Reason, c.Message)
				}
			}
			if !accepted || got != want && (want == "" || !strings.HasPrefix(got, want)) {
				return fmt.Errorf("accepted: %t, authority %q, want %q", accepted, got, want)
			}
			return nil
		})
	}
	lease := func(holder string) {
		t.Helper()
		now := metav1.NewMicroTime(time.Now().Add(time.Hour)) // it never grows old here
		leases := c.Core.CoordinationV1().Leases(release)
		_ = leases.Delete(ctx, leaseName, metav1.DeleteOptions{}) // there may be none
		if _, err := leases.Create(ctx, &coordinationv1.Lease{
			ObjectMeta: metav1.ObjectMeta{Name: leaseName, Namespace: release},
			Spec:       coordinationv1.LeaseSpec{HolderIdentity: &holder, RenewTime: &now},
		}, metav1.CreateOptions{}); err != nil {
			t.Fatal(err)
		}
	}
	lease("")

	status := &upstreamStatus{s: ca.UpstreamStatus{Reason: ca.UpstreamPending, Message: "waits for approval"}, changed: make(chan struct{})}
	run, stop := context.WithCancel(ctx)
	defer stop()
	var running sync.WaitGroup
	defer running.Wait()
	defer stop()
	running.Go(func() {
		one := &AuthorityStatus{Client: as, Namespace: release, Identity: "me", Status: status.get, Log: testLog(t)}
		if err := one.Run(run); err != nil {
			t.Error(err)
		}
	})
	is("False Pending: waits for approval; no certificate can be issued")
	end := time.Now().Add(time.Hour).Truncate(time.Second)
	status.set(ca.UpstreamStatus{Reason: ca.UpstreamReady, Message: "valid", NotAfter: end})
	is("True Ready: valid")
	status.set(ca.UpstreamStatus{Reason: ca.UpstreamDenied, Message: "denied by a policy", NotAfter: end, RetryAt: end})
	is("True Denied: denied by a policy; the present intermediate signs until " + end.UTC().Format(time.RFC3339) + "; it is asked again at ")
	eventually(t, 10*time.Second, func() error {
		list, err := c.Core.CoreV1().Events(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{FieldSelector: "reason=AuthorityAboveDenied"})
		if err != nil || len(list.Items) != 1 || list.Items[0].InvolvedObject.Kind != v1alpha1.KindMeshConfig || list.Items[0].Type != corev1.EventTypeWarning {
			return fmt.Errorf("%+v, %w", list, err)
		}
		return nil
	})
	lease("another")
	status.set(ca.UpstreamStatus{Reason: ca.UpstreamFailed, Message: "failed", NotAfter: end})
	time.Sleep(2 * time.Second)
	is("True Denied")
	lease("me")
	is("True Failed") // within the time in which it is looked who leads
	// Nodes can be certified, and workloads cannot: that is no authority.
	status.set(ca.UpstreamStatus{Reason: ca.UpstreamReady, Message: "valid", NotAfter: end, Leaves: ca.UpstreamError{Reason: ca.UpstreamPending, Message: "waits for approval"}})
	is("False Pending: workloads' certificates do not come: waits for approval; those that are there go on until they expire; nodes and the control plane are certified until " + end.UTC().Format(time.RFC3339))
	stop()
	running.Wait()

	without := &AuthorityStatus{Client: as, Namespace: release, Identity: "me", Log: testLog(t)}
	if err := without.Run(ctx); err != nil {
		t.Error(err)
	}
	is("")
}
