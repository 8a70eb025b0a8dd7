package netns

import (
	"errors"
	"fmt"
	"os"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// EnsureShared makes dir if it is missing, and makes sure that mounts that
// are made in it reach the mount namespaces that share it, such as the
// proxy's container. Where dir lies on a mount that is shared already, as in
// a container with bidirectional propagation, nothing is changed: mounts
// travel through that one, and a further one would hide them from the node.
// Elsewhere dir becomes a shared mount of its own. It may be called again at
// each start.
func EnsureShared(dir string) error {
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	m, err := mountOf(dir)
	if err != nil {
		return fmt.Errorf("netns: %w", err)
	}
	if m.shared {
		return nil
	}
	if !m.root {
		if err := unix.Mount(dir, dir, "", unix.MS_BIND, ""); err != nil {
			return fmt.Errorf("netns: mount %s on itself (it takes CAP_SYS_ADMIN): %w", dir, err)
		}
	}
	if err := unix.Mount("", dir, "", unix.MS_SHARED, ""); err != nil {
		return fmt.Errorf("netns: share the mount %s: %w", dir, err)
	}
	if m, err = mountOf(dir); err != nil {
		return fmt.Errorf("netns: %w", err)
	}
	if !m.shared {
		return fmt.Errorf("netns: the mount %s is still not shared; the proxy would not see namespaces that are pinned there", dir)
	}
	return nil
}

// mount is what mountinfo says of the mount that a directory lies on.
type mount struct {
	shared bool
	root   bool // the directory is the mount's own root
}

// mountOf finds the mount that dir lies on.
func mountOf(dir string) (mount, error) {
	fd, err := unix.Open(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return mount{}, &os.PathError{Op: "open", Path: dir, Err: err}
	}
	defer unix.Close(fd)
	var st unix.Statx_t
	if err := unix.Statx(fd, "", unix.AT_EMPTY_PATH, unix.STATX_MNT_ID, &st); err != nil {
		return mount{}, &os.PathError{Op: "statx", Path: dir, Err: err}
	}
	if st.Mask&unix.STATX_MNT_ID == 0 || st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return mount{}, errors.New("the kernel does not say which mount a file is on; Linux 5.8 or newer is needed")
	}
	raw, err := os.ReadFile("/proc/thread-self/mountinfo")
	if err != nil {
		return mount{}, err
	}
	shared, err := sharedMount(string(raw), st.Mnt_id)
	if err != nil {
		return mount{}, fmt.Errorf("%s: %w", dir, err)
	}
	return mount{shared: shared, root: st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0}, nil
}

// sharedMount reads from mountinfo whether a mount is in a peer group. A
// line is "<id> <parent> <dev> <root> <mount point> <options> [<optional
// field>...] - ...".
func sharedMount(mountinfo string, id uint64) (bool, error) {
	for line := range strings.Lines(mountinfo) {
		f := strings.Fields(line)
		if len(f) < 7 || f[0] != strconv.FormatUint(id, 10) {
			continue
		}
		for _, opt := range f[6:] {
			if opt == "-" {
				return false, nil
			}
			if strings.HasPrefix(opt, "shared:") {
				return true, nil
			}
		}
		return false, nil
	}
	return false, fmt.Errorf("mountinfo has no mount %d", id)
}
