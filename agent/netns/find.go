package netns

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// Procfs finds the network namespaces of pods that already run, by the
// cgroups of their processes. It is immutable.
type Procfs struct {
	// Proc is a mount of proc in the node's own pid namespace: "/proc" for an
	// agent with hostPID.
	Proc string
	// CgroupRoot is the cgroup that the kubelet's tree lies in, from
	// OwnCgroupRoot; "" is the root. Trees elsewhere, such as one that a user
	// of the node made in a cgroup of their own, are not believed.
	CgroupRoot string
	// Host is a path of the node's own network namespace.
	Host string
}

// Found is a pod's network namespace that was found and is held open.
type Found struct {
	// PID is the process that it was found by; for messages.
	PID  int
	file *os.File
}

// Path names the namespace, for Store.Pin. It is valid until Close.
func (f *Found) Path() string { return descriptor(int(f.file.Fd())) }

// Close lets go of the namespace.
func (f *Found) Close() error { return f.file.Close() }

// candidate is a process of a pod, as it was when it was looked at.
type candidate struct {
	pid    int
	start  uint64 // in clock ticks after boot
	cgroup string // the whole file
	pause  bool   // it calls itself pause; it may lie
}

// Scan is one look at all processes. It is immutable.
type Scan struct {
	proc      Procfs
	host      []id
	pods      map[string][]candidate
	conflicts map[string]error // of pods that a process belongs to, and to another too
	outside   int              // processes above the cgroup namespace of the agent
	seen      int
}

// Find finds the network namespace of a running pod. A pod without processes
// is ErrNotFound; one whose processes are all in the node's namespace is
// ErrHost; ErrConflict says that which namespace is its own is not certain.
// The caller closes what was found.
func (p Procfs) Find(ctx context.Context, uid string) (*Found, error) {
	const tries = 3 // a process may end while it is looked at
	for try := 1; ; try++ {
		s, err := p.Scan(ctx)
		if err != nil {
			return nil, err
		}
		f, err := s.Find(uid)
		if !errors.Is(err, ErrGone) || try == tries {
			return f, err
		}
	}
}

// Scan looks at all processes once, for Find of several pods.
func (p Procfs) Scan(ctx context.Context) (*Scan, error) {
	s := &Scan{proc: p, pods: map[string][]candidate{}, conflicts: map[string]error{}}
	for _, path := range []string{p.Host, own} {
		it, err := identify(path)
		if err != nil {
			return nil, fmt.Errorf("netns: the node's own namespace: %w", err)
		}
		s.host = append(s.host, it)
	}
	entries, err := os.ReadDir(p.Proc)
	if err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil || pid <= 0 {
			continue
		}
		if err := ctx.Err(); err != nil {
			return nil, fmt.Errorf("netns: %w", err)
		}
		s.add(pid)
	}
	return s, nil
}

// add looks at one process. One that has ended meanwhile is none.
func (s *Scan) add(pid int) {
	dir, err := s.proc.dir(pid)
	if err != nil {
		return
	}
	defer unix.Close(dir)
	raw, err := readAt(dir, "cgroup")
	if err != nil {
		return
	}
	s.seen++
	pods, outside, err := podsOf(raw)
	if err != nil {
		return
	}
	if outside && len(pods) == 0 {
		s.outside++
	}
	pods = slices.DeleteFunc(pods, func(p place) bool { return p.root != s.proc.CgroupRoot })
	if len(pods) > 1 {
		for _, p := range pods {
			s.conflicts[p.uid] = fmt.Errorf("%w: process %d is in the cgroups of pods %s and %s", ErrConflict, pid, pods[0].uid, pods[1].uid)
		}
		return
	}
	state, start, err := statAt(dir)
	if err != nil || len(pods) == 0 || state == 'Z' || state == 'X' { // what has ended has no namespace
		return
	}
	comm, _ := readAt(dir, "comm") // only breaks ties
	c := candidate{pid, start, raw, comm == "pause\n"}
	s.pods[pods[0].uid] = append(s.pods[pods[0].uid], c)
}

// Find finds a pod's network namespace among the processes that were seen.
// The oldest process of the pod that is not in the node's namespace decides:
// nothing of a pod runs before its sandbox, and what runs later may make
// namespaces of its own. Of several that started in the same moment, the
// sandbox's, which calls itself pause, comes first; if none does, they must
// agree. ErrGone says to scan again.
func (s *Scan) Find(uid string) (*Found, error) {
	f, err := s.find(uid)
	if err != nil {
		return nil, fmt.Errorf("netns: pod %s: %w", shorten(uid), err)
	}
	return f, nil
}

func (s *Scan) find(uid string) (*Found, error) {
	if err := CheckUID(uid); err != nil {
		return nil, err
	}
	if err := s.conflicts[uid]; err != nil {
		return nil, err
	}
	all := slices.Clone(s.pods[uid])
	if len(all) == 0 {
		return nil, s.none()
	}
	slices.SortFunc(all, func(a, b candidate) int {
		switch {
		case a.start != b.start:
			return int(min(max(int64(a.start)-int64(b.start), -1), 1))
		case a.pause != b.pause && a.pause:
			return -1
		case a.pause != b.pause:
			return 1
		}
		return a.pid - b.pid
	})
	var best *Found
	var first candidate
	var ns id
	for _, c := range all {
		if best != nil && (c.start != first.start || c.pause != first.pause) {
			break
		}
		f, it, err := s.proc.hold(c)
		if err != nil {
			return nil, closing(best, err)
		}
		switch {
		case slices.Contains(s.host, it): // a monitor of the runtime, or one still on its way in
		case best == nil:
			best, first, ns = &Found{c.pid, f}, c, it
			continue
		case it != ns:
			err = fmt.Errorf("%w: processes %d and %d started in the same moment, in different network namespaces; restart the pod", ErrConflict, first.pid, c.pid)
		}
		if err := errors.Join(err, f.Close()); err != nil {
			return nil, closing(best, err)
		}
	}
	if best == nil {
		return nil, fmt.Errorf("%w: each of its %d processes is there; pods with hostNetwork are not captured", ErrHost, len(all))
	}
	return best, nil
}

func closing(f *Found, err error) error {
	if f != nil {
		err = errors.Join(err, f.Close())
	}
	return err
}

// none says why nothing was found.
func (s *Scan) none() error {
	switch {
	case s.outside > 0:
		return fmt.Errorf("%w, and the cgroups of %d processes are outside of the agent's cgroup namespace; run the agent privileged, in the node's", ErrNotFound, s.outside)
	case s.seen <= 1:
		return fmt.Errorf("%w: %s shows %d processes; run the agent with hostPID", ErrNotFound, s.proc.Proc, s.seen)
	}
	return ErrNotFound
}

// hold opens the namespace of a process and makes sure that it is that
// process's: everything is read through the same open directory, and the
// process is looked at again after its namespace was opened.
func (p Procfs) hold(c candidate) (*os.File, id, error) {
	gone := func(err error) error { return fmt.Errorf("process %d: %w: %w", c.pid, ErrGone, err) }
	dir, err := p.dir(c.pid)
	if err != nil {
		return nil, id{}, gone(err)
	}
	defer unix.Close(dir)
	fd, err := unix.Openat(dir, "ns/net", unix.O_PATH|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, id{}, gone(err)
	}
	defer unix.Close(fd)
	f, err := reopen(fd, filepath.Join(p.Proc, strconv.Itoa(c.pid), "ns/net"))
	if err != nil {
		return nil, id{}, err
	}
	it, err := idOf(f)
	if err == nil {
		err = p.same(dir, c)
	}
	if err != nil {
		return nil, id{}, errors.Join(gone(err), f.Close())
	}
	return f, it, nil
}

// same says whether the process is still the one that was looked at.
func (p Procfs) same(dir int, c candidate) error {
	_, start, err := statAt(dir)
	if err != nil {
		return err
	}
	if start != c.start {
		return errors.New("its number was given to another process")
	}
	cgroup, err := readAt(dir, "cgroup")
	if err != nil {
		return err
	}
	if cgroup != c.cgroup {
		return errors.New("it moved to another cgroup")
	}
	return nil
}

func (p Procfs) dir(pid int) (int, error) {
	return unix.Open(filepath.Join(p.Proc, strconv.Itoa(pid)), unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
}

// readAt reads a small file of a process's directory.
func readAt(dir int, name string) (string, error) {
	fd, err := unix.Openat(dir, name, unix.O_RDONLY|unix.O_CLOEXEC, 0)
	if err != nil {
		return "", err
	}
	f := os.NewFile(uintptr(fd), name)
	defer f.Close()
	const most = 64 << 10
	raw, err := io.ReadAll(io.LimitReader(f, most+1))
	if err == nil && len(raw) > most {
		err = fmt.Errorf("%s is longer than %d bytes", name, most)
	}
	return string(raw), err
}

// statAt reads fields 3 and 22 of stat: the state, and when the process
// started. The second field is the command name in parentheses, which the
// process chooses, so fields are counted from the last closing parenthesis.
func statAt(dir int) (state byte, start uint64, err error) {
	raw, err := readAt(dir, "stat")
	if err != nil {
		return 0, 0, err
	}
	fields := strings.Fields(raw[strings.LastIndexByte(raw, ')')+1:]) // the first of them is field 3
	const at = 22 - 3
	if len(fields) <= at {
		return 0, 0, fmt.Errorf("stat: %d fields after the command name; want more than %d", len(fields), at)
	}
	start, err = strconv.ParseUint(fields[at], 10, 64)
	return fields[0][0], start, err
}
