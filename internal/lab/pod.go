package lab

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"runtime"
	"sync"

	"github.com/vishvananda/netlink"
	"github.com/vishvananda/netns"
	"golang.org/x/sys/unix"
)

// Pod is a network namespace with loopback and eth0. Its methods are safe for
// concurrent use.
type Pod struct {
	// Name is the pod's name; its namespace is mounted at NetNS.
	Name string
	// Addr is the address of eth0.
	Addr netip.Addr
	// Addr6 is the IPv6 address of eth0; not valid where the lab has no
	// Bridge6.
	Addr6 netip.Addr
	// NetNS is the absolute path of the namespace, /run/netns/<name>.
	NetNS string

	veth string // the end of eth0's pair on the bridge
	ns   netns.NsHandle

	mu    sync.Mutex
	procs []*os.Process // guarded by mu; started by Command
}

var podName = regexp.MustCompile(`^[a-z0-9]([a-z0-9.-]{0,60}[a-z0-9])?$`)

// AddPod makes a namespace with eth0 at addr, which must be a free address of
// the bridge's subnet, and a default route to the bridge, so that addresses
// that exist nowhere still route.
func (l *Lab) AddPod(name string, addr netip.Addr) (*Pod, error) {
	if !podName.MatchString(name) {
		return nil, fmt.Errorf("lab: pod name %q: use lower-case letters, digits, '-' and '.', at most 62", name)
	}
	if !l.subnet.Contains(addr) || addr == l.gateway || addr == l.subnet.Addr() {
		return nil, fmt.Errorf("lab: pod %s: addr %s is not a pod address of %s", name, addr, l.subnet)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	if l.closed {
		return nil, errors.New("lab: closed")
	}
	for _, p := range l.pods {
		if p.Name == name || p.Addr == addr {
			return nil, fmt.Errorf("lab: pod %s (%s): pod %s (%s) is there already", name, addr, p.Name, p.Addr)
		}
	}
	p := &Pod{
		Name:  name,
		Addr:  addr,
		NetNS: filepath.Join(netnsDir, name),
		veth:  fmt.Sprintf("veth%d", linkNumber.Add(1)),
	}
	if l.subnet6.IsValid() {
		p.Addr6 = l.six(addr)
	}
	var err error
	if p.ns, err = makeNetNS(p.NetNS); err != nil {
		return nil, fmt.Errorf("lab: pod %s: %w", name, err)
	}
	if err := l.connect(p); err != nil {
		return nil, errors.Join(fmt.Errorf("lab: pod %s: %w", name, err), p.remove())
	}
	l.pods[name] = p
	return p, nil
}

// connect gives p its links, address and route.
func (l *Lab) connect(p *Pod) error {
	attrs := netlink.NewLinkAttrs()
	attrs.Name = p.veth
	attrs.MasterIndex = l.bridge.Index
	veth := &netlink.Veth{LinkAttrs: attrs, PeerName: "eth0", PeerNamespace: netlink.NsFd(p.ns)}
	if err := netlink.LinkAdd(veth); err != nil {
		return fmt.Errorf("make veth pair: %w", err)
	}
	if err := netlink.LinkSetUp(veth); err != nil {
		return fmt.Errorf("set %s up: %w", p.veth, err)
	}
	h, err := netlink.NewHandleAt(p.ns)
	if err != nil {
		return fmt.Errorf("netlink: %w", err)
	}
	defer h.Close()
	if err := loopbackUp(h); err != nil {
		return err
	}
	eth0, err := h.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("find eth0: %w", err)
	}
	if err := h.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(p.Addr, l.subnet.Bits()))}); err != nil {
		return fmt.Errorf("set address: %w", err)
	}
	if p.Addr6.IsValid() {
		if err := p.Do(func() error { return noDuplicates("eth0") }); err != nil {
			return fmt.Errorf("set up IPv6: %w", err)
		}
		if err := h.AddrAdd(eth0, &netlink.Addr{IPNet: ipNet(netip.PrefixFrom(p.Addr6, l.subnet6.Bits())), Flags: unix.IFA_F_NODAD}); err != nil {
			return fmt.Errorf("set IPv6 address: %w", err)
		}
	}
	if err := h.LinkSetUp(eth0); err != nil {
		return fmt.Errorf("set eth0 up: %w", err)
	}
	if err := h.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: l.gateway.AsSlice()}); err != nil {
		return fmt.Errorf("set default route: %w", err)
	}
	if p.Addr6.IsValid() {
		if err := h.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Gw: l.six(l.gateway).AsSlice()}); err != nil {
			return fmt.Errorf("set IPv6 default route: %w", err)
		}
	}
	return nil
}

// makeNetNS makes a network namespace, mounts it at path and opens it.
func makeNetNS(path string) (netns.NsHandle, error) {
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		return -1, err
	}
	f, err := os.OpenFile(path, os.O_RDONLY|os.O_CREATE|os.O_EXCL, 0o444)
	if err != nil {
		return -1, err
	}
	if err := f.Close(); err != nil {
		return -1, err
	}
	done := make(chan error)
	go func() {
		done <- elsewhere(
			func() error { return unix.Unshare(unix.CLONE_NEWNET) },
			func() error { return unix.Mount("/proc/thread-self/ns/net", path, "", unix.MS_BIND, "") })
	}()
	if err := <-done; err != nil {
		return -1, errors.Join(err, os.Remove(path))
	}
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return -1, errors.Join(err, unix.Unmount(path, unix.MNT_DETACH), os.Remove(path))
	}
	return ns, nil
}

// remove ends the pod's processes and takes away its links and its name.
func (p *Pod) remove() error {
	p.mu.Lock()
	procs := p.procs
	p.procs = nil
	p.mu.Unlock()
	var errs []error
	for _, proc := range procs {
		if err := proc.Kill(); err != nil && !errors.Is(err, os.ErrProcessDone) {
			errs = append(errs, err)
		}
	}
	if link, err := netlink.LinkByName(p.veth); err == nil {
		errs = append(errs, netlink.LinkDel(link))
	}
	if exists(p.NetNS) {
		errs = append(errs, unix.Unmount(p.NetNS, unix.MNT_DETACH), os.Remove(p.NetNS))
	}
	errs = append(errs, p.ns.Close())
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("lab: remove pod %s: %w", p.Name, err)
	}
	return nil
}

// AddAddr gives eth0 one more address, IPv4 or IPv6 (without duplicate
// address detection, so that it is usable at once).
func (p *Pod) AddAddr(prefix netip.Prefix) error {
	h, err := netlink.NewHandleAt(p.ns)
	if err != nil {
		return fmt.Errorf("lab: pod %s: netlink: %w", p.Name, err)
	}
	defer h.Close()
	eth0, err := h.LinkByName("eth0")
	if err != nil {
		return fmt.Errorf("lab: pod %s: find eth0: %w", p.Name, err)
	}
	addr := &netlink.Addr{IPNet: ipNet(prefix)}
	if prefix.Addr().Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	if err := h.AddrAdd(eth0, addr); err != nil {
		return fmt.Errorf("lab: pod %s: add %s: %w", p.Name, prefix, err)
	}
	return nil
}

// Do runs f on a thread that is in the pod's network namespace. Sockets that
// f itself makes and processes that it starts belong to the pod; goroutines
// that it starts do not run in the pod.
func (p *Pod) Do(f func() error) error {
	done := make(chan error)
	go func() { done <- elsewhere(func() error { return netns.Set(p.ns) }, f) }()
	return <-done
}

// In runs f on a thread that is in the network namespace at a path; what f does
// is bound as with Pod.Do.
func In(path string, f func() error) error {
	ns, err := netns.GetFromPath(path)
	if err != nil {
		return fmt.Errorf("lab: network namespace %s: %w", path, err)
	}
	defer ns.Close()
	done := make(chan error)
	go func() { done <- elsewhere(func() error { return netns.Set(ns) }, f) }()
	return <-done
}

// elsewhere locks the calling goroutine to its thread, moves the thread to
// another network namespace with enter, calls f and moves the thread back. It
// must not simply let the thread end with its goroutine: the process's main
// thread would stay where it is, and with it /proc/self. A thread that cannot
// be brought back stays locked, so that nothing else runs there.
func elsewhere(enter, f func() error) error {
	runtime.LockOSThread()
	back, err := netns.Get() // of this thread
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("lab: current namespace: %w", err)
	}
	defer back.Close()
	if err := enter(); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("lab: enter namespace: %w", err)
	}
	ferr := f()
	if err := netns.Set(back); err != nil {
		return errors.Join(ferr, fmt.Errorf("lab: leave namespace: %w", err))
	}
	runtime.UnlockOSThread()
	return ferr
}

// Dial connects from inside the pod. addr must hold a literal IP address.
func (p *Pod) Dial(ctx context.Context, network, addr string) (net.Conn, error) {
	return p.DialWith(ctx, &net.Dialer{}, network, addr)
}

// DialWith is Dial with a dialer of the caller's, for example one whose
// Control sets a socket option.
func (p *Pod) DialWith(ctx context.Context, d *net.Dialer, network, addr string) (net.Conn, error) {
	// A name would be resolved on other goroutines, outside the pod.
	if _, err := netip.ParseAddrPort(addr); err != nil {
		return nil, fmt.Errorf("lab: dial %q: want a literal IP address and port: %w", addr, err)
	}
	var c net.Conn
	err := p.Do(func() (err error) {
		c, err = d.DialContext(ctx, network, addr)
		return err
	})
	return c, err
}

// Listen listens inside the pod. The host of addr is empty or a literal IP
// address.
func (p *Pod) Listen(network, addr string) (net.Listener, error) {
	if err := literalHost(addr); err != nil {
		return nil, err
	}
	var ln net.Listener
	err := p.Do(func() (err error) {
		ln, err = net.Listen(network, addr)
		return err
	})
	return ln, err
}

// ListenPacket is Listen for datagrams.
func (p *Pod) ListenPacket(network, addr string) (net.PacketConn, error) {
	if err := literalHost(addr); err != nil {
		return nil, err
	}
	var pc net.PacketConn
	err := p.Do(func() (err error) {
		pc, err = net.ListenPacket(network, addr)
		return err
	})
	return pc, err
}

func literalHost(addr string) error {
	host, _, err := net.SplitHostPort(addr)
	if err == nil && host != "" {
		_, err = netip.ParseAddr(host)
	}
	if err != nil {
		return fmt.Errorf("lab: listen %q: want a literal IP address or nothing, and a port: %w", addr, err)
	}
	return nil
}

// Command prepares a process that will run inside the pod. Like
// exec.CommandContext it is killed when ctx ends; it is also killed when the
// pod is removed.
func (p *Pod) Command(ctx context.Context, name string, args ...string) *Cmd {
	return &Cmd{Cmd: exec.CommandContext(ctx, name, args...), pod: p}
}
