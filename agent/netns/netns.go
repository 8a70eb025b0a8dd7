// Package netns holds on to the network namespaces of pods. A Store mounts
// each under a path that stays the same for as long as the pod's sandbox
// lives, through restarts of the agent and of the proxy; Procfs finds the
// namespace of a pod that already runs; Addresses says what addresses are
// inside.
//
// Which namespace is which pod's is a fact that identity hangs on. It comes
// from the container runtime (CNI) or from the kernel (cgroups), never from
// an address, and where two facts conflict the answer is an error.
package netns

import (
	"errors"
	"fmt"
	"os"
	"strings"

	"golang.org/x/sys/unix"
)

var (
	// ErrNotPinned says that no namespace is pinned for a pod.
	ErrNotPinned = errors.New("no network namespace is pinned for this pod")
	// ErrHost says that a namespace is the node's own: the pod has
	// hostNetwork, and must not be captured.
	ErrHost = errors.New("this is the node's own network namespace")
	// ErrConflict says that two facts name different owners of a namespace,
	// or different namespaces of a pod.
	ErrConflict = errors.New("conflicting facts about a network namespace")
	// ErrNotFound says that no process of a pod was found.
	ErrNotFound = errors.New("no process of this pod was found")
	// ErrGone says that a process ended, or became another, while it was
	// looked at.
	ErrGone = errors.New("the process is no longer the same")
)

// id names a network namespace for as long as somebody holds it.
type id struct{ dev, ino uint64 }

// own is where a process's own namespace is; a thread's, since threads may
// differ.
const own = "/proc/thread-self/ns/net"

// identify says which namespace a path names.
func identify(path string) (id, error) {
	f, err := openNS(path)
	if err != nil {
		return id{}, err
	}
	defer f.Close()
	return idOf(f)
}

func idOf(f *os.File) (id, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return id{}, err
	}
	return id{st.Dev, st.Ino}, nil
}

// openNS opens a network namespace and refuses every other kind of file
// before it is opened for good: opening a device or a FIFO has effects.
func openNS(path string) (*os.File, error) {
	fd, err := unix.Open(path, unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open network namespace", Path: path, Err: err}
	}
	defer unix.Close(fd)
	return reopen(fd, path)
}

// reopen opens what an O_PATH descriptor names, if it is a network namespace.
func reopen(fd int, path string) (*os.File, error) {
	if ok, err := isNSFS(fd); err != nil {
		return nil, &os.PathError{Op: "look at network namespace", Path: path, Err: err}
	} else if !ok {
		return nil, notNamespace(path)
	}
	f, err := os.OpenFile(descriptor(fd), os.O_RDONLY, 0)
	if err != nil {
		return nil, &os.PathError{Op: "open network namespace", Path: path, Err: err}
	}
	kind, err := unix.IoctlRetInt(int(f.Fd()), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return nil, errors.Join(notNamespace(path), f.Close())
	}
	return f, nil
}

func notNamespace(path string) error {
	return fmt.Errorf("%s is not a network namespace: name a file such as /run/netns/<name> or /proc/<pid>/ns/net", path)
}

func isNSFS(fd int) (bool, error) {
	var st unix.Statfs_t
	if err := unix.Fstatfs(fd, &st); err != nil {
		return false, err
	}
	return st.Type == unix.NSFS_MAGIC, nil
}

// descriptor is the path of an open descriptor: it names the very file that
// was looked at, whatever its old path names by now.
func descriptor(fd int) string { return fmt.Sprintf("/proc/self/fd/%d", fd) }

// CheckUID refuses what is not the UID of a pod in the form that may become
// the name of a file: 1 to 63 letters, digits and '-'. The API server makes
// UUIDs; static pods have 32 hexadecimal digits.
func CheckUID(uid string) error {
	ok := uid != "" && len(uid) <= 63 && uid[0] != '-'
	for _, c := range []byte(uid) {
		ok = ok && (c == '-' || '0' <= c && c <= '9' || 'a' <= c && c <= 'z' || 'A' <= c && c <= 'Z')
	}
	if !ok {
		return fmt.Errorf("uid %q is not a pod's UID: want letters, digits and '-', such as %s", shorten(uid), "0b8e7d0e-3f6c-4b0e-9a53-5a1f0a4c2f11")
	}
	return nil
}

// shorten keeps what others sent from filling a message.
func shorten(s string) string {
	const most = 80
	if len(s) <= most {
		return s
	}
	return strings.ToValidUTF8(s[:most], "") + "..."
}
