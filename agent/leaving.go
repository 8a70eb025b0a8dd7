package agent

import (
	"errors"
	"net/netip"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/internal/mesh"
)

// leaving is a tunnel that leaves a workload, as long as it is there.
type leaving struct {
	workload string // namespace/name of the source
	local    netip.AddrPort
}

// led is where a tunnel leads.
type led struct {
	remote netip.AddrPort
	serial string          // of the certificate that the server proved itself by
	conns  map[string]bool // open in it, by record id
}

// seeLeaving notes by which certificate the server of a tunnel proved itself, and ends
// the tunnel when that is revoked: the proxy itself cannot refuse it.
func (l *live) seeLeaving(e *audit.Event) {
	r := &e.Record
	l.mu.Lock()
	defer l.mu.Unlock()
	local, err1 := netip.ParseAddrPort(r.Source.Via)
	to, err2 := netip.ParseAddrPort(r.Destination.Via)
	if errors.Join(err1, err2) != nil || r.Destination.Serial == "" {
		return // it came to no tunnel
	}
	key := leaving{r.Source.Workload, local}
	t := l.leaving[key]
	if t.serial != r.Destination.Serial { // another tunnel has the port now
		t = led{serial: r.Destination.Serial, conns: map[string]bool{}}
	}
	t.remote = netip.AddrPortFrom(to.Addr(), mesh.PortTunnel)
	makeRoom(l.leaving, key)
	l.leaving[key] = t
	if e.Final {
		delete(t.conns, r.ID)
	} else {
		t.conns[r.ID] = true
	}
	l.judgeLeaving(key)
	if e.Final {
		l.tellRevoked(r)
	}
}

// judgeLeaving ends a tunnel whose server's certificate is revoked. mu is held.
func (l *live) judgeLeaving(key leaving) {
	t := l.leaving[key]
	why, w, refused := l.refuses(t.serial, key.workload)
	if !refused {
		return
	}
	delete(l.leaving, key)
	switch err := l.destroy(w.Capture.NetNS, key.local, t.remote); {
	case err == nil:
		for id := range t.conns {
			l.revoked[id] = revocation{reason: why.ofServer()}
		}
		l.log.Warn("tunnel to a server with a revoked certificate ended", "serial", t.serial, "from", key.workload, "to", t.remote, "reason", why.reason)
	case !errors.Is(err, capture.ErrNotFound):
		l.log.Error("a tunnel to a server with a revoked certificate could not be ended", "serial", t.serial, "from", key.workload, "error", err)
	}
}
