package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"os"
	"slices"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/mesh"
)

// State is a TCP state, numbered as in the kernel.
type State uint8

// The states. A connection in TimeWait or Close has ended already.
const (
	Established State = iota + 1
	SynSent
	SynRecv
	FinWait1
	FinWait2
	TimeWait
	Close
	CloseWait
	LastAck
	Listen
	Closing
	NewSynRecv
)

var stateNames = [...]string{"unknown", "established", "syn-sent", "syn-recv", "fin-wait-1", "fin-wait-2",
	"time-wait", "close", "close-wait", "last-ack", "listen", "closing", "new-syn-recv"}

// String returns the state's usual name in lower case.
func (s State) String() string {
	if int(s) < len(stateNames) {
		return stateNames[s]
	}
	return stateNames[0]
}

// open reports whether a connection in this state can still carry data.
func (s State) open() bool { return s != Listen && s != TimeWait && s != Close }

// Socket is one TCP socket.
type Socket struct {
	// Local and Remote never hold an IPv4 address as IPv6. Remote is a zero
	// address and port for a listener.
	Local, Remote netip.AddrPort
	State         State
	// Mark is the socket's SO_MARK: mesh.SocketMark on the proxy's own. The
	// kernel tells it only to callers with CAP_NET_ADMIN over the namespace;
	// others see 0.
	Mark uint32

	key diagKey
}

// Sockets lists every TCP socket in the namespace, in no order. Its cost grows
// with the connections, those that ended within the last minute included.
func (n *NS) Sockets() ([]Socket, error) { return n.list(allStates) }

// Listeners lists the TCP sockets that listen, in no order. Unlike Sockets it
// costs the same however many connections there are.
func (n *NS) Listeners() ([]Socket, error) { return n.list(1 << Listen) }

func (n *NS) list(states uint32) ([]Socket, error) {
	var out []Socket
	err := n.withDiag(func(d *diagConn) error {
		for _, family := range []uint8{unix.AF_INET, unix.AF_INET6} {
			got, err := d.dump(family, states)
			if err != nil {
				return err
			}
			out = append(out, got...)
		}
		return nil
	})
	if errors.Is(err, os.ErrNotExist) || errors.Is(err, unix.EINVAL) {
		err = ErrUnsupported // no handler for TCP
	}
	if err != nil {
		return nil, fmt.Errorf("capture: %s: list sockets: %w", n.path, err)
	}
	return out, nil
}

// Destroy ends the one connection between exactly these addresses, as seen
// from the namespace (the zone of a link-local one is not looked at): its process gets an error, and the peer a reset. Both
// ends of a connection within the namespace are different sockets. It never
// touches a listener. ErrNotFound means that there is no such connection, or
// that it has ended.
func (n *NS) Destroy(local, remote netip.AddrPort) error {
	if !local.IsValid() || !remote.IsValid() || local.Addr().Unmap().Is4() != remote.Addr().Unmap().Is4() {
		return fmt.Errorf("capture: destroy %s -> %s: want two addresses of one family", local, remote)
	}
	err := n.withDiag(func(d *diagConn) error {
		// The kernel falls back to a listener on the local port when the
		// connection is gone, and would destroy that. So look first, and
		// then destroy by the cookie of what was seen.
		s, err := d.find(unmap(local), unmap(remote))
		if err != nil {
			return err
		}
		if s.Local != unmap(local) || s.Remote != unmap(remote) || !s.State.open() {
			return ErrNotFound
		}
		return d.destroy(s.key)
	})
	if err != nil {
		return fmt.Errorf("capture: %s: destroy %s -> %s: %w", n.path, local, remote, err)
	}
	return nil
}

// ResetEstablished ends every TCP connection with the outside that does not
// pass the proxy, and returns how many: after Apply, connections from before
// would otherwise hang or wait for their next packet. It leaves alone connections within the namespace,
// those of the proxy itself (by mark, or accepted on its ports while it
// listens there), and those that it captured.
func (n *NS) ResetEstablished() (int, error) {
	total := 0
	// A connection may still be in the making during a pass. What begins
	// after Apply is captured, so few passes reach the end.
	for range 10 {
		all, err := n.Sockets()
		if err != nil {
			return total, err
		}
		bypass := bypassing(all)
		if len(bypass) == 0 {
			return total, nil
		}
		ended, err := n.destroy(bypass)
		if total += ended; err != nil {
			return total, err
		}
	}
	return total, fmt.Errorf("capture: %s: connections past the proxy keep appearing: is capture applied?", n.path)
}

// End ends every open TCP connection of the namespace and returns how many: for
// one whose processes are gone, in which only the proxy has sockets left. Their
// peers may have gone without a word, and then nothing else would end them.
func (n *NS) End() (int, error) {
	return n.end(func(s *Socket) bool { return s.State != Listen })
}

// end ends the connections that are chosen, and returns how many.
func (n *NS) end(chosen func(*Socket) bool) (int, error) {
	all, err := n.Sockets()
	if err != nil {
		return 0, err
	}
	return n.destroy(slices.DeleteFunc(all, func(s Socket) bool { return !chosen(&s) }))
}

// destroy ends connections by what was seen of them, and returns how many had not
// ended by themselves.
func (n *NS) destroy(sockets []Socket) (total int, err error) {
	for _, s := range sockets {
		err := n.withDiag(func(d *diagConn) error { return d.destroy(s.key) })
		switch {
		case err == nil:
			total++
		case !errors.Is(err, ErrNotFound):
			return total, fmt.Errorf("capture: %s: destroy %s -> %s: %w", n.path, s.Local, s.Remote, err)
		}
	}
	return total, nil
}

// EndTunnels ends every open tunnel of the namespace, in both directions, and
// returns how many. What is in them ends with them.
func (n *NS) EndTunnels() (int, error) {
	return n.end(func(s *Socket) bool {
		return s.State.open() && (s.Local.Port() == mesh.PortTunnel || s.Remote.Port() == mesh.PortTunnel && s.Mark == mesh.SocketMark)
	})
}

// bypassing returns the open connections that ResetEstablished ends.
func bypassing(all []Socket) []Socket {
	type pair struct{ local, remote netip.AddrPort }
	open := map[pair]bool{}
	accepted := map[netip.AddrPort]bool{} // peers of the proxy's outbound port
	listening := map[uint16]bool{}
	for _, s := range all {
		if s.State == Listen {
			listening[s.Local.Port()] = true
		}
	}
	proxyPort := func(p uint16) bool {
		return (p == mesh.PortOutbound || p == mesh.PortInbound || p == mesh.PortTunnel) && listening[p]
	}
	for _, s := range all {
		if s.State == Listen {
			continue
		}
		open[pair{s.Local, s.Remote}] = true
		if s.Local.Port() == mesh.PortOutbound && proxyPort(mesh.PortOutbound) {
			accepted[s.Remote] = true
		}
	}
	var out []Socket
	for _, s := range all {
		switch {
		case !s.State.open(),
			s.Mark == mesh.SocketMark,
			proxyPort(s.Local.Port()),
			s.Local.Addr().IsLoopback() && s.Remote.Addr().IsLoopback(),
			s.Local.Addr() == s.Remote.Addr(),
			open[pair{s.Remote, s.Local}], // the other end is in here as well
			accepted[s.Local]:             // captured: the other end is the proxy
		default:
			out = append(out, s)
		}
	}
	return out
}

func unmap(a netip.AddrPort) netip.AddrPort {
	return netip.AddrPortFrom(a.Addr().Unmap().WithZone(""), a.Port())
}
