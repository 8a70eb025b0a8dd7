package kube

import (
	"context"
	"fmt"
	"log/slog"
	"slices"
	"strings"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	applycorev1 "k8s.io/client-go/applyconfigurations/core/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/federation"
)

// statusPeriod is how often what became of things is looked at. What has not
// changed is not written.
const statusPeriod = time.Second

// statusWriter writes what became of policies, namespaces and pods. One
// goroutine uses it.
type statusWriter struct {
	client  *Client
	watcher *Watcher
	reports func() []caserver.NodeReport
	// followed says how the following of other trust domains goes; nil: nobody
	// follows any.
	followed func() []federation.Status
	log      *slog.Logger
	now      func() time.Time
	events   eventWriter
	failed   map[string]time.Time // what could not be written, and when it is tried again
}

func newStatusWriter(l *Leader) *statusWriter {
	s := &statusWriter{client: l.Client, watcher: l.Watcher, reports: l.Reports, followed: l.Federations, log: l.Log, now: time.Now, failed: map[string]time.Time{}}
	s.events = newEventWriter(l.Client, l.Log)
	return s
}

func (s *statusWriter) run(ctx context.Context) {
	tick := time.NewTicker(statusPeriod)
	defer tick.Stop()
	for {
		if snap := s.watcher.latest.Load(); snap != nil {
			s.write(ctx, snap)
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return
		}
	}
}

// write makes every status say what is true now.
func (s *statusWriter) write(ctx context.Context, snap *snapshot) {
	p := newPicture(snap, s.reports(), s.now())
	faults := map[string][]string{} // by kind and name
	for _, d := range snap.documents.diagnostics {
		key := v1alpha1.KindAllowPolicy + " " + d.Policy
		if d.Quarantine != "" {
			key = v1alpha1.KindQuarantine + " " + d.Quarantine
		}
		faults[key] = append(faults[key], d.Field+": "+d.Message)
	}
	for i := range snap.documents.policies {
		doc := &snap.documents.policies[i]
		on, of := p.nodesOf(authz.Target{Namespace: doc.Namespace, ServiceAccount: doc.Spec.Target.ServiceAccount})
		s.object(ctx, "allowpolicies", v1alpha1.KindAllowPolicy, &doc.ObjectMeta, doc.Status.Conditions,
			written{doc.Status.ObservedGeneration, doc.Status.ProgrammedNodes, doc.Status.Nodes},
			faults[v1alpha1.KindAllowPolicy+" "+doc.Namespace+"/"+doc.Name], on, of, "grants nothing: ")
	}
	on, of := p.allNodes()
	for i := range snap.documents.quarantines {
		doc := &snap.documents.quarantines[i]
		s.object(ctx, "quarantines", v1alpha1.KindQuarantine, &doc.ObjectMeta, doc.Status.Conditions,
			written{doc.Status.ObservedGeneration, doc.Status.ProgrammedNodes, doc.Status.Nodes},
			faults[v1alpha1.KindQuarantine+" "+doc.Name], on, of, "what is valid is in force: ")
	}
	if doc := snap.documents.config; doc != nil {
		was := written{doc.Status.ObservedGeneration, -1, -1}
		switch { // while nothing is revoked there is nothing to count
		case len(doc.Spec.Revoked) == 0:
			on, of = -1, -1
		case !snap.refuses:
			on = 0
			fallthrough
		default:
			was.on, was.of = doc.Status.ProgrammedNodes, doc.Status.Nodes
		}
		others := func(c metav1.Condition) bool { return c.Type == v1alpha1.ConditionAuthority }
		s.object(ctx, "meshconfigs", v1alpha1.KindMeshConfig, &doc.ObjectMeta, slices.DeleteFunc(slices.Clone(doc.Status.Conditions), others),
			was, snap.faults, on, of, "the last good settings are in force: ")
	}
	s.federationStatus(ctx, &snap.documents.federations)
	for _, obj := range s.watcher.namespaceStore.List() {
		ns := obj.(*corev1.Namespace)
		s.namespace(ctx, ns, p.namespace(ns.Name, snap))
	}
	s.events.write(ctx, p.problems, s.now())
}

// written is what a status has besides its conditions.
type written struct {
	generation int64
	on, of     int32
}

// object writes the status of an object of signet.dev, if it is not that
// already. A negative count is none.
func (s *statusWriter) object(ctx context.Context, resource, kind string, meta *metav1.ObjectMeta, have []metav1.Condition, was written, faults []string, on, of int, effect string) {
	now := written{meta.Generation, int32(on), int32(of)}
	want := []metav1.Condition{accepted(faults, effect)}
	status := map[string]any{}
	if on >= 0 {
		status["programmedNodes"], status["nodes"] = int64(on), int64(of)
		c := metav1.Condition{Type: v1alpha1.ConditionProgrammed, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonProgrammed, Message: fmt.Sprintf("on %d of %d nodes", on, of)}
		if on < of {
			c.Status, c.Reason = metav1.ConditionFalse, v1alpha1.ReasonPending
		}
		want = append(want, c)
	}
	s.put(ctx, resource, kind, meta, have, want, was == now, status)
}

// accepted is the condition of an object with these faults.
func accepted(faults []string, effect string) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionAccepted, Status: metav1.ConditionTrue, Reason: v1alpha1.ReasonValid, Message: "valid"}
	if len(faults) > 0 {
		c.Status, c.Reason, c.Message = metav1.ConditionFalse, v1alpha1.ReasonInvalid, bounded(effect+strings.Join(faults, "; "))
	}
	return c
}

// put writes a status, unless the rest of it is the same and so are the conditions.
func (s *statusWriter) put(ctx context.Context, resource, kind string, meta *metav1.ObjectMeta, have, want []metav1.Condition, same bool, status map[string]any) {
	same = same && len(have) == len(want)
	for i := range want {
		want[i].ObservedGeneration = meta.Generation
		want[i].LastTransitionTime = metav1.NewTime(s.now().Truncate(time.Second))
		found := false
		for _, c := range have {
			if c.Type == want[i].Type {
				found = c.Status == want[i].Status && c.Reason == want[i].Reason && c.Message == want[i].Message && c.ObservedGeneration == want[i].ObservedGeneration
				if c.Status == want[i].Status {
					want[i].LastTransitionTime = c.LastTransitionTime
				}
			}
		}
		same = same && found
	}
	if same {
		return
	}
	status["observedGeneration"] = meta.Generation
	var conditions []any
	for i := range want {
		c, err := runtime.DefaultUnstructuredConverter.ToUnstructured(&want[i])
		if err != nil {
			s.log.ErrorContext(ctx, "a condition cannot be encoded", "error", err)
			return
		}
		conditions = append(conditions, c)
	}
	status["conditions"] = conditions
	s.try(ctx, kind+" "+meta.Namespace+"/"+meta.Name, func() error {
		// The UID keeps the status of a deleted object off its successor.
		body := &unstructured.Unstructured{Object: map[string]any{"status": status}}
		body.SetGroupVersionKind(v1alpha1.Kind(kind))
		body.SetName(meta.Name)
		body.SetNamespace(meta.Namespace)
		body.SetUID(meta.UID)
		_, err := s.client.Objects.Resource(v1alpha1.Resource(resource)).Namespace(meta.Namespace).
			ApplyStatus(ctx, meta.Name, body, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
		return err
	})
}

// maxMessage bounds a condition's message; the API allows 32 KiB.
const maxMessage = 4096

func bounded(s string) string {
	if len(s) > maxMessage {
		return strings.ToValidUTF8(s[:maxMessage], "") + " ..."
	}
	return s
}

// namespace writes a namespace's annotation, and removes it when text is empty.
func (s *statusWriter) namespace(ctx context.Context, ns *corev1.Namespace, text string) {
	if ns.Annotations[v1alpha1.AnnotationStatus] == text {
		return
	}
	apply := applycorev1.Namespace(ns.Name).WithUID(ns.UID)
	if text != "" {
		apply = apply.WithAnnotations(map[string]string{v1alpha1.AnnotationStatus: text})
	}
	s.try(ctx, "Namespace "+ns.Name, func() error {
		_, err := s.client.Core.CoreV1().Namespaces().Apply(ctx, apply, metav1.ApplyOptions{FieldManager: fieldManager, Force: true})
		return err
	})
}

// retryWrite is how long a write that failed is left alone.
const retryWrite = 5 * time.Second

func (s *statusWriter) try(ctx context.Context, what string, write func() error) {
	if s.now().Before(s.failed[what]) {
		return
	}
	delete(s.failed, what)
	if err := write(); err != nil && ctx.Err() == nil {
		s.failed[what] = s.now().Add(retryWrite)
		s.log.WarnContext(ctx, "status could not be written; it is tried again", "object", what, "error", err)
	}
}
