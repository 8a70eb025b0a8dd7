package agent

import (
	"context"
	"fmt"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/sdkapi"
	"github.com/signet-mesh/signet/internal/proxy/instance"
)

// proxy says whether a proxy is connected, whether it works with this very state,
// and what it refused last. There may be no state yet.
func (a *agent) proxy(s *nodeState) (connected, settled bool, refused string) {
	connected, current, refused := a.relay.Proxy()
	return connected, current && s != nil && a.relay.Version() == s.xdsVersion, refused
}

// followProxies closes the records of connections that a dead proxy had open,
// while those of another that lives stay open.
func (a *agent) followProxies(ctx context.Context) {
	handled := ""
	for {
		looked := time.Now()
		living, err := instance.List(a.cfg.RunDir)
		if err != nil {
			a.log.Error("looking for the node's proxies", "error", err)
		} else if now := fmt.Sprint(epochs(living)); now != handled {
			if err := a.closeLost(ctx, living, looked); err == nil {
				handled = now
			} else if ctx.Err() == nil {
				a.log.Error("closing the records of a dead proxy", "error", err)
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}

// epochs returns, by proxy, when its Envoy was last started.
func epochs(living []instance.Instance) map[string]time.Time {
	out := map[string]time.Time{}
	for _, p := range living {
		out[p.ID] = p.Epoch
	}
	return out
}

// closeLost closes the records of connections that no proxy has any more.
// living are all that there were when it was looked.
func (a *agent) closeLost(ctx context.Context, living []instance.Instance, looked time.Time) error {
	if err := a.tailer.Sync(ctx); err != nil {
		return err
	}
	since := epochs(living)
	lost := map[string]bool{}
	n, err := a.store.CloseOpen(ctx, "proxy-lost", looked, func(r audit.Record) bool {
		if epoch, ok := since[r.Proxy]; ok && !r.Start.Before(epoch) || r.Start.After(looked) || sdkapi.Owns(&r) {
			return false
		}
		lost[r.ID] = true
		return true
	})
	if err != nil {
		return err
	}
	if n > 0 {
		a.live.forget(lost)
		a.log.Warn("a proxy died; its open connections were closed in the audit", "count", n)
	}
	return nil
}

// reopened: the proxies' parents notice by themselves that the spool was moved.
func reopened(context.Context) error { return nil }
