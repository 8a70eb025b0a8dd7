package fanout

import (
	"cmp"
	"container/heap"
	"context"
	"errors"
	"fmt"
	"iter"
	"sync"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
)

// Audit asks every node, or the one that q names, for records and gives fn all
// of them in the order of time, as far as each node recorded them in it. With a
// limit, those are the newest of the whole mesh. fn may take its time. An error
// of fn ends the query and is returned; a node that fails is in missing, and the
// records that it had given before are among the others.
func (f *Fanout) Audit(ctx context.Context, q adminclient.AuditQuery, fn func(audit.Record) error) (missing []adminv1.MissingNode, err error) {
	nodes, err := f.nodes(q.Node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()
	streams := make([]*stream, len(nodes))
	var started sync.WaitGroup
	for i, n := range nodes {
		streams[i] = f.open(ctx, n.Name, q)
		started.Go(streams[i].advance) // all first answers at once
	}
	started.Wait()
	defer func() {
		for _, s := range streams {
			s.stop()
		}
	}()
	var open merging
	for _, s := range streams {
		if s.more {
			open = append(open, s)
		}
	}
	heap.Init(&open)
	newest := ring{limit: q.Limit}
	for len(open) > 0 {
		s := open[0]
		if q.Limit > 0 {
			newest.add(s.record)
		} else if err := fn(s.record); err != nil {
			return nil, err
		}
		s.advance()
		if s.more {
			heap.Fix(&open, 0)
		} else {
			heap.Pop(&open)
		}
	}
	if err := ctx.Err(); err != nil {
		return nil, err
	}
	for r := range newest.all() {
		if err := fn(r); err != nil {
			return nil, err
		}
	}
	for _, s := range streams {
		if s.err != nil {
			missing = append(missing, adminv1.MissingNode{Node: s.node, Error: s.why()})
		}
	}
	return missing, nil
}

// stream is one node's records; at most one goroutine uses it at a time.
type stream struct {
	node    string
	timeout time.Duration
	ctx     context.Context // of the request
	cancel  context.CancelCauseFunc
	next    func() (audit.Record, error, bool)
	stop    func()

	more   bool // record is set
	record audit.Record
	// key is the latest start so far: a record that was written late must not
	// hold up or overtake what its node wrote after it.
	key   time.Time
	count int
	err   error
}

var errSlow = errors.New("too slow")

func (f *Fanout) open(ctx context.Context, node string, q adminclient.AuditQuery) *stream {
	ctx, cancel := context.WithCancelCause(ctx)
	q.Node = ""
	s := &stream{node: node, timeout: f.cfg.Timeout, ctx: ctx, cancel: cancel}
	next, stop := iter.Pull2(f.client(node).Audit(ctx, q))
	s.next = next
	s.stop = func() { cancel(nil); stop() }
	return s
}

// advance reads the next record.
func (s *stream) advance() {
	slow := time.AfterFunc(s.timeout, func() { s.cancel(errSlow) })
	r, err, ok := s.next()
	slow.Stop()
	if (err != nil || !ok) && errors.Is(context.Cause(s.ctx), errSlow) {
		err = errSlow // also where the node, being hung up on, ends in good order
	}
	s.more = ok && err == nil
	switch {
	case err != nil:
		s.err = err
	case !ok:
	case r.Node != s.node:
		// Evidence of one node must not be put in the name of another.
		s.more, s.err = false, fmt.Errorf("it answers with a record of node %q", r.Node)
	default:
		s.record = r
		s.count++
		if r.Start.After(s.key) {
			s.key = r.Start
		}
	}
}

func (s *stream) why() string {
	text := why(s.err, s.timeout)
	if errors.Is(s.err, errSlow) {
		text = fmt.Sprintf("no answer within %s", s.timeout)
	}
	if s.count > 0 {
		text = fmt.Sprintf("the answer broke off after %d records: %s", s.count, text)
	}
	return text
}

// merging is a heap of streams, the oldest record first.
type merging []*stream

// Len is part of heap.Interface.
func (m merging) Len() int { return len(m) }

// Less is part of heap.Interface.
func (m merging) Less(i, j int) bool {
	return cmp.Or(m[i].key.Compare(m[j].key), cmp.Compare(m[i].node, m[j].node)) < 0
}

// Swap is part of heap.Interface.
func (m merging) Swap(i, j int) { m[i], m[j] = m[j], m[i] }

// Push is part of heap.Interface; nothing is added to a merge.
func (m *merging) Push(x any) { *m = append(*m, x.(*stream)) }

// Pop is part of heap.Interface.
func (m *merging) Pop() any {
	last := (*m)[len(*m)-1]
	*m = (*m)[:len(*m)-1]
	return last
}

// ring keeps the newest records.
type ring struct {
	limit   int
	records []audit.Record
	oldest  int
}

func (r *ring) add(rec audit.Record) {
	if len(r.records) < r.limit {
		r.records = append(r.records, rec)
		return
	}
	r.records[r.oldest] = rec
	r.oldest = (r.oldest + 1) % r.limit
}

func (r *ring) all() iter.Seq[audit.Record] {
	return func(yield func(audit.Record) bool) {
		for i := range r.records {
			if !yield(r.records[(r.oldest+i)%len(r.records)]) {
				return
			}
		}
	}
}
