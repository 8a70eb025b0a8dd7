// Package hostcgroup runs code where cgroups have the names that the node has
// for them: an agent in a container sees them relative to its own.
package hostcgroup

import (
	"errors"
	"fmt"
	"os"
	"runtime"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/attest/procfs"
)

// Do calls f on a thread in the cgroup namespace of process 1, which is the
// node's first if the agent runs with the host's pids. There the kernel counts levels, and names cgroups, from the same
// root as for everybody else on the node; the agent's own container usually has
// another root. A thread that cannot be moved back ends with its goroutine.
func Do(f func() error) error {
	done := make(chan error)
	go func() { done <- enter(f) }()
	return <-done
}

// initial is the inode of the first cgroup namespace of all, which the kernel
// has fixed: whoever is in it needs no other.
const initial = 0xEFFFFFFB

func enter(f func() error) error {
	runtime.LockOSThread()
	own, err := open(os.Getpid(), fmt.Sprintf("task/%d/ns/cgroup", unix.Gettid()))
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("cgroup: own namespace: %w", err)
	}
	defer own.Close()
	ownID, err := inode(own)
	if err != nil || ownID == initial {
		if err == nil {
			err = f()
		}
		runtime.UnlockOSThread()
		return err
	}
	host, err := open(1, "ns/cgroup")
	if err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("cgroup: the namespace of process 1 (the agent needs the host's pids and CAP_SYS_PTRACE): %w", err)
	}
	defer host.Close()
	if err := unix.Setns(int(host.Fd()), unix.CLONE_NEWCGROUP); err != nil {
		runtime.UnlockOSThread()
		return fmt.Errorf("cgroup: enter the host's namespace (the agent needs CAP_SYS_ADMIN): %w", err)
	}
	ferr := f()
	if err := unix.Setns(int(own.Fd()), unix.CLONE_NEWCGROUP); err != nil {
		return errors.Join(ferr, fmt.Errorf("cgroup: leave the host's namespace: %w", err))
	}
	runtime.UnlockOSThread()
	return ferr
}

// open opens a namespace of a process.
func open(pid int, link string) (*os.File, error) {
	dir, err := procfs.Process(pid)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	return dir.OpenLink(link)
}

func inode(f *os.File) (uint64, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return 0, fmt.Errorf("cgroup: own namespace: %w", err)
	}
	return st.Ino, nil
}
