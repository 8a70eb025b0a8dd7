package attest

import (
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/mesh"
)

// kubepods makes cgroups as the kubelet does, in every hierarchy that gives the
// test itself a place, so that a process can be moved out of that.
type kubepods struct {
	t     *testing.T
	name  string            // of the cgroup around it
	roots map[string]string // hierarchy -> a directory that shows its root
}

func newKubepods(t *testing.T) *kubepods {
	t.Helper()
	k := &kubepods{t: t, name: fmt.Sprintf("signet-attest-test-%d", time.Now().UnixNano()), roots: map[string]string{}}
	raw, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		parts := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if hierarchy := parts[1]; hierarchy == "" || parts[2] != "/" {
			k.roots[hierarchy] = k.mount(hierarchy)
		}
	}
	return k
}

// mount makes the root of a hierarchy visible.
func (k *kubepods) mount(hierarchy string) string {
	k.t.Helper()
	dir := k.t.TempDir()
	kind := "cgroup"
	if hierarchy == "" {
		kind = "cgroup2"
	}
	options := hierarchy
	if strings.HasPrefix(hierarchy, "name=") {
		options = "none," + hierarchy
	}
	if err := unix.Mount("none", dir, kind, 0, options); err != nil {
		k.t.Fatalf("mount cgroup %q: %v", hierarchy, err)
	}
	k.t.Cleanup(func() {
		if err := unix.Unmount(dir, unix.MNT_DETACH); err != nil {
			k.t.Error(err)
		}
	})
	return dir
}

// move puts a process into a cgroup below the test's own, in every hierarchy.
func (k *kubepods) move(c *child, path string) {
	k.t.Helper()
	for _, root := range k.roots {
		dir := filepath.Join(root, k.name, path)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			k.t.Fatal(err)
		}
		k.t.Cleanup(func() { k.remove(c, root, dir) })
		if err := os.WriteFile(filepath.Join(dir, "cgroup.procs"), []byte(strconv.Itoa(c.cmd.Process.Pid)), 0); err != nil {
			k.t.Fatal(err)
		}
	}
}

// remove takes away a cgroup, and those above it that are empty then.
func (k *kubepods) remove(c *child, root, dir string) {
	c.kill()
	for ; dir != root; dir = filepath.Dir(dir) {
		for range 100 { // the process may not be quite gone
			if err := unix.Rmdir(dir); err != unix.EBUSY {
				break
			}
			if entries, _ := filepath.Glob(dir + "/*/cgroup.procs"); len(entries) > 0 {
				return // others are below
			}
			time.Sleep(10 * time.Millisecond)
		}
	}
}

// The kernel's own word: a process in a pod's cgroup is that pod, and no other;
// one of another pod that has the first one's socket in its file system is not,
// nor is one on the node.
func TestPodProcess(t *testing.T) {
	b := newBench(t)
	k := newKubepods(t)
	mine, other := b.start("connect", b.self), b.start("connect", b.self)
	k.move(mine, "kubepods/burstable/pod"+podUID+"/c1")
	k.move(other, "kubepods/besteffort/pod"+otherUID+"/c1")
	a := attestor(mesh.Attest{PodUID: podUID}, mesh.Attest{PodUID: otherUID})
	if got := names(t, a, mine.peer()); len(got) != 1 || got[0] != "w0" {
		t.Errorf("the pod's process: %v", got)
	}
	if got := names(t, a, other.peer()); len(got) != 1 || got[0] != "w1" {
		t.Errorf("another pod's process on the same socket: %v", got)
	}
	refused(t, a, b.start("connect", b.self).peer(), ErrStranger, "podUID")

	// Every further rule must match as well.
	both := attestor(mesh.Attest{PodUID: podUID, UID: uid(1)})
	refused(t, both, mine.peer(), ErrStranger, "uid")
}

// A container that was given its cgroup makes others below it that are named
// like another pod's: it is still where it is.
func TestPodForgedBelow(t *testing.T) {
	b := newBench(t)
	k := newKubepods(t)
	c := b.start("connect", b.self)
	k.move(c, "kubepods/pod"+otherUID+"/c1/kubepods/pod"+podUID+"/c1")
	refused(t, attestor(mesh.Attest{PodUID: podUID}), c.peer(), ErrStranger, otherUID)
}

// The number of a pod's process is given to another process of the same pod:
// the connection was the first one's. A process that becomes another program
// between connecting and the answer gets nothing either.
func TestPodProcessReplaced(t *testing.T) {
	b := newBench(t)
	k := newKubepods(t)
	in := "kubepods/pod" + podUID + "/c1"
	a := attestor(mesh.Attest{PodUID: podUID})

	first := b.start("connect", b.self)
	k.move(first, in)
	p := first.peer()
	if _, err := a.Attest(t.Context(), p); err != nil {
		t.Fatal(err)
	}
	first.kill()
	k.move(b.reuse(p.PID), in)
	refused(t, a, p, ErrGone, "process")

	b = newBench(t) // the second process's connection waits on the first's socket
	c := b.start("exec", b.self)
	k.move(c, in)
	q := c.peer()
	if q.PID != c.cmd.Process.Pid {
		t.Fatalf("peer is %d, want %d", q.PID, c.cmd.Process.Pid)
	}
	c.step()
	c.waitExec("/bin/cat")
	refused(t, a, q, ErrGone, "another program")
}
