package attest

import (
	"errors"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/mesh"
)

func itoa(n int) string { return strconv.Itoa(n) }

// refused wants the process to be given nothing, for the reason given.
func refused(t *testing.T, a *Attestor, p *Process, want error, say string) {
	t.Helper()
	ws, err := a.Attest(t.Context(), p)
	if !errors.Is(err, want) || len(ws) != 0 {
		t.Fatalf("attested as %v, %v; want %v", ws, err, want)
	}
	if !strings.Contains(err.Error(), say) {
		t.Errorf("%q does not say %q", err, say)
	}
}

// reuse starts the trusted program under a number that was another process's.
func (b *bench) reuse(pid int) *child {
	b.t.Helper()
	for range 500 {
		// The kernel gives out the next free number after the last one. The
		// loop is for whoever else starts processes on this machine.
		if err := os.WriteFile("/proc/sys/kernel/ns_last_pid", []byte(itoa(pid-1)), 0); err != nil {
			b.t.Fatal(err)
		}
		c := b.launch("connect", filepath.Join(b.dir, "s"), b.self)
		if c.cmd.Process.Pid == pid {
			c.expect("ready")
			return c
		}
		c.kill()
	}
	b.t.Fatalf("could not start a process with number %d", pid)
	return nil
}

// The process number is taken over by a process that satisfies every rule,
// after the first one connected: neither a handle taken before nor one taken
// after the change may name the second.
func TestReusedPID(t *testing.T) {
	b := newBench(t)
	first := b.start("connect", b.self)
	p := first.peer()
	a := attestor(mesh.Attest{UID: uid(0), Path: b.self})
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	first.kill()
	b.reuse(p.PID)
	if _, err := os.Stat("/proc/" + itoa(p.PID)); err != nil {
		t.Fatal(err)
	}
	refused(t, a, p, ErrGone, "process")
	if late, err := Peer(first.conn); !errors.Is(err, ErrGone) {
		t.Errorf("a handle taken after the change: %+v, %v; want ErrGone", late, err)
	}
}

// A process that has exited has no identity, whether its parent has taken
// note of it or not.
func TestExited(t *testing.T) {
	b := newBench(t)
	c := b.start("connect", b.self)
	p := c.peer()
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for p.alive() == nil {
		time.Sleep(time.Millisecond)
	}
	a := attestor(mesh.Attest{UID: uid(0)})
	refused(t, a, p, ErrGone, "")
	if _, err := Peer(c.conn); !errors.Is(err, ErrGone) {
		t.Errorf("Peer of a zombie: %v, want ErrGone", err)
	}
	c.kill()
	refused(t, a, p, ErrGone, "")
	if _, err := Peer(c.conn); !errors.Is(err, ErrGone) {
		t.Errorf("Peer of a reaped process: %v, want ErrGone", err)
	}
}

// A kernel without SO_PEERPIDFD: the handle is opened by number, and the start
// time tells a process from a later one with its number.
func TestWithoutPeerPidfd(t *testing.T) {
	b := newBench(t)
	c := b.start("connect", b.self)
	cred := &unix.Ucred{Pid: int32(c.cmd.Process.Pid)} // of root
	p, err := open(cred, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer p.Close()
	a := attestor(mesh.Attest{Path: b.self})
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	p.start--
	refused(t, a, p, ErrGone, "another time")
	p.start++
	c.kill()
	refused(t, a, p, ErrGone, "")
	if _, err := open(cred, -1); err == nil {
		t.Error("opened a process that is gone")
	}
}

// Defends: on such a kernel the number of a caller that has exited is not taken
// for the process of another user or group that has it now.
func TestOfAnotherWithoutPeerPidfd(t *testing.T) {
	b := newBench(t)
	first := b.start("connect", "setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", b.self)
	cred := &unix.Ucred{Pid: int32(first.cmd.Process.Pid), Uid: 1234, Gid: 1234}
	p, err := open(cred, -1)
	if err != nil {
		t.Fatal(err)
	}
	p.Close()
	first.kill()
	b.reuse(int(cred.Pid)) // by root
	if _, err := open(cred, -1); !errors.Is(err, ErrGone) {
		t.Errorf("%v, want ErrGone", err)
	}
}

// The handle of one process with the number of another is refused.
func TestHandleOfAnother(t *testing.T) {
	b := newBench(t)
	c := b.start("connect", b.self)
	fd, err := unix.PidfdOpen(os.Getpid(), 0)
	if err != nil {
		t.Fatal(err)
	}
	if _, err := open(&unix.Ucred{Pid: int32(c.cmd.Process.Pid)}, fd); !errors.Is(err, ErrGone) {
		t.Errorf("%v, want ErrGone", err)
	}
}

// A process connects and then becomes the trusted program: had the answer
// been made by what runs at the end, whoever shares the connection would have
// obtained the trusted program's identity.
func TestExecAfterConnect(t *testing.T) {
	b := newBench(t)
	c := b.start("exec", b.self)
	p := c.peer()
	cat, err := filepath.EvalSymlinks("/bin/cat")
	if err != nil {
		t.Fatal(err)
	}
	a := attestor(mesh.Attest{Path: cat}, mesh.Attest{Path: b.self}, mesh.Attest{UID: uid(0)})
	c.step()
	c.waitExec("/bin/cat")
	refused(t, a, p, ErrGone, "another program")
}

// A connection is handed to another program. The kernel names the process
// that connected, so the identity is that one's for as long as it lives: it
// answers for whom it lets use its connections. Once it is gone, nobody has
// the identity.
func TestPassedDescriptor(t *testing.T) {
	b := newBench(t)
	c := b.start("inherit", b.self)
	c.step()
	c.expect("done")
	p := c.peer() // asked only after the other program had the connection
	if p.PID != c.cmd.Process.Pid {
		t.Errorf("peer is %d, want the process that connected, %d", p.PID, c.cmd.Process.Pid)
	}
	a := attestor(mesh.Attest{Path: b.self})
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Errorf("while the connecting process lives: %v", err)
	}
	if err := c.cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	for p.alive() == nil {
		time.Sleep(time.Millisecond)
	}
	refused(t, a, p, ErrGone, "")
	c.kill()
}

// A process whose name looks like the fields of /proc/<pid>/stat.
func TestForgedComm(t *testing.T) {
	b := newBench(t)
	c := b.start("comm", b.self)
	p := c.peer()
	a := attestor(mesh.Attest{Path: b.self})
	c.step()
	c.expect("done")
	stat, err := p.read("stat")
	if err != nil || !strings.Contains(string(stat), "() S 1 1 1 ((((") {
		t.Fatalf("the name was not taken: %q, %v", stat, err)
	}
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Error(err)
	}
}

// The executable is deleted, or replaced, while the process runs: its path
// proves nothing any more, whatever the name looks like.
func TestDeletedExecutable(t *testing.T) {
	b := newBench(t)
	odd := filepath.Join(b.dir, "app (deleted)")
	b.copyTo(b.self, odd)
	a := attestor(mesh.Attest{Path: b.self}, mesh.Attest{Path: b.self + " (deleted)"},
		mesh.Attest{Path: filepath.Join(b.dir, "app")}, mesh.Attest{Path: odd})
	p := b.start("connect", b.self).peer()
	q := b.start("connect", odd).peer()
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	refused(t, a, q, ErrStranger, "deleted or replaced") // a file of that name is not told apart
	if err := os.Remove(b.self); err != nil {
		t.Fatal(err)
	}
	refused(t, a, p, ErrStranger, "deleted or replaced")
	b.copyTo("/bin/cat", b.self)
	refused(t, a, p, ErrStranger, "deleted or replaced")
	b.copyTo("/bin/cat", b.self+" (deleted)")
	refused(t, a, p, ErrStranger, "deleted or replaced")
}

// A process in a mount namespace of its own makes its executable appear under
// the trusted path. The kernel reports the path as that namespace has it, so
// a comparison of strings would believe it.
func TestMountNamespaceForgery(t *testing.T) {
	b := newBench(t)
	evil := filepath.Join(b.dir, "evil")
	b.copyTo(b.self, evil)
	c := b.start("connect", "unshare", "--mount", "--propagation", "private",
		"sh", "-c", "mount --bind "+evil+" "+b.self+" && exec "+b.self)
	p := c.peer()
	if exe, err := os.Readlink("/proc/" + itoa(p.PID) + "/exe"); err != nil || exe != b.self {
		t.Fatalf("the forgery does not work here: %s, %v", exe, err)
	}
	refused(t, attestor(mesh.Attest{Path: b.self}), p, ErrStranger, "another file than the agent's")

	// Another mount namespace as such is no reason: this is how programs
	// started by `ip netns exec` run.
	honest := b.start("connect", "unshare", "--mount", "--propagation", "private", b.self).peer()
	if _, err := attestor(mesh.Attest{Path: b.self}).Attest(t.Context(), honest); err != nil {
		t.Error(err)
	}
}

// In a user namespace of its own, any process may point /proc/<pid>/exe at
// another file. There its executable proves nothing; its user id still does.
func TestUserNamespace(t *testing.T) {
	b := newBench(t)
	p := b.start("connect", "setpriv", "--reuid=1234", "--regid=1234", "--clear-groups",
		"unshare", "--user", "--map-root-user", b.self).peer()
	if p.UID != 1234 {
		t.Errorf("uid %d; want 1234, the one outside, not root inside", p.UID)
	}
	refused(t, attestor(mesh.Attest{Path: b.self}), p, ErrStranger, "another user namespace")
	refused(t, attestor(mesh.Attest{SHA256: b.sum(b.self)}), p, ErrStranger, "another user namespace")
	refused(t, attestor(mesh.Attest{UID: uid(0)}), p, ErrStranger, "uid")
	if _, err := attestor(mesh.Attest{UID: uid(1234)}).Attest(t.Context(), p); err != nil {
		t.Error(err)
	}
}

// An agent in a pid namespace cannot name callers from outside of it: the
// kernel reports number 0 for all of them.
func TestOtherPIDNamespace(t *testing.T) {
	b := newBench(t)
	socket := filepath.Join(b.dir, "inner")
	c := b.launch("peer", socket, "unshare", "--pid", "--fork", "--kill-child", "--mount-proc", b.self)
	c.expect("ready")
	conn, err := net.Dial("unix", socket)
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	line, err := c.out.ReadString('\n')
	if err != nil || !strings.Contains(line, "another pid namespace") {
		t.Errorf("said %q, %v; want a refusal", line, err)
	}
	// The other way round works: a caller in an inner namespace has a number
	// in the agent's.
	inner := b.start("connect", "unshare", "--pid", "--fork", "--kill-child", b.self)
	if _, err := attestor(mesh.Attest{Path: b.self}).Attest(t.Context(), inner.peer()); err != nil {
		t.Error(err)
	}
}

// What a process mounts in its own mount namespace says nothing about it:
// with a directory named like a trusted cgroup in its mountinfo, it is still
// where /proc/<pid>/cgroup says.
func TestMountinfoForgery(t *testing.T) {
	b := newBench(t)
	own := filepath.Join(b.dir, "system.slice/nginx.service")
	at := filepath.Join(b.dir, "mnt")
	if err := errors.Join(os.MkdirAll(own, 0o755), os.Mkdir(at, 0o755)); err != nil {
		t.Fatal(err)
	}
	p := b.start("connect", "unshare", "--mount", "--propagation", "private",
		"sh", "-c", "mount --bind "+own+" "+at+" && exec "+b.self).peer()
	info, err := os.ReadFile("/proc/" + itoa(p.PID) + "/mountinfo")
	if err != nil || !strings.Contains(string(info), "/system.slice/nginx.service ") {
		t.Fatalf("the forgery does not work here: %v", err)
	}
	refused(t, attestor(mesh.Attest{Cgroup: "/system.slice/nginx.service"}), p, ErrStranger, "cgroup")
	refused(t, attestor(mesh.Attest{SystemdUnit: "nginx.service"}), p, ErrStranger, "systemdUnit")
}
