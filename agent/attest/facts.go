package attest

import (
	"context"
	"errors"
	"fmt"
	"os"
	"strings"
	"sync"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/attest/procfs"
	"github.com/signet-mesh/signet/internal/mesh"
)

// facts reads what rules ask about one process, each fact once. It is used by
// one goroutine that holds the process.
type facts struct {
	ctx     context.Context // of the one Attest call that the facts live for
	p       *Process
	digests *digests

	cgroups fact[seen[cgroups]]
	place   fact[seen[place]]
	path    fact[string]
	sha256  fact[string]
}

// fact is a value or why it is not known, read once.
type fact[T any] struct {
	read  bool
	value T
	err   error
}

func (f *fact[T]) get(read func() (T, error)) (T, error) {
	if !f.read {
		f.value, f.err = read()
		f.read = true
	}
	return f.value, f.err
}

// seen is what was made of /proc/<pid>/cgroup, and the file.
type seen[T any] struct {
	value T
	file  string
}

// unmoved says whether the process is in the cgroups in which it was found, if
// anybody asked. A process can be moved by others at any time, unlike all else
// that rules ask about.
func (f *facts) unmoved() error {
	again := func(before string, read func() (string, error)) error {
		after, err := read()
		if err == nil && after != before {
			err = fmt.Errorf("process %d: %w", f.p.PID, ErrMoved)
		}
		return err
	}
	if f.cgroups.read && f.cgroups.err == nil {
		if err := again(f.cgroups.value.file, func() (string, error) { c, err := f.readCgroups(); return c.file, err }); err != nil {
			return err
		}
	}
	if f.place.read && f.place.err == nil {
		return again(f.place.value.file, func() (string, error) { at, err := f.readPlace(); return at.file, err })
	}
	return nil
}

// match says why the process does not satisfy the rules, nil if it does. A
// fact that cannot be read is not satisfied. Cheap facts come first, so that
// an executable is read only for a process that is right in all else.
func (f *facts) match(r *mesh.Attest) error {
	if *r == (mesh.Attest{}) {
		return errors.New("attest: no rule is set; set at least one")
	}
	if r.UID != nil && *r.UID != f.p.UID {
		return fmt.Errorf("uid: want %d, is %d", *r.UID, f.p.UID)
	}
	if r.Cgroup != "" || r.SystemdUnit != "" {
		c, err := f.cgroups.get(f.readCgroups)
		if err != nil {
			return err
		}
		if r.Cgroup != "" {
			if err := c.value.within(r.Cgroup); err != nil {
				return err
			}
		}
		if r.SystemdUnit != "" {
			if err := c.value.inUnit(r.SystemdUnit); err != nil {
				return err
			}
		}
	}
	if r.PodUID != "" {
		at, err := f.place.get(f.readPlace)
		if err != nil {
			return fmt.Errorf("podUID: %w", err)
		}
		if err := at.value.cgroups.inPod(at.value.roots, r.PodUID); err != nil {
			return err
		}
	}
	if r.Path != "" {
		path, err := f.path.get(f.readPath)
		if err != nil {
			return fmt.Errorf("path: %w", err)
		}
		if path != r.Path {
			return fmt.Errorf("path: want %s, is %s", r.Path, path)
		}
	}
	if r.SHA256 != "" {
		sum, err := f.sha256.get(f.readSHA256)
		if err != nil {
			return fmt.Errorf("sha256: %w", err)
		}
		if sum != r.SHA256 {
			return fmt.Errorf("sha256: want %s, is %s", r.SHA256, sum)
		}
	}
	return nil
}

func (f *facts) readCgroups() (out seen[cgroups], err error) {
	raw, err := f.p.read("cgroup")
	if err != nil {
		return out, err
	}
	out.file = string(raw)
	out.value, err = parseCgroups(out.file)
	return out, err
}

// readPath returns the path of the executable. The kernel tells it as the
// process's own mount namespace has it, where whoever made that namespace
// decides what lies under which name; so the name must lead to the same file
// in the agent's.
func (f *facts) readPath() (string, error) {
	if err := f.sameUserNamespace(); err != nil {
		return "", err
	}
	path, err := f.p.dir.Link("exe")
	if err != nil {
		return "", f.p.failed("exe", err)
	}
	st, err := f.p.dir.StatLink("exe")
	if err != nil {
		return "", f.p.failed("exe", err)
	}
	if st.Nlink == 0 || strings.HasSuffix(path, " (deleted)") {
		return "", fmt.Errorf("the executable %s has been deleted or replaced; restart the process", strings.TrimSuffix(path, " (deleted)"))
	}
	var here unix.Stat_t
	if err := unix.Stat(path, &here); err != nil {
		return "", fmt.Errorf("the executable %s of the process is not there for the agent: %w; use sha256, cgroup or systemdUnit for processes with another view of the file system", path, err)
	}
	if inodeOf(&here) != inodeOf(&st) || inodeOf(&st) != f.p.exe {
		return "", fmt.Errorf("the executable %s of the process is another file than the agent's; use sha256, cgroup or systemdUnit for processes with another view of the file system", path)
	}
	return path, nil
}

func (f *facts) readSHA256() (string, error) {
	if err := f.sameUserNamespace(); err != nil {
		return "", err
	}
	exe, err := f.p.dir.OpenLink("exe")
	if err != nil {
		return "", f.p.failed("exe", err)
	}
	defer exe.Close()
	return f.digests.of(f.ctx, exe, f.p.exe)
}

var ownUserNamespace = sync.OnceValues(func() (inode, error) {
	own, err := procfs.Process(os.Getpid())
	if err != nil {
		return inode{}, fmt.Errorf("read the agent's user namespace: %w", err)
	}
	defer own.Close()
	st, err := own.StatLink("ns/user")
	if err != nil {
		return inode{}, fmt.Errorf("read the agent's user namespace: %w", err)
	}
	return inodeOf(&st), nil
})

// sameUserNamespace refuses processes of another user namespace than the
// agent's. Any user can make one, and is privileged inside: enough to point
// /proc/<pid>/exe at any file they can read (prctl PR_SET_MM_EXE_FILE).
func (f *facts) sameUserNamespace() error {
	own, err := ownUserNamespace()
	if err != nil {
		return err
	}
	st, err := f.p.dir.StatLink("ns/user")
	if err != nil {
		return f.p.failed("ns/user", err)
	}
	if inodeOf(&st) != own {
		return errors.New("the process is in another user namespace, where it can forge its executable; use uid, cgroup or systemdUnit")
	}
	return nil
}
