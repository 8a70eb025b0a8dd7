package capture

import (
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"slices"
	"syscall"
	"testing"
	"time"

	"github.com/cilium/ebpf"
	"github.com/google/nftables"
	"github.com/vishvananda/netlink"
	"golang.org/x/net/bpf"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture/nft"
	"github.com/signet-mesh/signet/internal/lab"
)

// guards runs a test with the guard in either place.
func guards(t *testing.T, f func(t *testing.T)) {
	t.Helper()
	t.Run("program", func(t *testing.T) {
		if _, err := loadTCX(); err != nil {
			t.Fatalf("these tests want a kernel whose links take programs: %v", err)
		}
		f(t)
	})
	t.Run("filter", func(t *testing.T) {
		kernelTCX = func() (*tcx, error) { return nil, errors.New("not here") }
		defer func() { kernelTCX = loadTCX }()
		f(t)
	})
}

// flush deletes every rule of a namespace, as `nft flush ruleset` does.
func flush(t *testing.T, p *lab.Pod) {
	t.Helper()
	tamper(t, p, func(c *nftables.Conn, _ []nft.RawRule) { c.FlushRuleset() })
}

// cutOff fails the test if a connection is made that must not be.
func cutOff(t *testing.T, from *lab.Pod, addr string) {
	t.Helper()
	_, got, err := dial(t, from, net.Dialer{Timeout: 1500 * time.Millisecond}, addr)
	var timeout net.Error
	if !errors.As(err, &timeout) || !timeout.Timeout() {
		t.Errorf("from %s to %s without rules: %q, %v; want no answer", from.Name, addr, got, err)
	}
}

// Defends: a namespace whose rules are gone is cut off and not open, both ways
// and by both families, without anybody there to notice; connections inside and
// other protocols work on; repaired, all is as before.
func TestGuard(t *testing.T) { guards(t, guardCutsOff) }

func guardCutsOff(t *testing.T) {
	p := newPair(t)
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "other")
	apply(t, p.a)
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "refused")
	flush(t, p.a)
	notInPlace(t, p.a, "rules gone")
	for _, way := range []struct {
		from *lab.Pod
		addr string
	}{{p.b, "10.88.0.2:8080"}, {p.b, "[fd00::2]:8080"}, {p.a, "10.88.0.3:8080"}, {p.a, "[fd00::3]:8080"}} {
		cutOff(t, way.from, way.addr)
	}
	reaches(t, p.a, net.Dialer{}, "127.0.0.1:8080", "app -")
	reaches(t, p.a, net.Dialer{}, "10.88.0.2:8080", "app -")
	udp, err := p.b.ListenPacket("udp", "10.88.0.3:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer udp.Close()
	c, err := p.a.Dial(t.Context(), "udp", "10.88.0.3:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "x"); err != nil {
		t.Fatal(err)
	}
	if err := udp.SetReadDeadline(time.Now().Add(5 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, _, err := udp.ReadFrom(make([]byte, 1)); err != nil {
		t.Errorf("UDP without rules: %v", err)
	}

	apply(t, p.a)
	proxy(t, p.a)
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "outbound 10.88.0.3:8080")

	// It is the guard that cut it off.
	if err := open(t, p.a).removeGuard(false); err != nil {
		t.Fatal(err)
	}
	notInPlace(t, p.a, "guard removed")
	flush(t, p.a)
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "app -")
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "other -")
	reaches(t, p.b, net.Dialer{}, "[fd00::2]:8080", "app -")
	reaches(t, p.a, net.Dialer{}, "[fd00::3]:8080", "other -")
}

// Defends: a namespace that leaves the mesh is not cut off by the guard, whether
// its rules are there at that moment, were deleted before, or stay for the sake
// of what is open.
func TestGuard_leave(t *testing.T) { guards(t, guardLeaves) }

func guardLeaves(t *testing.T) {
	p := newPair(t)
	serve(t, p.a, "tcp", ":8080", "app")
	for _, leave := range []func() error{
		func() error { return Remove(p.a.NetNS) },
		func() error { flush(t, p.a); return Remove(p.a.NetNS) },
		func() error { _, err := Leave(p.a.NetNS); return err },
		func() error { flush(t, p.a); _, err := Leave(p.a.NetNS); return err },
	} {
		apply(t, p.a)
		if err := leave(); err != nil {
			t.Fatal(err)
		}
		reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "app -")
	}
}

// Defends: what is open through the proxy when rules are deleted, and repaired
// soon, goes on: the guard drops packets, and TCP sends them again.
func TestGuard_openConnections(t *testing.T) { guards(t, guardKeepsOpen) }

func guardKeepsOpen(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.b, "tcp", ":8080", "other")
	apply(t, p.a)
	tunnel, _, err := dial(t, p.b, net.Dialer{}, "10.88.0.2:15008")
	if err != nil {
		t.Fatal(err)
	}
	upstream, _, err := dial(t, p.a, marked, "10.88.0.3:8080")
	if err != nil {
		t.Fatal(err)
	}
	flush(t, p.a)
	time.Sleep(100 * time.Millisecond)
	apply(t, p.a)
	if !alive(tunnel) || !alive(upstream) {
		t.Error("a connection of the proxy's own did not outlive the repair")
	}
}

// Defends: Verify notices a link that came later and a guard that lets all
// through, Apply repairs both, and Remove leaves nothing, but what is others'.
func TestGuard_links(t *testing.T) { guards(t, guardOnLinks) }

func guardOnLinks(t *testing.T) {
	p := newPair(t)
	apply(t, p.a)
	inside := func(what string, f func() error) {
		t.Helper()
		if err := p.a.Do(f); err != nil {
			t.Fatalf("%s: %v", what, err)
		}
	}
	inside("add a link", func() error {
		return netlink.LinkAdd(&netlink.Bridge{LinkAttrs: netlink.LinkAttrs{Name: "net1"}})
	})
	notInPlace(t, p.a, "a link added")
	apply(t, p.a)
	first := func() netlink.Link {
		all, err := links()
		if err != nil || len(all) != 2 {
			t.Fatalf("links: %v, %v", all, err)
		}
		return all[0]
	}
	inside("remove", func() error { _, err := unguardLink(first()); return err })
	notInPlace(t, p.a, "guard removed")
	apply(t, p.a)
	inside("add another's filter", func() error {
		if err := netlink.QdiscAdd(clsact(first())); err != nil && !errors.Is(err, unix.EEXIST) {
			return err
		}
		return netlink.FilterAdd(&netlink.U32{FilterAttrs: netlink.FilterAttrs{
			LinkIndex: first().Attrs().Index, Parent: netlink.HANDLE_MIN_INGRESS, Priority: 7, Protocol: unix.ETH_P_ALL,
		}, ClassId: netlink.MakeHandle(1, 1)})
	})
	if err := Remove(p.a.NetNS); err != nil {
		t.Fatal(err)
	}
	inside("look", func() error {
		all, err := links()
		if err != nil {
			return err
		}
		for i, l := range all {
			others, err := netlink.FilterList(l, netlink.HANDLE_MIN_INGRESS)
			if err != nil && !errors.Is(err, syscall.EINVAL) {
				return err
			}
			if found, err := guarded(l); found || err != nil || (len(others) == 1) != (i == 0) {
				return fmt.Errorf("link %s: guard %t, filters of others %d: %w", l.Attrs().Name, found, len(others), err)
			}
		}
		return nil
	})
}

// Defends: who joins or leaves loses no packet. When what a filter hangs on comes or
// goes the kernel drops what the link is to send: a call that is begun then waits
// a second, and if it was redirected and the proxy has stopped to listen meanwhile, it is
// refused. So a program has none, and a filter's stays until nothing is redirected.
func TestGuard_losesNothing(t *testing.T) {
	t.Run("program", func(t *testing.T) { guardHangs(t, false) })
	kernelTCX = func() (*tcx, error) { return nil, errors.New("not here") }
	defer func() { kernelTCX = loadTCX }()
	t.Run("filter", func(t *testing.T) { guardHangs(t, true) })
}

func guardHangs(t *testing.T, filter bool) {
	p := newPair(t)
	proxy(t, p.a)
	see := func(when string, want bool) {
		t.Helper()
		err := p.a.Do(func() error {
			all, err := links()
			for _, l := range all {
				disciplines, err := netlink.QdiscList(l)
				if err != nil {
					return err
				}
				if got := slices.ContainsFunc(disciplines, func(q netlink.Qdisc) bool { return q.Type() == "clsact" }); got != want {
					t.Errorf("%s: link %s has what a filter hangs on: %t, want %t", when, l.Attrs().Name, got, want)
				}
			}
			return err
		})
		if err != nil {
			t.Fatal(err)
		}
	}
	see("before", false)
	apply(t, p.a)
	see("captured", filter)
	c, _, err := dial(t, p.b, net.Dialer{}, "10.88.0.2:8080")
	if err != nil {
		t.Fatal(err)
	}
	for range 2 {
		if open, err := Leave(p.a.NetNS); err != nil || open == 0 {
			t.Fatalf("%d open, %v", open, err)
		}
		see("with a redirected connection", filter)
	}
	c.Close()
	for open, deadline := 1, time.Now().Add(5*time.Second); open > 0; time.Sleep(20 * time.Millisecond) {
		if open, err = Leave(p.a.NetNS); err != nil || time.Now().After(deadline) {
			t.Fatalf("%d open, %v", open, err)
		}
	}
	see("when the last has ended", false)
}

// Defends: both programs tell TCP without the mark from all else, IPv6 with
// headers in between included.
func TestGuard_program(t *testing.T) {
	if n := len(guardProgram()); n != 16 {
		t.Fatalf("%d instructions", n)
	}
	program, ok := bpf.Disassemble(guardProgram())
	if !ok {
		t.Fatal("it cannot be read back")
	}
	for _, tc := range []struct {
		name  string
		mark  uint32
		proto uint32
		next  uint32
		want  uint32
	}{
		{"vouched", vouched, unix.ETH_P_IP, unix.IPPROTO_TCP, filterNext},
		{"TCP", 0, unix.ETH_P_IP, unix.IPPROTO_TCP, filterDrop},
		{"with another mark", 0x539, unix.ETH_P_IP, unix.IPPROTO_TCP, filterDrop},
		{"UDP", 0, unix.ETH_P_IP, unix.IPPROTO_UDP, filterNext},
		{"ARP", 0, unix.ETH_P_ARP, unix.IPPROTO_TCP, filterNext},
		{"IPv6 TCP", 0, unix.ETH_P_IPV6, unix.IPPROTO_TCP, filterDrop},
		{"IPv6 fragment", 0, unix.ETH_P_IPV6, unix.IPPROTO_FRAGMENT, filterDrop},
		{"IPv6 options", 0, unix.ETH_P_IPV6, unix.IPPROTO_DSTOPTS, filterDrop},
		{"IPv6 routing", 0, unix.ETH_P_IPV6, unix.IPPROTO_ROUTING, filterDrop},
		{"IPv6 hop by hop", 0, unix.ETH_P_IPV6, unix.IPPROTO_HOPOPTS, filterDrop},
		{"IPv6 authentication", 0, unix.ETH_P_IPV6, unix.IPPROTO_AH, filterDrop},
		{"IPv6 UDP", 0, unix.ETH_P_IPV6, unix.IPPROTO_UDP, filterNext},
		{"neighbour discovery", 0, unix.ETH_P_IPV6, unix.IPPROTO_ICMPV6, filterNext},
	} {
		if got := interpret(t, program, tc.mark, tc.proto, tc.next); got != tc.want {
			t.Errorf("filter: %s: %#x, want %#x", tc.name, got, tc.want)
		}
		if got := run(t, tc.mark, tc.proto, tc.next); got != tc.want {
			t.Errorf("program: %s: %#x, want %#x", tc.name, got, tc.want)
		}
	}
}

// run has the kernel judge a packet.
func run(t *testing.T, mark, proto, next uint32) uint32 {
	t.Helper()
	g, err := loadTCX()
	if err != nil {
		t.Fatal(err)
	}
	frame := binary.BigEndian.AppendUint16(make([]byte, 12), uint16(proto))
	packet := make([]byte, 60)
	at := map[uint32]int{unix.ETH_P_IPV6: protocolV6}[proto]
	if at == 0 {
		at = protocolV4
	}
	packet[at] = byte(next)
	about := make([]byte, 192)
	binary.NativeEndian.PutUint32(about[8:], mark)
	got, err := g.program.Run(&ebpf.RunOptions{Data: append(frame, packet...), Context: about})
	if err != nil {
		t.Fatalf("mark %#x, protocol %#x, next %d: %v", mark, proto, next, err)
	}
	return got
}

// interpret runs the few instructions that the program has.
func interpret(t *testing.T, program []bpf.Instruction, mark, proto, next uint32) uint32 {
	t.Helper()
	var a uint32
	for pc := 0; pc < len(program); pc++ {
		switch i := program[pc].(type) {
		case bpf.LoadExtension:
			a = map[bpf.Extension]uint32{bpf.ExtMark: mark, bpf.ExtProto: proto}[i.Num]
		case bpf.LoadAbsolute:
			a = next
		case bpf.JumpIf:
			if (a == i.Val) == (i.Cond == bpf.JumpEqual) {
				pc += int(i.SkipTrue)
			} else {
				pc += int(i.SkipFalse)
			}
		case bpf.RetConstant:
			return i.Val
		default:
			t.Fatalf("instruction %d: %v", pc, i)
		}
	}
	t.Fatal("no verdict")
	return 0
}
