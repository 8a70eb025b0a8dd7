package agent

import (
	"context"
	"slices"
	"time"

	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
)

// reported is what the control plane was told last.
type reported struct {
	at       time.Time
	revision string
	message  *nodev1.ReportRequest
}

// reportEvery is how often the control plane hears that nothing has changed. A
// pod counts as enrolled there only while it hears so.
const reportEvery = 5 * time.Second

// reports tells the control plane how far this node is, until ctx ends: at
// once what has changed, and otherwise that it has not.
func (a *agent) reports(ctx context.Context) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		if a.connected.Load() {
			a.report(ctx)
		}
	}
}

func (a *agent) report(ctx context.Context) {
	status := a.status()
	a.mu.Lock()
	s, last := a.state, a.reported
	a.mu.Unlock()
	if s == nil {
		return
	}
	m := &nodev1.ReportRequest{Revision: status.Revision}
	if m.Revision == "" {
		m.Revision = last.revision // the proxy still has the older one in full
	}
	for i := range status.Workloads {
		w := &status.Workloads[i]
		uid := ""
		if known := s.workload(w.Workload); known != nil {
			uid = known.UID
		}
		m.Workloads = append(m.Workloads, &nodev1.WorkloadReport{Workload: w.Workload, Uid: uid, Problem: w.Problem})
	}
	slices.SortFunc(m.Workloads, func(x, y *nodev1.WorkloadReport) int {
		if x.GetWorkload() < y.GetWorkload() {
			return -1
		}
		return 1
	})
	if proto.Equal(m, last.message) && time.Since(last.at) < reportEvery {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if _, err := a.client.Report(ctx, m); err != nil {
		if ctx.Err() == nil {
			a.log.Warn("reporting to the control plane", "error", err)
		}
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reported = reported{at: time.Now(), revision: m.GetRevision(), message: m}
}

func (a *agent) reportedRevision() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.reported.revision
}
