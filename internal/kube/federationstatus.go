package kube

import (
	"context"
	"fmt"
	"slices"
	"strings"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/federation"
)

// fetchedPeriod is how exact a status is about when a bundle was fetched: some are
// fetched every second, and each write is one for the whole cluster.
const fetchedPeriod = time.Minute

// federations writes the status of Federations, by what this replica has fetched
// itself. Each follows all of them.
func (s *statusWriter) federationStatus(ctx context.Context, docs *federations) {
	var followed []federation.Status
	if s.followed != nil {
		followed = s.followed()
	}
	for i := range docs.docs {
		doc := &docs.docs[i]
		var faults []string
		if fault := docs.faults[doc.Name]; fault != "" {
			faults = []string{fault}
		}
		conditions := []metav1.Condition{accepted(faults, "nobody of it is believed: ")}
		status := map[string]any{}
		same := doc.Status.ObservedGeneration == doc.Generation
		at := slices.IndexFunc(followed, func(f federation.Status) bool { return f.Name == doc.Name })
		if at >= 0 && len(faults) == 0 {
			f := &followed[at]
			conditions = append(conditions, fetched(f))
			if f.Sequence > 0 {
				status["sequence"] = int64(f.Sequence)
				same = same && doc.Status.Sequence == int64(f.Sequence)
			}
			if was := doc.Status.FetchedAt; !f.FetchedAt.IsZero() {
				if was == nil || f.FetchedAt.Sub(was.Time) >= fetchedPeriod {
					was, same = &metav1.Time{Time: f.FetchedAt}, false
				}
				status["fetchedAt"] = was.UTC().Format(time.RFC3339)
			}
		}
		s.put(ctx, "federations", v1alpha1.KindFederation, &doc.ObjectMeta, doc.Status.Conditions, conditions, same, status)
	}
}

// fetched says how the newest attempt to fetch a bundle went.
func fetched(f *federation.Status) metav1.Condition {
	c := metav1.Condition{Type: v1alpha1.ConditionFetched, Status: metav1.ConditionFalse}
	switch {
	case f.Error != "" && f.FetchedAt.IsZero():
		c.Reason, c.Message = v1alpha1.ReasonFailing, bounded("what the document begins with stays believed: "+f.Error)
	case f.Error != "":
		c.Reason, c.Message = v1alpha1.ReasonFailing, bounded("what was fetched before stays believed: "+f.Error)
	case f.FetchedAt.IsZero():
		c.Reason, c.Message = v1alpha1.ReasonPending, "it is not fetched yet"
	default:
		c.Status, c.Reason = metav1.ConditionTrue, v1alpha1.ReasonFetched
		c.Message = fmt.Sprintf("bundle %d, %d roots, %d keys of tokens", f.Sequence, f.Roots, f.JWTKeys)
		if len(f.Ignored) > 0 {
			c.Message = bounded(c.Message + "; left out: " + strings.Join(f.Ignored, "; "))
		}
	}
	return c
}
