package procfs

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

func mount(t *testing.T, from, to string) {
	t.Helper()
	tree, err := unix.OpenTree(unix.AT_FDCWD, from, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
	if err != nil {
		t.Fatal(err)
	}
	// Over a link itself, which mount(2) would follow.
	err = unix.MoveMount(tree, "", unix.AT_FDCWD, to, unix.MOVE_MOUNT_F_EMPTY_PATH)
	if err := errors.Join(err, unix.Close(tree)); err != nil {
		t.Fatalf("%s over %s: %v", from, to, err)
	}
	t.Cleanup(func() {
		if err := unix.Unmount(to, unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			t.Error(err)
		}
	})
}

// What the kernel says is read, and everything that is not its word is refused:
// files, links and directories that something is mounted over, links, and paths
// that lead elsewhere. See also the attack tests of package attest.
func TestRead(t *testing.T) {
	own, err := Process(os.Getpid())
	if err != nil {
		t.Fatal(err)
	}
	defer own.Close()
	comm, err := os.ReadFile("/proc/self/comm")
	if err != nil {
		t.Fatal(err)
	}
	for name, read := range map[string]func() ([]byte, error){
		"of a process": func() ([]byte, error) { return own.Read("comm") },
		"its own":      func() ([]byte, error) { return ReadOwn("comm") },
	} {
		if got, err := read(); err != nil || string(got) != string(comm) {
			t.Errorf("%s: %q, %v; want %q", name, got, err, comm)
		}
	}
	exe, err := os.Readlink("/proc/self/exe")
	if err != nil {
		t.Fatal(err)
	}
	if got, err := own.Link("exe"); err != nil || got != exe {
		t.Errorf("%q, %v; want %q", got, err, exe)
	}
	var st unix.Stat_t
	if err := unix.Stat(exe, &st); err != nil {
		t.Fatal(err)
	}
	if got, err := own.StatLink("exe"); err != nil || got.Ino != st.Ino || got.Dev != st.Dev {
		t.Errorf("%+v, %v", got, err)
	}
	if f, err := own.OpenLink("exe"); err != nil {
		t.Error(err)
	} else {
		f.Close()
	}
	for _, path := range []string{"../self/comm", "/etc/passwd", "exe", "cwd/x", "no-such-file"} {
		if got, err := own.Read(path); err == nil {
			t.Errorf("read %q: %.20q", path, got)
		}
	}
	if _, err := own.Read("comm/x"); err == nil {
		t.Error("read below a file")
	}

	file := filepath.Join(t.TempDir(), "file")
	if err := os.WriteFile(file, []byte("forged\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	mount(t, file, "/proc/self/comm")
	mount(t, "/proc/self/ns/cgroup", "/proc/1/ns/cgroup")
	mount(t, "/proc/1/task", "/proc/1/fdinfo")
	if got, err := ReadOwn("comm"); !errors.Is(err, ErrMounted) {
		t.Errorf("%q, %v; want ErrMounted", got, err)
	}
	first, err := Process(1)
	if err != nil {
		t.Fatal(err)
	}
	defer first.Close()
	if _, err := first.OpenLink("ns/cgroup"); !errors.Is(err, ErrMounted) {
		t.Errorf("%v, want ErrMounted", err)
	}
	if _, err := first.StatLink("ns/cgroup"); !errors.Is(err, ErrMounted) {
		t.Errorf("%v, want ErrMounted", err)
	}
	if _, err := first.Read("fdinfo/1/stat"); !errors.Is(err, ErrMounted) {
		t.Errorf("through a mount: %v, want ErrMounted", err)
	}
	own.Close()
	own.Close()
	if _, err := own.Read("stat"); err == nil || own.IsOpen() {
		t.Error("read after it was closed")
	}
}

// A part of a procfs in the place of the whole, and another file system, are none.
func TestRoot(t *testing.T) {
	for name, dir := range map[string]string{"a part": "/proc/self/task", "no procfs": t.TempDir()} {
		t.Run(name, func(t *testing.T) {
			mount(t, dir, "/proc")
			if root, err := Root(); !errors.Is(err, ErrMounted) || root.IsOpen() {
				t.Errorf("%v, want ErrMounted", err)
			}
		})
	}
	if _, err := ReadOwn(strings.Repeat("x", 300)); err == nil {
		t.Error("read a file that is not there")
	}
}
