package agent

import (
	"errors"
	"fmt"
	"maps"
	"net/netip"
	"slices"
	"strings"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/capture"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// revokedCert is a certificate that is revoked, and whether it is refused yet.
type revokedCert struct {
	reason  string
	refused bool
}

func (r revokedCert) text() string { return authz.CallerRevoked + ": " + r.reason }

// ofServer is why a connection that leaves ends.
func (r revokedCert) ofServer() string { return authz.ServerRevoked + ": " + r.reason }

// maxRevoked bounds what a node takes, above what any control plane sends.
const maxRevoked = 4096

func parseRevoked(all []*nodev1.Revoked) (map[string]revokedCert, error) {
	if len(all) > maxRevoked {
		return nil, fmt.Errorf("revoked: %d certificates; at most %d", len(all), maxRevoked)
	}
	out := make(map[string]revokedCert, len(all))
	for _, r := range all {
		s := r.GetSerial()
		if s == "" || len(s)%2 != 0 || len(s) > 40 || strings.Trim(s, "0123456789abcdef") != "" {
			return nil, fmt.Errorf("revoked: %.64q is no serial number", s)
		}
		out[s] = revokedCert{reason: r.GetReason(), refused: r.GetRefused()}
	}
	return out, nil
}

// isRevoked reports whether a certificate is to be renewed at once.
func (s *nodeState) isRevoked(serial string) bool {
	_, ok := s.revoked[serial]
	return ok
}

// refused lists the certificates that the proxy refuses.
func (s *nodeState) refused() []string {
	return slices.Sorted(maps.Keys(s.refusedReasons()))
}

// refusedReasons is why each is refused.
func (s *nodeState) refusedReasons() map[string]string {
	out := map[string]string{}
	for serial, r := range s.revoked {
		if r.refused {
			out[serial] = r.reason
		}
	}
	return out
}

// liveTunnel is a caller's tunnel to a workload, as long as it is there.
type liveTunnel struct {
	workload string // namespace/name of the destination
	peer     netip.AddrPort
}

// shown is the certificate that a tunnel was opened with.
type shown struct {
	serial string
	local  netip.Addr // the destination
}

// maxTunnels bounds the tunnels that are kept in mind. Any other is ended at the
// first connection that it asks for.
const maxTunnels = 8192

// makeRoom forgets any tunnel, if there are too many to keep one more in mind.
func makeRoom[K comparable, V any](tunnels map[K]V, key K) {
	if _, known := tunnels[key]; known || len(tunnels) < maxTunnels {
		return
	}
	for other := range tunnels {
		delete(tunnels, other)
		return
	}
}

// refuses reports why a certificate is refused, if it is, and which captured workload
// a connection with it is of. mu is held.
func (l *live) refuses(serial, workload string) (why revokedCert, w *mesh.Workload, refused bool) {
	if l.state == nil {
		return why, nil, false
	}
	why, w = l.state.revoked[serial], l.state.workload(workload)
	return why, w, why.refused && w != nil && w.Capture != nil
}

// seeTunnel notes with which certificate a tunnel was opened, and ends the tunnel
// when that is refused. mu is held.
func (l *live) seeTunnel(r *audit.Record) {
	peer, err1 := netip.ParseAddrPort(r.Source.Address)
	to, err2 := netip.ParseAddrPort(r.Destination.Address)
	if errors.Join(err1, err2) != nil || r.Source.Serial == "" {
		return
	}
	key := liveTunnel{r.Destination.Workload, peer}
	makeRoom(l.tunnels, key)
	l.tunnels[key] = shown{serial: r.Source.Serial, local: to.Addr()}
	l.judgeTunnel(key)
}

// judgeTunnel ends a tunnel whose certificate is refused. mu is held.
func (l *live) judgeTunnel(key liveTunnel) {
	s := l.tunnels[key]
	why, w, refused := l.refuses(s.serial, key.workload)
	if !refused {
		return
	}
	delete(l.tunnels, key)
	local := netip.AddrPortFrom(s.local, mesh.PortTunnel)
	switch err := l.destroy(w.Capture.NetNS, local, key.peer); {
	case err == nil:
		l.log.Warn("tunnel with a revoked certificate ended", "serial", s.serial, "to", key.workload, "from", key.peer, "reason", why.reason)
	case !errors.Is(err, capture.ErrNotFound):
		l.log.Error("a tunnel with a revoked certificate could not be ended", "serial", s.serial, "to", key.workload, "error", err)
	}
}

// revoke ends what certificates are in that a new state refuses, before the proxy
// refuses them: who has another one opens new tunnels with that.
func (l *live) revoke(s *nodeState) {
	l.mu.Lock()
	defer l.mu.Unlock()
	was := l.state
	if was == nil {
		was = &nodeState{}
	}
	if !slices.ContainsFunc(s.refused(), func(serial string) bool { return !was.revoked[serial].refused }) {
		return
	}
	for id, c := range l.conns { // first, so that the audit says why they ended
		w := s.workload(c.workload)
		if why := s.revoked[c.serial]; why.refused && w != nil && w.Capture != nil {
			l.end(id, c, w, c.refused(why))
		}
	}
	l.state = s
	for key := range l.tunnels {
		l.judgeTunnel(key)
	}
	for key := range l.leaving {
		l.judgeLeaving(key)
	}
}
