// Package procfs opens what the kernel says in /proc, and nothing that was put
// over it: whoever can mount in the agent's mount namespace, or has a mount
// propagated there, could otherwise answer in the kernel's place.
package procfs

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strconv"

	"golang.org/x/sys/unix"
)

// ErrMounted says that what lies under /proc is not the kernel's word.
var ErrMounted = errors.New("something is mounted over /proc or a part of it, and is not believed; unmount it")

// rootInode is the inode number of the root of every procfs.
const rootInode = 1

// Dir is a handle of a directory of a procfs. Close it.
type Dir struct{ fd int }

// None is a Dir that is closed.
func None() Dir { return Dir{-1} }

// IsOpen says whether d has not been closed.
func (d Dir) IsOpen() bool { return d.fd >= 0 }

// Close closes d. It may be called more than once.
func (d *Dir) Close() {
	if d.fd >= 0 {
		_ = unix.Close(d.fd) // a handle without content has nothing to lose
		d.fd = -1
	}
}

// Root opens the root of the procfs at /proc. A file system of another kind, or
// a part of a procfs, is refused.
func Root() (Dir, error) {
	fd, err := unix.Open("/proc", unix.O_PATH|unix.O_DIRECTORY|unix.O_CLOEXEC, 0)
	if err != nil {
		return None(), fmt.Errorf("open /proc: %w", err)
	}
	root := Dir{fd}
	var fs unix.Statfs_t
	var st unix.Stat_t
	err = errors.Join(unix.Fstatfs(fd, &fs), unix.Fstat(fd, &st))
	if err == nil && (fs.Type != unix.PROC_SUPER_MAGIC || st.Ino != rootInode) {
		err = ErrMounted
	}
	if err != nil {
		root.Close()
		return None(), err
	}
	return root, nil
}

// Process opens the directory of a process, by its number in the agent's pid
// namespace.
func Process(pid int) (Dir, error) {
	root, err := Root()
	if err != nil {
		return None(), err
	}
	defer root.Close()
	fd, err := root.open(strconv.Itoa(pid), unix.O_PATH|unix.O_DIRECTORY)
	if err != nil {
		return None(), err
	}
	return Dir{fd}, nil
}

// open opens what is below d. A mount on the way, or on the file itself, is
// refused, also one of another file of the same procfs: device numbers would
// not show that. No link is followed.
func (d Dir) open(path string, flags uint64) (int, error) {
	fd, err := unix.Openat2(d.fd, path, &unix.OpenHow{
		Flags: flags | unix.O_CLOEXEC | unix.O_NOFOLLOW, Resolve: unix.RESOLVE_NO_XDEV | unix.RESOLVE_BENEATH,
	})
	if errors.Is(err, unix.EXDEV) {
		err = fmt.Errorf("%s: %w", path, ErrMounted)
	}
	return fd, err
}

// maxFile is the most bytes of a file that are read.
const maxFile = 64 << 10

// Read reads a small file.
func (d Dir) Read(path string) ([]byte, error) {
	fd, err := d.open(path, unix.O_RDONLY|unix.O_NONBLOCK)
	if err != nil {
		return nil, err
	}
	f := os.NewFile(uintptr(fd), filepath.Join("/proc", path))
	defer f.Close()
	raw, err := io.ReadAll(io.LimitReader(f, maxFile+1))
	if err == nil && len(raw) > maxFile {
		err = fmt.Errorf("longer than %d bytes", maxFile)
	}
	return raw, err
}

// ReadOwn reads a small file of the agent's own directory.
func ReadOwn(path string) ([]byte, error) {
	own, err := Process(os.Getpid())
	if err != nil {
		return nil, err
	}
	defer own.Close()
	return own.Read(path)
}

// own refuses a link that something is mounted over, which would be followed
// in its place.
func (d Dir) own(link string) error {
	fd, err := d.open(link, unix.O_PATH)
	if err != nil {
		return err
	}
	_ = unix.Close(fd) // as above
	return nil
}

// Link returns what a link says.
func (d Dir) Link(path string) (string, error) {
	if err := d.own(path); err != nil {
		return "", err
	}
	buf := make([]byte, unix.PathMax)
	n, err := unix.Readlinkat(d.fd, path, buf)
	if err != nil {
		return "", err
	}
	if n == len(buf) {
		return "", fmt.Errorf("longer than %d bytes", n)
	}
	return string(buf[:n]), nil
}

// StatLink describes the file that a link leads to.
func (d Dir) StatLink(path string) (st unix.Stat_t, err error) {
	if err := d.own(path); err != nil {
		return st, err
	}
	return st, unix.Fstatat(d.fd, path, &st, 0)
}

// OpenLink opens the file that a link leads to, for reading.
func (d Dir) OpenLink(path string) (*os.File, error) {
	if err := d.own(path); err != nil {
		return nil, err
	}
	fd, err := unix.Openat(d.fd, path, unix.O_RDONLY|unix.O_CLOEXEC|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	return os.NewFile(uintptr(fd), filepath.Join("/proc", path)), nil
}
