package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

const cgroupDir = "/sys/fs/cgroup"

// hierarchy is a mounted cgroup hierarchy.
type hierarchy struct {
	dir    string // where it is mounted
	fstype string // cgroup or cgroup2
	data   string // its mount option: controllers, or a name
}

// hierarchies lists those of the machine: one on a cgroup 2 machine, one for
// every controller on others.
func hierarchies() ([]hierarchy, error) {
	f, err := os.Open("/proc/self/mountinfo")
	if err != nil {
		return nil, err
	}
	defer f.Close()
	var all []hierarchy
	for lines := bufio.NewScanner(f); lines.Scan(); {
		before, after, _ := strings.Cut(lines.Text(), " - ")
		place, kind := strings.Fields(before), strings.Fields(after)
		if len(place) < 5 || len(kind) < 3 || !strings.HasPrefix(place[4], cgroupDir) {
			continue
		}
		h := hierarchy{dir: place[4], fstype: kind[0]}
		switch h.fstype {
		case "cgroup":
			var options []string
			for _, o := range strings.Split(kind[2], ",") {
				if o != "rw" && o != "ro" && !strings.HasPrefix(o, "release_agent=") {
					options = append(options, o)
				}
			}
			h.data = strings.Join(options, ",")
		case "cgroup2":
		default:
			continue
		}
		all = append(all, h)
	}
	if len(all) == 0 {
		return nil, errors.New("no cgroup hierarchy is mounted below " + cgroupDir)
	}
	return all, nil
}

// join makes a cgroup in every hierarchy and moves this process there.
func join(cgroup string) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := h.make(cgroup); err != nil {
			return fmt.Errorf("cgroup %s in %s: %w", cgroup, h.dir, err)
		}
		if err := h.enter(cgroup, os.Getpid()); err != nil {
			return err
		}
	}
	return nil
}

func (h hierarchy) enter(cgroup string, pid int) error {
	return os.WriteFile(filepath.Join(h.dir, cgroup, "cgroup.procs"), []byte(strconv.Itoa(pid)), 0)
}

// make makes a cgroup and those above it, fit to hold processes.
func (h hierarchy) make(cgroup string) error {
	dir := h.dir
	for _, name := range strings.Split(cgroup, "/") {
		if h.fstype == "cgroup2" && h.dir == cgroupDir {
			if err := delegate(dir); err != nil {
				return err
			}
		}
		parent := dir
		dir = filepath.Join(dir, name)
		if err := os.Mkdir(dir, 0o755); err != nil && !errors.Is(err, os.ErrExist) {
			return err
		}
		// A cpuset without processors or memory takes no process.
		for _, file := range []string{"cpuset.cpus", "cpuset.mems"} {
			if b, err := os.ReadFile(filepath.Join(parent, file)); err == nil && h.fstype == "cgroup" {
				if err := os.WriteFile(filepath.Join(dir, file), b, 0); err != nil {
					return err
				}
			}
		}
	}
	return nil
}

// delegate gives the cgroups below dir every controller that dir has.
func delegate(dir string) error {
	b, err := os.ReadFile(filepath.Join(dir, "cgroup.controllers"))
	if err != nil {
		return err
	}
	for _, c := range strings.Fields(string(b)) {
		if err := os.WriteFile(filepath.Join(dir, "cgroup.subtree_control"), []byte("+"+c), 0); err != nil {
			return err
		}
	}
	return nil
}

// mountCgroups mounts below root what this process's cgroup namespace shows of
// the hierarchies, which it has as the real machine has them.
func mountCgroups(root string, all []hierarchy) error {
	const flags = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if all[0].dir != cgroupDir {
		if err := unix.Mount("cgroup", filepath.Join(root, cgroupDir), "tmpfs", flags, "mode=0755"); err != nil {
			return err
		}
		entries, err := os.ReadDir(cgroupDir)
		if err != nil {
			return err
		}
		for _, e := range entries { // such as cpu -> cpu,cpuacct
			if to, err := os.Readlink(filepath.Join(cgroupDir, e.Name())); err == nil {
				if err := os.Symlink(to, filepath.Join(root, cgroupDir, e.Name())); err != nil {
					return err
				}
			}
		}
	}
	for _, h := range all {
		dir := filepath.Join(root, h.dir)
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return err
		}
		if err := unix.Mount("cgroup", dir, h.fstype, flags, h.data); err != nil {
			return fmt.Errorf("mount %s: %w", h.dir, err)
		}
	}
	return nil
}

// leaf moves this process out of the root of a cgroup 2 machine, where it would
// keep the cgroups below from having controllers, and hands those on. Where
// controllers are in hierarchies of version 1, kubelet uses these.
func leaf(all []hierarchy) error {
	if len(all) != 1 || all[0].fstype != "cgroup2" {
		return nil
	}
	const name = "init.scope"
	dir := all[0].dir
	if err := os.Mkdir(filepath.Join(dir, name), 0o755); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	if err := all[0].enter(name, os.Getpid()); err != nil {
		return err
	}
	// boot is on its way out.
	for deadline := time.Now().Add(5 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if err := delegate(dir); !errors.Is(err, unix.EBUSY) || time.Now().After(deadline) {
			return err
		}
	}
}

// leave moves this process out of the cgroup that it joined for its child.
func leave() error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	for _, h := range all {
		if err := h.enter("", os.Getpid()); err != nil {
			return fmt.Errorf("leave the machine's cgroup in %s: %w", h.dir, err)
		}
	}
	return nil
}

// serviceCgroup returns the version 2 cgroup of a service, which is its own, as
// systemd would have it: others of the machine are not in it. It is nil on a
// machine without that version.
func serviceCgroup(name string) (*os.File, error) {
	all, err := hierarchies()
	if err != nil {
		return nil, err
	}
	for _, h := range all {
		if h.fstype != "cgroup2" {
			continue
		}
		dir := filepath.Join(h.dir, "system.slice", name+".service")
		if err := os.MkdirAll(dir, 0o755); err != nil {
			return nil, err
		}
		return os.Open(dir)
	}
	return nil, nil
}
