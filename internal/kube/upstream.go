package kube

import (
	"context"
	"fmt"
	"log/slog"
	"strings"
	"time"

	coordinationv1 "k8s.io/api/coordination/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/ca"
)

// authorityManager owns the condition Authority and no other, so that it can be
// written before the control plane serves.
const authorityManager = "signet-authority"

// Timing of the condition Authority.
const (
	tellAuthority      = 10 * time.Second // how often it is looked who should write it
	authorityTold      = 10 * time.Minute // the same event again
	leaseGone          = 15 * time.Second // after its last renewal a leader is none
	authorityRetry     = 2 * time.Second
	authorityEventKind = "AuthorityAbove"
)

// AuthorityStatus tells in the MeshConfig's condition Authority, and in events, how it
// stands with the authority above. The replica that leads writes it; while none does,
// because there is no certificate to serve with, any.
type AuthorityStatus struct {
	Client    *Client
	Namespace string // of the release
	Identity  string // of this replica
	// Status is followed; nil: there is no authority above, and what was said of one
	// is removed.
	Status func() (ca.UpstreamStatus, <-chan struct{})
	Log    *slog.Logger

	told   string // of the loop alone: the last event
	toldAt time.Time
}

// Run writes until ctx ends, or, without an authority above, until it is written.
func (s *AuthorityStatus) Run(ctx context.Context) error {
	for {
		var status ca.UpstreamStatus
		var changed <-chan struct{}
		if s.Status != nil {
			status, changed = s.Status()
		}
		again := tellAuthority
		writes, err := s.writes(ctx)
		if err == nil && (writes || s.Status == nil) {
			err = s.write(ctx, status)
		}
		switch {
		case err != nil && ctx.Err() == nil:
			s.Log.WarnContext(ctx, "the condition Authority could not be written; it is tried again", "error", err)
			again = authorityRetry
		case s.Status == nil:
			return nil
		}
		select {
		case <-changed:
		case <-time.After(again):
		case <-ctx.Done():
			return nil
		}
	}
}

// writes reports whether this replica leads, or nobody does.
func (s *AuthorityStatus) writes(ctx context.Context) (bool, error) {
	lease, err := s.Client.Core.CoordinationV1().Leases(s.Namespace).Get(ctx, leaseName, metav1.GetOptions{})
	if apierrors.IsNotFound(err) {
		return true, nil
	}
	return err == nil && leads(lease, s.Identity, time.Now()), err
}

func leads(lease *coordinationv1.Lease, identity string, now time.Time) bool {
	holder, renewed := lease.Spec.HolderIdentity, lease.Spec.RenewTime
	return holder == nil || *holder == "" || *holder == identity || renewed == nil || now.Sub(renewed.Time) > leaseGone
}

// write makes the condition say what is true now.
func (s *AuthorityStatus) write(ctx context.Context, status ca.UpstreamStatus) error {
	configs := s.Client.Objects.Resource(v1alpha1.Resource("meshconfigs"))
	list, err := configs.List(ctx, metav1.ListOptions{FieldSelector: "metadata.name=" + v1alpha1.MeshConfigName})
	if err != nil || len(list.Items) == 0 {
		return err // its absence is told elsewhere
	}
	obj := &list.Items[0]
	var doc v1alpha1.MeshConfig
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(obj.Object, &doc); err != nil {
		return err
	}
	var have *metav1.Condition
	for i := range doc.Status.Conditions {
		if doc.Status.Conditions[i].Type == v1alpha1.ConditionAuthority {
			have = &doc.Status.Conditions[i]
		}
	}
	conditions := []any{}
	if s.Status != nil {
		want := authorityCondition(status, doc.Generation, time.Now())
		if have != nil && have.Status == want.Status && have.Reason == want.Reason && have.Message == want.Message {
			return nil
		}
		if have != nil && have.Status == want.Status {
			want.LastTransitionTime = have.LastTransitionTime
		}
		c, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&want)
		if err != nil {
			return err
		}
		conditions = append(conditions, c)
		s.event(ctx, obj, want)
	} else if have == nil {
		return nil
	}
	body := &unstructured.Unstructured{Object: map[string]any{"status": map[string]any{"conditions": conditions}}}
	body.SetGroupVersionKind(v1alpha1.Kind(v1alpha1.KindMeshConfig))
	body.SetName(obj.GetName())
	body.SetUID(obj.GetUID())
	_, err = configs.ApplyStatus(ctx, obj.GetName(), body, metav1.ApplyOptions{FieldManager: authorityManager, Force: true})
	return err
}

// authorityCondition is True while certificates can be signed, those of workloads too,
// whatever the reason says of the next intermediate.
func authorityCondition(s ca.UpstreamStatus, generation int64, now time.Time) metav1.Condition {
	reason, text := s.Said()
	c := metav1.Condition{
		Type: v1alpha1.ConditionAuthority, Status: metav1.ConditionFalse, Reason: string(reason),
		ObservedGeneration: generation, LastTransitionTime: metav1.NewTime(now.Truncate(time.Second)),
	}
	message := []string{text}
	if s.Leaves.Reason != "" && s.Signs(now) {
		message = append(message, "nodes and the control plane are certified until "+s.NotAfter.UTC().Format(time.RFC3339))
	} else if s.Signs(now) {
		c.Status = metav1.ConditionTrue
		if s.Reason != ca.UpstreamReady {
			message = append(message, "the present intermediate signs until "+s.NotAfter.UTC().Format(time.RFC3339))
		}
	} else {
		message = append(message, "no certificate can be issued")
	}
	if !s.RetryAt.IsZero() {
		message = append(message, "it is asked again at "+s.RetryAt.UTC().Format(time.RFC3339))
	}
	c.Message = bounded(strings.TrimPrefix(strings.Join(message, "; "), "; "))
	return c
}

// event tells what an operator has to do something about.
func (s *AuthorityStatus) event(ctx context.Context, obj *unstructured.Unstructured, c metav1.Condition) {
	switch ca.UpstreamReason(c.Reason) {
	case ca.UpstreamReady, ca.UpstreamPending:
		return
	}
	now := time.Now()
	if s.told == c.Reason && now.Sub(s.toldAt) < authorityTold {
		return
	}
	s.told, s.toldAt = c.Reason, now
	at := metav1.NewTime(now)
	_, err := s.Client.Core.CoreV1().Events(metav1.NamespaceDefault).Create(ctx, &corev1.Event{
		ObjectMeta: metav1.ObjectMeta{Name: fmt.Sprintf("%s.%x", obj.GetName(), now.UnixNano()), Namespace: metav1.NamespaceDefault},
		InvolvedObject: corev1.ObjectReference{
			APIVersion: obj.GetAPIVersion(), Kind: obj.GetKind(), Name: obj.GetName(), UID: obj.GetUID(),
		},
		Reason: authorityEventKind + c.Reason, Message: short(c.Message), Type: corev1.EventTypeWarning,
		Source: corev1.EventSource{Component: fieldManager, Host: s.Identity}, FirstTimestamp: at, LastTimestamp: at, Count: 1,
	}, metav1.CreateOptions{})
	if err != nil && ctx.Err() == nil {
		s.Log.WarnContext(ctx, "an event could not be written", "object", "MeshConfig mesh", "error", err)
	}
}
