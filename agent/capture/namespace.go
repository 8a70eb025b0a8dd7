package capture

import (
	"errors"
	"fmt"
	"os"
	"runtime"
	"sync"

	"golang.org/x/sys/unix"
)

// NS is an open handle of one network namespace. It keeps the namespace
// alive until Close. Its methods are safe for concurrent use, but not during
// or after Close.
type NS struct {
	path string
	file *os.File // the namespace

	apply sync.Mutex // held while rules and settings change

	mu   sync.Mutex
	diag *diagConn // guarded by mu; nil until first used
}

// Open opens the network namespace that is mounted at path. It refuses the
// caller's own: capturing that would capture the node proxy's machine. When
// path is gone, errors.Is(err, os.ErrNotExist).
func Open(path string) (*NS, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, fmt.Errorf("capture: open network namespace: %w", err)
	}
	n := &NS{path: path, file: f}
	if err := n.check(); err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return n, nil
}

// check makes sure that the file is a network namespace, and another one.
func (n *NS) check() error {
	kind, err := unix.IoctlRetInt(n.fd(), unix.NS_GET_NSTYPE)
	if err != nil || kind != unix.CLONE_NEWNET {
		return fmt.Errorf("capture: %s is not a network namespace: name a file such as /run/netns/<name> or /proc/<pid>/ns/net", n.path)
	}
	var own, it unix.Stat_t
	if err := unix.Stat("/proc/thread-self/ns/net", &own); err != nil {
		return fmt.Errorf("capture: own network namespace: %w", err)
	}
	if err := unix.Fstat(n.fd(), &it); err != nil {
		return fmt.Errorf("capture: %s: %w", n.path, err)
	}
	if own.Dev == it.Dev && own.Ino == it.Ino {
		return fmt.Errorf("capture: %s is the network namespace of this process, which is not captured: give the workload one of its own", n.path)
	}
	return nil
}

func (n *NS) fd() int { return int(n.file.Fd()) }

// Close releases the handle. Capture stays in place.
func (n *NS) Close() error {
	n.mu.Lock()
	defer n.mu.Unlock()
	var err error
	if n.diag != nil {
		err = n.diag.close()
		n.diag = nil
	}
	return errors.Join(err, n.file.Close())
}

// do runs f on a thread that is in the namespace.
func (n *NS) do(f func() error) error {
	done := make(chan error)
	go func() { done <- n.enter(f) }()
	return <-done
}

// enter moves the calling goroutine's thread into the namespace, calls f and
// moves the thread back. If that fails the thread stays locked, so that it
// ends with the goroutine and nothing else runs in the wrong place.
func (n *NS) enter(f func() error) error {
	runtime.LockOSThread()
	back, err := os.Open("/proc/thread-self/ns/net")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("capture: own network namespace: %w", err)
	}
	defer back.Close()
	if err := unix.Setns(n.fd(), unix.CLONE_NEWNET); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("capture: enter %s: %w", n.path, err)
	}
	ferr := f()
	if err := unix.Setns(int(back.Fd()), unix.CLONE_NEWNET); err != nil {
		return errors.Join(ferr, fmt.Errorf("capture: leave %s: %w", n.path, err))
	}
	runtime.UnlockOSThread()
	return ferr
}
