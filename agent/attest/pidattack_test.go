package attest

import (
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/attest/procfs"
	"github.com/signet-mesh/signet/internal/mesh"
)

// attestWrapped is the agent's part of TestWrappedPIDs, and process 1 of a pid
// namespace that nobody else uses: there the numbers can be used up.
func attestWrapped() error {
	socket := os.Getenv(socketEnv)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket + ".wrap"})
	if err != nil {
		return err
	}
	self, err := os.Executable()
	if err != nil {
		return err
	}
	connect := func() (*exec.Cmd, error) {
		c := exec.Command(self)
		c.Env = append(os.Environ(), helperEnv+"=connect", socketEnv+"="+socket+".wrap")
		if _, err := c.StdinPipe(); err != nil {
			return nil, err
		}
		return c, c.Start()
	}
	kill := func(c *exec.Cmd) error {
		err := c.Process.Kill()
		_ = c.Wait() // it was killed
		return err
	}
	lastPID := func(n int) error {
		return os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(itoa(n)), 0)
	}
	// Beyond the numbers that the kernel keeps free when it begins anew.
	if err := lastPID(400); err != nil {
		return err
	}
	first, err := connect()
	if err != nil {
		return err
	}
	conn, err := ln.AcceptUnix()
	if err != nil {
		return err
	}
	p, err := Peer(conn)
	if err != nil {
		return err
	}
	a := attestor(mesh.Attest{UID: uid(0), Path: self})
	if _, err := a.Attest(context.Background(), p); err != nil {
		return fmt.Errorf("the first: %w", err)
	}
	if err := kill(first); err != nil {
		return err
	}
	raw, err := os.ReadFile("/proc/sys/kernel/pid_max")
	if err != nil {
		return err
	}
	var most int
	if _, err := fmt.Sscan(string(raw), &most); err != nil {
		return err
	}
	if err := lastPID(most - 20); err != nil {
		return err
	}
	highest := 0
	for range 3000 {
		next, err := connect()
		if err != nil {
			return err
		}
		pid := next.Process.Pid
		highest = max(highest, pid)
		if pid == p.PID {
			if highest < most-20 {
				return errors.New("the numbers were not used up")
			}
			// The second waits for its connection to be accepted, with all that
			// the first was known by.
			_, err := a.Attest(context.Background(), p)
			_, late := Peer(conn)
			fmt.Printf("held: %t late: %t\n", errors.Is(err, ErrGone), errors.Is(late, ErrGone))
			return kill(next)
		}
		if err := kill(next); err != nil {
			return err
		}
		if pid > p.PID && pid < most/2 { // passed by
			if err := lastPID(most - 20); err != nil {
				return err
			}
		}
	}
	return errors.New("no process got the number of the first")
}

// Defends: numbers of processes are used up and begin anew, and the number of a
// caller goes to a process that satisfies every rule.
func TestWrappedPIDs(t *testing.T) {
	b := newBench(t)
	c := b.launch("wrap", b.dir+"/s", "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", b.self)
	c.expect("held: true late: true")
}

// Defends: that a process has exited is asked of its handle too. A directory in
// /proc that is its successor's, who has its number and all that it was known by,
// down to the instant of its start, names nobody. The kernel's own directories go
// with their process; that there is a second word is what is tried here.
func TestDirectoryOfSuccessor(t *testing.T) {
	for name, hold := range map[string]func(*child) (*Process, error){
		"from 6.5":   func(c *child) (*Process, error) { return Peer(c.conn) },
		"before 6.5": func(c *child) (*Process, error) { return open(&unix.Ucred{Pid: int32(c.cmd.Process.Pid)}, -1) },
	} {
		t.Run(name, func(t *testing.T) {
			b := newBench(t)
			first := b.start("connect", b.self)
			p, err := hold(first)
			if err != nil {
				t.Fatal(err)
			}
			defer p.Close()
			first.kill()
			b.reuse(p.PID)
			p.dir.Close()
			if p.dir, err = procfs.Process(p.PID); err != nil {
				t.Fatal(err)
			}
			if p.start, err = p.startTime(); err != nil {
				t.Fatal(err)
			}
			refused(t, attestor(mesh.Attest{UID: uid(0), Path: b.self}), p, ErrGone, "it has exited")
		})
	}
}

// passDescriptor sends a descriptor to the socket that the test named.
func passDescriptor(fd int) error {
	to, err := net.DialUnix("unix", nil, &net.UnixAddr{Name: os.Getenv(socketEnv) + ".pass"})
	if err != nil {
		return err
	}
	defer to.Close()
	_, _, err = to.WriteMsgUnix([]byte{0}, syscall.UnixRights(fd), nil)
	return err
}

// receiveDescriptor takes a descriptor, and writes to it and reads from it.
func receiveDescriptor(next func() bool) error {
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: os.Getenv(socketEnv) + ".pass"})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	from, err := ln.AcceptUnix()
	if err != nil {
		return err
	}
	oob := make([]byte, 64)
	_, n, _, _, err := from.ReadMsgUnix(make([]byte, 1), oob)
	if err != nil {
		return err
	}
	messages, err := syscall.ParseSocketControlMessage(oob[:n])
	if err != nil || len(messages) != 1 {
		return fmt.Errorf("%d messages: %w", len(messages), err)
	}
	fds, err := syscall.ParseUnixRights(&messages[0])
	if err != nil || len(fds) != 1 {
		return fmt.Errorf("%d descriptors: %w", len(fds), err)
	}
	if _, err := syscall.Write(fds[0], []byte("mine")); err != nil {
		return err
	}
	fmt.Println("wrote")
	next()
	return nil
}

// Defends: who is sent somebody's connection is not the one that it speaks
// for. While the process that connected lives, the connection is that one's,
// and once it is gone, nobody's, although it is open and in use.
func TestSentDescriptor(t *testing.T) {
	b := newBench(t)
	k := newKubepods(t)
	thief := b.launch("receive", b.dir+"/s", b.self)
	thief.expect("ready")
	owner := b.start("pass", b.self)
	k.move(owner, "kubepods/burstable/pod"+podUID+"/c1")
	k.move(thief, "kubepods/burstable/pod"+otherUID+"/c1")
	owner.step()
	owner.expect("done")
	thief.expect("wrote")
	said := make([]byte, 4)
	if _, err := owner.conn.Read(said); err != nil || string(said) != "mine" {
		t.Fatalf("%q, %v: the connection was not passed", said, err)
	}
	a := attestor(mesh.Attest{PodUID: podUID}, mesh.Attest{PodUID: otherUID})
	p := owner.peer() // only after the other has used it
	if got := names(t, a, p); len(got) != 1 || got[0] != "w0" {
		t.Errorf("while its owner lives it is %v's, want w0's", got)
	}
	owner.kill()
	refused(t, a, p, ErrGone, "process")
	if _, err := Peer(owner.conn); !errors.Is(err, ErrGone) {
		t.Errorf("%v, want ErrGone", err)
	}
	if err := owner.conn.SetDeadline(time.Now().Add(time.Second)); err != nil {
		t.Fatal(err)
	}
	if _, err := owner.conn.Write([]byte{0}); err != nil && strings.Contains(err.Error(), "pipe") {
		t.Errorf("%v: the other does not hold the connection any more, so nothing was tried", err)
	}
}

// Defends: a pod that mounts the directory of the agent's socket elsewhere, as
// every pod may that the cluster lets mount it, in namespaces of its own of every
// kind that it can have, is itself there.
func TestAnotherPodsMountOfTheSocket(t *testing.T) {
	b := newBench(t)
	k := newKubepods(t)
	at := b.dir + "/elsewhere"
	if err := os.Mkdir(at, 0o755); err != nil {
		t.Fatal(err)
	}
	c := b.launch("connect", b.dir+"/s", "sh", "-c", `read go; exec unshare --mount --uts --ipc --net --cgroup --propagation private sh -c '
		mount --bind `+b.dir+` `+at+` && `+socketEnv+`=`+at+`/s exec `+b.self+`'`)
	k.move(c, "kubepods/burstable/pod"+otherUID+"/c1") // its cgroup namespace begins there
	c.step()
	c.expect("ready")
	b.accept(c)
	p := c.peer()
	if ns, err := os.Readlink("/proc/" + itoa(p.PID) + "/ns/cgroup"); err != nil || ns == ownLink(t, "ns/cgroup") {
		t.Fatalf("it is not in a cgroup namespace of its own: %s, %v", ns, err)
	}
	a := attestor(mesh.Attest{PodUID: podUID}, mesh.Attest{PodUID: otherUID})
	if got := names(t, a, p); len(got) != 1 || got[0] != "w1" {
		t.Errorf("it is %v, want w1", got)
	}
}

func ownLink(t *testing.T, name string) string {
	t.Helper()
	s, err := os.Readlink("/proc/self/" + name)
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Defends: a process that is moved to another cgroup while it is attested has
// neither the identity that it had there before, nor one that is made of both.
func TestMovedMeanwhile(t *testing.T) {
	b := newBench(t)
	k := newKubepods(t)
	sum := b.sum(b.self)
	for name, rule := range map[string]mesh.Attest{
		"pod":    {PodUID: podUID, SHA256: sum},
		"cgroup": {Cgroup: "/" + k.name + "/kubepods/pod" + podUID, SHA256: sum},
	} {
		t.Run(name, func(t *testing.T) {
			c := b.start("connect", b.self)
			k.move(c, "kubepods/pod"+podUID+"/c1")
			p, a := c.peer(), attestor(rule)
			if _, err := a.Attest(t.Context(), p); err != nil {
				t.Fatal(err)
			}
			err := a.meanwhile(t, p, b.self, func() { k.move(c, "kubepods/pod"+otherUID+"/c1") })
			if !errors.Is(err, ErrMoved) {
				t.Errorf("%v, want ErrMoved", err)
			}
			refused(t, a, p, ErrStranger, "")
		})
	}
}

// meanwhile attests p by a rule with a digest, and has something happen after all
// other facts were read and the executable was opened.
func (a *Attestor) meanwhile(t *testing.T, p *Process, executable string, happens func()) error {
	t.Helper()
	// The digest is read last, in turn: while all turns are taken, the place has
	// been looked at and the answer has not been given.
	for range cap(a.digests.turn) {
		a.digests.turn <- struct{}{}
	}
	clear(a.digests.known)
	answer := make(chan error, 1)
	go func() {
		_, err := a.Attest(t.Context(), p)
		answer <- err
	}()
	waitOpen(t, executable)
	happens()
	for range cap(a.digests.turn) {
		<-a.digests.turn
	}
	return <-answer
}

// waitOpen waits until the test itself has a file open.
func waitOpen(t *testing.T, path string) {
	t.Helper()
	for range 2000 {
		fds, err := os.ReadDir("/proc/self/fd")
		if err != nil {
			t.Fatal(err)
		}
		for _, fd := range fds {
			if to, _ := os.Readlink("/proc/self/fd/" + fd.Name()); to == path {
				return
			}
		}
		time.Sleep(5 * time.Millisecond)
	}
	t.Fatal("nobody opened", path)
}
