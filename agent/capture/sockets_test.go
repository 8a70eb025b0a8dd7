package capture

import (
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"github.com/google/nftables/expr"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/internal/mesh"
)

func connect(t testing.TB, p *lab.Pod, d net.Dialer, addr string) net.Conn {
	t.Helper()
	c, _, err := dial(t, p, d, addr)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func ends(c net.Conn) (local, remote netip.AddrPort) {
	return c.LocalAddr().(*net.TCPAddr).AddrPort(), c.RemoteAddr().(*net.TCPAddr).AddrPort()
}

func TestSockets(t *testing.T) {
	p := newPair(t)
	serve(t, p.b, "tcp", ":8080", "app") // an IPv6 socket that takes IPv4
	c := connect(t, p.a, marked, "10.88.0.3:8080")
	local, remote := ends(c)
	list, err := Sockets(p.a.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	if len(list) != 1 || list[0].Local != local || list[0].Remote != remote || list[0].State != Established || list[0].Mark != mesh.SocketMark {
		t.Errorf("pod a: %+v", list)
	}
	list, err = Sockets(p.b.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	states := map[State]int{}
	for _, s := range list {
		states[s.State]++
		if s.State == Established && (s.Local != remote || s.Remote != local || s.Mark != 0) {
			t.Errorf("pod b: %+v", s)
		}
	}
	if len(list) != 2 || states[Listen] != 1 || states[Established] != 1 {
		t.Errorf("pod b: %+v", list)
	}
}

// Defends: Destroy ends the one connection that was named, on either side,
// and no other; in particular not the listener, which the kernel itself would
// pick once the connection is gone.
func TestDestroy(t *testing.T) {
	p := newPair(t)
	serve(t, p.b, "tcp", ":8080", "app")
	serve(t, p.b, "tcp4", ":8081", "app")
	var conns []net.Conn
	for i := range 40 {
		conns = append(conns, connect(t, p.a, net.Dialer{}, fmt.Sprintf("10.88.0.3:808%d", i%2)))
	}
	a, b := open(t, p.a), open(t, p.b)
	for i, victim := range []int{7, 12, 21, 30} {
		local, remote := ends(conns[victim])
		kill := func() error { return a.Destroy(local, remote) }
		if i%2 == 1 {
			kill = func() error { return b.Destroy(remote, local) }
		}
		if err := kill(); err != nil {
			t.Fatal(err)
		}
		if err := kill(); !errors.Is(err, ErrNotFound) {
			t.Errorf("again: %v, want ErrNotFound", err)
		}
		if alive(conns[victim]) {
			t.Errorf("connection %d goes on", victim)
		}
		conns[victim] = nil
	}
	for i, c := range conns {
		if c != nil && !alive(c) {
			t.Errorf("connection %d was ended too", i)
		}
	}
	// The listener was not taken for the connection.
	connect(t, p.a, net.Dialer{}, "10.88.0.3:8080")
	connect(t, p.a, net.Dialer{}, "10.88.0.3:8081")

	l, r := ends(conns[0])
	for _, bad := range [][2]netip.AddrPort{{l, {}}, {{}, r}, {l, netip.MustParseAddrPort("[::1]:1")}} {
		if err := a.Destroy(bad[0], bad[1]); err == nil || errors.Is(err, ErrNotFound) {
			t.Errorf("%v: %v", bad, err)
		}
	}
	// An IPv4 address written as IPv6 is the same address.
	mapped := netip.AddrPortFrom(netip.AddrFrom16(l.Addr().As16()), l.Port())
	if err := Destroy(p.a.NetNS, mapped, r); err == nil {
		if alive(conns[0]) {
			t.Error("goes on")
		}
	} else {
		t.Error(err)
	}
}

func TestDestroy_IPv6(t *testing.T) {
	p := newPair(t)
	serve(t, p.b, "tcp", ":8080", "app")
	c, other := connect(t, p.a, net.Dialer{}, "[fd00::3]:8080"), connect(t, p.a, net.Dialer{}, "[fd00::3]:8080")
	local, remote := ends(c)
	if err := Destroy(p.a.NetNS, local, remote); err != nil {
		t.Fatal(err)
	}
	if alive(c) || !alive(other) {
		t.Errorf("alive: %v, the other %v", alive(c), alive(other))
	}
}

// Defends: after Apply and ResetEstablished nothing goes past the proxy, and
// what may stay stays.
func TestResetEstablished(t *testing.T) {
	p := newPair(t)
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "app")
	past := map[string]net.Conn{
		"out":              connect(t, p.a, net.Dialer{}, "10.88.0.3:8080"),
		"in":               connect(t, p.b, net.Dialer{}, "10.88.0.2:8080"),
		"in with a mark":   connect(t, p.b, marked, "10.88.0.2:8080"),
		"out, port 15001":  connect(t, p.a, net.Dialer{LocalAddr: &net.TCPAddr{Port: mesh.PortOutbound}}, "10.88.0.3:8080"),
		"out, half closed": connect(t, p.a, net.Dialer{}, "10.88.0.3:8080"),
	}
	if err := past["out, half closed"].(*net.TCPConn).CloseWrite(); err != nil {
		t.Fatal(err)
	}
	stay := map[string]net.Conn{
		"loopback":    connect(t, p.a, net.Dialer{}, "127.0.0.1:8080"),
		"own address": connect(t, p.a, net.Dialer{}, "10.88.0.2:8080"),
		"mark":        connect(t, p.a, marked, "10.88.0.3:8080"),
	}
	apply(t, p.a)
	// The half closed one's peer may have ended it by now.
	n, err := ResetEstablished(p.a.NetNS)
	if err != nil || n < 4 || n > 5 {
		t.Fatalf("reset %d, %v", n, err)
	}
	for name, c := range past {
		if alive(c) {
			t.Errorf("%s: goes on past the proxy", name)
		}
	}
	// A dead socket holds its port until its process closes it.
	past["out, port 15001"].Close()
	proxy(t, p.a)
	stay["captured out"] = connect(t, p.a, net.Dialer{}, "10.88.0.3:8080")
	stay["captured in"] = connect(t, p.b, net.Dialer{}, "10.88.0.2:8080")
	stay["tunnel"] = connect(t, p.b, net.Dialer{}, "10.88.0.2:15008")
	stay["proxy to app"] = connect(t, p.a, marked, "10.88.0.2:8080")
	if n, err := ResetEstablished(p.a.NetNS); err != nil || n != 0 {
		t.Fatalf("reset %d more, %v", n, err)
	}
	for name, c := range stay {
		if !alive(c) {
			t.Errorf("%s: was ended", name)
		}
	}
	// A repair does not disturb what is open.
	without(t, p.a, "output_nat", "outbound")
	apply(t, p.a)
	for name, c := range stay {
		if !alive(c) {
			t.Errorf("%s: ended by Apply", name)
		}
	}
}

// Defends: where the kernel tracked connections already, it redirects neither
// those that are open nor new ones on the same ports. They must be refused.
// ResetEstablished alone is not enough against the second kind.
func TestTrackedBefore(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "app")
	n := open(t, p.a)
	c, err := n.nft()
	if err != nil {
		t.Fatal(err)
	}
	other := c.AddTable(&nftables.Table{Name: "other", Family: nftables.TableFamilyIPv4})
	chain := c.AddChain(&nftables.Chain{Name: "tracks", Table: other, Type: nftables.ChainTypeFilter,
		Hooknum: nftables.ChainHookOutput, Priority: nftables.ChainPriorityFilter})
	c.AddRule(&nftables.Rule{Table: other, Chain: chain, Exprs: []expr.Any{&expr.Ct{Key: expr.CtKeySTATE, Register: 1}}})
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
	from := net.Dialer{LocalAddr: &net.TCPAddr{Port: 40001}, Control: reuse}
	out, in := connect(t, p.a, from, "10.88.0.3:8080"), connect(t, p.b, from, "10.88.0.2:8080")
	out2, in2 := connect(t, p.a, net.Dialer{}, "10.88.0.3:8080"), connect(t, p.b, net.Dialer{}, "10.88.0.2:8080")
	apply(t, p.a)
	if alive(out2) || alive(in2) {
		t.Error("goes on past the proxy")
	}
	without(t, p.a, "output_filter", "nothing past the proxy")
	without(t, p.a, "output_filter", "nothing untracked")
	without(t, p.a, "input_filter", "nothing past the proxy")
	without(t, p.a, "input_filter", "nothing untracked")
	if !alive(out) || !alive(in) {
		t.Error("ended although the rules are gone: the test shows nothing")
	}
	if n, err := n.ResetEstablished(); err != nil || n < 2 {
		t.Errorf("reset %d, %v", n, err)
	}
	if alive(out) || alive(in) {
		t.Error("goes on after ResetEstablished")
	}
	out.Close()
	in.Close()
	apply(t, p.a)
	reaches(t, p.b, from, "10.88.0.2:8080", "refused")
	without(t, p.a, "input_filter", "nothing past the proxy")
	without(t, p.a, "input_filter", "nothing untracked")
	reaches(t, p.b, from, "10.88.0.2:8080", "app -") // past the proxy
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "outbound 10.88.0.3:8080")
}

// Defends: packets that the kernel cannot assign to a connection are not
// redirected either, and must not pass. With nf_conntrack_tcp_loose off, all
// those of connections from before are such.
func TestUntracked(t *testing.T) {
	p := newPair(t)
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "app")
	err := p.a.Do(func() error {
		return os.WriteFile("/proc/sys/net/netfilter/nf_conntrack_tcp_loose", []byte("0\n"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	out, in := connect(t, p.a, net.Dialer{}, "10.88.0.3:8080"), connect(t, p.b, net.Dialer{}, "10.88.0.2:8080")
	apply(t, p.a)
	for _, c := range []net.Conn{out, in} {
		if err := c.SetDeadline(time.Now().Add(300 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		if alive(c) {
			t.Error("goes on past the proxy")
		}
		if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
			t.Fatal(err)
		}
	}
	without(t, p.a, "output_filter", "nothing untracked")
	without(t, p.a, "input_filter", "nothing untracked")
	for _, c := range []net.Conn{out, in} {
		if line, err := readLine(c); err != nil || line != "x" {
			t.Errorf("ended although the rules are gone: the test shows nothing: %q, %v", line, err)
		}
	}
}

func reuse(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_REUSEADDR, 1)
	}), err)
}

// What Apply's comment says about connections that were not tracked: they
// break at the next packet, and idle ones are ended by ResetEstablished.
func TestApply_openConnections(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "app")
	out, in := connect(t, p.a, net.Dialer{}, "10.88.0.3:8080"), connect(t, p.b, net.Dialer{}, "10.88.0.2:8080")
	connect(t, p.a, net.Dialer{}, "10.88.0.3:8080") // idle
	apply(t, p.a)
	if alive(out) || alive(in) {
		t.Error("goes on after Apply")
	}
	if n, err := ResetEstablished(p.a.NetNS); err != nil || n == 0 {
		t.Fatalf("reset %d, %v", n, err)
	}
	list, err := Sockets(p.a.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	for _, s := range list {
		if s.State.open() && !s.Local.Addr().IsLoopback() {
			t.Errorf("left: %+v", s)
		}
	}
}

// Defends: threads come back. Many goroutines work on two namespaces at once;
// each must see its own, and the rest of the program must see neither.
func TestThreads(t *testing.T) {
	p := newPair(t)
	serve(t, p.a, "tcp", "127.0.0.1:1111", "app")
	serve(t, p.b, "tcp", "127.0.0.1:2222", "app")
	var home unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &home); err != nil {
		t.Fatal(err)
	}
	shared := []*NS{open(t, p.a), open(t, p.b)}
	want := []uint16{1111, 2222}
	pods := []*lab.Pod{p.a, p.b}
	var wg sync.WaitGroup
	for i := range 100 {
		wg.Go(func() {
			for round := range 5 {
				k := (i + round) % 2
				list, err := shared[k].Sockets()
				if round%2 == 0 {
					list, err = Sockets(pods[k].NetNS)
				}
				if err != nil || len(list) != 1 || list[0].Local.Port() != want[k] {
					t.Errorf("pod %s: %v, %v", pods[k].Name, list, err)
				}
				if err := Verify(pods[k].NetNS, opts); !errors.Is(err, ErrNotCaptured) {
					t.Error(err)
				}
				runtime.LockOSThread()
				var now unix.Stat_t
				if err := unix.Stat("/proc/thread-self/ns/net", &now); err != nil || now.Ino != home.Ino {
					t.Errorf("namespace %d, want %d (%v)", now.Ino, home.Ino, err)
				}
				runtime.UnlockOSThread()
			}
		})
	}
	wg.Wait()
}

func BenchmarkDestroy(b *testing.B) {
	p := newPair(b)
	serve(b, p.b, "tcp", ":8080", "app")
	n := open(b, p.a)
	for range 1000 { // company
		connect(b, p.a, net.Dialer{}, "10.88.0.3:8080")
	}
	for b.Loop() {
		b.StopTimer()
		c, err := p.a.Dial(b.Context(), "tcp", "10.88.0.3:8080")
		if err != nil {
			b.Fatal(err)
		}
		local, remote := ends(c)
		b.StartTimer()
		if err := n.Destroy(local, remote); err != nil {
			b.Fatal(err)
		}
		b.StopTimer()
		c.Close()
		b.StartTimer()
	}
}

func BenchmarkSockets(b *testing.B) {
	p := newPair(b)
	serve(b, p.b, "tcp", ":8080", "app")
	n := open(b, p.a)
	for range 1000 {
		connect(b, p.a, net.Dialer{}, "10.88.0.3:8080")
	}
	for b.Loop() {
		if list, err := n.Sockets(); err != nil || len(list) < 1000 {
			b.Fatal(len(list), err)
		}
	}
}

func BenchmarkVerify(b *testing.B) {
	p := newPair(b)
	apply(b, p.a)
	n := open(b, p.a)
	for b.Loop() {
		if err := n.Verify(opts); err != nil {
			b.Fatal(err)
		}
	}
}
