package capture

import (
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture/nft"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/internal/mesh"
)

// opts are the options of all tests that do not care: a probe on a port that
// nobody serves.
var opts = Options{Probes: []uint16{8079}}

func TestMain(m *testing.M) { lab.Main(m) }

// pair is two pods, 10.88.0.2 and fd00::2, and 3; a is the one that tests
// capture.
type pair struct {
	a, b *lab.Pod
}

func newPair(t testing.TB) pair {
	t.Helper()
	l, err := lab.New(lab.Config{Bridge6: netip.MustParsePrefix("fd00::/64")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	a, err := l.AddPod("a", netip.MustParseAddr("10.88.0.2"))
	if err != nil {
		t.Fatal(err)
	}
	b, err := l.AddPod("b", netip.MustParseAddr("10.88.0.3"))
	if err != nil {
		t.Fatal(err)
	}
	return pair{a, b}
}

// serve names itself, and the original destination, to every connection, and
// then echoes.
func serve(t testing.TB, p *lab.Pod, network, addr, name string) {
	t.Helper()
	ln, err := p.Listen(network, addr)
	if err != nil {
		t.Fatal(err)
	}
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				stop := context.AfterFunc(t.Context(), func() { c.Close() })
				defer stop()
				fmt.Fprintf(c, "%s %s\n", name, originalDst(c))
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
}

// proxy listens where the node proxy would, on IPv4.
func proxy(t testing.TB, p *lab.Pod) { t.Helper(); proxyOn(t, p, "tcp4") }

// proxyOn listens where the node proxy would.
func proxyOn(t testing.TB, p *lab.Pod, network string) {
	t.Helper()
	serve(t, p, network, fmt.Sprintf(":%d", mesh.PortOutbound), "outbound")
	serve(t, p, network, fmt.Sprintf(":%d", mesh.PortInbound), "inbound")
	serve(t, p, network, fmt.Sprintf(":%d", mesh.PortTunnel), "tunnel")
}

// originalDst is the address that a redirected client asked for, or "-".
func originalDst(c net.Conn) string {
	raw, err := c.(*net.TCPConn).SyscallConn()
	if err != nil {
		return err.Error()
	}
	out := "-"
	err = raw.Control(func(fd uintptr) {
		// struct sockaddr_in, in a struct of the same size.
		if r, err := unix.GetsockoptIPv6Mreq(int(fd), unix.IPPROTO_IP, unix.SO_ORIGINAL_DST); err == nil {
			b := r.Multiaddr
			out = fmt.Sprintf("%d.%d.%d.%d:%d", b[4], b[5], b[6], b[7], int(b[2])<<8|int(b[3]))
			return
		}
		// A struct that begins with a struct sockaddr_in6.
		const originalDst6 = 80 // IP6T_SO_ORIGINAL_DST
		if r, err := unix.GetsockoptIPv6MTUInfo(int(fd), unix.IPPROTO_IPV6, originalDst6); err == nil {
			port := binary.BigEndian.Uint16(binary.NativeEndian.AppendUint16(nil, r.Addr.Port))
			out = netip.AddrPortFrom(netip.AddrFrom16(r.Addr.Addr), port).String()
		}
	})
	if err != nil {
		return err.Error()
	}
	local := *c.LocalAddr().(*net.TCPAddr)
	local.Zone = ""
	if out == local.String() {
		return "-" // tracked, but not redirected
	}
	return out
}

var marked = net.Dialer{Control: func(_, _ string, c syscall.RawConn) error {
	var err error
	return errors.Join(c.Control(func(fd uintptr) {
		err = unix.SetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_MARK, mesh.SocketMark)
	}), err)
}}

// dial connects and returns who answered.
func dial(t testing.TB, p *lab.Pod, d net.Dialer, addr string) (net.Conn, string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Second)
	defer cancel()
	c, err := p.DialWith(ctx, &d, "tcp", addr)
	if err != nil {
		return nil, "", err
	}
	t.Cleanup(func() { c.Close() })
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return nil, "", err
	}
	line, err := readLine(c)
	return c, line, err
}

func readLine(c net.Conn) (string, error) {
	var line []byte
	one := make([]byte, 1)
	for {
		if _, err := io.ReadFull(c, one); err != nil {
			return string(line), err
		}
		if one[0] == '\n' {
			return string(line), nil
		}
		line = append(line, one[0])
	}
}

// reaches says who must answer; "refused" is a reset in place of an answer.
func reaches(t testing.TB, p *lab.Pod, d net.Dialer, addr, want string) {
	t.Helper()
	_, got, err := dial(t, p, d, addr)
	if errors.Is(err, syscall.ECONNREFUSED) {
		got, err = "refused", nil
	}
	if err != nil || got != want {
		t.Errorf("from %s to %s: got %q, %v; want %q", p.Name, addr, got, err, want)
	}
}

// alive reports whether an open connection still echoes.
func alive(c net.Conn) bool {
	if _, err := io.WriteString(c, "x\n"); err != nil {
		return false
	}
	line, err := readLine(c)
	return err == nil && line == "x"
}

func apply(t testing.TB, p *lab.Pod) {
	t.Helper()
	if err := Apply(p.NetNS, opts); err != nil {
		t.Fatal(err)
	}
	if err := Verify(p.NetNS, opts); err != nil {
		t.Fatal(err)
	}
}

func open(t testing.TB, p *lab.Pod) *NS {
	t.Helper()
	n, err := Open(p.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := n.Close(); err != nil {
			t.Error(err)
		}
	})
	return n
}

// without deletes the rules with that comment from a chain, so that a test
// can show that it was these rules that made the difference.
func without(t testing.TB, p *lab.Pod, chainName, text string) {
	t.Helper()
	n := open(t, p)
	rules, err := n.readRules()
	if err != nil {
		t.Fatal(err)
	}
	c, err := n.nft()
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, r := range rules {
		if r.Chain == chainName && nft.CommentText(r.UserData) == text {
			found++
			if err := c.DelRule(&nftables.Rule{Table: table, Chain: &nftables.Chain{Name: chainName, Table: table}, Handle: r.Handle}); err != nil {
				t.Fatal(err)
			}
		}
	}
	if found == 0 {
		t.Fatalf("no rule %q in chain %s", text, chainName)
	}
	if err := c.Flush(); err != nil {
		t.Fatal(err)
	}
}

// Defends: what a process dials goes to the proxy, which learns where to,
// addresses that exist nowhere included.
func TestOutbound(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.b, "tcp", ":8080", "app")
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "app -")
	apply(t, p.a)
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "outbound 10.88.0.3:8080")
	reaches(t, p.a, net.Dialer{}, "10.96.0.1:80", "outbound 10.96.0.1:80")
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:15008", "outbound 10.88.0.3:15008")
	without(t, p.a, "output_nat", "outbound")
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "refused") // the second line
	without(t, p.a, "output_filter", "nothing past the proxy")
	without(t, p.a, "output_filter", "nothing untracked")
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "app -")
}

// Defends: the proxy's own connections are not captured again.
func TestOutbound_mark(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.b, "tcp", ":8080", "app")
	apply(t, p.a)
	reaches(t, p.a, marked, "10.88.0.3:8080", "app -")
	without(t, p.a, "output_nat", "the proxy's own sockets")
	reaches(t, p.a, marked, "10.88.0.3:8080", "outbound 10.88.0.3:8080")
}

// Defends: connections within the namespace are left alone, by loopback and
// by the pod's own address, in both hooks.
func TestInsideIsLeftAlone(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":9000", "app")
	apply(t, p.a)
	for _, addr := range []string{"127.0.0.1:9000", "10.88.0.2:9000", "[::1]:9000"} {
		reaches(t, p.a, net.Dialer{}, addr, "app -")
		reaches(t, p.a, marked, addr, "app -")
	}
	without(t, p.a, "input_nat", "inside the namespace")
	// A connection on lo that output has looked at is not looked at again,
	// so the second rule matters only together with the first.
	without(t, p.a, "output_nat", "inside the namespace")
	reaches(t, p.a, net.Dialer{}, "10.88.0.2:9000", "outbound 10.88.0.2:9000")
}

// Defends: what comes without a tunnel goes to the proxy, whatever the port
// and whatever mark the sender set; tunnels go to the tunnel port.
func TestInbound(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":8080", "app")
	apply(t, p.a)
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	reaches(t, p.b, marked, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:15001", "inbound 10.88.0.2:15001")
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:15006", "inbound -") // where it would go anyway
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:15008", "tunnel -")
	without(t, p.a, "input_nat", "tunnels")
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:15008", "inbound 10.88.0.2:15008")
	without(t, p.a, "input_nat", "inbound without a tunnel")
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "refused") // the second line
	without(t, p.a, "input_filter", "nothing past the proxy")
	without(t, p.a, "input_filter", "nothing untracked")
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "app -")
}

// Defends: a tunnel that asks the proxy for its own capture ports cannot make
// it connect to itself for ever.
func TestNoLoopIntoTheProxy(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	apply(t, p.a)
	for _, host := range []string{"127.0.0.1", "10.88.0.2"} {
		reaches(t, p.a, marked, host+":15001", "refused")
		reaches(t, p.a, marked, host+":15006", "refused")
		reaches(t, p.a, marked, host+":15008", "tunnel -") // a pod that calls itself
	}
	without(t, p.a, "output_filter", "no loop into the proxy")
	reaches(t, p.a, marked, "127.0.0.1:15001", "outbound -")
	reaches(t, p.a, marked, "10.88.0.2:15006", "inbound -")
}

// UDP is left alone, as the package says.
func TestUDPIsLeftAlone(t *testing.T) {
	p := newPair(t)
	pc, err := p.b.ListenPacket("udp", "10.88.0.3:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer pc.Close()
	apply(t, p.a)
	c, err := p.a.Dial(t.Context(), "udp", "10.88.0.3:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if _, err := io.WriteString(c, "ping"); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, 16)
	if err := pc.SetReadDeadline(time.Now().Add(3 * time.Second)); err != nil {
		t.Fatal(err)
	}
	if n, _, err := pc.ReadFrom(buf); err != nil || string(buf[:n]) != "ping" {
		t.Fatalf("got %q, %v", buf[:n], err)
	}
}

// What a workload without capabilities can do: not set the proxy's mark.
func TestMarkNeedsACapability(t *testing.T) {
	p := newPair(t)
	set := func(caps ...uint) error {
		return p.a.Do(func() error {
			return withCapabilities(caps, func() error {
				fd, err := unix.Socket(unix.AF_INET, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
				if err != nil {
					return err
				}
				defer unix.Close(fd)
				return unix.SetsockoptInt(fd, unix.SOL_SOCKET, unix.SO_MARK, mesh.SocketMark)
			})
		})
	}
	if err := set(); !errors.Is(err, unix.EPERM) {
		t.Errorf("without capabilities: %v, want EPERM", err)
	}
	if err := set(unix.CAP_NET_ADMIN); err != nil {
		t.Errorf("with CAP_NET_ADMIN: %v", err)
	}
	// The package comment warns of this; kernels before 5.17 refuse it.
	t.Logf("with CAP_NET_RAW: %v", set(unix.CAP_NET_RAW))
}

// withCapabilities calls f with only these effective on the calling thread.
func withCapabilities(caps []uint, f func() error) error {
	hdr := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var old, now [2]unix.CapUserData
	if err := unix.Capget(&hdr, &old[0]); err != nil {
		return err
	}
	now = old
	now[0].Effective, now[1].Effective = 0, 0
	for _, c := range caps {
		now[c/32].Effective |= 1 << (c % 32)
	}
	if err := unix.Capset(&hdr, &now[0]); err != nil {
		return err
	}
	return errors.Join(f(), unix.Capset(&hdr, &old[0]))
}

// Defends: a wrong path is an error that says so, and the machine's own
// namespace is never captured.
func TestOpen_refuses(t *testing.T) {
	file := t.TempDir() + "/file"
	if err := os.WriteFile(file, nil, 0o600); err != nil {
		t.Fatal(err)
	}
	for path, want := range map[string]string{
		file:                     "not a network namespace",
		"/proc/self/ns/mnt":      "not a network namespace",
		"/proc/self/ns/net":      "of this process",
		"/run/netns/not-there":   "no such file",
		t.TempDir() + "/missing": "no such file",
	} {
		if err := Apply(path, opts); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%s: got %v, want %q", path, err, want)
		}
	}
	if err := Apply("/run/netns/not-there", opts); !errors.Is(err, os.ErrNotExist) {
		t.Errorf("a missing namespace: %v is not os.ErrNotExist", err)
	}
}
