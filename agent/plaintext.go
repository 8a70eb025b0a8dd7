package agent

import (
	"errors"
	"fmt"
	"io/fs"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// plaintext ends connections that a new state refuses and that no policy of a
// tunnel ends: those that reached a workload without one, once its namespace
// enforces, and all of a workload that is quarantined, also those that it
// opened itself. New connections are refused by the proxy's new listener; those
// of the old one would live until the proxy has drained it.
type plaintext struct {
	log     *slog.Logger
	sockets func(netns string) ([]capture.Socket, error)
	destroy func(netns string, local, remote netip.AddrPort) error

	// proven lists connections without a tunnel whose callers proved an identity.
	// Policies end those.
	proven func() map[string]bool

	// done is, by what is refused, when to stop looking: a while after the
	// proxy has its new listener. Zero: it does not have it. Owned by the
	// goroutine that captures.
	done map[closing]time.Time
	// first is when connections were seen first that had proven no identity, by
	// workload and caller. Owned by the same.
	first map[string]time.Time

	mu    sync.Mutex
	ended map[string]closed // guarded by mu; by workload and caller
}

// closing is what is closed in a network namespace: what comes to one of the
// proxy's ports there.
type closing struct {
	netns string
	port  uint16
	why   string
}

// enforces is why plaintext is refused where nobody is quarantined.
const enforces = "the namespace enforces"

// closed is a connection that was ended from here.
type closed struct {
	at  time.Time
	why string
}

// swapTime is how long the proxy's old listener may still accept after the
// proxy has taken its new one.
const swapTime = 2 * time.Second

// proveTime is how long a connection to a workload in front of which TLS is ended
// is let be: until the proxy has ended it, and its audit line is read. Only then
// the connection is known for what it is.
const proveTime = 500 * time.Millisecond

func newPlaintext(log *slog.Logger, proven func() map[string]bool) *plaintext {
	return &plaintext{
		log: log, proven: proven, sockets: capture.Sockets, destroy: capture.Destroy,
		done: map[closing]time.Time{}, first: map[string]time.Time{}, ended: map[string]closed{},
	}
}

// look ends what the state refuses. settled says that the proxy works with
// this very state.
func (p *plaintext) look(s *nodeState, settled bool, now time.Time) {
	done := map[closing]time.Time{}
	for i := range s.workloads {
		w := &s.workloads[i]
		terminates := len(s.model.Terminated(authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount})) > 0
		for _, r := range refusals(s, w) {
			until := p.done[r]
			if until.IsZero() && settled {
				until = now.Add(swapTime)
				if terminates {
					until = until.Add(4 * proveTime)
				}
			}
			done[r] = until
			if until.IsZero() || now.Before(until) {
				p.end(w, r, terminates, now)
			}
		}
	}
	p.done = done
	for k, first := range p.first {
		if now.Sub(first) > time.Minute {
			delete(p.first, k)
		}
	}
}

// refusals says what of a workload the state refuses.
func refusals(s *nodeState, w *mesh.Workload) []closing {
	if w.Capture == nil || w.Capture.NetNS == "" {
		return nil
	}
	if name, cut := s.model.Quarantined(w.ID); cut {
		why := fmt.Sprintf("quarantined by %q", name)
		return []closing{{w.Capture.NetNS, mesh.PortInbound, why}, {w.Capture.NetNS, mesh.PortOutbound, why}}
	}
	if s.modes[w.Namespace] == mesh.ModeEnforce {
		return []closing{{w.Capture.NetNS, mesh.PortInbound, enforces}}
	}
	return nil
}

// end ends every connection that is refused. Where TLS is ended in front of the
// workload, a new one may still prove that it is none of those.
func (p *plaintext) end(w *mesh.Workload, r closing, terminates bool, now time.Time) {
	sockets, err := p.sockets(r.netns)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			p.log.Error("connections that are refused cannot be looked for", "workload", w.Key(), "error", err)
		}
		return
	}
	var proven map[string]bool
	if r.why == enforces {
		proven = p.proven()
	}
	for _, s := range sockets {
		if s.Local.Port() != r.port || s.State != capture.Established && s.State != capture.CloseWait {
			continue
		}
		if key := caller(w.Key(), s.Remote.String()); proven[key] || r.why == enforces && terminates && p.young(key, now) {
			continue
		}
		switch err := p.destroy(r.netns, s.Local, s.Remote); {
		case err == nil:
			p.mu.Lock()
			p.ended[caller(w.Key(), s.Remote.String())] = closed{now, r.why}
			p.mu.Unlock()
			p.log.Info("connection ended", "because", r.why, "workload", w.Key(), "from", s.Remote)
		case !errors.Is(err, capture.ErrNotFound): // not found: it ended by itself
			p.log.Error("a connection that is no longer allowed could not be ended", "workload", w.Key(), "from", s.Remote, "error", err)
		}
	}
}

// young reports whether a connection was first seen so lately that it may still
// prove an identity.
func (p *plaintext) young(key string, now time.Time) bool {
	if _, known := p.first[key]; !known {
		p.first[key] = now
	}
	return now.Sub(p.first[key]) < proveTime
}

// see takes an event before it is stored, and says in it when the connection
// was ended from here.
func (p *plaintext) see(e *audit.Event) {
	r := &e.Record
	if !e.Final || r.Transport != "plaintext" || r.Verdict == audit.Denied {
		return
	}
	workload := r.Destination.Workload
	if r.Side == audit.Source {
		workload = r.Source.Workload
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	key := caller(workload, r.Source.Address)
	if c, ok := p.ended[key]; ok && r.Start.Before(c.at) {
		delete(p.ended, key)
		r.Ended = "revoked"
		r.Reason += "; revoked: " + c.why
	}
	for k, c := range p.ended { // of connections whose end was never told
		if r.End.Sub(c.at) > time.Minute {
			delete(p.ended, k)
		}
	}
}

// caller names a connection by its workload and the caller's address. The proxy
// writes the interface into a link-local one, as its zone.
func caller(workload, addr string) string {
	if a, err := netip.ParseAddrPort(addr); err == nil {
		addr = netip.AddrPortFrom(a.Addr().WithZone(""), a.Port()).String()
	}
	return workload + " " + addr
}
