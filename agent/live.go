package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"net/netip"
	"sync"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/agent/sdkapi"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// live knows the open inbound connections and ends those that the newest
// policies no longer allow. A connection that was admitted under an older
// state is looked at when it is first heard of, so none slips between an edit
// and its own first audit line.
type live struct {
	log     *slog.Logger
	destroy func(netns string, local, remote netip.AddrPort) error

	mu      sync.Mutex
	state   *nodeState            // guarded by mu
	conns   map[string]liveConn   // guarded by mu; by record id
	tunnels map[liveTunnel]shown  // guarded by mu; how callers proved themselves in them
	leaving map[leaving]led       // guarded by mu; how servers did, in tunnels that leave
	revoked map[string]revocation // guarded by mu; by record id, until it ended
}

// revocation is why a connection was ended from here.
type revocation struct {
	reason string
}

// liveConn is one connection at its destination.
type liveConn struct {
	from     spiffeid.ID
	serial   string // of the caller's certificate; where it leaves, of the application's
	workload string // namespace/name of the destination
	local    netip.AddrPort
	remote   netip.AddrPort // the application; its port is what policies name
	direct   string         // workload and caller, where it came without a tunnel
	// to is the application with which the proxy speaks mutual TLS, where the
	// connection leaves workload; zero: it arrived there.
	to spiffeid.ID
}

// refused is why a connection ends because a certificate is revoked.
func (c *liveConn) refused(why revokedCert) string {
	if !c.to.IsZero() {
		return why.ofServer()
	}
	return why.text()
}

func newLive(log *slog.Logger) *live {
	return &live{log: log, destroy: capture.Destroy, conns: map[string]liveConn{}, tunnels: map[liveTunnel]shown{}, leaving: map[leaving]led{}, revoked: map[string]revocation{}}
}

// load takes up the connections that were open when the agent last ran.
func (l *live) load(ctx context.Context, store *audit.Store) error {
	open := true
	return store.Query(ctx, audit.Filter{Open: &open}, func(r audit.Record) error {
		if sdkapi.Owns(&r) {
			return nil // its workload ends it
		}
		e := audit.Event{Record: r}
		l.see(&e)
		return nil
	})
}

// see takes an event before it is stored, and says in it when the connection
// was ended from here.
func (l *live) see(e *audit.Event) {
	r := &e.Record
	if r.Side == audit.Source && r.Transport == "mtls" {
		l.seeLeaving(e)
		return
	}
	leaves := r.Side == audit.Source && r.Transport == audit.Direct
	if !leaves && (r.Side != audit.Destination || r.Transport != "mtls" && r.Transport != audit.Direct) {
		return
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if r.Transport == "mtls" {
		l.seeTunnel(r)
	}
	if e.Final {
		delete(l.conns, r.ID)
		l.tellRevoked(r)
		return
	}
	follow := arrived
	if leaves {
		follow = left
	}
	c, err := follow(r)
	if err != nil {
		l.log.Error("an open connection cannot be followed", "id", r.ID, "error", err)
		return
	}
	l.conns[r.ID] = c
	l.judge(r.ID)
}

// tellRevoked says in a record that the connection was ended from here. mu is held.
func (l *live) tellRevoked(r *audit.Record) {
	if why, ok := l.revoked[r.ID]; ok {
		delete(l.revoked, r.ID)
		r.Ended = "revoked"
		r.Reason += "; revoked: " + why.reason
	}
}

// arrived reads the record of a connection at its destination.
func arrived(r *audit.Record) (liveConn, error) {
	local, err1 := netip.ParseAddrPort(r.Destination.Via)
	remote, err2 := netip.ParseAddrPort(r.Destination.Address)
	from, err3 := spiffeid.FromString(r.Source.ID)
	c := liveConn{from: from, serial: r.Source.Serial, workload: r.Destination.Workload, local: local, remote: remote}
	if r.Transport == audit.Direct {
		c.direct = caller(c.workload, r.Source.Address)
	}
	return c, errors.Join(err1, err2, err3)
}

// left reads the record, at its source, of a connection with an application.
func left(r *audit.Record) (liveConn, error) {
	local, err1 := netip.ParseAddrPort(r.Source.Via)
	remote, err2 := netip.ParseAddrPort(r.Destination.Via)
	from, err3 := spiffeid.FromString(r.Source.ID)
	to, err4 := spiffeid.FromString(r.Destination.ID)
	return liveConn{from: from, to: to, serial: r.Destination.Serial, workload: r.Source.Workload, local: local, remote: remote}, errors.Join(err1, err2, err3, err4)
}

// update puts a new state into force and judges every open connection by it.
func (l *live) update(s *nodeState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	l.state = s
	for id := range l.conns {
		l.judge(id)
	}
}

// judge ends a connection that is not allowed. mu is held.
func (l *live) judge(id string) {
	if l.state == nil {
		return
	}
	c := l.conns[id]
	w := l.state.workload(c.workload)
	if w == nil || w.Capture == nil {
		return // gone
	}
	if why, ok := l.state.revoked[c.serial]; ok && why.refused {
		l.end(id, c, w, c.refused(why))
		return
	}
	if !c.to.IsZero() { // whom the application admits is for it to say
		if name, cut := l.state.model.Quarantined(c.from); cut {
			l.end(id, c, w, authz.CallerCutOff(name, c.from.String()))
		} else if name, cut := l.state.model.Quarantined(c.to); cut {
			l.end(id, c, w, authz.ApplicationCutOff(name, c.to.String()))
		}
		return
	}
	d := l.state.model.Decide(authz.Request{
		From:   c.from,
		Target: authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount},
		Port:   c.remote.Port(),
	})
	if d.Verdict == authz.Allow || l.state.modes[w.Namespace] != mesh.ModeEnforce && d.Quarantine == "" {
		return // an observed namespace enforces quarantines only
	}
	l.end(id, c, w, d.Reason)
}

// end ends one connection. mu is held.
func (l *live) end(id string, c liveConn, w *mesh.Workload, reason string) {
	delete(l.conns, id)
	switch err := l.destroy(w.Capture.NetNS, c.local, c.remote); {
	case err == nil:
		l.revoked[id] = revocation{reason: reason}
		l.log.Info("connection revoked", "from", c.from, "to", c.workload, "port", c.remote.Port(), "reason", reason)
	case !errors.Is(err, capture.ErrNotFound): // not found: it ended by itself
		l.log.Error("a connection that is no longer allowed could not be ended", "from", c.from, "to", c.workload, "error", err)
	}
}

// directs lists the connections that came without a tunnel and whose callers
// proved an identity, by workload and caller.
func (l *live) directs() map[string]bool {
	l.mu.Lock()
	defer l.mu.Unlock()
	out := map[string]bool{}
	for _, c := range l.conns {
		if c.direct != "" {
			out[c.direct] = true
		}
	}
	return out
}

// endDirects ends all of those, and those that leave, and returns how many.
func (l *live) endDirects(s *nodeState, reason string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for id, c := range l.conns {
		if w := s.workload(c.workload); (c.direct != "" || !c.to.IsZero()) && w != nil && w.Capture != nil {
			l.end(id, c, w, reason)
			n++
		}
	}
	return n
}

// forget drops what a dead proxy had open, by record id.
func (l *live) forget(lost map[string]bool) {
	l.mu.Lock()
	defer l.mu.Unlock()
	for id := range lost {
		delete(l.conns, id)
		delete(l.revoked, id)
	}
	for key, t := range l.leaving {
		if maps.DeleteFunc(t.conns, func(id string, _ bool) bool { return lost[id] }); len(t.conns) == 0 {
			delete(l.leaving, key)
		}
	}
}

// count returns the open connections to a workload.
func (l *live) count(workload string) int {
	l.mu.Lock()
	defer l.mu.Unlock()
	n := 0
	for _, c := range l.conns {
		if c.workload == workload && c.to.IsZero() {
			n++
		}
	}
	return n
}
