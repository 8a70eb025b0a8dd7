package csi

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"
)

// target is where kubelet wants a volume: <pods>/<UID>/volumes/kubernetes.io~csi/<name>/mount.
type target struct {
	pods      string // kubelet's folder of pods
	uid, name string // of the pod, and of its volume
}

// mountName is the last part of a target, the only one that is not there before.
const mountName = "mount"

func parseTarget(pods, path string) (target, error) {
	bad := func() (target, error) {
		return target{}, fmt.Errorf("target_path %q is not %s/<UID of a pod>/volumes/kubernetes.io~csi/<volume>/%s", path, pods, mountName)
	}
	below, ok := strings.CutPrefix(path, pods+"/")
	if !ok {
		return bad()
	}
	seg := strings.Split(below, "/")
	if len(seg) != 5 || seg[1] != "volumes" || seg[2] != "kubernetes.io~csi" || seg[4] != mountName ||
		!podUID.MatchString(seg[0]) || !label.MatchString(seg[3]) {
		return bad()
	}
	return target{pods, seg[0], seg[3]}, nil
}

// parent opens the directory that the target is made in. Nothing on the way to it
// below kubelet's folder may be a link.
func (t target) parent() (*os.File, error) {
	root, err := os.OpenFile(t.pods, unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, err
	}
	defer root.Close()
	below := filepath.Join(t.uid, "volumes", "kubernetes.io~csi", t.name)
	fd, err := unix.Openat2(int(root.Fd()), below, &unix.OpenHow{
		Flags: unix.O_PATH | unix.O_DIRECTORY | unix.O_CLOEXEC, Resolve: unix.RESOLVE_BENEATH | unix.RESOLVE_NO_SYMLINKS | unix.RESOLVE_NO_MAGICLINKS,
	})
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(t.pods, below), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(t.pods, below)), nil
}

// open opens the target itself, with what is mounted there. It is no link.
func (t target) open(parent *os.File) (*os.File, error) {
	fd, err := unix.Openat(int(parent.Fd()), mountName, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return nil, &fs.PathError{Op: "open", Path: filepath.Join(parent.Name(), mountName), Err: err}
	}
	return os.NewFile(uintptr(fd), filepath.Join(parent.Name(), mountName)), nil
}

// mounted reports whether something is mounted on the target.
func (t target) mounted() (bool, error) {
	parent, err := t.parent()
	if err != nil {
		return false, absent(err)
	}
	defer parent.Close()
	at, err := t.open(parent)
	if err != nil {
		return false, absent(err)
	}
	defer at.Close()
	return mountRoot(at)
}

// attach mounts a directory, read-only and whatever else it takes from programs, on
// the target. Whoever sees the target, on the node and in pods, sees it so.
func (t target) attach(source string) error {
	parent, err := t.parent()
	if err != nil {
		return err
	}
	defer parent.Close()
	if err := unix.Mkdirat(int(parent.Fd()), mountName, 0o750); err != nil && !errors.Is(err, unix.EEXIST) {
		return fmt.Errorf("make %s: %w", filepath.Join(parent.Name(), mountName), err)
	}
	at, err := t.open(parent)
	if err != nil {
		return err
	}
	defer at.Close()
	if there, err := mountRoot(at); err != nil || there {
		return errors.Join(fmt.Errorf("%s: something is mounted there already", at.Name()), err)
	}
	// The flags are set before anybody can see the mount: a change of flags
	// reaches no copy of a mount in another namespace.
	tree, err := unix.OpenTree(unix.AT_FDCWD, source, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC|unix.AT_SYMLINK_NOFOLLOW)
	if err != nil {
		return fmt.Errorf("copy the mount of %s: %w", source, err)
	}
	defer unix.Close(tree)
	if err := unix.MountSetattr(tree, "", unix.AT_EMPTY_PATH, &unix.MountAttr{
		Attr_set: unix.MOUNT_ATTR_RDONLY | unix.MOUNT_ATTR_NOSUID | unix.MOUNT_ATTR_NODEV | unix.MOUNT_ATTR_NOEXEC, Propagation: unix.MS_PRIVATE,
	}); err != nil {
		return fmt.Errorf("make the mount of %s read-only (Linux 5.12 or later is needed): %w", source, err)
	}
	if err := unix.MoveMount(tree, "", int(at.Fd()), "", unix.MOVE_MOUNT_F_EMPTY_PATH|unix.MOVE_MOUNT_T_EMPTY_PATH); err != nil {
		return fmt.Errorf("mount on %s: %w", at.Name(), err)
	}
	return nil
}

// detach unmounts all that is on the target and removes it. One that is not there
// is no error.
func (t target) detach() error {
	parent, err := t.parent()
	if err != nil {
		return absent(err)
	}
	defer parent.Close()
	// By way of the open directory: no name that is looked up can be replaced by a link.
	path := "/proc/self/fd/" + strconv.Itoa(int(parent.Fd())) + "/" + mountName
	for range maxMounts {
		at, err := t.open(parent)
		if err != nil {
			return absent(err)
		}
		there, err := mountRoot(at)
		at.Close()
		if err != nil {
			return err
		}
		if !there {
			if err := unix.Unlinkat(int(parent.Fd()), mountName, unix.AT_REMOVEDIR); err != nil && !errors.Is(err, unix.ENOENT) {
				return fmt.Errorf("remove %s: %w", filepath.Join(parent.Name(), mountName), err)
			}
			return nil
		}
		if err := unix.Unmount(path, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", filepath.Join(parent.Name(), mountName), err)
		}
	}
	return fmt.Errorf("%s: more than %d mounts lie on each other", filepath.Join(parent.Name(), mountName), maxMounts)
}

// maxMounts bounds how many mounts are taken off one place.
const maxMounts = 8

// mountRoot reports whether an open directory is the root of a mount.
func mountRoot(f *os.File) (bool, error) {
	var st unix.Statx_t
	if err := unix.Statx(int(f.Fd()), "", unix.AT_EMPTY_PATH, unix.STATX_BASIC_STATS, &st); err != nil {
		return false, fmt.Errorf("statx %s: %w", f.Name(), err)
	}
	if st.Attributes_mask&unix.STATX_ATTR_MOUNT_ROOT == 0 {
		return false, errors.New("the kernel does not tell whether a directory is a mount; Linux 5.12 or later is needed")
	}
	return st.Attributes&unix.STATX_ATTR_MOUNT_ROOT != 0, nil
}

// absent leaves out that something does not exist.
func absent(err error) error {
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	return err
}
