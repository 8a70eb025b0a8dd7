package attest

import (
	"errors"
	"fmt"
	"net"
	"strconv"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/attest/procfs"
)

// ErrGone says that the process at the other end of the socket has exited, or
// has become another program, since it connected.
var ErrGone = errors.New("the process that connected is no longer the same")

// Process is a process held on to: for as long as it is open, what is read
// through it comes from that very process or fails, even when its number has
// been given to another one. It is safe for concurrent use.
type Process struct {
	// PID is its number in the agent's namespace; for messages, since it may
	// be given to another process.
	PID int
	// UID and GID are the effective ones at the moment it connected.
	UID, GID uint32

	start uint64 // when it started, in clock ticks after boot
	exe   inode  // the program it ran when it was looked at first

	mu    sync.RWMutex // held for reading while the descriptors are in use
	pidfd int          // guarded by mu; -1 once closed
	dir   procfs.Dir   // guarded by mu; /proc/<pid>
}

// inode names a file.
type inode struct{ dev, ino uint64 }

func inodeOf(st *unix.Stat_t) inode { return inode{st.Dev, st.Ino} }

// Peer returns the process that connected to the other end of conn, which
// must be an accepted stream socket. It is the process that called connect,
// or socketpair, and stays that one when the descriptor is inherited by or
// passed to others: whoever passes a connection on passes on its identity,
// for as long as it lives itself and runs the same program. That is the one it
// runs now, which need not be the one that it connected as: call it right after
// accept, and Close the process when done.
func Peer(conn *net.UnixConn) (*Process, error) {
	raw, err := conn.SyscallConn()
	if err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	var (
		cred    *unix.Ucred
		pidfd   int
		credErr error
		fdErr   error
	)
	if err := raw.Control(func(fd uintptr) {
		cred, credErr = unix.GetsockoptUcred(int(fd), unix.SOL_SOCKET, unix.SO_PEERCRED)
		pidfd, fdErr = unix.GetsockoptInt(int(fd), unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	}); err != nil {
		return nil, fmt.Errorf("attest: %w", err)
	}
	if credErr != nil {
		return nil, fmt.Errorf("attest: read the peer's credentials: %w", credErr)
	}
	if fdErr != nil {
		pidfd = -1
		if !errors.Is(fdErr, unix.ENOPROTOOPT) {
			return nil, &PeerError{PID: int(cred.Pid), UID: cred.Uid, Err: fmt.Errorf("attest: get a handle of process %d: %w: %w", cred.Pid, ErrGone, fdErr)}
		}
	}
	p, err := open(cred, pidfd)
	if err != nil {
		return nil, &PeerError{PID: int(cred.Pid), UID: cred.Uid, Err: err}
	}
	return p, nil
}

// PeerError is why there is no Process of a caller of whom the kernel says no
// more than this.
type PeerError struct {
	PID int // 0: it has none in the agent's namespace
	UID uint32
	Err error
}

// Error implements error.
func (e *PeerError) Error() string { return e.Err.Error() }

// Unwrap returns why.
func (e *PeerError) Unwrap() error { return e.Err }

// open pins the process of cred. pidfd is taken over; -1 means that the
// kernel (before 6.5) cannot give the peer's, and that one is opened by
// number. Then a process that connects, exits, and has its number taken by
// another before accept is taken for the other, if that has the same effective
// user and group id. The other must still satisfy every rule; its own start time
// and program are what is held.
func open(cred *unix.Ucred, pidfd int) (p *Process, err error) {
	held := &Process{PID: int(cred.Pid), UID: cred.Uid, GID: cred.Gid, pidfd: pidfd, dir: procfs.None()}
	defer func() {
		if err != nil {
			held.Close()
			p, err = nil, fmt.Errorf("attest: %w", err)
		}
	}()
	if held.PID <= 0 {
		return nil, errors.New("the caller is in another pid namespace and has no number in the agent's; run the agent in the host's pid namespace")
	}
	if pidfd < 0 {
		if held.pidfd, err = unix.PidfdOpen(held.PID, 0); err != nil {
			return nil, held.failed("pidfd", err)
		}
	}
	if held.dir, err = procfs.Process(held.PID); err != nil {
		return nil, held.failed("directory", err)
	}
	// The number was the peer's when it connected. That the directory is the
	// peer's too follows from the pidfd: it still has this number, after the
	// directory was opened.
	info, err := procfs.ReadOwn("fdinfo/" + strconv.Itoa(held.pidfd))
	if err != nil {
		return nil, err
	}
	pid, err := pidfdPid(info)
	if err != nil {
		return nil, err
	}
	if pid != held.PID {
		return nil, fmt.Errorf("process %d: %w (its handle now stands for %d)", held.PID, ErrGone, pid)
	}
	if held.start, err = held.startTime(); err != nil {
		return nil, err
	}
	if pidfd < 0 {
		if err := held.sameIDs(); err != nil {
			return nil, err
		}
	}
	if held.exe, err = held.program(); err != nil {
		return nil, err
	}
	return held, held.alive()
}

// Looks returns what the process looks like, for messages and records: its
// executable, as its own mount namespace names it, and the UID of the pod whose
// cgroup it is in. What cannot be read is empty. It proves nothing.
func (p *Process) Looks() (executable, podUID string) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if !p.dir.IsOpen() {
		return "", ""
	}
	executable, _ = p.dir.Link("exe")
	if at, err := (&facts{p: p}).readPlace(); err == nil {
		for _, m := range at.value.cgroups {
			if podUID = at.value.roots.pod(m); podUID != "" {
				break
			}
		}
	}
	return executable, podUID
}

// Close lets go of the process. It waits for an attestation under way and may
// be called more than once.
func (p *Process) Close() {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.pidfd >= 0 {
		_ = unix.Close(p.pidfd) // a handle without content has nothing to lose
		p.pidfd = -1
	}
	p.dir.Close()
}

// same says whether the process still lives and still runs the program that
// it ran when it was looked at first. The caller holds mu for reading.
func (p *Process) same() error {
	if !p.dir.IsOpen() {
		return fmt.Errorf("process %d: the connection is closed", p.PID)
	}
	start, err := p.startTime()
	if err != nil {
		return err
	}
	if start != p.start {
		return fmt.Errorf("process %d: %w: it started at another time", p.PID, ErrGone)
	}
	exe, err := p.program()
	if err != nil {
		return err
	}
	if exe != p.exe {
		return fmt.Errorf("process %d: %w: it runs another program", p.PID, ErrGone)
	}
	return p.alive() // last: what was read before came from a living process
}

// alive says whether the process has not exited: its pidfd becomes readable
// when it does. What was read in its directory failed then too, as kernels are
// today: an exited process has no executable. This is the promise that a pidfd
// comes with, and does not hang on what is read or on where it was read.
func (p *Process) alive() error {
	fds := []unix.PollFd{{Fd: int32(p.pidfd), Events: unix.POLLIN}}
	for {
		n, err := unix.Poll(fds, 0)
		switch {
		case errors.Is(err, unix.EINTR):
			continue
		case err != nil:
			return fmt.Errorf("process %d: poll: %w", p.PID, err)
		case n != 0:
			return fmt.Errorf("process %d: %w: it has exited", p.PID, ErrGone)
		}
		return nil
	}
}

func (p *Process) startTime() (uint64, error) {
	stat, err := p.read("stat")
	if err != nil {
		return 0, err
	}
	t, err := startTime(stat)
	if err != nil {
		return 0, fmt.Errorf("process %d: %w", p.PID, err)
	}
	return t, nil
}

// sameIDs says whether the process has the ids that the peer had when it
// connected.
func (p *Process) sameIDs() error {
	status, err := p.read("status")
	if err != nil {
		return err
	}
	uid, gid, err := effectiveIDs(status)
	if err != nil {
		return fmt.Errorf("process %d: %w", p.PID, err)
	}
	if uid != p.UID || gid != p.GID {
		return fmt.Errorf("process %d: %w: it is of uid %d and gid %d, who connected was of %d and %d", p.PID, ErrGone, uid, gid, p.UID, p.GID)
	}
	return nil
}

// program names the file that the process executes.
func (p *Process) program() (inode, error) {
	st, err := p.dir.StatLink("exe")
	if err != nil {
		return inode{}, p.failed("exe", err)
	}
	return inodeOf(&st), nil
}

// read reads a small file of the process's directory in /proc.
func (p *Process) read(name string) ([]byte, error) {
	raw, err := p.dir.Read(name)
	if err != nil {
		return nil, p.failed(name, err)
	}
	return raw, nil
}

// failed says that something of the process could not be read; ESRCH and
// ENOENT mean that it is gone.
func (p *Process) failed(name string, err error) error {
	if errors.Is(err, unix.ESRCH) || errors.Is(err, unix.ENOENT) {
		return fmt.Errorf("process %d: %w: read %s: %w", p.PID, ErrGone, name, err)
	}
	return fmt.Errorf("process %d: read %s: %w", p.PID, name, err)
}
