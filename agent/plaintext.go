package agent

import (
	"errors"
	"io/fs"
	"log/slog"
	"net/netip"
	"sync"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/internal/mesh"
)

// plaintext ends what reached a workload without a tunnel in observe mode
// once its namespace enforces. New connections are refused by the proxy's new
// listener; those of the old one would live until the proxy has drained it.
type plaintext struct {
	log     *slog.Logger
	sockets func(netns string) ([]capture.Socket, error)
	destroy func(netns string, local, remote netip.AddrPort) error

	// done is, by network namespace that enforces, when to stop looking: a
	// while after the proxy has its new listener. Zero: it does not have it.
	// Owned by the goroutine that captures.
	done map[string]time.Time

	mu    sync.Mutex
	ended map[string]time.Time // guarded by mu; when, by workload and caller
}

// swapTime is how long the proxy's old listener may still accept after the
// proxy has taken its new one.
const swapTime = 2 * time.Second

func newPlaintext(log *slog.Logger) *plaintext {
	return &plaintext{
		log: log, sockets: capture.Sockets, destroy: capture.Destroy,
		done: map[string]time.Time{}, ended: map[string]time.Time{},
	}
}

// look ends what the state refuses. settled says that the proxy works with
// this very state.
func (p *plaintext) look(s *nodeState, settled bool, now time.Time) {
	done := map[string]time.Time{}
	for i := range s.workloads {
		w := &s.workloads[i]
		if w.Capture == nil || s.modes[w.Namespace] != mesh.ModeEnforce {
			continue
		}
		until := p.done[w.Capture.NetNS]
		if until.IsZero() && settled {
			until = now.Add(swapTime)
		}
		done[w.Capture.NetNS] = until
		if until.IsZero() || now.Before(until) {
			p.end(w, now)
		}
	}
	p.done = done
}

// end ends every connection that came without a tunnel.
func (p *plaintext) end(w *mesh.Workload, now time.Time) {
	sockets, err := p.sockets(w.Capture.NetNS)
	if err != nil {
		if !errors.Is(err, fs.ErrNotExist) {
			p.log.Error("plaintext connections cannot be looked for", "to", w.Key(), "error", err)
		}
		return
	}
	for _, s := range sockets {
		if s.Local.Port() != mesh.PortInbound || s.State != capture.Established && s.State != capture.CloseWait {
			continue
		}
		switch err := p.destroy(w.Capture.NetNS, s.Local, s.Remote); {
		case err == nil:
			p.mu.Lock()
			p.ended[caller(w.Key(), s.Remote.String())] = now
			p.mu.Unlock()
			p.log.Info("plaintext connection ended, the namespace enforces", "to", w.Key(), "from", s.Remote)
		case !errors.Is(err, capture.ErrNotFound): // not found: it ended by itself
			p.log.Error("a plaintext connection that is no longer allowed could not be ended", "to", w.Key(), "from", s.Remote, "error", err)
		}
	}
}

// see takes an event before it is stored, and says in it when the connection
// was ended from here.
func (p *plaintext) see(e *audit.Event) {
	r := &e.Record
	if r.Transport != "plaintext" || r.Side != audit.Destination || r.Verdict != audit.Observed || !e.Final {
		return
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	key := caller(r.Destination.Workload, r.Source.Address)
	if at, ok := p.ended[key]; ok && r.Start.Before(at) {
		delete(p.ended, key)
		r.Ended = "revoked"
		r.Reason += "; revoked: the namespace enforces"
	}
	for k, at := range p.ended { // of connections whose end was never told
		if r.End.Sub(at) > time.Minute {
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
