package agent

import (
	"context"
	"strings"
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
	a.mu.Lock()
	s, last := a.state, a.reported
	a.mu.Unlock()
	if s == nil {
		return
	}
	connected, settled, _ := a.proxy(s)
	m := &nodev1.ReportRequest{Revision: last.revision} // unless the proxy has a newer one in full
	if settled && a.rules.by(s) {                       // the rules, and what was open before, follow the state too
		m.Revision = s.revision
	}
	problems := a.problems(s, connected)
	for i := range s.workloads {
		w := &s.workloads[i]
		m.Workloads = append(m.Workloads, &nodev1.WorkloadReport{Workload: w.Key(), Uid: w.UID, Problem: bounded(problems[w.Key()]), Repaired: a.rules.repairedSince(w.UID, time.Now().Add(-tellRepairs))})
	}
	m.Roots = a.reportRoots(s)
	a.distrust(s, m.Roots.GetWaits())
	if proto.Equal(m, last.message) && time.Since(last.at) < reportEvery {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	said := m
	m = proto.CloneOf(m)
	m.Clock = time.Now().Unix() // no change by itself
	if _, err := a.client.Report(ctx, m); err != nil {
		if ctx.Err() == nil {
			a.log.Warn("reporting to the control plane", "error", err)
		}
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reported = reported{at: time.Now(), revision: m.GetRevision(), message: said}
}

// tellRepairs is how long the control plane is told of a repair.
const tellRepairs = 30 * time.Second

// repairedSince reports whether a pod's rules were written again since then. What
// is older is forgotten.
func (c *capturing) repairedSince(uid string, since time.Time) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.repaired[uid].After(since) {
		return true
	}
	delete(c.repaired, uid)
	return false
}

// bounded fits what the control plane takes of one problem.
func bounded(problem string) string {
	const most = 1000
	if len(problem) > most {
		return strings.ToValidUTF8(problem[:most], "") + " ..."
	}
	return problem
}

func (a *agent) reportedRevision() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.reported.revision
}
