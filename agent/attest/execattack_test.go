package attest

import (
	"errors"
	"os"
	"path/filepath"
	"slices"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/mesh"
)

// A process that becomes another program keeps its number, its start time, its
// cgroups and its connections. The tests here are about the three instants at
// which it can do so: before it is accepted, while it is attested, and after
// (TestExecAfterConnect). The identity is that of the program that runs when the
// answer is given, or nobody's, and never that of the program before.

// execBeforeAccept starts a helper of user 1234 in a pod, has it connect and then
// become another program, and accepts its connection.
func execBeforeAccept(t *testing.T, b *bench, k *kubepods, program string) *child {
	t.Helper()
	t.Setenv(execEnv, program)
	c := b.launch("exec", filepath.Join(b.dir, "s"), "setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", b.self)
	c.expect("ready")
	k.move(c, "kubepods/burstable/pod"+podUID+"/c1")
	c.step()
	c.waitExec(program)
	b.accept(c)
	return c
}

// Defends: who connects as one program and is accepted as another has nothing of
// the first: path and digest are those of the second. What does not hang on the
// program stays: the pod, and the user who connected. So who may start a trusted
// program speaks for it, with a connection of before; rules with a path name a
// user or a place beside.
func TestExecBeforeAccept(t *testing.T) {
	b := newBench(t)
	second := filepath.Join(b.dir, "second")
	b.copyTo("/bin/cat", second)
	a := attestor(
		mesh.Attest{Path: b.self},
		mesh.Attest{SHA256: b.sum(b.self)},
		mesh.Attest{UID: uid(1234), PodUID: podUID, Path: b.self},
		mesh.Attest{Path: second},
		mesh.Attest{SHA256: b.sum(second)},
		mesh.Attest{UID: uid(1234), PodUID: podUID, Path: second},
		mesh.Attest{PodUID: podUID},
		mesh.Attest{UID: uid(1234)},
	)
	c := execBeforeAccept(t, b, newKubepods(t), second)
	byNumber, err := open(&unix.Ucred{Pid: int32(c.cmd.Process.Pid), Uid: 1234, Gid: 1234}, -1)
	if err != nil {
		t.Fatal(err)
	}
	defer byNumber.Close()
	for name, p := range map[string]*Process{"from 6.5": c.peer(), "before 6.5": byNumber} {
		if got, want := names(t, a, p), []string{"w3", "w4", "w5", "w6", "w7"}; !slices.Equal(got, want) {
			t.Errorf("%s: matches %v, want %v", name, got, want)
		}
	}
}

// Defends: a program that is another user's by its file's mode gives whoever
// starts it with a connection of before not that user's identity. Where the kernel
// cannot give a handle of the peer, it is nobody.
func TestSetUserIDBeforeAccept(t *testing.T) {
	b := newBench(t)
	second := filepath.Join(b.dir, "second")
	b.copyTo("/bin/cat", second)
	if err := os.Chmod(second, 0o755|os.ModeSetuid); err != nil {
		t.Fatal(err)
	}
	c := execBeforeAccept(t, b, newKubepods(t), second)
	p := c.peer()
	if status, err := p.read("status"); err != nil {
		t.Fatal(err)
	} else if now, _, err := effectiveIDs(status); err != nil || now != 0 {
		t.Fatalf("it runs as user %d, %v: nothing was tried", now, err)
	}
	a := attestor(mesh.Attest{UID: uid(0)}, mesh.Attest{UID: uid(0), Path: second}, mesh.Attest{UID: uid(1234), Path: second})
	if got := names(t, a, p); !slices.Equal(got, []string{"w2"}) {
		t.Errorf("matches %v, want w2", got)
	}
	if _, err := open(&unix.Ucred{Pid: int32(p.PID), Uid: 1234, Gid: 1234}, -1); !errors.Is(err, ErrGone) {
		t.Errorf("before 6.5: %v, want ErrGone", err)
	}
}

// Defends: a process that becomes another program while it is attested does not
// get what the first one was found to be.
func TestExecMeanwhile(t *testing.T) {
	b := newBench(t)
	c := b.start("exec", b.self)
	a := attestor(mesh.Attest{UID: uid(0), SHA256: b.sum(b.self)})
	err := a.meanwhile(t, c.peer(), b.self, func() {
		c.step()
		c.waitExec("/bin/cat")
	})
	if !errors.Is(err, ErrGone) {
		t.Errorf("%v, want ErrGone", err)
	}
}
