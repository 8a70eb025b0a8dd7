package csi

import (
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// store is the directory with the volumes of this node, one directory each: what
// it is, and, for files, a file system in memory that only the agent writes to. Pods
// see it through a mount of their own. What is mounted outlives the agent, and
// neither outlives the machine.
type store struct{ dir string }

const (
	recordName = "volume.json"
	filesName  = "files"
)

func (s store) of(id string) string      { return filepath.Join(s.dir, id) }
func (s store) filesOf(id string) string { return filepath.Join(s.dir, id, filesName) }

// put writes down what a volume is, before anything is mounted: a crash leaves
// nothing that nobody knows of.
func (s store) put(v *volume) error {
	if err := os.MkdirAll(s.of(v.ID), 0o700); err != nil {
		return err
	}
	b, err := json.Marshal(v)
	if err != nil {
		return err
	}
	return wholefile.Write(filepath.Join(s.of(v.ID), recordName), b)
}

// mount makes the file system for a volume's files.
func (s store) mount(id string) error {
	dir := s.filesOf(id)
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return err
	}
	const flags, options = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC, "size=4m,nr_inodes=256,mode=0755"
	// A key is not written to a disk, not even by swapping; before Linux 6.4 that
	// cannot be asked for.
	err := unix.Mount("signet-svid", dir, "tmpfs", flags, options+",noswap")
	if errors.Is(err, unix.EINVAL) {
		err = unix.Mount("signet-svid", dir, "tmpfs", flags, options)
	}
	if err != nil {
		return fmt.Errorf("mount a tmpfs on %s: %w", dir, err)
	}
	return nil
}

// remove takes away all of a volume that is here. What is not there is no error.
func (s store) remove(id string) error {
	dir := s.filesOf(id)
	for range maxMounts {
		f, err := os.OpenFile(dir, unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
		if errors.Is(err, fs.ErrNotExist) {
			break
		} else if err != nil {
			return err
		}
		there, err := mountRoot(f)
		f.Close()
		if err != nil {
			return err
		}
		if !there {
			break
		}
		if err := unix.Unmount(dir, unix.UMOUNT_NOFOLLOW|unix.MNT_DETACH); err != nil {
			return fmt.Errorf("unmount %s: %w", dir, err)
		}
	}
	return os.RemoveAll(s.of(id)) // what is mounted and could not be unmounted is busy, and stays
}

// mounted reports whether a volume's file system is there.
func (s store) mounted(id string) (bool, error) {
	f, err := os.OpenFile(s.filesOf(id), unix.O_PATH|unix.O_DIRECTORY|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if err != nil {
		return false, absent(err)
	}
	defer f.Close()
	return mountRoot(f)
}

// list returns the volumes that are written down, and the names of directories
// whose volume is not known: a crash came first.
func (s store) list() (volumes []*volume, unknown []string, err error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, nil, absent(err)
	}
	for _, e := range entries {
		if !e.IsDir() || !volumeID.MatchString(e.Name()) {
			continue
		}
		var v volume
		b, err := os.ReadFile(filepath.Join(s.of(e.Name()), recordName))
		if err == nil {
			err = json.Unmarshal(b, &v)
		}
		if err != nil || v.ID != e.Name() {
			unknown = append(unknown, e.Name())
			continue
		}
		volumes = append(volumes, &v)
	}
	return volumes, unknown, nil
}
