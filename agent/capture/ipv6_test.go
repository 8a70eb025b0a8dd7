package capture

import (
	"errors"
	"io"
	"net"
	"os"
	"testing"
	"time"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/lab"
)

// Defends: IPv6 is no way past the proxy, out of the namespace: what a process
// dials goes to the proxy, which learns where to, and what was not redirected
// is refused.
func TestIPv6Outbound(t *testing.T) {
	p := newPair(t)
	proxyOn(t, p.a, "tcp6")
	serve(t, p.b, "tcp", ":8080", "app")
	reaches(t, p.a, net.Dialer{}, "[fd00::3]:8080", "app -")
	apply(t, p.a)
	reaches(t, p.a, net.Dialer{}, "[fd00::3]:8080", "outbound [fd00::3]:8080")
	reaches(t, p.a, net.Dialer{}, "[fd96::1]:80", "outbound [fd96::1]:80")
	reaches(t, p.a, net.Dialer{}, "[fd00::3]:15008", "outbound [fd00::3]:15008")
	reaches(t, p.a, marked, "[fd00::3]:8080", "app -")
	without(t, p.a, "output_nat", "outbound")
	reaches(t, p.a, net.Dialer{}, "[fd00::3]:8080", "refused") // the second line
	without(t, p.a, "output_filter", "nothing past the proxy")
	without(t, p.a, "output_filter", "nothing untracked")
	reaches(t, p.a, net.Dialer{}, "[fd00::3]:8080", "app -")
}

// Defends: IPv6 is no way past the proxy, into the namespace: what comes
// without a tunnel goes to the proxy, whatever the port and the mark, by the
// pod's address and by its link-local one.
func TestIPv6Inbound(t *testing.T) {
	p := newPair(t)
	proxyOn(t, p.a, "tcp6")
	serve(t, p.a, "tcp", ":8080", "app")
	apply(t, p.a)
	reaches(t, p.b, net.Dialer{}, "[fd00::2]:8080", "inbound [fd00::2]:8080")
	reaches(t, p.b, marked, "[fd00::2]:8080", "inbound [fd00::2]:8080")
	reaches(t, p.b, net.Dialer{}, "[fd00::2]:15001", "inbound [fd00::2]:15001")
	reaches(t, p.b, net.Dialer{}, "[fd00::2]:15008", "tunnel -")
	near := linkLocal(t, p.a)
	reaches(t, p.b, net.Dialer{}, "["+near+"%eth0]:8080", "inbound ["+near+"]:8080")
	without(t, p.a, "input_nat", "inbound without a tunnel")
	reaches(t, p.b, net.Dialer{}, "[fd00::2]:8080", "refused") // the second line
	without(t, p.a, "input_filter", "nothing past the proxy")
	without(t, p.a, "input_filter", "nothing untracked")
	reaches(t, p.b, net.Dialer{}, "[fd00::2]:8080", "app -")
}

// Defends: a neighbour's link-local address is no way past the proxy: dialling
// it is refused, and at once. The namespace's own is left alone.
func TestIPv6LinkLocal(t *testing.T) {
	p := newPair(t)
	proxyOn(t, p.a, "tcp6")
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "app")
	far, own := "["+linkLocal(t, p.b)+"%eth0]:8080", "["+linkLocal(t, p.a)+"%eth0]:8080"
	reaches(t, p.a, net.Dialer{}, far, "app -")
	apply(t, p.a)
	reaches(t, p.a, net.Dialer{}, far, "refused")
	reaches(t, p.a, net.Dialer{}, own, "app -")
	without(t, p.a, "output_filter", "nothing past the proxy")
	without(t, p.a, "output_filter", "nothing untracked")
	reaches(t, p.a, net.Dialer{}, far, "app -")
}

// linkLocal returns the address of eth0 that begins with fe80.
func linkLocal(t *testing.T, p *lab.Pod) string {
	t.Helper()
	var out string
	err := p.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		list, err := netlink.AddrList(eth0, unix.AF_INET6)
		for _, a := range list {
			if a.IP.IsLinkLocalUnicast() {
				out = a.IP.String()
			}
		}
		return err
	})
	if err != nil || out == "" {
		t.Fatalf("no link-local address of %s: %v", p.Name, err)
	}
	return out
}

// Defends: where the proxy listens on IPv4 only, IPv6 is refused in both
// directions and not let through; open connections end.
func TestIPv6WithoutTheProxy(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "app")
	before, _, err := dial(t, p.a, net.Dialer{}, "[fd00::3]:8080")
	if err != nil {
		t.Fatal(err)
	}
	apply(t, p.a)
	reaches(t, p.a, net.Dialer{}, "[fd00::3]:8080", "refused")
	reaches(t, p.b, net.Dialer{}, "[fd00::2]:8080", "refused")
	reaches(t, p.b, net.Dialer{}, "[fd00::2]:15008", "refused")
	if alive(before) {
		t.Error("an open IPv6 connection goes on")
	}
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "outbound 10.88.0.3:8080")
}

// Defends: connections within the namespace are left alone over IPv6 too, and
// the proxy cannot be made to connect to itself by it.
func TestIPv6Inside(t *testing.T) {
	p := newPair(t)
	proxyOn(t, p.a, "tcp6")
	serve(t, p.a, "tcp", ":9000", "app")
	apply(t, p.a)
	for _, host := range []string{"[::1]", "[fd00::2]"} {
		reaches(t, p.a, net.Dialer{}, host+":9000", "app -")
		reaches(t, p.a, marked, host+":9000", "app -")
		reaches(t, p.a, marked, host+":15001", "refused")
		reaches(t, p.a, marked, host+":15006", "refused")
		reaches(t, p.a, marked, host+":15008", "tunnel -")
	}
	without(t, p.a, "output_filter", "no loop into the proxy")
	reaches(t, p.a, marked, "[fd00::2]:15001", "outbound -")
}

// Defends: connections over IPv6 from before the capture end at once, and
// those through the proxy live on.
func TestIPv6ResetEstablished(t *testing.T) {
	p := newPair(t)
	proxyOn(t, p.a, "tcp6")
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "app")
	out, _, err1 := dial(t, p.a, net.Dialer{}, "[fd00::3]:8080")
	in, _, err2 := dial(t, p.b, net.Dialer{}, "[fd00::2]:8080")
	inside, _, err3 := dial(t, p.a, net.Dialer{}, "[fd00::2]:8080")
	if err := errors.Join(err1, err2, err3); err != nil {
		t.Fatal(err)
	}
	apply(t, p.a)
	through, got, err := dial(t, p.a, net.Dialer{}, "[fd00::3]:8080")
	if err != nil || got != "outbound [fd00::3]:8080" {
		t.Fatal(got, err)
	}
	arrived, got, err := dial(t, p.b, net.Dialer{}, "[fd00::2]:8080")
	if err != nil || got != "inbound [fd00::2]:8080" {
		t.Fatal(got, err)
	}
	if n, err := ResetEstablished(p.a.NetNS); n != 2 || err != nil {
		t.Errorf("%d connections were ended, %v; want 2", n, err)
	}
	for name, c := range map[string]net.Conn{"out": out, "in": in} {
		if alive(c) {
			t.Errorf("the connection %s from before goes on", name)
		}
	}
	for name, c := range map[string]net.Conn{"inside": inside, "through the proxy": through, "to the proxy": arrived} {
		if !alive(c) {
			t.Errorf("the connection %s ended", name)
		}
	}
}

// Defends: a connection that arrived by a link-local address can be ended as
// any other; the kernel finds it by its interface only.
func TestIPv6DestroyLinkLocal(t *testing.T) {
	p := newPair(t)
	serve(t, p.a, "tcp", ":8080", "app")
	at := "[" + linkLocal(t, p.a) + "%eth0]:8080"
	c, other := connect(t, p.b, net.Dialer{}, at), connect(t, p.b, net.Dialer{}, at)
	remote, local := ends(c) // as the pod sees it
	if err := Destroy(p.a.NetNS, local, remote); err != nil {
		t.Fatal(err)
	}
	if alive(c) || !alive(other) {
		t.Errorf("alive: %v, the other %v", alive(c), alive(other))
	}
	if err := Destroy(p.a.NetNS, local, remote); !errors.Is(err, ErrNotFound) {
		t.Errorf("again: %v", err)
	}
}

// UDP, ping and neighbour discovery over IPv6 are left alone: the neighbours'
// addresses are forgotten first, so that they must be asked for anew.
func TestIPv6OthersAreLeftAlone(t *testing.T) {
	p := newPair(t)
	pc, err := p.b.ListenPacket("udp", "[fd00::3]:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	apply(t, p.a)
	forgetNeighbours(t, p.a)
	forgetNeighbours(t, p.b)
	c, err := p.a.Dial(t.Context(), "udp", "[fd00::3]:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "ping"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 64)
	if err := errors.Join(pc.SetReadDeadline(time.Now().Add(3*time.Second)), c.SetReadDeadline(time.Now().Add(3*time.Second))); err != nil {
		t.Fatal(err)
	}
	if n, from, err := pc.ReadFrom(buf); err != nil || string(buf[:n]) != "ping" {
		t.Fatalf("got %q, %v", buf[:n], err)
	} else if _, err := pc.WriteTo([]byte("pong"), from); err != nil {
		t.Fatal(err)
	}
	if n, err := c.Read(buf); err != nil || string(buf[:n]) != "pong" {
		t.Fatalf("got %q, %v", buf[:n], err)
	}
	var echo net.Conn
	if err := p.b.Do(func() (err error) { echo, err = net.Dial("ip6:ipv6-icmp", "fd00::2"); return err }); err != nil {
		t.Fatal(err)
	}
	defer echo.Close()
	const request, reply = 128, 129 // the kernel fills in the checksum
	if _, err := echo.Write([]byte{request, 0, 0, 0, 0x51, 0x6e, 0, 1}); err != nil {
		t.Fatal(err)
	}
	if err := echo.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		t.Fatal(err)
	}
	for buf[0] != reply { // what neighbours ask arrives here as well
		if _, err := echo.Read(buf); err != nil {
			t.Fatalf("ping: %v", err)
		}
	}
}

// forgetNeighbours empties the table of the neighbours' link addresses.
func forgetNeighbours(t *testing.T, p *lab.Pod) {
	t.Helper()
	err := p.Do(func() error {
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		known, err := netlink.NeighList(eth0.Attrs().Index, unix.AF_INET6)
		for i := range known {
			if known[i].State&unix.NUD_NOARP == 0 {
				err = errors.Join(err, netlink.NeighDel(&known[i]))
			}
		}
		return err
	})
	if err != nil {
		t.Fatal(err)
	}
}

// A pod in which IPv6 is switched off is captured as any other.
func TestIPv6SwitchedOff(t *testing.T) {
	p := newPair(t)
	err := p.a.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	})
	if err != nil {
		t.Fatal(err)
	}
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.b, "tcp", ":8080", "app")
	apply(t, p.a)
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "outbound 10.88.0.3:8080")
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	if _, _, err := dial(t, p.a, net.Dialer{}, "[fd00::3]:8080"); err == nil {
		t.Error("a connection by IPv6 came about")
	}
}
