package probe

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/agent/capture/nft"
	"github.com/signet-mesh/signet/internal/lab"
)

// The test binary, started with helperEnv set, is a process of the node: it
// connects where each line of its standard input says.
const helperEnv = "PROBE_HELPER"

func TestMain(m *testing.M) {
	switch os.Getenv(helperEnv) {
	case "dial":
		in := bufio.NewScanner(os.Stdin)
		for in.Scan() {
			source, addr, _ := strings.Cut(in.Text(), " ")
			fmt.Println(answer(context.Background(), net.Dialer{}, source, addr))
		}
		return
	case "set": // an agent that puts rules in place and is gone
		n := Node{Kubelet: os.Getenv("PROBE_CGROUP")}
		if err := n.Set(context.Background(), []Pod{{Addrs: []netip.Addr{four.pod, six.pod}, Ports: []uint16{8080}}}); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		return
	}
	lab.Main(m)
}

var (
	four = side{pod: podA, source: capture.ProbeSource, service: netip.MustParseAddr("10.96.0.1")}
	six  = side{pod: netip.MustParseAddr("fd88::2"), source: capture.ProbeSource6, service: netip.MustParseAddr("fd96::1")}
)

// side is a family's addresses.
type side struct {
	pod, source, service netip.Addr
}

// eachFamily runs a test by IPv4 and by IPv6.
func eachFamily(t *testing.T, test func(*testing.T, side)) {
	t.Run("IPv4", func(t *testing.T) { test(t, four) })
	t.Run("IPv6", func(t *testing.T) { test(t, six) })
}

// at is a port of the captured pod.
func (s side) at(port uint16) string { return netip.AddrPortFrom(s.pod, port).String() }

// host is an address as a network of its own.
func host(a netip.Addr) *net.IPNet {
	return &net.IPNet{IP: a.AsSlice(), Mask: net.CIDRMask(a.BitLen(), a.BitLen())}
}

// gateway is the address of a lab's bridge.
func (s side) gateway(l *lab.Lab) netip.Addr {
	if s.pod.Is6() {
		return l.Gateway6()
	}
	return l.Gateway()
}

var (
	podA = netip.MustParseAddr("10.88.0.2")
	podB = netip.MustParseAddr("10.88.0.3")
	far  = netip.MustParseAddr("10.89.0.2")
)

// answer connects, from source unless that is "-", and says who answered.
func answer(ctx context.Context, d net.Dialer, source, addr string) string {
	if source != "-" {
		d.LocalAddr = &net.TCPAddr{IP: net.ParseIP(source)}
	}
	d.Timeout = time.Second
	c, err := d.DialContext(ctx, "tcp", addr)
	if err == nil {
		defer c.Close()
		if err = c.SetDeadline(time.Now().Add(time.Second)); err == nil {
			line, rerr := bufio.NewReader(c).ReadString('\n')
			if rerr == nil {
				return strings.TrimSpace(line)
			}
			err = rerr
		}
	}
	var timeout net.Error
	switch {
	case errors.Is(err, syscall.ECONNREFUSED), errors.Is(err, syscall.ECONNRESET), errors.Is(err, syscall.EPERM), errors.Is(err, io.EOF):
		return "refused"
	case errors.As(err, &timeout) && timeout.Timeout():
		return "nothing"
	}
	return err.Error()
}

// bench is a node with a captured pod, another pod on its bridge, and a far one
// behind a router. The test's own network namespace is the node's.
type bench struct {
	t       *testing.T
	lab     *lab.Lab
	other   *lab.Lab
	a, b    *lab.Pod
	far     *lab.Pod
	root    int    // the cgroup hierarchy
	cgroups string // path of the test's own part of it
	node    *Node
}

func newBench(t *testing.T) *bench {
	t.Helper()
	b := &bench{t: t}
	var err error
	if b.lab, err = lab.New(lab.Config{Bridge6: netip.MustParsePrefix("fd88::/64")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.check(b.lab.Close()) })
	if b.other, err = lab.New(lab.Config{Bridge: netip.MustParsePrefix("10.89.0.0/16"), Bridge6: netip.MustParsePrefix("fd89::/64")}); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.check(b.other.Close()) })
	b.a = b.pod(b.lab, "a", podA)
	b.b = b.pod(b.lab, "b", podB)
	b.far = b.pod(b.other, "far", far)
	b.check(os.WriteFile("/proc/sys/net/ipv4/ip_forward", []byte("1"), 0))
	b.check(os.WriteFile("/proc/sys/net/ipv6/conf/all/forwarding", []byte("1"), 0))
	for addr, name := range map[string]string{":8080": "app", ":9090": "app", ":15006": "proxy"} {
		serve(t, b.a, addr, name)
	}
	b.check(capture.Apply(b.a.NetNS, capture.Options{Probes: []uint16{8080}}))

	if b.root, err = cgroupRoot(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { unix.Close(b.root) })
	b.cgroups = fmt.Sprintf("/signet-probe-test-%d", time.Now().UnixNano())
	b.cgroup("")
	b.node = &Node{Kubelet: b.cgroup("/kubelet")}
	t.Cleanup(func() { b.check(b.node.Remove()) })
	return b
}

func (b *bench) check(err error) {
	b.t.Helper()
	if err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) pod(l *lab.Lab, name string, addr netip.Addr) *lab.Pod {
	b.t.Helper()
	p, err := l.AddPod(name, addr)
	b.check(err)
	return p
}

// cgroup makes a cgroup below the test's own and returns its path.
func (b *bench) cgroup(name string) string {
	b.t.Helper()
	path := b.cgroups + name
	b.check(unix.Mkdirat(b.root, "."+path, 0o755))
	b.t.Cleanup(func() { _ = b.rmdir(path) }) // a test may have removed it
	return path
}

// rmdir removes a cgroup; the last process in it may not be quite gone yet.
func (b *bench) rmdir(path string) (err error) {
	for range 100 {
		if err = unix.Unlinkat(b.root, "."+path, unix.AT_REMOVEDIR); !errors.Is(err, unix.EBUSY) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return err
}

// set declares pod a's port 8080.
func (b *bench) set() {
	b.t.Helper()
	b.check(b.node.Set(b.t.Context(), []Pod{{UID: "a", Addrs: []netip.Addr{four.pod, six.pod}, Ports: []uint16{8080}}}))
	b.check(b.node.Verify(b.t.Context()))
}

// helper is a process of the node.
type helper struct {
	t   *testing.T
	in  io.WriteCloser
	out *bufio.Reader
	cmd *exec.Cmd
}

// start runs a process named name in a cgroup ("/" is the hierarchy's root).
func (b *bench) start(cgroup, name string, uid uint32) *helper {
	b.t.Helper()
	dir, err := unix.Openat(b.root, "."+cgroup, unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	b.check(err)
	defer unix.Close(dir)
	home, err := os.MkdirTemp("", "probe")
	b.check(err)
	b.t.Cleanup(func() { os.RemoveAll(home) })
	b.check(os.Chmod(home, 0o755))
	path := filepath.Join(home, name)
	self, err := os.Executable()
	b.check(err)
	raw, err := os.ReadFile(self)
	b.check(err)
	b.check(os.WriteFile(path, raw, 0o755))

	h := &helper{t: b.t, cmd: exec.Command(path)}
	h.cmd.Env = append(os.Environ(), helperEnv+"=dial")
	h.cmd.Stderr = os.Stderr
	h.cmd.Dir = "/"
	h.cmd.SysProcAttr = &syscall.SysProcAttr{UseCgroupFD: true, CgroupFD: dir, Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	h.in, err = h.cmd.StdinPipe()
	b.check(err)
	out, err := h.cmd.StdoutPipe()
	b.check(err)
	h.out = bufio.NewReader(out)
	b.check(h.cmd.Start())
	b.t.Cleanup(h.stop)
	return h
}

func (h *helper) stop() {
	if h.cmd.ProcessState == nil {
		h.in.Close()
		_ = h.cmd.Wait() // it ends with its input
	}
}

// reaches says who must answer the process.
func (h *helper) reaches(source, addr, want string) {
	h.t.Helper()
	if _, err := fmt.Fprintln(h.in, source, addr); err != nil {
		h.t.Fatal(err)
	}
	got, err := h.out.ReadString('\n')
	if got = strings.TrimSpace(got); err != nil || got != want {
		h.t.Errorf("to %s from %s: got %q, %v; want %q", addr, source, got, err, want)
	}
}

// podReaches says who must answer a process in a pod. Where somebody must, the
// first call may be lost while neighbours look for each other.
func (b *bench) podReaches(p *lab.Pod, source, addr, want string) {
	b.t.Helper()
	var got string
	for range 4 {
		b.check(p.Do(func() error {
			got = answer(b.t.Context(), net.Dialer{}, source, addr)
			return nil
		}))
		if got != "nothing" || want == "nothing" {
			break
		}
	}
	if got != want {
		b.t.Errorf("%s to %s from %s: got %q, want %q", p.Name, addr, source, got, want)
	}
}

// without deletes rules, so that a test can show that it was these that made
// the difference.
func (b *bench) without(t *nftables.Table, chain, comment string) {
	b.t.Helper()
	rules, err := nft.Read(0, t)
	b.check(err)
	c, err := nftables.New()
	b.check(err)
	found := false
	for _, r := range rules {
		if r.Chain == chain && nft.CommentText(r.UserData) == comment {
			found = true
			b.check(c.DelRule(&nftables.Rule{Table: t, Chain: &nftables.Chain{Name: chain, Table: t}, Handle: r.Handle}))
		}
	}
	if !found {
		b.t.Fatalf("no rule %q in chain %s", comment, chain)
	}
	b.check(c.Flush())
}

// serve says name to every connection.
func serve(t *testing.T, p *lab.Pod, addr, name string) {
	t.Helper()
	ln, err := p.Listen("tcp", addr)
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
			_, _ = io.WriteString(c, name+"\n") // whoever went away need not know
			c.Close()
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
}
