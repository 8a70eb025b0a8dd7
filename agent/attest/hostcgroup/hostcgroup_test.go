package hostcgroup

import (
	"errors"
	"os"
	"runtime"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }

// Defends: what an agent in a container reads is named from the host's root,
// and the thread is back in the container's namespace afterwards.
func TestDo(t *testing.T) {
	own, err := os.ReadFile("/proc/self/cgroup")
	if err != nil {
		t.Fatal(err)
	}
	failed := errors.New("failed")
	runtime.LockOSThread() // and never unlocked: the thread ends with the test
	for range 2 {
		var got []byte
		err := Do(func() (err error) {
			got, err = os.ReadFile("/proc/self/cgroup")
			return errors.Join(err, failed)
		})
		if !errors.Is(err, failed) || string(got) != string(own) {
			t.Fatalf("%v: %q, want %q", err, got, own)
		}
		// What enter does, from a thread in another namespace.
		if err := unix.Unshare(unix.CLONE_NEWCGROUP); err != nil {
			t.Fatal(err)
		}
		inside, err := os.Readlink("/proc/thread-self/ns/cgroup")
		if err != nil {
			t.Fatal(err)
		}
		var seen string
		err = enter(func() (err error) {
			got, err = os.ReadFile("/proc/self/cgroup")
			seen, _ = os.Readlink("/proc/thread-self/ns/cgroup")
			return err
		})
		if err != nil || seen == inside || strings.Contains(string(got), "..") || string(got) != string(own) {
			t.Fatalf("%v: in %s: %q, want %q", err, seen, got, own)
		}
		if back, err := os.Readlink("/proc/thread-self/ns/cgroup"); err != nil || back != inside {
			t.Fatalf("the thread is in %s, %v; want %s", back, err, inside)
		}
	}
}
