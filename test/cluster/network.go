package cluster

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

const bridgeName = "nodes"

// handle opens the machine's network namespace.
func (m *machine) handle() (*netlink.Handle, netns.NsHandle, error) {
	pid, err := m.pid()
	if err != nil {
		return nil, -1, err
	}
	ns, err := netns.GetFromPid(pid)
	if err != nil {
		return nil, -1, fmt.Errorf("cluster: network of %s: %w", m.Name, err)
	}
	h, err := netlink.NewHandleAt(ns)
	if err != nil {
		return nil, -1, errors.Join(fmt.Errorf("cluster: network of %s: %w", m.Name, err), ns.Close())
	}
	return h, ns, nil
}

// makeBridge makes, in the control plane's namespace, what the nodes meet at.
func (c *Cluster) makeBridge() error {
	control := c.control()
	h, ns, err := control.handle()
	if err != nil {
		return err
	}
	defer ns.Close()
	defer h.Close()
	attrs := netlink.NewLinkAttrs()
	attrs.Name = bridgeName
	attrs.HardwareAddr = control.mac()
	bridge := &netlink.Bridge{LinkAttrs: attrs}
	if err := h.LinkAdd(bridge); err != nil {
		return fmt.Errorf("cluster: make the bridge: %w", err)
	}
	return control.configure(h, bridgeName)
}

// plug connects a node that was just booted.
func (c *Cluster) plug(n *machine) error {
	nh, nns, err := n.handle()
	if err != nil {
		return err
	}
	defer nns.Close()
	defer nh.Close()
	ch, cns, err := c.control().handle()
	if err != nil {
		return err
	}
	defer cns.Close()
	defer ch.Close()

	bridge, err := ch.LinkByName(bridgeName)
	if err != nil {
		return fmt.Errorf("cluster: find the bridge: %w", err)
	}
	// Where the node was on before, its end may be on its way out still.
	if old, err := ch.LinkByName(n.Name); err == nil {
		if err := ch.LinkDel(old); err != nil && !errors.Is(err, unix.ENODEV) {
			return fmt.Errorf("cluster: unplug %s: %w", n.Name, err)
		}
	}
	attrs := netlink.NewLinkAttrs()
	attrs.Name = n.Name
	attrs.MasterIndex = bridge.Attrs().Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(nns), PeerHardwareAddr: n.mac()}
	if err := ch.LinkAdd(veth); err != nil {
		return fmt.Errorf("cluster: plug %s in: %w", n.Name, err)
	}
	if err := ch.LinkSetUp(veth); err != nil {
		return fmt.Errorf("cluster: plug %s in: %w", n.Name, err)
	}
	if err := n.configure(nh, "eth0"); err != nil {
		return err
	}
	control := c.control()
	for _, gw := range []netip.Addr{control.Addr4, control.Addr6} {
		if err := nh.RouteAdd(&netlink.Route{Gw: gw.AsSlice()}); err != nil {
			return fmt.Errorf("cluster: default route of %s: %w", n.Name, err)
		}
	}
	for i, m := range c.state.Machines {
		if i == 0 || m.Name == n.Name {
			continue
		}
		if err := route(nh, m); err != nil {
			return err
		}
	}
	return route(ch, n.machineState)
}

// configure gives a link, and loopback, what the machine needs.
func (m *machine) configure(h *netlink.Handle, name string) error {
	for _, link := range []string{"lo", name} {
		l, err := h.LinkByName(link)
		if err != nil {
			return fmt.Errorf("cluster: %s: find %s: %w", m.Name, link, err)
		}
		if link == name {
			for addr, bits := range map[netip.Addr]int{m.Addr4: 24, m.Addr6: 64} {
				a := &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(addr, bits)), Flags: unix.IFA_F_NODAD}
				if err := h.AddrAdd(l, a); err != nil {
					return fmt.Errorf("cluster: %s: address %s: %w", m.Name, addr, err)
				}
			}
		}
		if err := h.LinkSetUp(l); err != nil {
			return fmt.Errorf("cluster: %s: set %s up: %w", m.Name, link, err)
		}
	}
	return nil
}

// route sends what is for the pods of a node to that node.
func route(h *netlink.Handle, to machineState) error {
	for _, r := range []netlink.Route{
		{Dst: ipNet(to.Pods4), Gw: to.Addr4.AsSlice()},
		{Dst: ipNet(to.Pods6), Gw: to.Addr6.AsSlice()},
	} {
		if err := h.RouteReplace(&r); err != nil {
			return fmt.Errorf("cluster: route to the pods of %s: %w", to.Name, err)
		}
	}
	return nil
}

// mac returns an address that stays the same when the machine is booted again,
// so that what others remember of it stays true.
func (m *machine) mac() net.HardwareAddr {
	a := m.Addr4.As4()
	return net.HardwareAddr{2, 0, a[0], a[1], a[2], a[3]}
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// listen opens the API server's port in the caller's network namespace. port 0
// is any.
func listen(port int) (f *os.File, chosen int, err error) {
	l, err := net.ListenTCP("tcp4", &net.TCPAddr{IP: net.IPv4(127, 0, 0, 1), Port: port})
	if err != nil {
		return nil, 0, fmt.Errorf("cluster: %w", err)
	}
	defer l.Close()
	f, err = l.File()
	if err != nil {
		return nil, 0, fmt.Errorf("cluster: %w", err)
	}
	return f, l.Addr().(*net.TCPAddr).Port, nil
}
