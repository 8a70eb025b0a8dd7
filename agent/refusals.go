package agent

import (
	"context"
	"crypto/rand"
	"fmt"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/refusal"
)

// keepRefusals writes refusals into the audit until ctx ends.
func (a *agent) keepRefusals(ctx context.Context) {
	run, n := rand.Text(), 0 // no record of another run has such an id
	a.refusals.Run(ctx, func(ctx context.Context, entries []refusal.Entry) error {
		events := make([]audit.Event, len(entries))
		for i, e := range entries {
			n++
			events[i] = audit.Event{Record: a.refusalRecord(fmt.Sprintf("refused:%s:%d", run, n), e), Final: true}
		}
		err := a.store.Add(ctx, events)
		if err != nil {
			a.log.Error("storing who was refused an identity", "error", err)
		}
		return err
	})
}

func (a *agent) refusalRecord(id string, e refusal.Entry) audit.Record {
	r := e.Event
	out := audit.Record{
		ID: id, Start: e.First, End: e.Last, Verdict: audit.Refused, Reason: r.Reason,
		Source: audit.Party{Workload: r.Workload},
		Refusal: &audit.Refusal{
			Kind: string(r.Kind), Call: r.Call, ID: r.ID, Count: e.Count, Several: e.Several,
			PID: r.Caller.PID, UID: r.Caller.UID, Executable: r.Caller.Executable, PodUID: r.Caller.PodUID,
		},
	}
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	if s != nil && r.Caller.PodUID != "" {
		if w := s.pod(r.Caller.PodUID); w != nil {
			out.Source.Workload = w.Key()
		}
	}
	return out
}

// refusedBy notes what the control plane refused a workload of this node; that it
// is away is no refusal.
func (a *agent) refusedBy(call, workload string, err error) {
	switch code := status.Code(err); code {
	case codes.PermissionDenied, codes.Unauthenticated, codes.InvalidArgument, codes.ResourceExhausted, codes.FailedPrecondition:
		a.refusals.Add(refusal.Refusal{Kind: refusal.Control, Call: call, Workload: workload, Reason: code.String() + ": " + status.Convert(err).Message()})
	}
}

// refused is the metric of refusals.
type refused struct{ book *refusal.Book }

var refusedDesc = prometheus.NewDesc("signet_agent_refused_total", "Refusals of an identity to callers on this node, or by the control plane to its workloads.", []string{"reason"}, nil)

// Describe implements prometheus.Collector.
func (r refused) Describe(c chan<- *prometheus.Desc) { c <- refusedDesc }

// Collect implements prometheus.Collector.
func (r refused) Collect(c chan<- prometheus.Metric) {
	for kind, n := range r.book.Counts() {
		c <- prometheus.MustNewConstMetric(refusedDesc, prometheus.CounterValue, float64(n), string(kind))
	}
}
