// Package capture puts the node proxy in the way of a network namespace's TCP
// traffic, looks at the sockets in it, and ends the ones that may not go on.
//
// # What the rules do
//
// One nftables table, "inet signet", in each captured namespace:
//
//   - output: TCP to anything but the namespace itself is redirected to
//     the proxy's outbound port, except from sockets with the proxy's mark.
//   - input: TCP from outside is redirected to the proxy's port for
//     connections without a tunnel, except to the tunnel port. There is no
//     exception for a mark here: marks do not cross namespaces, so nothing
//     honest would need it.
//     The one exception are the declared probe ports, from the sources of
//     probes.
//   - the proxy's own connections to its capture ports in the same namespace
//     are refused, so that a tunnel which asks for those ports cannot loop.
//   - TCP that was not redirected, although it should have been, is
//     refused in both directions: the kernel redirects a connection by its
//     first packet, so one that it tracked before, or a new one on the ports
//     of such, would slip by.
//     Options.KeepOpen leaves this out, and captures what begins only.
//   - What leaves by a link is marked last of all, and at the link a filter in
//     another part of the kernel (guard.go) drops TCP without that mark: a
//     namespace whose rules are gone is cut off, not open, whoever deleted
//     them and whether an agent runs or not.
//   - Other protocols (UDP, SCTP, ICMP) are left alone: they are neither
//     protected nor recorded.
//
// All of it holds for IPv4 and IPv6 alike. In a namespace where the proxy
// listens on IPv4 only, since it has no IPv6 address by which others reach it,
// or where IPv6 is switched off on loopback, what arrives or leaves by IPv6 is
// led to a port that nobody listens on, and so refused. What is dialled by a
// link-local address (fe80::/10) is refused always: the proxy could not tell
// whose it is. What arrives by one is led to the proxy. Neighbour discovery is
// ICMPv6, and works.
//
// Connections inside the namespace (loopback, or its own addresses) are left
// alone.
//
// # What they do not do
//
// The rules bind processes without special rights. A process in the namespace
// that has CAP_NET_ADMIN can remove them and the guard (Verify notices), and one that has
// CAP_NET_ADMIN or, since Linux 5.17, CAP_NET_RAW can set the proxy's mark on
// its sockets and so leave without the proxy. It gains no identity by that:
// enforcing peers refuse what comes without a tunnel. Workloads should drop
// both capabilities.
//
// # Probes
//
// The node's kubelet knows nothing of tunnels. Its connections, and no others,
// arrive with the source ProbeSource, or ProbeSource6: the node's own rules
// (package probe) see to both. The rules here let these sources in on the ports
// of Options.Probes and nowhere else. A pod that talks to itself through its service is captured
// outbound like any other, and connections of other processes of the node
// arrive with the node's address, and so at the proxy's port.
//
// # Threads
//
// Entering a namespace moves an OS thread. All functions keep it locked
// meanwhile, move it back, and give up the thread if that fails. They are safe
// for concurrent use.
package capture

import (
	"errors"
	"fmt"
	"net/netip"
	"slices"

	"github.com/signet-mesh/signet/internal/mesh"
)

// Errors that callers act on, found with errors.Is.
var (
	// ErrNotCaptured: the namespace was read, and the rules or settings in
	// it are not those that Apply writes.
	ErrNotCaptured = errors.New("capture is not in place")
	// ErrNotFound: there is no such connection (any more).
	ErrNotFound = errors.New("no such connection")
	// ErrUnsupported: the kernel cannot list or destroy sockets.
	ErrUnsupported = errors.New("the kernel lacks CONFIG_INET_DIAG or CONFIG_INET_DIAG_DESTROY")
)

// ProbeSource is the source of the kubelet's connections as a pod sees them.
// No interface has this link-local address, and nothing routes to it.
var ProbeSource = netip.AddrFrom4([4]byte{169, 254, 150, 8})

// ProbeSource6 is the same for IPv6. It is a unique local address and not a
// link-local one: pods look for those among their neighbours, and would not
// send their answers to the node.
var ProbeSource6 = netip.MustParseAddr("fd73:6967:6e65:7400::9608")

// Options is what differs from one captured namespace to the next.
type Options struct {
	// Probes are the ports that the kubelet of the node may reach without a
	// tunnel, in any order. None of the mesh's own, and not 0.
	Probes []uint16
	// KeepOpen leaves connections from before alone: only those that begin now
	// are captured, and what is not captured is not refused. It is for
	// namespaces that only observe. Without it again, what bypasses the proxy
	// breaks as after every Apply.
	KeepOpen bool
	// Originals are what Remove restores when somebody has deleted the rules,
	// and the settings from before with them.
	Originals Originals
}

func (o *Options) check() error {
	for _, port := range o.Probes {
		switch port {
		case 0, mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel:
			return fmt.Errorf("capture: Probes: port %d cannot be probed without a tunnel: declare the probe on a port that the workload itself serves, not 0 or one of the mesh's own (%d, %d, %d)",
				port, mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel)
		}
	}
	return nil
}

// ports returns the probes' ports in the order of the rules.
func (o *Options) ports() []uint16 {
	return slices.Compact(slices.Sorted(slices.Values(o.Probes)))
}

// Apply captures a namespace; see NS.Apply.
func Apply(netns string, o Options) error {
	return with(netns, func(n *NS) error { return n.Apply(o) })
}

// Verify returns nil only when capture is in place; see NS.Verify.
func Verify(netns string, o Options) error {
	return with(netns, func(n *NS) error { return n.Verify(o) })
}

// OriginalsOf returns the settings from before; see NS.Originals.
func OriginalsOf(netns string) (o Originals, err error) {
	err = with(netns, func(n *NS) (err error) {
		o, err = n.Originals()
		return err
	})
	return o, err
}

// Remove undoes Apply; see NS.Remove.
func Remove(netns string) error { return with(netns, (*NS).Remove) }

// Leave undoes Apply, but for open connections; see NS.Leave.
func Leave(netns string) (open int, err error) {
	err = with(netns, func(ns *NS) (err error) {
		open, err = ns.Leave()
		return err
	})
	return open, err
}

// End ends all connections; see NS.End.
func End(netns string) (n int, err error) {
	err = with(netns, func(ns *NS) (err error) {
		n, err = ns.End()
		return err
	})
	return n, err
}

// EndTunnels ends all tunnels; see NS.EndTunnels.
func EndTunnels(netns string) (n int, err error) {
	err = with(netns, func(ns *NS) (err error) {
		n, err = ns.EndTunnels()
		return err
	})
	return n, err
}

// ResetEstablished ends the connections that bypass the proxy; see
// NS.ResetEstablished.
func ResetEstablished(netns string) (n int, err error) {
	err = with(netns, func(ns *NS) (err error) {
		n, err = ns.ResetEstablished()
		return err
	})
	return n, err
}

// Sockets lists TCP sockets; see NS.Sockets.
func Sockets(netns string) (list []Socket, err error) {
	err = with(netns, func(ns *NS) (err error) {
		list, err = ns.Sockets()
		return err
	})
	return list, err
}

// Listeners lists the TCP sockets that listen; see NS.Listeners.
func Listeners(netns string) (list []Socket, err error) {
	err = with(netns, func(ns *NS) (err error) {
		list, err = ns.Listeners()
		return err
	})
	return list, err
}

// Destroy ends one connection; see NS.Destroy.
func Destroy(netns string, local, remote netip.AddrPort) error {
	return with(netns, func(ns *NS) error { return ns.Destroy(local, remote) })
}

func with(netns string, f func(*NS) error) (err error) {
	ns, err := Open(netns)
	if err != nil {
		return err
	}
	defer func() { err = errors.Join(err, ns.Close()) }()
	return f(ns)
}
