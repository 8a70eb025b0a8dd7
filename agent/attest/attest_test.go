package attest

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/internal/mesh"
)

// names attests p and returns the names of the workloads that match.
func names(t *testing.T, a *Attestor, p *Process) []string {
	t.Helper()
	ws, err := a.Attest(t.Context(), p)
	if err != nil && !errors.Is(err, ErrStranger) {
		t.Fatal(err)
	}
	var out []string
	for _, w := range ws {
		out = append(out, w.Name)
	}
	return out
}

// Every rule that is set must match; several workloads may.
func TestRules(t *testing.T) {
	b := newBench(t)
	c := b.start("connect", b.self)
	p := c.peer()
	if p.PID != c.cmd.Process.Pid || p.UID != 0 || p.GID != 0 {
		t.Errorf("peer %+v, want pid %d of root", p, c.cmd.Process.Pid)
	}
	sum, wrong := b.sum(b.self), strings.Repeat("0", 64)
	a := attestor(
		mesh.Attest{UID: uid(0)},
		mesh.Attest{Path: b.self},
		mesh.Attest{SHA256: sum},
		mesh.Attest{UID: uid(0), Path: b.self, SHA256: sum},
		mesh.Attest{UID: uid(1), Path: b.self, SHA256: sum},
		mesh.Attest{UID: uid(0), Path: b.self + "x", SHA256: sum},
		mesh.Attest{UID: uid(0), Path: b.self, SHA256: wrong},
		mesh.Attest{UID: uid(0), Cgroup: "/no/such"},
		mesh.Attest{UID: uid(0), SystemdUnit: "nginx.service"},
		mesh.Attest{}, // manifests refuse it; it must not match everyone
	)
	if got, want := names(t, a, p), []string{"w0", "w1", "w2", "w3"}; !slices.Equal(got, want) {
		t.Errorf("matches %v, want %v", got, want)
	}
	// The refusal says for each workload what differed.
	a = attestor(mesh.Attest{UID: uid(7)}, mesh.Attest{Path: "/bin/other"})
	_, err := a.Attest(t.Context(), p)
	if !errors.Is(err, ErrStranger) {
		t.Fatalf("%v, want ErrStranger", err)
	}
	for _, want := range []string{"default/w0: uid: want 7, is 0", "default/w1: path: want /bin/other, is " + b.self} {
		if !strings.Contains(err.Error(), want) {
			t.Errorf("%q does not say %q", err, want)
		}
	}
	if _, err := New().Attest(t.Context(), p); !errors.Is(err, ErrStranger) {
		t.Errorf("without workloads: %v, want ErrStranger", err)
	}
}

// The user id is that of the socket's peer.
func TestOtherUser(t *testing.T) {
	b := newBench(t)
	p := b.start("connect", "setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", b.self).peer()
	if p.UID != 1234 {
		t.Errorf("uid %d, want 1234", p.UID)
	}
	a := attestor(mesh.Attest{UID: uid(0)}, mesh.Attest{UID: uid(1234), Path: b.self})
	if got := names(t, a, p); !slices.Equal(got, []string{"w1"}) {
		t.Errorf("matches %v, want w1", got)
	}
}

// A process in a cgroup of its own, as the kernel reports it. Where the
// machine has version 1 hierarchies beside version 2, the process is put into
// the cgroup in some of them only, which must not be enough.
func TestRealCgroup(t *testing.T) {
	b := newBench(t)
	const name = "signet-attest-test"
	var roots []string // of hierarchies that can be written
	for _, glob := range []string{"/sys/fs/cgroup", "/sys/fs/cgroup/*"} {
		dirs, _ := filepath.Glob(glob)
		for _, d := range dirs {
			if _, err := os.Stat(filepath.Join(d, "cgroup.procs")); err == nil && !strings.HasSuffix(d, ".slice") {
				roots = append(roots, d)
			}
		}
		if glob == "/sys/fs/cgroup" && len(roots) > 0 {
			break // version 2 only; what is below are cgroups
		}
	}
	c := b.start("connect", b.self)
	pid := []byte(itoa(c.cmd.Process.Pid))
	var joined []string
	for _, r := range roots {
		cg := filepath.Join(r, name)
		if err := os.Mkdir(cg, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			continue // cpuset and the like may refuse
		}
		t.Cleanup(func() { removeCgroup(t, cg) })
		if err := os.WriteFile(filepath.Join(cg, "cgroup.procs"), pid, 0); err == nil {
			joined = append(joined, r)
		}
	}
	t.Cleanup(c.kill) // before the cgroups are removed
	if len(joined) == 0 {
		t.Fatal("no cgroup hierarchy can be written on this machine")
	}
	raw, err := os.ReadFile("/proc/" + itoa(c.cmd.Process.Pid) + "/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	all := true // every hierarchy that gives a place gives this one
	for line := range strings.Lines(string(raw)) {
		if path := line[strings.LastIndex(line, ":")+1:]; path != "/\n" && path != "/"+name+"\n" {
			all = false
		}
	}
	a := attestor(mesh.Attest{Cgroup: "/" + name}, mesh.Attest{Cgroup: "/" + name + "-other"})
	p := c.peer()
	got := names(t, a, p)
	if want := []string{"w0"}; all && !slices.Equal(got, want) || !all && len(got) != 0 {
		t.Errorf("matches %v; the kernel says:\n%s", got, raw)
	}
	if len(joined) < 2 {
		return
	}
	// Back to the root in one of them: no place, so no conflict. Elsewhere in
	// one of them: a conflict.
	other := filepath.Join(joined[0], name+"-other")
	if err := os.Mkdir(other, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		t.Fatal(err)
	}
	t.Cleanup(func() { removeCgroup(t, other) })
	if err := os.WriteFile(filepath.Join(other, "cgroup.procs"), pid, 0); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.kill)
	if got := names(t, a, p); len(got) != 0 {
		t.Errorf("hierarchies conflict, and %v match", got)
	}
	if _, err := a.Attest(t.Context(), p); err == nil || !strings.Contains(err.Error(), "conflict") {
		t.Errorf("%v; want it to say that the hierarchies conflict", err)
	}
}

func removeCgroup(t *testing.T, dir string) {
	var err error
	for range 100 { // a killed process leaves its cgroup a little later
		if err = os.Remove(dir); err == nil || errors.Is(err, os.ErrNotExist) {
			return
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Errorf("left behind: %v", err)
}

// A digest is remembered only for the very content: a change that keeps size
// and puts the modification time back still shows.
func TestDigestCache(t *testing.T) {
	b := newBench(t)
	path := filepath.Join(t.TempDir(), "f")
	write := func(s string) {
		t.Helper()
		stamp := time.Unix(1_000_000_000, 0)
		if err := errors.Join(os.WriteFile(path, []byte(s), 0o755), os.Chtimes(path, stamp, stamp)); err != nil {
			t.Fatal(err)
		}
		time.Sleep(50 * time.Millisecond) // beyond the granularity of ctime
	}
	d := newDigests()
	d.settled = 20 * time.Millisecond
	digest := func() string {
		t.Helper()
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		defer f.Close()
		v, err := versionOf(f)
		if err != nil {
			t.Fatal(err)
		}
		s, err := d.of(t.Context(), f, v.inode)
		if err != nil {
			t.Fatal(err)
		}
		return s
	}
	write("good")
	if got := digest(); got != b.sum(path) {
		t.Errorf("digest %s, want %s", got, b.sum(path))
	}
	if len(d.known) != 1 {
		t.Fatalf("%d digests remembered, want 1", len(d.known))
	}
	for v := range d.known {
		d.known[v] = "remembered"
	}
	if got := digest(); got != "remembered" {
		t.Errorf("the digest was computed again: %s", got)
	}
	write("evil")
	if got := digest(); got != b.sum(path) {
		t.Errorf("digest %s of the old content", got)
	}
}

// Stopping the caller stops the reading of a large executable.
func TestDigestStops(t *testing.T) {
	path := filepath.Join(t.TempDir(), "big")
	if err := errors.Join(os.WriteFile(path, nil, 0o755), os.Truncate(path, maxExecutable)); err != nil {
		t.Fatal(err)
	}
	f, err := os.Open(path)
	if err != nil {
		t.Fatal(err)
	}
	defer f.Close()
	v, err := versionOf(f)
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 10*time.Millisecond)
	defer cancel()
	if _, err := newDigests().of(ctx, f, v.inode); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("%v, want deadline exceeded", err)
	}
}

// A process may be closed while it is attested, and says so afterwards; a
// descriptor that has been closed is not read.
func TestClose(t *testing.T) {
	b := newBench(t)
	p := b.start("connect", b.self).peer()
	a := attestor(mesh.Attest{UID: uid(0), Path: b.self})
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for {
				if _, err := a.Attest(t.Context(), p); err != nil {
					if !strings.Contains(err.Error(), "closed") {
						t.Error(err)
					}
					return
				}
			}
		})
	}
	time.Sleep(50 * time.Millisecond)
	p.Close()
	p.Close()
	wg.Wait()
}

// Those who wait hear of new workloads.
func TestChanged(t *testing.T) {
	a := New()
	c := a.Changed()
	a.SetWorkloads(nil)
	select {
	case <-c:
	default:
		t.Error("SetWorkloads was not announced")
	}
}
