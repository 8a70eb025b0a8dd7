package agent

import (
	"context"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/xds"
)

// shownSoon is how long the proxy is given to have a certificate that was renewed
// late, and others to be renewed as well, before it opens new tunnels.
const shownSoon = time.Second

// watchRenewals has the proxy open new tunnels when a certificate was replaced so
// late that a tunnel which was opened with it could take new connections after it
// has expired: those would be refused at the other end. That is so when the control
// plane was away, after a suspend, and when certificates are to live longer.
func (a *agent) watchRenewals(ctx context.Context) {
	held := newest{}
	for {
		changed := a.svids.Changed()
		now := time.Now().Round(0)
		a.giving.Lock()
		life := time.Duration(0)
		if a.given != nil {
			life = xds.TunnelLife(a.given.ttl)
		}
		a.giving.Unlock()
		if id := held.late(a.svids.All(), now, life); !id.IsZero() {
			select {
			case <-ctx.Done():
				return
			case <-time.After(shownSoon):
			}
			_ = held.late(a.svids.All(), time.Now().Round(0), life) // of these too
			a.log.Warn("a certificate was renewed late: the proxy opens new tunnels, so that none is in use when the certificate that it was opened with expires", "id", id)
			a.newTunnels(time.Now())
			continue
		}
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// newest is the certificate of each identity that was there last, also when it
// has expired.
type newest map[spiffeid.ID]*svid.SVID

// late takes up the certificates that there are, and returns an identity, if there
// is one, whose last was replaced when less was left of it than a tunnel's life.
func (n newest) late(all []*svid.SVID, now time.Time, life time.Duration) (id spiffeid.ID) {
	there := map[spiffeid.ID]bool{}
	for _, s := range all {
		there[s.ID] = true
		if was := n[s.ID]; was != nil && was.Serial != s.Serial && was.NotAfter.Before(now.Add(life)) {
			id = s.ID
		}
		n[s.ID] = s
	}
	for i, s := range n {
		if !there[i] && s.NotAfter.Add(life).Before(now) { // its tunnels take nothing any more
			delete(n, i)
		}
	}
	return id
}
