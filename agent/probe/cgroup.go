package probe

import (
	"fmt"
	"strings"

	"golang.org/x/sys/unix"
)

// cgroupRoot returns a handle of the root of the version 2 hierarchy, as the
// calling thread's namespace has it. It is a mount of its own, in no directory,
// so that it does not matter what the agent's container has mounted.
func cgroupRoot() (fd int, err error) {
	fs, err := unix.Fsopen("cgroup2", unix.FSOPEN_CLOEXEC)
	if err != nil {
		return -1, fmt.Errorf("the kernel has no cgroup version 2: %w", err)
	}
	defer unix.Close(fs)
	if err := unix.FsconfigCreate(fs); err != nil {
		return -1, fmt.Errorf("mount cgroup version 2: %w", err)
	}
	fd, err = unix.Fsmount(fs, unix.FSMOUNT_CLOEXEC, unix.MOUNT_ATTR_NOSUID|unix.MOUNT_ATTR_NODEV|unix.MOUNT_ATTR_NOEXEC)
	if err != nil {
		return -1, fmt.Errorf("mount cgroup version 2: %w", err)
	}
	return fd, nil
}

// cgroupID returns the number and the level of a cgroup by its absolute path.
func cgroupID(path string) (id uint64, level uint32, err error) {
	root, err := cgroupRoot()
	if err != nil {
		return 0, 0, err
	}
	defer unix.Close(root)
	var st unix.Stat_t
	if err := unix.Fstatat(root, "."+path, &st, 0); err != nil {
		return 0, 0, fmt.Errorf("cgroup %s: %w", path, err)
	}
	if path != "/" {
		level = uint32(strings.Count(path, "/"))
	}
	return st.Ino, level, nil
}

// membership is a process's place in the cgroup hierarchies.
type membership struct {
	unified string // version 2; "" where the process has no place
	inPod   bool   // some hierarchy has it below the pods' cgroup
}

// parseMembership reads /proc/<pid>/cgroup.
func parseMembership(file string) (m membership) {
	for line := range strings.Lines(file) {
		_, rest, _ := strings.Cut(strings.TrimSuffix(line, "\n"), ":")
		hierarchy, path, ok := strings.Cut(rest, ":")
		if !ok || !strings.HasPrefix(path, "/") {
			continue
		}
		if hierarchy == "" {
			m.unified = path
		}
		for seg := range strings.SplitSeq(path, "/") {
			// "kubepods", "kubepods.slice", and "kubelet-kubepods.slice" where
			// the kubelet itself has a cgroup root.
			if strings.HasPrefix(seg, "kubepods") || strings.HasSuffix(seg, "-kubepods.slice") {
				m.inPod = true
			}
		}
	}
	return m
}
