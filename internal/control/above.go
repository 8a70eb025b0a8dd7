package control

import (
	"context"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/ca"
)

// enrol keeps an intermediate of the authority above in the roots' store until stop
// is called, and returns when there is one to sign with. Both it and its Enrolment
// are nil where there is no authority above.
func (c *control) enrol(ctx context.Context, td spiffeid.TrustDomain) (_ *ca.Enrolment, stop func(), err error) {
	if c.cfg.Above == nil {
		return nil, func() {}, nil
	}
	above, err := c.cfg.Above(td)
	if err != nil {
		return nil, nil, err
	}
	c.above.Store(above)
	ctx, cancel := context.WithCancel(ctx)
	var running sync.WaitGroup
	running.Go(func() { above.Run(ctx) })
	if c.cfg.Enrolling != nil {
		running.Go(func() {
			if err := c.cfg.Enrolling(ctx, above.Status); err != nil && ctx.Err() == nil {
				c.log.ErrorContext(ctx, "the status of the authority above is not told", "error", err)
			}
		})
	}
	stop = func() { cancel(); running.Wait() }
	if err := above.Ready(ctx); err != nil {
		stop()
		return nil, nil, err
	}
	return above, stop, nil
}
