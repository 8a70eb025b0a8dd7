package cluster

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// remove takes away everything that the state names, whatever of it is there.
func (c *Cluster) remove(ctx context.Context) error {
	var errs []error
	for i := len(c.state.Machines) - 1; i >= 0; i-- {
		errs = append(errs, c.machine(i).kill(ctx))
	}
	errs = append(errs, c.removeCgroups(ctx))
	if err := errors.Join(errs...); err != nil {
		return err // the state stays, to try again
	}
	// Every mount was in the machines' namespaces, which are gone.
	if err := os.RemoveAll(c.dir); err != nil {
		return fmt.Errorf("cluster: remove: %w", err)
	}
	c.log.say("removed")
	return nil
}

// removeCgroups removes the cluster's cgroups, and first whatever runs in them:
// a machine whose start was cut off before it could be recorded.
func (c *Cluster) removeCgroups(ctx context.Context) error {
	ctx, cancel := context.WithTimeoutCause(ctx, 30*time.Second, errors.New("after 30 s"))
	defer cancel()
	tops, err := filepath.Glob("/sys/fs/cgroup/*/" + c.state.cgroup())
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	tops = append(tops, "/sys/fs/cgroup/"+c.state.cgroup())
	return poll(ctx, 50*time.Millisecond, func() error {
		var errs []error
		for _, top := range tops {
			errs = append(errs, removeCgroup(top))
		}
		return errors.Join(errs...)
	})
}

// removeCgroup removes a cgroup and all below it. It fails while a process in
// there is not gone yet.
func removeCgroup(top string) error {
	var dirs []string
	err := filepath.WalkDir(top, func(path string, d fs.DirEntry, err error) error {
		switch {
		case errors.Is(err, os.ErrNotExist):
			return nil
		case err != nil:
			return err
		case d.IsDir():
			dirs = append(dirs, path)
		}
		return nil
	})
	if err != nil {
		return fmt.Errorf("remove cgroup %s: %w", top, err)
	}
	for i := len(dirs) - 1; i >= 0; i-- {
		if err := endAll(dirs[i]); err != nil {
			return err
		}
		if err := unix.Rmdir(dirs[i]); err != nil && !errors.Is(err, unix.ENOENT) {
			return fmt.Errorf("remove cgroup %s: %w", dirs[i], err)
		}
	}
	return nil
}

// endAll kills the processes in a cgroup.
func endAll(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.procs"))
	if errors.Is(err, os.ErrNotExist) {
		return nil
	} else if err != nil {
		return fmt.Errorf("read cgroup %s: %w", dir, err)
	}
	for _, field := range strings.Fields(string(b)) {
		pid, err := strconv.Atoi(field)
		if err != nil || pid == 0 {
			continue // 0: a process that has no number here
		}
		if err := unix.Kill(pid, unix.SIGKILL); err != nil && !errors.Is(err, unix.ESRCH) {
			return fmt.Errorf("kill process %d in cgroup %s: %w", pid, dir, err)
		}
	}
	return nil
}
