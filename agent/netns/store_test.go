package netns

import (
	"bufio"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

const (
	uidA = "0b8e7d0e-3f6c-4b0e-9a53-5a1f0a4c2f11"
	uidB = "7c1f2d3e-0000-4b0e-9a53-5a1f0a4c2f22"
	host = "/proc/1/ns/net"
)

// pods makes two network namespaces.
func pods(t *testing.T) (a, b *lab.Pod) {
	t.Helper()
	l, err := lab.New(lab.Config{})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	if a, err = l.AddPod("a", netip.MustParseAddr("10.88.0.2")); err != nil {
		t.Fatal(err)
	}
	if b, err = l.AddPod("b", netip.MustParseAddr("10.88.0.3")); err != nil {
		t.Fatal(err)
	}
	return a, b
}

func newStore(t *testing.T, dir string) *Store {
	t.Helper()
	s, err := Open(dir, host)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // mounts would keep the directory from being removed
		pins, _ := filepath.Glob(filepath.Join(dir, "*"))
		for _, p := range append(pins, dir) {
			for unix.Unmount(p, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW) == nil {
			}
		}
	})
	return s
}

func mustPin(t *testing.T, s *Store, uid, from string) Pin {
	t.Helper()
	p, err := s.Pin(uid, from)
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func inode(t *testing.T, path string) uint64 {
	t.Helper()
	it, err := identify(path)
	if err != nil {
		t.Fatal(err)
	}
	return it.ino
}

// Defends: the namespace is pinned under a path that stays, and outlives the
// agent and the runtime's own mount.
func TestPin(t *testing.T) {
	a, _ := pods(t)
	dir := t.TempDir()
	s := newStore(t, dir)
	want := Pin{UID: uidA, Path: filepath.Join(dir, uidA), Inode: inode(t, a.NetNS)}
	for range 3 { // again and again: nothing changes, no mounts pile up
		if got := mustPin(t, s, uidA, a.NetNS); got != want {
			t.Fatalf("%+v, want %+v", got, want)
		}
	}
	if n := mounts(t, want.Path); n != 1 {
		t.Errorf("%d mounts on %s", n, want.Path)
	}
	if err := errors.Join(unix.Unmount(a.NetNS, unix.MNT_DETACH), os.Remove(a.NetNS)); err != nil {
		t.Fatal(err)
	}
	s = newStore(t, dir) // the agent starts again
	if got, err := s.List(); err != nil || !slices.Equal(got, []Pin{want}) {
		t.Errorf("after a restart: %v, %v", got, err)
	}
	if path, err := s.Path(uidA); err != nil || path != want.Path {
		t.Errorf("Path: %s, %v", path, err)
	}
	for range 2 {
		if err := s.Unpin(uidA); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := s.Path(uidA); !errors.Is(err, ErrNotPinned) {
		t.Errorf("after Unpin: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 0 {
		t.Errorf("left: %v, %v", left, err)
	}
}

func mounts(t *testing.T, path string) (n int) {
	t.Helper()
	raw, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(raw)) {
		if strings.Fields(line)[4] == path {
			n++
		}
	}
	return n
}

// Defends: a sandbox that is made again gets its new namespace, the caller is
// told, and the late deletion of the old sandbox takes nothing away.
func TestReplaced(t *testing.T) {
	a, b := pods(t)
	s := newStore(t, t.TempDir())
	mustPin(t, s, uidA, a.NetNS)
	p := mustPin(t, s, uidA, b.NetNS)
	if !p.Replaced || p.Inode != inode(t, b.NetNS) || inode(t, p.Path) != p.Inode || mounts(t, p.Path) != 1 {
		t.Errorf("%+v", p)
	}
	if did, err := s.UnpinIf(uidA, a.NetNS); did || err != nil {
		t.Errorf("deleting the old sandbox: %v, %v", did, err)
	}
	if p := mustPin(t, s, uidA, b.NetNS); p.Replaced {
		t.Errorf("replaced by itself: %+v", p)
	}
	if did, err := s.UnpinIf(uidA, b.NetNS); !did || err != nil {
		t.Errorf("deleting the sandbox: %v, %v", did, err)
	}
	if did, err := s.UnpinIf(uidA, b.NetNS); did || err != nil {
		t.Errorf("deleting it twice: %v, %v", did, err)
	}
}

// Defends: capturing the node, or taking one pod's namespace for another's.
func TestRefused(t *testing.T) {
	a, _ := pods(t)
	dir := t.TempDir()
	s := newStore(t, filepath.Join(dir, "pins"))
	mustPin(t, s, uidA, a.NetNS)
	plain, fifo, link := filepath.Join(dir, "plain"), filepath.Join(dir, "fifo"), filepath.Join(dir, "link")
	if err := errors.Join(os.WriteFile(plain, nil, 0o600), unix.Mkfifo(fifo, 0o600), os.Symlink(host, link)); err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		uid, from, want string
		is              error
	}{
		{uidB, host, "hostNetwork", ErrHost},
		{uidB, "/proc/self/ns/net", "hostNetwork", ErrHost},
		{uidB, link, "hostNetwork", ErrHost},
		{uidB, a.NetNS, "pinned for pod " + uidA, ErrConflict},
		{uidB, "/proc/self/ns/mnt", "not a network namespace", nil},
		{uidB, plain, "not a network namespace", nil},
		{uidB, fifo, "not a network namespace", nil}, // must not block either
		{uidB, dir, "not a network namespace", nil},
		{uidB, "/dev/null", "not a network namespace", nil},
		{uidB, filepath.Join(dir, "no"), "no such file", os.ErrNotExist},
		{"", a.NetNS, "not a pod's UID", nil},
		{".", a.NetNS, "not a pod's UID", nil},
		{"..", a.NetNS, "not a pod's UID", nil},
		{"../x", a.NetNS, "not a pod's UID", nil},
		{"a/b", a.NetNS, "not a pod's UID", nil},
		{"-x", a.NetNS, "not a pod's UID", nil},
		{"a\x00b", a.NetNS, "not a pod's UID", nil},
		{strings.Repeat("a", 64), a.NetNS, "not a pod's UID", nil},
	} {
		_, err := s.Pin(tc.uid, tc.from)
		if err == nil || !strings.Contains(err.Error(), tc.want) || (tc.is != nil && !errors.Is(err, tc.is)) {
			t.Errorf("Pin(%q, %s): %v; want %q", tc.uid, tc.from, err, tc.want)
		}
	}
	if left, err := os.ReadDir(filepath.Join(dir, "pins")); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
	for _, bad := range []string{"..", "a/b"} {
		_, perr := s.Path(bad)
		_, uerr := s.UnpinIf(bad, a.NetNS)
		if perr == nil || uerr == nil || s.Unpin(bad) == nil {
			t.Errorf("uid %q is accepted", bad)
		}
	}
}

// Defends: what a crash or a reboot left is no pin, and is in nobody's way;
// files of others are left alone.
func TestLeftovers(t *testing.T) {
	a, _ := pods(t)
	dir := t.TempDir()
	for _, name := range []string{uidA, uidB, "README.md"} {
		if err := os.WriteFile(filepath.Join(dir, name), nil, 0o444); err != nil {
			t.Fatal(err)
		}
	}
	s := newStore(t, dir)
	if _, err := s.Path(uidA); !errors.Is(err, ErrNotPinned) {
		t.Errorf("a file without a mount is a pin: %v", err)
	}
	if left, err := os.ReadDir(dir); err != nil || len(left) != 1 {
		t.Errorf("left: %v, %v", left, err)
	}
	// A crash between making the file and mounting on it, or between
	// unmounting and mounting again.
	if err := os.WriteFile(filepath.Join(dir, uidA), nil, 0o444); err != nil {
		t.Fatal(err)
	}
	mustPin(t, s, uidA, a.NetNS)
	// A link in a pin's place leads elsewhere.
	if err := os.Symlink(a.NetNS, filepath.Join(dir, uidB)); err != nil {
		t.Fatal(err)
	}
	if _, err := s.Path(uidB); err == nil || errors.Is(err, ErrNotPinned) {
		t.Errorf("a symbolic link as a pin: %v", err)
	}
	open := t.TempDir()
	if err := os.Chmod(open, 0o777); err != nil {
		t.Fatal(err)
	}
	if _, err := Open(open, host); err == nil {
		t.Error("opened a directory that anyone may write to")
	}
}

// Defends: the proxy, which lives in another mount namespace and was started
// first, sees pins that are made later and those that were unmounted go; also
// after the agent was started again.
func TestShared(t *testing.T) {
	a, b := pods(t)
	dir := filepath.Join(t.TempDir(), "netns")
	for range 2 {
		if err := EnsureShared(dir); err != nil {
			t.Fatal(err)
		}
	}
	if n := mounts(t, dir); n != 1 {
		t.Errorf("%d mounts on %s", n, dir)
	}
	look := fmt.Sprintf("echo ready; while read x; do stat -f -c %%t %s/$x 2>&1; done", dir)
	proxy := exec.CommandContext(t.Context(), "unshare", "--mount", "--propagation", "slave", "sh", "-c", look)
	in, err := proxy.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	out, err := proxy.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := proxy.Start(); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { in.Close(); proxy.Wait() })
	r := bufio.NewReader(out)
	read := func() string { s, _ := r.ReadString('\n'); return strings.TrimSpace(s) }
	if got := read(); got != "ready" {
		t.Fatal(got)
	}
	sees := func(uid string) bool { fmt.Fprintln(in, uid); return read() == "6e736673" }
	s := newStore(t, dir)
	mustPin(t, s, uidA, a.NetNS)
	if !sees(uidA) {
		t.Error("the proxy does not see a pin")
	}
	if err := EnsureShared(dir); err != nil { // the agent starts again
		t.Fatal(err)
	}
	s = newStore(t, dir)
	mustPin(t, s, uidB, b.NetNS)
	if !sees(uidA) || !sees(uidB) {
		t.Error("after a restart of the agent, the proxy misses a pin")
	}
	if err := s.Unpin(uidA); err != nil {
		t.Fatal(err)
	}
	if sees(uidA) || !sees(uidB) {
		t.Error("the proxy still sees a pin that is gone, or not one that is there")
	}
	// In a container the directory lies on a shared mount: no further one.
	below := filepath.Join(dir, "below")
	if err := EnsureShared(below); err != nil {
		t.Fatal(err)
	}
	if n := mounts(t, below); n != 0 {
		t.Errorf("%d mounts on %s, which is shared already", n, below)
	}
}

func TestAddresses(t *testing.T) {
	a, _ := pods(t)
	for _, p := range []string{"fd00:1::2/64", "10.99.0.7/32", "169.254.3.4/32"} {
		if err := a.AddAddr(netip.MustParsePrefix(p)); err != nil {
			t.Fatal(err)
		}
	}
	// Addresses on loopback are nobody else's business.
	if out, err := exec.Command("ip", "netns", "exec", "a", "ip", "addr", "add", "10.200.0.1/32", "dev", "lo").CombinedOutput(); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	got, err := Addresses(a.NetNS)
	want := []netip.Addr{netip.MustParseAddr("10.88.0.2"), netip.MustParseAddr("10.99.0.7"), netip.MustParseAddr("fd00:1::2")}
	if err != nil || !slices.Equal(got, want) {
		t.Errorf("%v, %v; want %v", got, err, want)
	}
	if _, err := Addresses("/dev/null"); err == nil {
		t.Error("addresses of a device")
	}
}
