package proxy

import (
	"context"
	"net/http"
	"slices"
	"time"

	"github.com/signet-mesh/signet/internal/proxy/instance"
)

const (
	// successorWait is how long a proxy that is to end serves on, to see
	// whether another comes.
	successorWait = 5 * time.Second
	// askEvery is how often Envoys are asked how far they are.
	askEvery = 100 * time.Millisecond
	// sayEvery is how often the log says what remains.
	sayEvery = 10 * time.Second
)

// drain returns when the proxy may end: no connection is left, or the limit is
// reached, or cut ends, or there is nobody to take over. In the last case the
// node is better served by a proxy that can be started again soon than by one
// that takes nothing new.
func (p *proxy) drain(cut context.Context) {
	if p.DrainLimit == 0 {
		p.cutting("no time to drain was given")
		return
	}
	ctx, stop := context.WithTimeout(cut, p.DrainLimit)
	defer stop()
	p.draining.Store(true)
	p.Log.Info("ending: waiting for the proxy that takes over")
	if !p.handOver(ctx) {
		why := "no other proxy runs on this node"
		if ctx.Err() != nil {
			why = "no other proxy took over in time"
		}
		p.cutting(why)
		return
	}
	if err := p.own.Drain(); err != nil { // the agent would expect too much of this proxy
		p.Log.Error("telling the agent that this proxy drains", "error", err)
	}
	if err := p.admin.stopAccepting(ctx); err != nil {
		p.Log.Error("the proxy could not be told to take no more", "error", err)
		p.cutting("it cannot drain")
		return
	}
	if err := p.setHaste("1"); err != nil { // they go too, but only when their callers like
		p.Log.Error("telling tunnels that idle to go", "error", err)
	}
	p.Log.Info("draining: another proxy takes the new connections", "limit", p.DrainLimit)
	p.untilEmpty(ctx)
}

// handOver waits until another proxy of this node has every listener that this
// one has. It reports false when there is none, or ctx ends.
func (p *proxy) handOver(ctx context.Context) bool {
	alone := time.Now()
	said := ""
	for {
		own, err := p.admin.listeners(ctx)
		if err != nil || len(own) == 0 {
			return false // dead, or never configured: there is nothing to hand over
		}
		others, err := p.others()
		if err != nil {
			p.Log.Error("looking for another proxy", "error", err)
		}
		if len(others) > 0 {
			alone = time.Now()
		}
		for _, o := range others {
			admin := newAdmin(o.Admin())
			theirs, err := admin.listeners(ctx)
			missing := ""
			for name := range own {
				if !theirs[name] {
					missing = name
				}
			}
			if err == nil && missing == "" {
				// An Envoy that starts has its listeners before it accepts on
				// them, which takes a while on a busy machine.
				_, err = admin.do(ctx, http.MethodGet, "/ready")
			}
			if err == nil && missing == "" {
				p.Log.Info("another proxy has every listener", "other", o.ID, "listeners", len(own))
				return true
			}
			if o.ID != said {
				p.Log.Info("another proxy runs and is not ready", "other", o.ID, "missing", missing, "error", err)
				said = o.ID
			}
		}
		if time.Since(alone) > successorWait || !p.pause(ctx, askEvery) {
			return false
		}
	}
}

// others returns the proxies of this node that take connections.
func (p *proxy) others() ([]instance.Instance, error) {
	all, err := instance.List(p.RunDir)
	return slices.DeleteFunc(all, func(i instance.Instance) bool { return i.ID == p.own.ID || i.Draining }), err
}

// untilEmpty returns when no connection is left or ctx ends.
func (p *proxy) untilEmpty(ctx context.Context) {
	began := time.Now()
	var said time.Time
	for {
		c, err := p.admin.connections(ctx)
		switch {
		case err != nil && ctx.Err() == nil:
			p.Log.Warn("connections cannot be counted", "error", err)
		case err == nil && c.Open() == 0 && c.Tunnels == 0:
			p.Log.Info("drained", "took", time.Since(began).Round(time.Millisecond))
			return
		case err == nil && time.Since(said) >= sayEvery:
			said = time.Now()
			p.Log.Info("draining", "connections", c.Open(), "outbound", c.Outbound, "inbound", c.Inbound, "plain", c.Plain,
				"tunnels", c.Tunnels, "left", time.Until(began.Add(p.DrainLimit)).Round(time.Second))
		}
		if !p.pause(ctx, askEvery) {
			p.cutting("the time to drain is over")
			return
		}
	}
}

// cutting says how many connections end with Envoy.
func (p *proxy) cutting(why string) {
	ctx, stop := context.WithTimeout(context.Background(), time.Second)
	defer stop()
	c, err := p.admin.connections(ctx)
	if err != nil {
		p.Log.Info("ending", "why", why) // Envoy is not there
		return
	}
	p.Log.Warn("ending", "why", why, "cut", c.Open(), "outbound", c.Outbound, "inbound", c.Inbound, "plain", c.Plain)
}

// pause reports false if ctx ends, or Envoy dies, meanwhile.
func (p *proxy) pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
	case <-p.died:
	}
	return false
}
