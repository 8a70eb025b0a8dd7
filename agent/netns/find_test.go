package netns

import (
	"context"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strconv"
	"strings"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/lab"
)

// Which pod a cgroup is, in every layout that kubelets and runtimes make, and
// in none that a pod could make inside of its own.
func TestPodIn(t *testing.T) {
	const u = "kubepods-burstable-pod0b8e7d0e_3f6c_4b0e_9a53_5a1f0a4c2f11.slice"
	for path, want := range map[string]place{
		"/kubepods/burstable/pod" + uidA + "/0123":                                                   {"", uidA},
		"/kubepods/besteffort/pod" + uidA:                                                            {"", uidA},
		"/kubepods/pod" + uidA + "/0123":                                                             {"", uidA},
		"/kubepods/pod0123456789abcdef0123456789abcdef/x":                                            {"", "0123456789abcdef0123456789abcdef"},
		"/node1/kubepods/burstable/pod" + uidA + "/0123":                                             {"/node1", uidA},
		"/kubepods.slice/kubepods-burstable.slice/" + u + "/cri-containerd-0123.scope":               {"", uidA},
		"/kubepods.slice/" + strings.Replace(u, "burstable-", "", 1) + "/crio-0.scope":               {"", uidA},
		"/kubelet.slice/kubelet-kubepods.slice/kubelet-kubepods-burstable.slice/kubelet-" + u + "/x": {"/kubelet.slice", uidA},
		"/system.slice/containerd.service/" + u + ":cri-containerd:0123":                             {"/system.slice/containerd.service", uidA},
		// The outermost pod: what is below it is the pod's to make.
		"/kubepods/pod" + uidA + "/x/kubepods/pod" + uidB + "/y":               {"", uidA},
		"/kubepods/pod" + uidA + "/x/" + strings.ReplaceAll(u, "0b8e", "1111"): {"", uidA},

		"/":                                 {},
		"/system.slice/sshd.service":        {},
		"/pod" + uidA:                       {},
		"/kubepods/pod":                     {},
		"/kubepods/burstable":               {},
		"/kubepods/other/pod" + uidA:        {},
		"/burstable/pod" + uidA:             {},
		"/xkubepods/pod" + uidA:             {},
		"/kubepods/podx y":                  {},
		"/kubepods-pod" + uidA + ".scope":   {},
		"/xkubepods-pod" + uidA + ".slice":  {},
		"/kubepods-pod" + uidA + ".slicer/": {},
	} {
		got, ok := podIn(path)
		if got != want || ok != (want != place{}) {
			t.Errorf("%s: %+v, %v; want %+v", path, got, ok, want)
		}
	}
}

func FuzzPods(f *testing.F) {
	f.Add("0::/kubepods/pod"+uidA+"/x\n", "/x")
	f.Add("3:cpu,cpuacct:/kubepods.slice/kubepods-pod0b8e7d0e_3f6c.slice/a\n0::/\n", "/kubepods/poda")
	f.Fuzz(func(t *testing.T, file, below string) {
		pods, _, err := podsOf(file)
		if err != nil {
			return
		}
		for _, p := range pods {
			if CheckUID(p.uid) != nil || (p.root != "" && !strings.HasPrefix(p.root, "/")) {
				t.Errorf("%q: %+v", file, p)
			}
		}
		// Whatever a pod makes below its own cgroup changes nothing.
		if got, ok := podIn("/kubepods/pod" + uidA + "/" + below); !ok || got != (place{"", uidA}) {
			t.Errorf("below %q: %+v, %v", below, got, ok)
		}
	})
}

// kernel is a Procfs on the real one.
var kernel = Procfs{Proc: "/proc", Host: host}

// sleeper is a process in a pod's network namespace.
func sleeper(t *testing.T, p *lab.Pod, argv ...string) int {
	t.Helper()
	if argv == nil {
		argv = []string{"sleep", "1000"}
	}
	c := exec.CommandContext(t.Context(), argv[0], argv[1:]...)
	start := c.Start
	if p != nil {
		start = func() error { return p.Do(c.Start) }
	}
	if err := start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = c.Process.Kill(); _ = c.Wait() })
	return c.Process.Pid
}

// cgroup makes a cgroup in every hierarchy of this machine that can be
// written, moves the processes there and returns how many took them.
func cgroup(t *testing.T, path string, pids ...int) (n int) {
	t.Helper()
	for _, root := range hierarchies(t) {
		top := filepath.Join(root, path)
		if err := os.MkdirAll(top, 0o755); err != nil {
			continue
		}
		t.Cleanup(func() {
			for _, pid := range pids {
				_ = unix.Kill(pid, unix.SIGKILL) // whoever started it reaps it
			}
			for d := top; d != root; d = filepath.Dir(d) {
				for range 100 { // a killed process leaves its cgroup a little later
					if err := os.Remove(d); err == nil || errors.Is(err, os.ErrNotExist) || d != top {
						break // parents: the last of their children's clean-ups removes them
					}
					time.Sleep(10 * time.Millisecond)
				}
			}
		})
		ok := true
		for _, pid := range pids {
			ok = ok && os.WriteFile(filepath.Join(top, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0) == nil
		}
		if ok {
			n++
		}
	}
	if n == 0 {
		t.Fatal("no cgroup hierarchy can be written on this machine")
	}
	return n
}

func hierarchies(t *testing.T) (out []string) {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		before, after, _ := strings.Cut(line, " - ")
		if kind := strings.Fields(after)[0]; kind == "cgroup" || kind == "cgroup2" {
			out = append(out, strings.Fields(before)[4])
		}
	}
	return out
}

func find(t *testing.T, p Procfs, uid string) (uint64, int, error) {
	t.Helper()
	f, err := p.Find(t.Context(), uid)
	if err != nil {
		return 0, 0, err
	}
	defer f.Close()
	return inode(t, f.Path()), f.PID, nil
}

// A real process in real cgroups. Defends: which namespace is which pod's
// comes from the kernel; the oldest process decides, so that one which the
// pod started later in another namespace changes nothing; the namespace that
// was found can be pinned after the process is gone.
func TestFind(t *testing.T) {
	a, b := pods(t)
	dir := "/kubepods/burstable/pod" + uidA
	pause := sleeper(t, a)
	time.Sleep(50 * time.Millisecond) // start times are in hundredths of a second
	later := sleeper(t, b)
	time.Sleep(50 * time.Millisecond)
	cgroup(t, dir+"/main", later) // a smaller number does not matter, nor the order
	cgroup(t, dir+"/sandbox", pause)
	f, err := kernel.Find(t.Context(), uidA)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	if f.PID != pause || inode(t, f.Path()) != inode(t, a.NetNS) {
		t.Errorf("process %d, want %d", f.PID, pause)
	}
	if err := unix.Kill(pause, unix.SIGKILL); err != nil {
		t.Fatal(err)
	}
	s := newStore(t, t.TempDir())
	if p := mustPin(t, s, uidA, f.Path()); p.Inode != inode(t, a.NetNS) {
		t.Errorf("%+v", p)
	}
	if _, _, err := find(t, kernel, uidB); !errors.Is(err, ErrNotFound) {
		t.Errorf("a pod that is not here: %v", err)
	}
}

// Defends: a pod with hostNetwork is never captured, while a runtime's
// monitor, which is in the pod's cgroup and the node's namespace and older
// than the pod, is passed over.
func TestFindHost(t *testing.T) {
	a, _ := pods(t)
	dir := "/kubepods.slice/kubepods-pod" + strings.ReplaceAll(uidA, "-", "_") + ".slice"
	monitor := sleeper(t, nil)
	cgroup(t, dir+"/crio-conmon-1.scope", monitor)
	if _, _, err := find(t, kernel, uidA); !errors.Is(err, ErrHost) {
		t.Errorf("hostNetwork: %v", err)
	}
	time.Sleep(50 * time.Millisecond)
	main := sleeper(t, a)
	cgroup(t, dir+"/crio-1.scope", main)
	if ino, pid, err := find(t, kernel, uidA); err != nil || pid != main || ino != inode(t, a.NetNS) {
		t.Errorf("process %d, want %d: %v", pid, main, err)
	}
}

// Defends: a user of the node with cgroups of their own names one like a
// pod's, to have another namespace taken for the pod's.
func TestFindForgedTree(t *testing.T) {
	a, b := pods(t)
	forged := sleeper(t, a)
	cgroup(t, "/user.slice/user-1000.slice/kubepods/burstable/pod"+uidA+"/x", forged)
	if _, _, err := find(t, kernel, uidA); !errors.Is(err, ErrNotFound) {
		t.Errorf("the forged tree is believed: %v", err)
	}
	time.Sleep(50 * time.Millisecond)
	real := sleeper(t, b)
	cgroup(t, "/kubepods/burstable/pod"+uidA+"/x", real)
	if ino, pid, err := find(t, kernel, uidA); err != nil || pid != real || ino != inode(t, b.NetNS) {
		t.Errorf("process %d, want %d: %v", pid, real, err)
	}
	// A kubelet whose tree is elsewhere on purpose.
	below := kernel
	below.CgroupRoot = "/user.slice/user-1000.slice"
	if _, pid, err := find(t, below, uidA); err != nil || pid != forged {
		t.Errorf("process %d, want %d: %v", pid, forged, err)
	}
}

// fixture is a forged /proc.
type fixture struct {
	t    *testing.T
	root string
}

func newFixture(t *testing.T) (fixture, Procfs) {
	f := fixture{t, t.TempDir()}
	f.add(1, 1, "init", "0::/init.scope\n", host)
	return f, Procfs{Proc: f.root, Host: host}
}

func (f fixture) add(pid, start int, comm, cgroup, ns string) {
	f.t.Helper()
	dir := filepath.Join(f.root, strconv.Itoa(pid))
	link := filepath.Join(dir, "ns", "net")
	_ = os.Remove(link)
	write := func(name, text string) error { return os.WriteFile(filepath.Join(dir, name), []byte(text), 0o600) }
	state := "S"
	if ns == "" {
		state, ns = "Z", "/nonexistent"
	}
	if err := errors.Join(os.MkdirAll(filepath.Dir(link), 0o755), os.Symlink(ns, link), write("comm", comm+"\n"), write("cgroup", cgroup),
		write("stat", fmt.Sprintf("%d (%s) %s 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20 21 %d 22 23\n", pid, comm, state, start))); err != nil {
		f.t.Fatal(err)
	}
}

// Defends: conflicting facts fail closed, and the process's own choices (its
// name, namespaces it makes later) decide nothing that they may not.
func TestFindConflicts(t *testing.T) {
	a, b := pods(t)
	in := func(uid string) string {
		return "2:cpu:/kubepods/pod" + uid + "/x\n1:memory:/kubepods/pod" + uid + "/x\n0::/\n"
	}
	for _, tc := range []struct {
		name string
		make func(f fixture)
		want *lab.Pod
		is   error
	}{
		{"one", func(f fixture) { f.add(7, 100, "pause", in(uidA), a.NetNS) }, a, nil},
		{"oldest", func(f fixture) {
			f.add(7, 200, "pause", in(uidA), b.NetNS)
			f.add(9, 100, "nginx", in(uidA), a.NetNS)
		}, a, nil},
		{"same moment, one is the sandbox's", func(f fixture) {
			f.add(7, 100, "evil", in(uidA), b.NetNS)
			f.add(9, 100, "pause", in(uidA), a.NetNS)
		}, a, nil},
		{"same moment, two say they are the sandbox's", func(f fixture) {
			f.add(7, 100, "pause", in(uidA), b.NetNS)
			f.add(9, 100, "pause", in(uidA), a.NetNS)
		}, nil, ErrConflict},
		{"same moment, none is", func(f fixture) {
			f.add(7, 100, "x", in(uidA), b.NetNS)
			f.add(9, 100, "y", in(uidA), a.NetNS)
		}, nil, ErrConflict},
		{"same moment, same namespace", func(f fixture) {
			f.add(7, 100, "x", in(uidA), a.NetNS)
			f.add(9, 100, "y", in(uidA), a.NetNS)
		}, a, nil},
		{"hierarchies conflict", func(f fixture) {
			f.add(7, 100, "pause", in(uidA), a.NetNS)
			f.add(9, 200, "x", "2:cpu:/kubepods/pod"+uidA+"/x\n1:memory:/kubepods/pod"+uidB+"/x\n", b.NetNS)
		}, nil, ErrConflict},
		{"one hierarchy says nothing", func(f fixture) {
			f.add(7, 100, "pause", "2:cpu:/kubepods/pod"+uidA+"/x\n0::/system.slice/containerd.service\n", a.NetNS)
		}, a, nil},
		{"a name like fields of stat", func(f fixture) {
			f.add(7, 100, ") S 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 1 999 (", in(uidA), a.NetNS)
			f.add(9, 500, "x", in(uidA), b.NetNS)
		}, a, nil},
		{"the oldest has ended", func(f fixture) {
			f.add(7, 100, "x", in(uidA), "")
			f.add(9, 200, "y", in(uidA), a.NetNS)
		}, a, nil},
		{"not a namespace", func(f fixture) { f.add(7, 100, "x", in(uidA), "/dev/null") }, nil, errors.ErrUnsupported},
		{"outside of the cgroup namespace", func(f fixture) { f.add(7, 100, "x", "0::/../../burstable/pod"+uidA+"/x\n", a.NetNS) }, nil, ErrNotFound},
		{"host", func(f fixture) { f.add(7, 100, "x", in(uidA), host) }, nil, ErrHost},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f, p := newFixture(t)
			f.add(3, 50, "other", in(uidB), b.NetNS)
			tc.make(f)
			ino, _, err := find(t, p, uidA)
			switch {
			case tc.want != nil && (err != nil || ino != inode(t, tc.want.NetNS)):
				t.Errorf("%d, %v; want pod %s", ino, err, tc.want.Name)
			case tc.want == nil && err == nil:
				t.Error("found")
			case tc.is == errors.ErrUnsupported:
				if !strings.Contains(err.Error(), "not a network namespace") {
					t.Error(err)
				}
			case tc.is != nil && !errors.Is(err, tc.is):
				t.Errorf("%v, want %v", err, tc.is)
			}
			if err != nil {
				t.Log(err)
			}
		})
	}
}

// Defends: a number that was given to another process, or a process that
// moved to another pod, between the look and the opening of its namespace.
func TestFindReusedNumber(t *testing.T) {
	a, b := pods(t)
	in := func(uid string) string { return "0::/kubepods/pod" + uid + "/x\n" }
	for name, then := range map[string]func(f fixture){
		"another process": func(f fixture) { f.add(7, 300, "pause", in(uidA), b.NetNS) },
		"another pod":     func(f fixture) { f.add(7, 100, "pause", in(uidB), b.NetNS) },
		"gone":            func(f fixture) { _ = os.RemoveAll(filepath.Join(f.root, "7")) },
	} {
		f, p := newFixture(t)
		f.add(7, 100, "pause", in(uidA), a.NetNS)
		s, err := p.Scan(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		then(f)
		if found, err := s.Find(uidA); !errors.Is(err, ErrGone) {
			t.Errorf("%s: %+v, %v; want ErrGone", name, found, err)
		}
	}
}

func TestFindCancelled(t *testing.T) {
	ctx, cancel := context.WithCancel(t.Context())
	cancel()
	if _, err := kernel.Find(ctx, uidA); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
	if _, err := kernel.Find(t.Context(), "../x"); err == nil {
		t.Error("a UID with a path in it")
	}
}

// Defends: without hostPID the agent sees itself only; it says so.
func TestFindWithoutHostPID(t *testing.T) {
	_, p := newFixture(t)
	if _, err := p.Find(t.Context(), uidA); !errors.Is(err, ErrNotFound) || !strings.Contains(err.Error(), "hostPID") {
		t.Error(err)
	}
}

func TestOwnCgroupRoot(t *testing.T) {
	root := t.TempDir()
	for file, want := range map[string]string{
		"0::/\n":                            "",
		"0::/system.slice/signet.service\n": "",
		"0::/kubepods/besteffort/pod" + uidA + "/x\n":      "",
		"2:cpu:/n1/kubepods/pod" + uidA + "/x\n0::/\n":     "/n1",
		"1:a:/kubepods/pod" + uidA + "\n0::/kubepods/podx": "!",
	} {
		if err := errors.Join(os.MkdirAll(filepath.Join(root, "self"), 0o755), os.WriteFile(filepath.Join(root, "self", "cgroup"), []byte(file), 0o600)); err != nil {
			t.Fatal(err)
		}
		got, err := OwnCgroupRoot(root)
		if (err != nil) != (want == "!") || (err == nil && got != want) {
			t.Errorf("%q: %q, %v; want %q", file, got, err, want)
		}
	}
}

func BenchmarkScan(b *testing.B) {
	for b.Loop() {
		if _, err := kernel.Scan(b.Context()); err != nil {
			b.Fatal(err)
		}
	}
}
