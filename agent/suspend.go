package agent

import (
	"context"
	"time"
)

// stoodStill is for how long timers may stand still, together, before the proxy
// opens new tunnels. Certificates are dated back by as much.
const stoodStill = 10 * time.Second

// watchClock has the proxy open new tunnels after the machine was suspended, or the
// wall clock was set ahead. The proxy lets a tunnel take new connections for a time
// by its timers, which stood still: those from before could be in use when their
// certificates expire, and connections in them be refused.
func (a *agent) watchClock(ctx context.Context) {
	tick := time.NewTicker(lookAtClock)
	defer tick.Stop()
	began := time.Now()
	for p := (&pace{wall: began.Round(0)}); ; {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		now := time.Now()
		if lag := p.lag(now.Round(0), now.Sub(began)); lag >= stoodStill {
			a.log.Warn("the wall clock has gone ahead of the timers, as after a suspend: the proxy opens new tunnels, and those from before take no new connections", "by", lag.Round(time.Second))
			a.newTunnels(now)
		}
	}
}

// pace compares the wall clock with the timers.
type pace struct {
	wall   time.Time     // by the wall clock alone
	timers time.Duration // at that time
	behind time.Duration // how far the timers fell behind since lag last said so; not negative
}

// lag returns how far the timers fell behind the wall clock since it last returned
// stoodStill or more; short stops add up.
func (p *pace) lag(wall time.Time, timers time.Duration) time.Duration {
	by := wall.Sub(p.wall) - (timers - p.timers)
	p.wall, p.timers, p.behind = wall, timers, max(0, p.behind+by)
	out := p.behind
	if out >= stoodStill {
		p.behind = 0
	}
	return out
}

// newTunnels gives the proxy what it has, but for a cluster of tunnels that is new.
func (a *agent) newTunnels(now time.Time) {
	a.giving.Lock()
	defer a.giving.Unlock()
	a.tunnels = now
	if a.given == nil {
		return // with the first state, then
	}
	set, err := a.local(a.given)
	if err != nil {
		a.log.Error("building the proxy's configuration; it keeps what it has", "error", err)
		return
	}
	a.relay.SetLocal(set)
}
