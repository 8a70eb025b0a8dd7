// Package lab makes small networks for tests, examples and benchmarks:
// network namespaces ("pods") on a bridge, inside namespaces of the program's
// own, so that nothing can be left behind on the machine.
//
// It works as root and, through a user namespace, as an ordinary user.
package lab

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"sync"
	"sync/atomic"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// netnsDir is where named namespaces are mounted, as "ip netns" does.
const netnsDir = "/run/netns"

// Config describes a lab. The zero Config is usable.
type Config struct {
	// Bridge is the IPv4 subnet of the pods; 10.88.0.0/16 if not set. Its
	// first address is the gateway, on the bridge. Two labs that live at
	// the same time need different subnets.
	Bridge netip.Prefix
	// Bridge6 is the IPv6 subnet of the pods, at most 112 bits long; without
	// it they have no IPv6 but link-local addresses. Hosts have the same
	// numbers in both subnets.
	Bridge6 netip.Prefix
}

// Lab is a bridge and its pods. Its methods are safe for concurrent use.
type Lab struct {
	subnet  netip.Prefix
	gateway netip.Addr
	subnet6 netip.Prefix // not valid: no IPv6
	bridge  *netlink.Bridge

	mu     sync.Mutex
	pods   map[string]*Pod // guarded by mu
	closed bool            // guarded by mu
}

// linkNumber makes link names unique within the process.
var linkNumber atomic.Uint32

// New makes a bridge in the current network namespace. It fails unless the
// program runs inside namespaces that Isolate made, so it never changes the
// machine's own network. The caller closes the lab.
func New(cfg Config) (*Lab, error) {
	if !inside() {
		return nil, errors.New("lab: not isolated: call lab.Isolate (or lab.Main in TestMain) first")
	}
	subnet := cfg.Bridge
	if !subnet.IsValid() {
		subnet = netip.MustParsePrefix("10.88.0.0/16")
	}
	subnet = subnet.Masked()
	if !subnet.Addr().Is4() || subnet.Bits() > 30 {
		return nil, fmt.Errorf("lab: Bridge: %s is not an IPv4 subnet with room for pods: use for example 10.88.0.0/16", subnet)
	}
	if six := cfg.Bridge6; six.IsValid() && (!six.Addr().Is6() || six.Addr().Is4In6() || six.Bits() > 112 || subnet.Bits() < 16) {
		return nil, fmt.Errorf("lab: Bridge6: %s is not an IPv6 subnet with room for the hosts of %s: use for example fd88::/64", six, subnet)
	}
	l := &Lab{
		subnet6: cfg.Bridge6.Masked(),
		subnet:  subnet,
		gateway: subnet.Addr().Next(),
		bridge:  &netlink.Bridge{LinkAttrs: netlink.NewLinkAttrs()},
		pods:    map[string]*Pod{},
	}
	l.bridge.Name = fmt.Sprintf("lab%d", linkNumber.Add(1))
	if err := netlink.LinkAdd(l.bridge); err != nil {
		return nil, fmt.Errorf("lab: make bridge %s: %w", l.bridge.Name, err)
	}
	err := netlink.AddrAdd(l.bridge, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(l.gateway, subnet.Bits()))})
	if err == nil && l.subnet6.IsValid() {
		err = noDuplicates(l.bridge.Name)
	}
	if err == nil && l.subnet6.IsValid() {
		err = netlink.AddrAdd(l.bridge, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(l.Gateway6(), l.subnet6.Bits())), Flags: unix.IFA_F_NODAD})
	}
	if err == nil {
		err = netlink.LinkSetUp(l.bridge)
	}
	if err != nil {
		return nil, errors.Join(fmt.Errorf("lab: set up bridge %s: %w", l.bridge.Name, err), netlink.LinkDel(l.bridge))
	}
	return l, nil
}

// Gateway is the bridge's own address: processes outside of every pod, such
// as an unenrolled client on the node, have it.
func (l *Lab) Gateway() netip.Addr { return l.gateway }

// Gateway6 is the bridge's IPv6 address; not valid where the lab has no
// Bridge6.
func (l *Lab) Gateway6() netip.Addr {
	if !l.subnet6.IsValid() {
		return netip.Addr{}
	}
	return l.six(l.gateway)
}

// six is the IPv6 address of a host of the IPv4 subnet.
func (l *Lab) six(host netip.Addr) netip.Addr {
	base, four, out := l.subnet.Addr().As4(), host.As4(), l.subnet6.Addr().As16()
	out[14], out[15] = four[2]-base[2], four[3]-base[3] // the subnet has 16 bits or more
	return netip.AddrFrom16(out)
}

// noDuplicates has an interface of the current network namespace, which is not
// up yet, use its link-local address at once: the kernel would ask the
// neighbours for a second whether somebody else has it.
func noDuplicates(name string) error {
	return os.WriteFile("/proc/sys/net/ipv6/conf/"+name+"/accept_dad", []byte("0"), 0)
}

// Bridge is the name of the bridge interface.
func (l *Lab) Bridge() string { return l.bridge.Name }

// Pod returns the pod of that name, or nil.
func (l *Lab) Pod(name string) *Pod {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.pods[name]
}

// DeletePod kills the processes that Command started in the pod and removes
// its links and its name. Processes started in other ways keep the nameless
// namespace until they end. The pod must not be used afterwards.
func (l *Lab) DeletePod(name string) error {
	l.mu.Lock()
	p := l.pods[name]
	delete(l.pods, name)
	l.mu.Unlock()
	if p == nil {
		return fmt.Errorf("lab: no pod named %q", name)
	}
	return p.remove()
}

// Close removes all pods and the bridge. It is idempotent.
func (l *Lab) Close() error {
	l.mu.Lock()
	pods := l.pods
	l.pods = map[string]*Pod{}
	closed := l.closed
	l.closed = true
	l.mu.Unlock()
	if closed {
		return nil
	}
	var errs []error
	for _, p := range pods {
		errs = append(errs, p.remove())
	}
	if err := netlink.LinkDel(l.bridge); err != nil {
		errs = append(errs, fmt.Errorf("lab: remove bridge %s: %w", l.bridge.Name, err))
	}
	return errors.Join(errs...)
}

func ipNet(p netip.Prefix) *net.IPNet {
	return &net.IPNet{IP: p.Addr().AsSlice(), Mask: net.CIDRMask(p.Bits(), p.Addr().BitLen())}
}

// exists reports whether a file is there.
func exists(path string) bool {
	_, err := os.Lstat(path)
	return err == nil
}
