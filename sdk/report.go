package sdk

import (
	"context"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
)

const (
	maxQueue = 16384 // events; with more, the newest are dropped and counted
	maxBatch = 128
)

// reporter hands audit events to the agent, in order, each once. It never
// blocks who makes them.
type reporter struct {
	mesh *Mesh
	wake chan struct{}

	mu    sync.Mutex
	queue []*sdkv1.Event // guarded by mu; the agent has none of these for sure
	first uint64         // guarded by mu; the number of queue[0]
	lost  uint64         // guarded by mu
	empty chan struct{}  // guarded by mu; closed when the queue is empty; nil: nobody waits
}

func newReporter(m *Mesh) *reporter {
	return &reporter{mesh: m, wake: make(chan struct{}, 1), first: 1}
}

func (r *reporter) add(e *sdkv1.Event) {
	r.mu.Lock()
	if len(r.queue) < maxQueue {
		r.queue = append(r.queue, e)
	} else {
		r.lost++
	}
	r.mu.Unlock()
	select {
	case r.wake <- struct{}{}:
	default:
	}
}

// flush waits until the agent has everything, for so long.
func (r *reporter) flush(wait time.Duration) {
	r.mu.Lock()
	if len(r.queue) == 0 && r.lost == 0 {
		r.mu.Unlock()
		return
	}
	if r.empty == nil {
		r.empty = make(chan struct{})
	}
	empty := r.empty
	r.mu.Unlock()
	select {
	case <-empty:
	case <-time.After(wait):
	}
}

// run reports until ctx ends.
func (r *reporter) run(ctx context.Context) {
	wait := 50 * time.Millisecond
	for {
		r.mu.Lock()
		req := &sdkv1.ReportRequest{
			SpiffeId: r.mesh.id.String(), Session: r.mesh.session, First: r.first, Lost: r.lost,
			Events: append([]*sdkv1.Event(nil), r.queue[:min(len(r.queue), maxBatch)]...),
		}
		if len(req.Events) == 0 && req.Lost == 0 && r.empty != nil {
			close(r.empty)
			r.empty = nil
		}
		r.mu.Unlock()
		if len(req.Events) == 0 && req.Lost == 0 {
			select {
			case <-r.wake:
				continue
			case <-ctx.Done():
				return
			}
		}
		call, cancel := context.WithTimeout(outgoing(ctx), 10*time.Second)
		_, err := r.mesh.client.Report(call, req)
		cancel()
		if err == nil || status.Code(err) == codes.InvalidArgument {
			r.mu.Lock()
			n := len(req.Events)
			r.queue, r.first, r.lost = r.queue[n:], r.first+uint64(n), r.lost-req.Lost
			if err != nil {
				r.lost += uint64(n)
			}
			r.mu.Unlock()
			if err != nil {
				r.mesh.log.Error("the agent does not take audit events", "error", err)
			}
			wait = 50 * time.Millisecond
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait):
		}
		wait = min(2*wait, time.Second)
	}
}
