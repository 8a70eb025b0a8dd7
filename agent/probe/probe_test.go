package probe

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture/nft"
	"github.com/signet-mesh/signet/internal/lab"
)

// Defends: the kubelet reaches the declared port of a captured pod, and no
// other port; no other process of the node reaches it, host-network pods and
// the kubelet's own children in other cgroups included.
func TestKubelet(t *testing.T) { eachFamily(t, testKubelet) }

func testKubelet(t *testing.T, f side) {
	b := newBench(t)
	kubelet := b.start(b.node.Kubelet, "any", 0)
	kubelet.reaches("-", f.at(8080), "proxy")
	b.set()
	kubelet.reaches("-", f.at(8080), "app")
	kubelet.reaches("-", f.at(9090), "proxy")
	b.cgroup("/kubepods")
	other := b.start(b.cgroup("/kubepods/pod1"), "any", 0)
	other.reaches("-", f.at(8080), "proxy")
	b.start("/", "any", 0).reaches("-", f.at(8080), "proxy")
	below := b.start(b.cgroup("/kubelet/below"), "any", 0)
	below.reaches("-", f.at(8080), "proxy")
	b.without(table, "kubelet", "below the kubelet's cgroup")
	below.reaches("-", f.at(8080), "app")
	other.reaches("-", f.at(8080), "proxy")
	b.without(table, "kubelet", "probes by the kubelet")
	kubelet.reaches("-", f.at(8080), "proxy")
}

// A kubelet in the root of the hierarchy is told from what is below it.
func TestKubeletInTheRoot(t *testing.T) {
	b := newBench(t)
	b.node.Kubelet = "/"
	b.set()
	b.start("/", "any", 0).reaches("-", "10.88.0.2:8080", "app")
	b.start(b.cgroup("/pod"), "any", 0).reaches("-", "10.88.0.2:8080", "proxy")
}

// Defends: a process of the node, such as a host-network pod, does not pass by
// binding to the probes' source, even where somebody made that address local.
func TestSpoofedOnTheNode(t *testing.T) { eachFamily(t, testSpoofedOnTheNode) }

func testSpoofedOnTheNode(t *testing.T, f side) {
	b := newBench(t)
	lo, err := netlink.LinkByName("lo")
	b.check(err)
	addr := &netlink.Addr{IPNet: host(f.source)}
	if f.source.Is6() {
		addr.Flags = unix.IFA_F_NODAD
	}
	b.check(netlink.AddrAdd(lo, addr))
	t.Cleanup(func() { b.check(netlink.AddrDel(lo, addr)) })
	other := b.start(b.cgroup("/pod"), "any", 0)
	other.reaches(f.source.String(), f.at(8080), "app") // the pod's rules alone cannot tell
	b.set()
	other.reaches(f.source.String(), f.at(8080), "nothing")
	b.start(b.node.Kubelet, "any", 0).reaches("-", f.at(8080), "app")
	b.without(table, "kubelet", "nobody else has this source")
	other.reaches(f.source.String(), f.at(8080), "nothing") // the second line
	b.without(table, "answers", "answers to a forged source")
	b.without(table, "answers", "nothing else")
	other.reaches(f.source.String(), f.at(8080), "app")
}

// Defends: another pod, or another node, that claims the probes' source is not
// let in, although the node would route the answers to it.
func TestSpoofedFromAfar(t *testing.T) { eachFamily(t, testSpoofedFromAfar) }

func testSpoofedFromAfar(t *testing.T, f side) {
	b := newBench(t)
	b.check(b.far.AddAddr(netip.PrefixFrom(f.source, f.source.BitLen())))
	bridge, err := netlink.LinkByName(b.other.Bridge())
	b.check(err)
	b.check(netlink.RouteAdd(&netlink.Route{LinkIndex: bridge.Attrs().Index, Dst: host(f.source), Scope: netlink.SCOPE_LINK}))
	b.podReaches(b.far, f.source.String(), f.at(8080), "app")
	b.set()
	b.podReaches(b.far, f.source.String(), f.at(8080), "nothing")
	b.podReaches(b.far, "-", f.at(8080), "proxy")                    // an honest one
	b.without(bridgeTable, "claimed", "nobody else has this source") // far is behind a bridge too
	b.podReaches(b.far, f.source.String(), f.at(8080), "nothing")
	b.without(table, "claimed", "nobody else has this source")
	b.podReaches(b.far, f.source.String(), f.at(8080), "nothing") // the second line
	b.without(table, "answers", "answers to a forged source")
	b.without(table, "answers", "nothing else")
	b.podReaches(b.far, f.source.String(), f.at(8080), "app")
}

// Defends: a pod on the same bridge that claims the source, and that has made
// the other pod take it for the gateway, is not let in, on nodes where bridged
// packets do not pass the routed packets' rules, and where they do.
func TestSpoofedOnTheBridge(t *testing.T) { eachFamily(t, testSpoofedOnTheBridge) }

func testSpoofedOnTheBridge(t *testing.T, f side) {
	b := newBench(t)
	b.check(b.b.AddAddr(netip.PrefixFrom(f.source, f.source.BitLen())))
	hardware := func(of *lab.Pod) (mac net.HardwareAddr) {
		b.check(of.Do(func() error {
			eth0, err := netlink.LinkByName("eth0")
			if err == nil {
				mac = eth0.Attrs().HardwareAddr
			}
			return err
		}))
		return mac
	}
	// Each knows the other: what asks for a neighbour from the node's address
	// is dropped as well, and would fail what comes after it for a while.
	knows := func(pod *lab.Pod, address netip.Addr, mac net.HardwareAddr) {
		b.check(pod.Do(func() error {
			eth0, err := netlink.LinkByName("eth0")
			if err != nil {
				return err
			}
			return netlink.NeighSet(&netlink.Neigh{LinkIndex: eth0.Attrs().Index, IP: address.AsSlice(), HardwareAddr: mac, State: netlink.NUD_PERMANENT})
		}))
	}
	knows(b.a, f.gateway(b.lab), hardware(b.b))
	knows(b.b, f.pod, hardware(b.a))
	pass := "/proc/sys/net/bridge/bridge-nf-call-iptables"
	if f.pod.Is6() {
		pass = "/proc/sys/net/bridge/bridge-nf-call-ip6tables"
	}
	if _, err := os.Stat(pass); err == nil {
		b.set()
		b.check(os.WriteFile(pass, []byte("1"), 0))
		b.podReaches(b.b, f.source.String(), f.at(8080), "nothing")
		b.check(os.WriteFile(pass, []byte("0"), 0))
	}
	b.set()
	b.podReaches(b.b, f.source.String(), f.at(8080), "nothing")
	b.podReaches(b.b, "-", f.at(8080), "proxy")
	b.without(bridgeTable, "claimed", "nobody else has this source")
	b.podReaches(b.b, f.source.String(), f.at(8080), "app")
}

// Defends: what others do to packets of the node neither opens nor closes: a
// service address that leads to the port is no way around, for whomever, and
// the kubelet's connections keep their source where all others lose theirs.
func TestBesideKubeProxy(t *testing.T) { eachFamily(t, testBesideKubeProxy) }

func testBesideKubeProxy(t *testing.T, f side) {
	b := newBench(t)
	b.set()
	c, err := nftables.New()
	b.check(err)
	family := nftables.TableFamilyIPv4
	if f.pod.Is6() {
		family = nftables.TableFamilyIPv6
	}
	kube := c.AddTable(&nftables.Table{Name: "kube-proxy", Family: family})
	t.Cleanup(func() {
		c.DelTable(kube)
		b.check(c.Flush())
	})
	out := c.AddChain(&nftables.Chain{Name: "out", Table: kube, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityNATDest})
	c.AddRule(&nftables.Rule{Table: kube, Chain: out, Exprs: append(nft.Destination(f.service), []expr.Any{
		&expr.Immediate{Register: 1, Data: f.pod.AsSlice()},
		&expr.NAT{Type: expr.NATTypeDestNAT, Family: uint32(family), RegAddrMin: 1},
	}...)})
	post := c.AddChain(&nftables.Chain{Name: "post", Table: kube, Type: nftables.ChainTypeNAT, Hooknum: nftables.ChainHookPostrouting, Priority: nftables.ChainPriorityNATSource})
	c.AddRule(&nftables.Rule{Table: kube, Chain: post, Exprs: []expr.Any{&expr.Masq{}}})
	b.check(c.Flush())
	bridge, err := netlink.LinkByName(b.lab.Bridge())
	b.check(err)
	b.check(netlink.RouteAdd(&netlink.Route{LinkIndex: bridge.Attrs().Index, Dst: host(f.service), Scope: netlink.SCOPE_LINK}))
	kubelet, other := b.start(b.node.Kubelet, "any", 0), b.start(b.cgroup("/pod"), "any", 0)
	kubelet.reaches("-", f.at(8080), "app")
	kubelet.reaches("-", netip.AddrPortFrom(f.service, 8080).String(), "proxy")
	other.reaches("-", netip.AddrPortFrom(f.service, 8080).String(), "proxy")
	other.reaches("-", f.at(8080), "proxy")
}

// Defends: probes pass while there is no agent: the one that put the rules in
// place has ended.
func TestAgentGone(t *testing.T) { eachFamily(t, testAgentGone) }

func testAgentGone(t *testing.T, f side) {
	b := newBench(t)
	self, err := os.Executable()
	b.check(err)
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), helperEnv+"=set", "PROBE_CGROUP="+b.node.Kubelet)
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.start(b.node.Kubelet, "any", 0).reaches("-", f.at(8080), "app")
}

// A node that is itself a container: the kubelet is in the root of the cgroup
// namespace of the node's first process, and the pods are below it.
func TestNodeInAContainer(t *testing.T) {
	b := newBench(t)
	self, err := os.Executable()
	b.check(err)
	dir, err := unix.Openat(b.root, "."+b.node.Kubelet, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	b.check(err)
	defer unix.Close(dir)
	cmd := exec.Command("unshare", "--cgroup", "--pid", "--fork", "--mount-proc", self)
	cmd.Env = append(os.Environ(), helperEnv+"=set", "PROBE_CGROUP=/")
	cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: dir}
	if out, err := cmd.CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	b.start(b.node.Kubelet, "any", 0).reaches("-", "10.88.0.2:8080", "app")
	b.start(b.cgroup("/kubelet/kubepods"), "any", 0).reaches("-", "10.88.0.2:8080", "proxy")
	b.start(b.cgroup("/other"), "any", 0).reaches("-", "10.88.0.2:8080", "proxy")
	b.start("/", "any", 0).reaches("-", "10.88.0.2:8080", "proxy")
}

// Defends: a kubelet that was started anew, in a new cgroup of the same name,
// is noticed and let in again; a removed port is closed.
func TestSet_again(t *testing.T) {
	b := newBench(t)
	if err := b.node.Verify(t.Context()); !errors.Is(err, ErrNotInPlace) {
		t.Errorf("before the first Set: %v", err)
	}
	b.set()
	b.check(b.rmdir(b.node.Kubelet))
	if err := b.node.Verify(t.Context()); !errors.Is(err, ErrUnsupported) {
		t.Errorf("without a kubelet: %v", err)
	}
	b.cgroup("/kubelet")
	if err := b.node.Verify(t.Context()); !errors.Is(err, ErrNotInPlace) {
		t.Errorf("another cgroup: %v", err)
	}
	b.set()
	kubelet := b.start(b.node.Kubelet, "any", 0)
	kubelet.reaches("-", "10.88.0.2:8080", "app")
	b.check(b.node.Set(t.Context(), nil))
	kubelet.reaches("-", "10.88.0.2:8080", "proxy")
	if err := b.node.Set(t.Context(), []Pod{{UID: "u1", Addrs: []netip.Addr{podA}, Ports: []uint16{0}}}); err == nil || !strings.Contains(err.Error(), "pod u1: Ports") {
		t.Errorf("port 0: %v", err)
	}
}

// Defends: the kubelet is found among the processes, one in a pod that only
// has its name is not, and of two nobody guesses.
func TestFindKubelet(t *testing.T) {
	b := newBench(t)
	path := b.node.Kubelet
	b.node.Kubelet = ""
	says := func(kind Kind, want string) {
		t.Helper()
		got, why := b.node.Support(t.Context())
		if got != kind || !strings.Contains(why, want) {
			t.Errorf("%s: %q; want %s: %q", got, why, kind, want)
		}
	}
	says(None, "no kubelet is found")
	b.cgroup("/kubepods.slice")
	fake := b.start(b.cgroup("/kubepods.slice/x"), "kubelet", 0)
	b.start(b.cgroup("/user"), "kubelet", 1000)
	says(None, "no kubelet is found")
	kubelet := b.start(path, "kubelet", 0)
	says(Cgroup, path)
	b.set()
	kubelet.reaches("-", "10.88.0.2:8080", "app")
	fake.reaches("-", "10.88.0.2:8080", "proxy")
	second := b.start(b.cgroup("/second"), "kubelet", 0)
	says(None, "two kubelets")
	kubelet.stop()
	if err := b.node.Verify(t.Context()); !errors.Is(err, ErrNotInPlace) {
		t.Errorf("the kubelet moved: %v", err)
	}
	b.set()
	second.reaches("-", "10.88.0.2:8080", "app")
	b.node.Kubelet = "relative"
	says(None, "absolute")
}

// Defends: where the kubelet cannot be told apart, probes are refused with a
// reason, unless the weaker way was asked for; and the rules of the weaker way
// go when it is no longer.
func TestAllowRoot(t *testing.T) { eachFamily(t, testAllowRoot) }

func testAllowRoot(t *testing.T, f side) {
	b := newBench(t)
	b.node.Kubelet = "/no-such-cgroup"
	pods := []Pod{{Addrs: []netip.Addr{f.pod}, Ports: []uint16{8080}}}
	if err := b.node.Set(t.Context(), pods); !errors.Is(err, ErrUnsupported) || !strings.Contains(err.Error(), "/no-such-cgroup") {
		t.Errorf("not asked for: %v", err)
	}
	root, user := b.start(b.cgroup("/pod"), "any", 0), b.start(b.cgroup("/user"), "any", 1000)
	root.reaches("-", f.at(8080), "proxy")
	b.node.AllowRoot = true
	if kind, why := b.node.Support(t.Context()); kind != Root || !strings.Contains(why, "every process of the node that runs as root") {
		t.Errorf("asked for: %s, %q", kind, why)
	}
	b.check(b.node.Set(t.Context(), pods))
	root.reaches("-", f.at(8080), "app")
	user.reaches("-", f.at(8080), "proxy")
	b.node = &Node{Kubelet: b.node.Kubelet}
	if err := b.node.Set(t.Context(), pods); !errors.Is(err, ErrUnsupported) {
		t.Errorf("no longer asked for: %v", err)
	}
	root.reaches("-", f.at(8080), "proxy")
}

// Defends: the processes of pods that the runtime did not move away from the
// kubelet's cgroup are noticed.
func TestMembership(t *testing.T) {
	for file, want := range map[string]membership{
		"0::/system.slice/kubelet.service\n":                               {unified: "/system.slice/kubelet.service"},
		"0::/kubepods.slice/kubepods-pod1.slice/x.scope\n":                 {unified: "/kubepods.slice/kubepods-pod1.slice/x.scope", inPod: true},
		"0::/kubelet.slice/kubelet-kubepods.slice/x\n":                     {unified: "/kubelet.slice/kubelet-kubepods.slice/x", inPod: true},
		"4:memory:/kubepods/besteffort/pod1/c\n0::/\n":                     {unified: "/", inPod: true},
		"4:memory:/system.slice\n1:name=systemd:/system.slice/k.service\n": {},
		"nonsense": {},
	} {
		if got := parseMembership(file); got != want {
			t.Errorf("%q: %+v, want %+v", file, got, want)
		}
	}
}

// Defends: status tells the truth: whatever is altered is noticed and repaired.
func TestVerify(t *testing.T) {
	b := newBench(t)
	type step struct {
		name string
		do   func(c *nftables.Conn)
	}
	steps := []step{
		{"table removed", func(c *nftables.Conn) { c.DelTable(table) }},
		{"bridge table removed", func(c *nftables.Conn) { c.DelTable(bridgeTable) }},
	}
	for i, f := range families {
		steps = append(steps,
			step{"member removed", func(c *nftables.Conn) { c.FlushSet(f.set()) }},
			step{"member added", func(c *nftables.Conn) {
				b.check(c.SetAddElements(f.set(), []nftables.SetElement{{Key: target{[]side{four, six}[i].pod, 9090}.key()}}))
			}})
	}
	b.set()
	for _, x := range []struct {
		t      *nftables.Table
		chains []string
	}{{table, []string{"claimed", "answers", "kubelet", "source"}}, {bridgeTable, []string{"claimed"}}} {
		for _, chain := range x.chains {
			steps = append(steps, step{chain + " flushed", func(c *nftables.Conn) {
				c.FlushChain(&nftables.Chain{Name: chain, Table: x.t})
			}}, step{chain + " passed by", func(c *nftables.Conn) {
				c.InsertRule(&nftables.Rule{Table: x.t, Chain: &nftables.Chain{Name: chain, Table: x.t}, Exprs: nft.Done()})
			}})
		}
	}
	for _, s := range steps {
		c, err := nftables.New()
		b.check(err)
		s.do(c)
		b.check(c.Flush())
		if err := b.node.Verify(t.Context()); !errors.Is(err, ErrNotInPlace) {
			t.Errorf("%s: %v", s.name, err)
		}
		b.set()
	}
	b.check(b.node.Remove())
	b.check(b.node.Remove()) // idempotent
	if err := b.node.Verify(t.Context()); !errors.Is(err, ErrNotInPlace) {
		t.Errorf("after Remove: %v", err)
	}
}

// A node's worth of pods, and far more, is one transaction.
func TestSet_many(t *testing.T) {
	b := newBench(t)
	for _, n := range []int{200, 4000} {
		var pods []Pod
		for i := range n {
			pods = append(pods, Pod{UID: fmt.Sprint(i), Addrs: []netip.Addr{netip.AddrFrom4([4]byte{10, 1, byte(i >> 8), byte(i)})}, Ports: []uint16{8080, 9090}})
		}
		start := time.Now()
		b.check(b.node.Set(t.Context(), pods))
		set := time.Since(start)
		start = time.Now()
		b.check(b.node.Verify(t.Context()))
		t.Logf("%d members: set in %v, verified in %v", 2*n, set, time.Since(start))
	}
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if err := (&Node{}).Set(ctx, nil); !errors.Is(err, context.Canceled) {
		t.Errorf("cancelled: %v", err)
	}
}
