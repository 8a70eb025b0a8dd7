package agent

import (
	"context"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/signet-mesh/signet/agent/probe"
	"github.com/signet-mesh/signet/internal/mesh"
)

// probes keeps the node's rules that let its kubelet, and nobody else, reach
// the probe ports of captured pods. A nil probes keeps none: there is no
// kubelet outside a cluster.
type probes struct {
	log  *slog.Logger
	node probe.Node

	// last and looked belong to the goroutine that calls look.
	last   []probe.Pod
	looked time.Time

	mu      sync.Mutex
	problem string // guarded by mu; why probes are not let in, "" if they are
}

// verifyEvery is how often the node's rules are read back while nothing changed.
const verifyEvery = time.Second

// look puts the rules in place for the pods of a state, and repairs them where
// somebody else changed them.
func (p *probes) look(ctx context.Context, workloads []mesh.Workload) {
	if p == nil {
		return
	}
	var pods []probe.Pod
	for i := range workloads {
		if w := &workloads[i]; probed(w) {
			pods = append(pods, probe.Pod{UID: w.UID, Addrs: w.Capture.Addrs, Ports: w.Capture.Probes})
		}
	}
	now := time.Now()
	if now.Sub(p.looked) < verifyEvery && slices.EqualFunc(pods, p.last, samePod) {
		return
	}
	err := p.node.Set(ctx, pods)
	p.last, p.looked = pods, now
	problem := ""
	if err != nil && len(pods) > 0 {
		problem = err.Error()
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if problem != p.problem && problem != "" {
		p.log.Error("kubelet's probes of captured pods do not pass", "error", err)
	} else if problem != p.problem {
		p.log.Info("kubelet's probes of captured pods pass")
	}
	p.problem = problem
}

// wrong says why the kubelet cannot probe a pod, "" if it can or need not.
func (p *probes) wrong(w *mesh.Workload) string {
	if p == nil || !probed(w) {
		return ""
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.problem == "" {
		return ""
	}
	return "captured, but its probes do not pass: " + p.problem
}

func probed(w *mesh.Workload) bool {
	return w.Capture != nil && w.Capture.NetNS != "" && len(w.Capture.Probes) > 0
}

func samePod(a, b probe.Pod) bool {
	return a.UID == b.UID && slices.Equal(a.Addrs, b.Addrs) && slices.Equal(a.Ports, b.Ports)
}
