package attest

import (
	"bufio"
	"cmp"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/mesh"
)

// The test binary, started with helperEnv set, is the process that is
// attested: it does what the variable says, one line of standard input at a
// time.
const (
	helperEnv = "ATTEST_HELPER"
	socketEnv = "ATTEST_SOCKET"
	execEnv   = "ATTEST_EXEC" // what the mode exec becomes; empty: /bin/cat
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		if err := helper(mode); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func helper(mode string) error {
	in := bufio.NewReader(os.Stdin)
	next := func() bool { _, err := in.ReadString('\n'); return err == nil }
	if mode == "peer" { // the agent's part, to be run in another pid namespace
		ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: os.Getenv(socketEnv)})
		if err != nil {
			return err
		}
		fmt.Println("ready")
		conn, err := ln.AcceptUnix()
		if err != nil {
			return err
		}
		_, err = Peer(conn)
		fmt.Println("peer:", err)
		return nil
	}
	switch mode {
	case "mounted":
		return attestMounted(in)
	case "wrap":
		return attestWrapped()
	case "receive":
		return receiveDescriptor(next)
	case "child": // says when it is signalled
		c := make(chan os.Signal, 8)
		signal.Notify(c, syscall.SIGHUP)
		fmt.Println("child ready")
		go func() {
			for range c {
				fmt.Println("the child was signalled")
			}
		}()
		next()
		return nil
	}
	// Without the runtime's poller, so that the descriptor survives an exec.
	fd, err := syscall.Socket(syscall.AF_UNIX, syscall.SOCK_STREAM, 0)
	if err != nil {
		return err
	}
	if err := syscall.Connect(fd, &syscall.SockaddrUnix{Name: os.Getenv(socketEnv)}); err != nil {
		return err
	}
	hups := make(chan os.Signal, 8)
	signal.Notify(hups, syscall.SIGHUP)
	fmt.Println("ready")
	switch mode {
	case "signalled": // says when it is, and to the end how often it was
		n := 0
		ended := make(chan struct{})
		go func() {
			next()
			close(ended)
		}()
		for {
			select {
			case <-hups:
				n++
				fmt.Println("signal")
			case <-ended:
				fmt.Println("signals:", n)
				return nil
			}
		}
	case "family": // has a child that runs the same program
		if next() {
			self, err := os.Executable()
			if err != nil {
				return err
			}
			c := exec.Command(self)
			c.Env = append(os.Environ(), helperEnv+"=child")
			c.Stdin, c.Stdout = os.Stdin, os.Stdout
			if err := c.Start(); err != nil {
				return err
			}
			go func() {
				for range hups {
					fmt.Println("the parent was signalled")
				}
			}()
			return c.Wait()
		}
	case "connect":
	case "exec": // becomes another program, with the connection open
		if next() {
			return syscall.Exec(cmp.Or(os.Getenv(execEnv), "/bin/cat"), []string{"cat"}, nil)
		}
	case "comm": // takes a name that looks like further fields of stat
		if next() {
			if err := os.WriteFile("/proc/self/comm", []byte(") S 1 1 1 (((("), 0); err != nil {
				return err
			}
			fmt.Println("done")
		}
	case "pass": // sends the connection to whoever is at the other end of standard output's name
		if next() {
			if err := passDescriptor(fd); err != nil {
				return err
			}
			fmt.Println("done")
		}
	case "inherit": // gives the connection to another program
		if next() {
			c := exec.Command("/bin/cat")
			c.ExtraFiles = []*os.File{os.NewFile(uintptr(fd), "conn")}
			c.Stdin = os.Stdin // ends with the test's end of it
			if err := c.Start(); err != nil {
				return err
			}
			fmt.Println("done")
			return c.Wait()
		}
	}
	next()
	return nil
}

// bench is a socket that helpers connect to.
type bench struct {
	t    *testing.T
	dir  string
	self string // a copy of the test binary
	ln   *net.UnixListener
}

func newBench(t *testing.T) *bench {
	t.Helper()
	dir, err := os.MkdirTemp("", "attest") // short, for the socket; open to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o755); err != nil {
		t.Fatal(err)
	}
	b := &bench{t: t, dir: dir, self: filepath.Join(dir, "trusted")}
	own, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	b.copyTo(own, b.self)
	b.ln, err = net.ListenUnix("unix", &net.UnixAddr{Name: filepath.Join(dir, "s")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { b.ln.Close() })
	if err := os.Chmod(filepath.Join(dir, "s"), 0o777); err != nil {
		t.Fatal(err)
	}
	return b
}

func (b *bench) copyTo(from, to string) {
	b.t.Helper()
	raw, err := os.ReadFile(from)
	if err != nil {
		b.t.Fatal(err)
	}
	if err := os.WriteFile(to, raw, 0o755); err != nil {
		b.t.Fatal(err)
	}
}

func (b *bench) sum(path string) string {
	b.t.Helper()
	raw, err := os.ReadFile(path)
	if err != nil {
		b.t.Fatal(err)
	}
	s := sha256.Sum256(raw)
	return hex.EncodeToString(s[:])
}

// child is a started helper.
type child struct {
	t    *testing.T
	cmd  *exec.Cmd
	in   io.WriteCloser
	out  *bufio.Reader
	conn *net.UnixConn // the accepted end
}

// start runs argv with the helper's mode and accepts its connection.
func (b *bench) start(mode string, argv ...string) *child {
	b.t.Helper()
	c := b.launch(mode, filepath.Join(b.dir, "s"), argv...)
	c.expect("ready")
	b.accept(c)
	return c
}

// accept takes the connection that a helper has made.
func (b *bench) accept(c *child) {
	b.t.Helper()
	if err := b.ln.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
		b.t.Fatal(err)
	}
	conn, err := b.ln.AcceptUnix()
	if err != nil {
		b.t.Fatal(err)
	}
	c.conn = conn
	b.t.Cleanup(func() { conn.Close() })
}

func (b *bench) launch(mode, socket string, argv ...string) *child {
	b.t.Helper()
	c := &child{t: b.t, cmd: exec.Command(argv[0], argv[1:]...)}
	c.cmd.Env = append(os.Environ(), helperEnv+"="+mode, socketEnv+"="+socket)
	c.cmd.Stderr = os.Stderr
	var err error
	if c.in, err = c.cmd.StdinPipe(); err != nil {
		b.t.Fatal(err)
	}
	out, err := c.cmd.StdoutPipe()
	if err != nil {
		b.t.Fatal(err)
	}
	c.out = bufio.NewReader(out)
	if err := c.cmd.Start(); err != nil {
		b.t.Fatal(err)
	}
	b.t.Cleanup(c.kill)
	return c
}

func (c *child) expect(want string) {
	c.t.Helper()
	line, err := c.out.ReadString('\n')
	if strings.TrimSpace(line) != want {
		c.t.Fatalf("helper said %q (%v), want %q", line, err, want)
	}
}

func (c *child) step() {
	c.t.Helper()
	if _, err := c.in.Write([]byte("\n")); err != nil {
		c.t.Fatal(err)
	}
}

// kill ends the helper and reaps it; its number is free afterwards.
func (c *child) kill() {
	if c.cmd.ProcessState == nil {
		c.in.Close()
		_ = c.cmd.Process.Kill() // it may have ended
		_ = c.cmd.Wait()         // it was killed
	}
}

func (c *child) peer() *Process {
	c.t.Helper()
	p, err := Peer(c.conn)
	if err != nil {
		c.t.Fatal(err)
	}
	c.t.Cleanup(p.Close)
	return p
}

// waitExec waits until the helper executes path.
func (c *child) waitExec(path string) {
	c.t.Helper()
	real, err := filepath.EvalSymlinks(path)
	if err != nil {
		c.t.Fatal(err)
	}
	for range 1000 {
		if exe, _ := os.Readlink("/proc/" + strconv.Itoa(c.cmd.Process.Pid) + "/exe"); exe == real {
			return
		}
		time.Sleep(5 * time.Millisecond)
	}
	c.t.Fatalf("helper did not execute %s", path)
}

// attestor returns one with the given rules, named w0, w1 and so on.
func attestor(rules ...mesh.Attest) *Attestor {
	a := New()
	var ws []mesh.Workload
	for i := range rules {
		ws = append(ws, mesh.Workload{Namespace: "default", Name: fmt.Sprintf("w%d", i), Attest: &rules[i]})
	}
	a.SetWorkloads(ws)
	return a
}

func uid(n uint32) *uint32 { return &n }

// ownProcess holds the test itself.
func ownProcess(t testing.TB) *Process {
	t.Helper()
	p, err := open(&unix.Ucred{Pid: int32(os.Getpid()), Uid: uint32(os.Getuid())}, -1)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(p.Close)
	return p
}
