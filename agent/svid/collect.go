package svid

import (
	"context"
	"errors"
	"fmt"
	"sync"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
)

// ManyIssuer is an Issuer that can be asked for several certificates at once.
type ManyIssuer interface {
	Issuer
	// IssueMany returns one answer for each, in order. ErrSingly, as its error or an
	// answer's, means that Issue is to be asked. It must return when ctx ends.
	IssueMany(ctx context.Context, asks []Ask) ([]Answer, error)
}

// Ask is what Issuer.Issue is asked with.
type Ask struct {
	Workload string
	CSR      []byte
}

// Answer is what Issuer.Issue answers.
type Answer struct {
	Chain [][]byte
	Err   error
}

// ErrSingly is the answer of a control plane that wants to be asked one by one.
var ErrSingly = errors.New("svid: ask for one certificate at a time")

const (
	// collectFor is how long the first of several that are due waits for others.
	collectFor = 10 * time.Millisecond
	// collectMost is how many are asked for at once.
	collectMost = 20
	// collectQuiet is how long nothing must have been asked for, that one which is
	// due waits for no other.
	collectQuiet = time.Second
	// singlyFor is how long a control plane that wants to be asked one by one is.
	singlyFor = time.Minute
)

// collector asks for what is due at nearly the same time in one call. It is safe for
// concurrent use.
type collector struct {
	issuer ManyIssuer
	now    func() time.Time
	calls  sync.WaitGroup // what was started here

	mu     sync.Mutex
	open   *batch    // guarded by mu; collects; nil: none does
	asked  time.Time // guarded by mu; when something was asked for last
	singly time.Time // guarded by mu; until then it is asked one by one
}

// batch is one call.
type batch struct {
	ctx    context.Context // ends when nobody waits any more
	cancel context.CancelFunc
	full   chan struct{} // closed when no more fit in
	done   chan struct{} // closed when answers and err are set

	asks    []Ask // guarded by collector.mu until the call is made
	waiting int   // guarded by collector.mu

	answers []Answer
	err     error
}

// Issue implements Issuer. What is asked for after a while of quiet, such as for a pod
// that starts alone, waits for nothing.
func (c *collector) Issue(ctx context.Context, workload string, csr []byte) ([][]byte, error) {
	c.mu.Lock()
	now := c.now()
	quiet := now.Sub(c.asked) >= collectQuiet || now.Before(c.asked)
	c.asked = now
	if now.Before(c.singly) && c.singly.Sub(now) <= singlyFor || c.open == nil && quiet {
		c.mu.Unlock()
		return c.issuer.Issue(ctx, workload, csr)
	}
	if c.open == nil {
		c.open = c.begin(ctx)
	}
	b, at := c.open, len(c.open.asks)
	b.asks = append(b.asks, Ask{workload, csr})
	b.waiting++
	if len(b.asks) == collectMost {
		c.open = nil
		close(b.full)
	}
	c.mu.Unlock()
	select {
	case <-b.done:
	case <-ctx.Done():
		c.mu.Lock()
		if b.waiting--; b.waiting == 0 {
			b.cancel()
			if c.open == b {
				c.open = nil
			}
		}
		c.mu.Unlock()
		return nil, ctx.Err()
	}
	err := b.err
	if err == nil {
		err = b.answers[at].Err
	}
	switch {
	case errors.Is(err, ErrSingly):
		return c.issuer.Issue(ctx, workload, csr)
	case err != nil:
		return nil, err
	}
	return b.answers[at].Chain, nil
}

// begin starts a batch, which is not bound to who is its first: the others wait for
// it too. The caller holds mu.
func (c *collector) begin(ctx context.Context) *batch {
	b := &batch{full: make(chan struct{}), done: make(chan struct{})}
	b.ctx, b.cancel = context.WithTimeout(context.WithoutCancel(ctx), collectFor+maxAttempt)
	c.calls.Go(func() {
		defer b.cancel()
		defer close(b.done)
		timer := time.NewTimer(collectFor)
		defer timer.Stop()
		select {
		case <-timer.C:
		case <-b.full:
		case <-b.ctx.Done():
		}
		c.mu.Lock()
		if c.open == b {
			c.open = nil
		}
		asks := b.asks
		c.mu.Unlock()
		if len(asks) < 2 {
			b.err = ErrSingly
			return
		}
		b.answers, b.err = c.issuer.IssueMany(b.ctx, asks)
		switch {
		case errors.Is(b.err, ErrSingly):
			c.mu.Lock()
			c.singly = c.now().Add(singlyFor)
			c.mu.Unlock()
		case b.err == nil && len(b.answers) != len(asks):
			b.err = fmt.Errorf("the control plane answered %d of %d", len(b.answers), len(asks))
		}
	})
	return b
}

// AskMany asks the node API, and takes its answers apart.
func AskMany(ctx context.Context, client nodev1.NodeClient, requests []*nodev1.IssueRequest) ([]Answer, error) {
	resp, err := client.IssueMany(ctx, &nodev1.IssueManyRequest{Requests: requests})
	if status.Code(err) == codes.Unimplemented {
		return nil, ErrSingly
	}
	if err != nil {
		return nil, err
	}
	out := make([]Answer, len(resp.GetResults()))
	for i, r := range resp.GetResults() {
		switch code := codes.Code(r.GetCode()); code {
		case codes.OK:
			out[i].Chain = r.GetChain()
		case codes.Unimplemented:
			out[i].Err = ErrSingly
		default:
			out[i].Err = status.Error(code, r.GetMessage())
		}
	}
	return out, nil
}
