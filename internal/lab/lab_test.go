package lab

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"
)

// childVar makes the test binary play a part, outside or inside isolation.
const childVar = "LAB_TEST_CHILD"

func TestMain(m *testing.M) {
	switch os.Getenv(childVar) {
	case "unisolated":
		if _, err := New(Config{}); err != nil {
			fmt.Println(err)
			os.Exit(7)
		}
		os.Exit(0)
	case "exit":
		mustIsolate()
		os.Exit(42)
	case "term":
		mustIsolate()
		fmt.Println("ready")
		time.Sleep(time.Minute) // ended by a forwarded SIGTERM
		os.Exit(0)
	case "detached":
		mustIsolate()
		cmd := exec.Command("sleep", os.Getenv("LAB_TEST_SLEEP"))
		cmd.SysProcAttr = &syscall.SysProcAttr{Setsid: true}
		if err := cmd.Start(); err != nil {
			fmt.Println(err)
			os.Exit(1)
		}
		fmt.Println("ready")
		if os.Getenv("LAB_TEST_STAY") != "" {
			time.Sleep(time.Minute)
		}
		os.Exit(0)
	}
	Main(m)
}

func mustIsolate() {
	if _, err := Isolate(); err != nil {
		fmt.Println(err)
		os.Exit(1)
	}
}

// again runs this test binary in a part, as if it had never been isolated.
func again(t *testing.T, part string, env ...string) *exec.Cmd {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
	t.Cleanup(cancel)
	cmd := exec.CommandContext(ctx, "/proc/self/exe", "-test.run=XXX")
	for _, e := range os.Environ() {
		if !strings.HasPrefix(e, stageVar+"=") {
			cmd.Env = append(cmd.Env, e)
		}
	}
	cmd.Env = append(cmd.Env, childVar+"="+part)
	cmd.Env = append(cmd.Env, env...)
	return cmd
}

func newLab(t *testing.T) *Lab {
	t.Helper()
	l, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if err := l.Close(); err != nil {
			t.Error(err)
		}
	})
	return l
}

func addPod(t *testing.T, l *Lab, name, addr string) *Pod {
	t.Helper()
	p, err := l.AddPod(name, netip.MustParseAddr(addr))
	if err != nil {
		t.Fatal(err)
	}
	return p
}

// serve answers every connection with a greeting and the bytes it got.
func serve(t *testing.T, ln net.Listener) {
	t.Helper()
	var wg sync.WaitGroup
	wg.Go(func() {
		for {
			c, err := ln.Accept()
			if err != nil {
				return
			}
			wg.Go(func() {
				defer c.Close()
				_, _ = io.WriteString(c, "hello ")
				_, _ = io.Copy(c, c)
			})
		}
	})
	t.Cleanup(func() {
		ln.Close()
		wg.Wait()
	})
}

func ask(p *Pod, addr, what string) (string, error) {
	ctx, cancel := context.WithTimeout(context.Background(), 5*time.Second)
	defer cancel()
	c, err := p.Dial(ctx, "tcp", addr)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(5 * time.Second)); err != nil {
		return "", err
	}
	if _, err := io.WriteString(c, what); err != nil {
		return "", err
	}
	if err := c.(*net.TCPConn).CloseWrite(); err != nil {
		return "", err
	}
	b, err := io.ReadAll(c)
	return string(b), err
}

// Two pods reach each other from in-process sockets and from processes, and
// an address that exists nowhere has a route.
func TestPodsTalk(t *testing.T) {
	l := newLab(t)
	a, b := addPod(t, l, "a", "10.88.0.2"), addPod(t, l, "b", "10.88.0.3")
	ln, err := b.Listen("tcp", ":8080")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, ln)
	if got, err := ask(a, "10.88.0.3:8080", "x"); err != nil || got != "hello x" {
		t.Fatalf("got %q, %v", got, err)
	}
	out, err := a.Command(t.Context(), "ip", "-o", "-4", "addr", "show", "eth0").Output()
	if err != nil || !strings.Contains(string(out), "10.88.0.2/16") {
		t.Fatalf("in the pod: %s, %v", out, err)
	}
	out, err = a.Command(t.Context(), "ip", "route", "get", "10.96.0.1").CombinedOutput()
	if err != nil || !strings.Contains(string(out), "via 10.88.0.1 dev eth0") {
		t.Fatalf("route of an address that exists nowhere: %s, %v", out, err)
	}
	// The namespace is where other programs look for it.
	out, err = exec.CommandContext(t.Context(), "ip", "netns", "exec", "b", "cat", "/proc/sys/net/ipv4/ip_forward").CombinedOutput()
	if err != nil {
		t.Fatalf("ip netns exec: %s, %v", out, err)
	}
}

func TestDial_namesAreRefused(t *testing.T) {
	l := newLab(t)
	a := addPod(t, l, "a", "10.88.0.2")
	if _, err := a.Dial(t.Context(), "tcp", "localhost:80"); err == nil || !strings.Contains(err.Error(), "literal IP") {
		t.Fatalf("got %v", err)
	}
	if _, err := a.Listen("tcp", "localhost:80"); err == nil || !strings.Contains(err.Error(), "literal IP") {
		t.Fatalf("got %v", err)
	}
}

func TestAddPod_badInput(t *testing.T) {
	l := newLab(t)
	addPod(t, l, "a", "10.88.0.2")
	for _, c := range []struct{ name, addr, want string }{
		{"../x", "10.88.0.9", "pod name"},
		{"", "10.88.0.9", "pod name"},
		{"b", "10.89.0.1", "not a pod address"},
		{"b", "10.88.0.1", "not a pod address"},
		{"a", "10.88.0.9", "there already"},
		{"b", "10.88.0.2", "there already"},
	} {
		if _, err := l.AddPod(c.name, netip.MustParseAddr(c.addr)); err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("%q %s: got %v, want %q", c.name, c.addr, err, c.want)
		}
	}
	if _, err := New(Config{Bridge: netip.MustParsePrefix("fd00::/64")}); err == nil {
		t.Error("an IPv6 subnet was accepted")
	}
}

// Close and DeletePod take away processes, links and names.
func TestCloseLeavesNothing(t *testing.T) {
	l, err := New(Config{})
	if err != nil {
		t.Fatal(err)
	}
	a, b := addPod(t, l, "a", "10.88.0.2"), addPod(t, l, "b", "10.88.0.3")
	for _, p := range []*Pod{a, b} {
		cmd := p.Command(t.Context(), "sleep", "60")
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		defer func() {
			if err := cmd.Wait(); err == nil {
				t.Error("the process outlived its pod")
			}
		}()
	}
	if err := l.DeletePod("a"); err != nil {
		t.Fatal(err)
	}
	if err := l.DeletePod("a"); err == nil {
		t.Fatal("deleted twice")
	}
	if exists(a.NetNS) || !exists(b.NetNS) {
		t.Fatal("the wrong pod is gone")
	}
	for range 2 {
		if err := l.Close(); err != nil {
			t.Fatal(err)
		}
	}
	ifs, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	if len(ifs) != 1 || exists(b.NetNS) {
		t.Fatalf("left: %v, %s", ifs, b.NetNS)
	}
	if _, err := l.AddPod("c", netip.MustParseAddr("10.88.0.4")); err == nil {
		t.Fatal("a closed lab took a pod")
	}
}

// No goroutine may find itself on a thread of another namespace, whatever
// runs beside it.
func TestDo_threadsComeBack(t *testing.T) {
	l := newLab(t)
	pods := []*Pod{addPod(t, l, "a", "10.88.0.2"), addPod(t, l, "b", "10.88.0.3")}
	home := inode(t, "/proc/thread-self/ns/net")
	want := []uint64{inode(t, pods[0].NetNS), inode(t, pods[1].NetNS)}
	var wg sync.WaitGroup
	for i := range 200 {
		wg.Go(func() {
			for range 10 {
				err := pods[i%2].Do(func() error {
					if got := inode(t, "/proc/thread-self/ns/net"); got != want[i%2] {
						t.Errorf("in pod %d: namespace %d, want %d", i%2, got, want[i%2])
					}
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				if got := inode(t, "/proc/thread-self/ns/net"); got != home {
					t.Errorf("outside: namespace %d, want %d", got, home)
				}
			}
		})
	}
	wg.Wait()
	if got := inode(t, "/proc/self/ns/net"); got != home {
		t.Errorf("the main thread: namespace %d, want %d", got, home)
	}
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	var st unix.Stat_t
	if err := unix.Stat(path, &st); err != nil {
		t.Error(err)
	}
	return st.Ino
}

// The sniffer finds a canary that passes between two pods, on the bridge and
// on a pod's link, and finds nothing where nothing passes.
func TestSniff(t *testing.T) {
	l := newLab(t)
	a, b, c := addPod(t, l, "a", "10.88.0.2"), addPod(t, l, "b", "10.88.0.3"), addPod(t, l, "c", "10.88.0.4")
	canary, other := []byte("canary-7f3a"), []byte("never-sent")
	bridge, err := l.Sniff(t.Context(), canary, other)
	if err != nil {
		t.Fatal(err)
	}
	onB, err := b.Sniff(t.Context(), "eth0", canary)
	if err != nil {
		t.Fatal(err)
	}
	onC, err := c.Sniff(t.Context(), "eth0", canary)
	if err != nil {
		t.Fatal(err)
	}
	ln, err := b.Listen("tcp", "10.88.0.3:8080")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, ln)
	if _, err := ask(a, "10.88.0.3:8080", "canary-7f3a and canary-7f3a"); err != nil {
		t.Fatal(err)
	}
	for _, s := range []*Sniffer{bridge, onB, onC} {
		if err := s.Close(); err != nil {
			t.Fatal(err)
		}
		if s.Lost() != 0 {
			t.Errorf("lost %d packets", s.Lost())
		}
	}
	// Twice there and twice back, in the echo.
	if n := bridge.Count(canary); n != 4 {
		t.Errorf("bridge: canary seen %d times, want 4", n)
	}
	if n := onB.Count(canary); n != 4 {
		t.Errorf("pod b: canary seen %d times, want 4", n)
	}
	if n := onC.Count(canary); n != 0 {
		t.Errorf("pod c: canary seen %d times, want 0", n)
	}
	if bridge.Count(other) != 0 || bridge.Packets() == 0 {
		t.Errorf("bridge: %d of a string never sent, %d packets", bridge.Count(other), bridge.Packets())
	}
	if _, err := l.Sniff(t.Context(), nil); err == nil {
		t.Error("an empty canary was accepted")
	}
}

// Outside of isolation New refuses, so a test that forgets it cannot change
// the machine's network.
func TestNew_refusesOutside(t *testing.T) {
	out, err := again(t, "unisolated").Output()
	if code := exit(err); code != 7 || !strings.Contains(string(out), "not isolated") {
		t.Fatalf("exit code %d, %s", code, out)
	}
	// An inherited variable does not count: it names other namespaces.
	out, err = again(t, "unisolated", stageVar+"="+stageIn+"mnt:[1]").Output()
	if code := exit(err); code != 7 {
		t.Fatalf("with a stale variable: exit code %d, %s", code, out)
	}
}

func TestIsolate_exitCode(t *testing.T) {
	if out, err := again(t, "exit").CombinedOutput(); exit(err) != 42 {
		t.Fatalf("%v: %s", err, out)
	}
}

func TestIsolate_forwardsSignals(t *testing.T) {
	cmd := again(t, "term")
	awaitReady(t, cmd)
	if err := cmd.Process.Signal(syscall.SIGTERM); err != nil {
		t.Fatal(err)
	}
	if err := cmd.Wait(); exit(err) != 128+int(syscall.SIGTERM) && exit(err) != 2 {
		t.Fatalf("got %v", err)
	}
}

// A detached process must not outlive the program, whether that ends by
// itself or its outer process is killed without warning.
func TestIsolate_leavesNoProcess(t *testing.T) {
	t.Run("exit", func(t *testing.T) {
		cmd := again(t, "detached", "LAB_TEST_SLEEP=3141")
		if out, err := cmd.CombinedOutput(); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		if pids := running(t, "sleep\x003141\x00"); len(pids) != 0 {
			t.Fatalf("left running: %v", pids)
		}
	})
	t.Run("killed", func(t *testing.T) {
		cmd := again(t, "detached", "LAB_TEST_SLEEP=3142", "LAB_TEST_STAY=1")
		awaitReady(t, cmd)
		if len(running(t, "sleep\x003142\x00")) != 1 {
			t.Fatal("the detached process is not there to begin with")
		}
		if err := cmd.Process.Kill(); err != nil {
			t.Fatal(err)
		}
		_ = cmd.Wait() // killed
		deadline := time.Now().Add(5 * time.Second)
		for len(running(t, "sleep\x003142\x00")) != 0 {
			if time.Now().After(deadline) {
				t.Fatal("left running 5 s after the kill")
			}
			time.Sleep(5 * time.Millisecond)
		}
	})
}

// An ordinary user gets the same lab, through a user namespace.
func TestOrdinaryUser(t *testing.T) {
	const nobody = 65534
	if os.Getenv("LAB_TEST_NOBODY") != "" {
		// Inside the copy: root here, an ordinary user outside.
		m, err := os.ReadFile("/proc/self/uid_map")
		if err != nil || strings.Fields(string(m))[2] != "1" {
			t.Fatalf("not in a user namespace of one user: %s, %v", m, err)
		}
		return
	}
	if m, err := os.ReadFile("/proc/self/uid_map"); err != nil || strings.Fields(string(m))[2] == "1" {
		return // the whole package runs as an ordinary user already
	}
	dir, err := os.MkdirTemp("/tmp", "lab")
	if err != nil {
		t.Fatal(err)
	}
	defer os.RemoveAll(dir)
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	exe, err := os.ReadFile("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	copied := filepath.Join(dir, "lab.test")
	if err := os.WriteFile(copied, exe, 0o755); err != nil {
		t.Fatal(err)
	}
	cmd := again(t, "", "LAB_TEST_NOBODY=1")
	cmd.Path, cmd.Args = copied, []string{copied, "-test.v", "-test.run=TestOrdinaryUser|TestPodsTalk|TestSniff|TestCloseLeavesNothing|TestDo_|TestIsolate_"}
	cmd.Dir = dir
	cmd.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: nobody, Gid: nobody}}
	out, err := cmd.CombinedOutput()
	if err != nil {
		t.Fatalf("%v:\n%s", err, out)
	}
	if n := bytes.Count(out, []byte("\n--- PASS")); n < 7 {
		t.Fatalf("only %d tests ran:\n%s", n, out)
	}
}

func exit(err error) int {
	if err == nil {
		return 0
	}
	if e, ok := err.(*exec.ExitError); ok {
		return e.ExitCode()
	}
	return -1
}

func awaitReady(t *testing.T, cmd *exec.Cmd) {
	t.Helper()
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	buf := make([]byte, len("ready\n"))
	if _, err := io.ReadFull(out, buf); err != nil {
		t.Fatalf("%s: %v", buf, err)
	}
}

// running lists the processes with that command line.
func running(t *testing.T, cmdline string) []int {
	t.Helper()
	dirs, err := os.ReadDir("/proc")
	if err != nil {
		t.Fatal(err)
	}
	var pids []int
	for _, d := range dirs {
		pid, err := strconv.Atoi(d.Name())
		if err != nil {
			continue
		}
		if b, err := os.ReadFile(filepath.Join("/proc", d.Name(), "cmdline")); err == nil && string(b) == cmdline {
			pids = append(pids, pid)
		}
	}
	return pids
}
