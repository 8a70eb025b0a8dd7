package netns

import (
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"sync"

	"golang.org/x/sys/unix"
)

// Store is a directory of pinned namespaces: <dir>/<pod UID> is a mount of
// the pod's network namespace, which therefore lives on until it is unpinned.
// The mounts are the state, so a Store that is opened on the same directory
// after a restart has the same pins. One Store per directory; its methods are
// safe for concurrent use.
type Store struct {
	dir  string
	host []id // the node's namespaces, which are never pinned

	mu sync.Mutex // held while mounts change
}

// Pin is a namespace that is pinned.
type Pin struct {
	// UID is the pod's.
	UID string
	// Path is where the namespace is mounted: <dir>/<UID>.
	Path string
	// Inode is the namespace's inode number. It differs from that of every
	// other namespace that lives.
	Inode uint64
	// Replaced says that another namespace was pinned for the pod before this
	// call: its sandbox was made again, and what listened there is gone.
	Replaced bool
}

// Open opens the store in dir, which is made if it is missing, and removes
// what a reboot or a crash left there: files without a mount. host is a path
// of the node's own network namespace, such as /proc/1/ns/net; that one and
// the caller's are refused by Pin. Call EnsureShared first where others are
// to see the pins.
func Open(dir, host string) (*Store, error) {
	dir, err := filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	var st unix.Stat_t
	if err := unix.Lstat(dir, &st); err != nil {
		return nil, fmt.Errorf("netns: %s: %w", dir, err)
	}
	if st.Mode&unix.S_IFMT != unix.S_IFDIR || int(st.Uid) != os.Geteuid() || st.Mode&0o022 != 0 {
		return nil, fmt.Errorf("netns: %s must be a directory of user %d that nobody else may write to; remove it and start again", dir, os.Geteuid())
	}
	s := &Store{dir: dir}
	for _, path := range []string{host, own} {
		it, err := identify(path)
		if err != nil {
			return nil, fmt.Errorf("netns: the node's own namespace: %w", err)
		}
		s.host = append(s.host, it)
	}
	return s, s.sweep()
}

// sweep removes files that nothing is mounted on.
func (s *Store) sweep() error {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return fmt.Errorf("netns: %w", err)
	}
	for _, e := range entries {
		if CheckUID(e.Name()) != nil {
			continue // not ours
		}
		_, err := s.look(e.Name())
		if errors.Is(err, ErrNotPinned) {
			err = s.removeFile(e.Name())
		}
		if err != nil {
			return fmt.Errorf("netns: %w", err)
		}
	}
	return nil
}

// Path returns the path of the pod's pinned namespace. When there is none,
// errors.Is(err, ErrNotPinned).
func (s *Store) Path(uid string) (string, error) {
	p, err := s.Get(uid)
	return p.Path, err
}

// Get returns the pod's pin. When there is none, errors.Is(err, ErrNotPinned).
func (s *Store) Get(uid string) (Pin, error) {
	if err := CheckUID(uid); err != nil {
		return Pin{}, fmt.Errorf("netns: %w", err)
	}
	it, err := s.look(uid)
	if err != nil {
		return Pin{}, fmt.Errorf("netns: pod %s: %w", uid, err)
	}
	return s.pin(uid, it), nil
}

func (s *Store) pin(uid string, it id) Pin {
	return Pin{UID: uid, Path: s.file(uid), Inode: it.ino}
}

func (s *Store) file(uid string) string { return filepath.Join(s.dir, uid) }

// look says which namespace is mounted for a pod.
func (s *Store) look(uid string) (id, error) {
	fd, err := unix.Open(s.file(uid), unix.O_PATH|unix.O_NOFOLLOW|unix.O_CLOEXEC, 0)
	if errors.Is(err, fs.ErrNotExist) {
		return id{}, ErrNotPinned
	}
	if err != nil {
		return id{}, &os.PathError{Op: "open", Path: s.file(uid), Err: err}
	}
	defer unix.Close(fd)
	var st unix.Stat_t
	if err := unix.Fstat(fd, &st); err != nil {
		return id{}, &os.PathError{Op: "stat", Path: s.file(uid), Err: err}
	}
	if st.Mode&unix.S_IFMT != unix.S_IFREG {
		return id{}, fmt.Errorf("%s is neither a pin nor a plain file; remove it", s.file(uid))
	}
	if ok, err := isNSFS(fd); err != nil {
		return id{}, &os.PathError{Op: "statfs", Path: s.file(uid), Err: err}
	} else if !ok {
		return id{}, ErrNotPinned
	}
	f, err := reopen(fd, s.file(uid))
	if err != nil {
		return id{}, err
	}
	defer f.Close()
	return idOf(f)
}

// List returns every pin, by UID.
func (s *Store) List() ([]Pin, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.list()
}

// list is List; the caller holds mu.
func (s *Store) list() ([]Pin, error) {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, fmt.Errorf("netns: %w", err)
	}
	var out []Pin
	for _, e := range entries {
		if CheckUID(e.Name()) != nil {
			continue
		}
		switch it, err := s.look(e.Name()); {
		case errors.Is(err, ErrNotPinned):
		case err != nil:
			return nil, fmt.Errorf("netns: %w", err)
		default:
			out = append(out, s.pin(e.Name(), it))
		}
	}
	return out, nil
}

// Pin mounts the network namespace at from, which CNI or Procfs.Find names,
// as the pod's. Pinning what is pinned already changes nothing. Another
// namespace of the same pod, whose sandbox was made again, takes the place of
// the old one, and the result says so. It refuses the node's own namespace
// (ErrHost), one that is pinned for another pod (ErrConflict), and every file
// that is no network namespace.
func (s *Store) Pin(uid, from string) (Pin, error) {
	p, err := s.pinFrom(uid, from)
	if err != nil {
		return Pin{}, fmt.Errorf("netns: pin for pod %s: %w", shorten(uid), err)
	}
	return p, nil
}

func (s *Store) pinFrom(uid, from string) (Pin, error) {
	if err := CheckUID(uid); err != nil {
		return Pin{}, err
	}
	f, err := openNS(from)
	if err != nil {
		return Pin{}, err
	}
	defer f.Close()
	it, err := idOf(f)
	if err != nil {
		return Pin{}, err
	}
	if s.isHost(it) {
		return Pin{}, fmt.Errorf("%s: %w; pods with hostNetwork are not captured", from, ErrHost)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	pins, err := s.list()
	if err != nil {
		return Pin{}, err
	}
	p := s.pin(uid, it)
	for _, other := range pins {
		switch {
		case other.UID == uid && other.Inode == it.ino:
			return p, nil
		case other.UID == uid:
			p.Replaced = true
		case other.Inode == it.ino:
			return Pin{}, fmt.Errorf("%s: %w: it is pinned for pod %s", from, ErrConflict, other.UID)
		}
	}
	if p.Replaced {
		if err := s.unmount(uid); err != nil {
			return Pin{}, err
		}
	}
	return p, s.mount(f, uid)
}

func (s *Store) isHost(it id) bool {
	for _, h := range s.host {
		if it == h {
			return true
		}
	}
	return false
}

// mount mounts the open namespace, not whatever its path names by now.
func (s *Store) mount(f *os.File, uid string) error {
	at, err := os.OpenFile(s.file(uid), os.O_RDONLY|os.O_CREATE|unix.O_NOFOLLOW, 0o444)
	if err != nil {
		return err
	}
	if err := at.Close(); err != nil {
		return err
	}
	if err := unix.Mount(descriptor(int(f.Fd())), s.file(uid), "", unix.MS_BIND, ""); err != nil {
		return errors.Join(&os.PathError{Op: "mount namespace on", Path: s.file(uid), Err: err}, s.removeFile(uid))
	}
	return nil
}

// unmount takes every mount off the pod's file. Those who have the namespace
// open keep it.
func (s *Store) unmount(uid string) error {
	for {
		_, err := s.look(uid)
		if errors.Is(err, ErrNotPinned) {
			return nil
		}
		if err != nil {
			return err
		}
		if err := unix.Unmount(s.file(uid), unix.MNT_DETACH|unix.UMOUNT_NOFOLLOW); err != nil {
			return &os.PathError{Op: "unmount", Path: s.file(uid), Err: err}
		}
	}
}

// Unpin lets go of the pod's namespace, which ends when nobody else holds it.
// A pod that has no pin is no error.
func (s *Store) Unpin(uid string) error {
	if err := CheckUID(uid); err != nil {
		return fmt.Errorf("netns: %w", err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.unpin(uid)
}

// unpin is Unpin; the caller holds mu.
func (s *Store) unpin(uid string) error {
	if err := errors.Join(s.unmount(uid), s.removeFile(uid)); err != nil {
		return fmt.Errorf("netns: unpin pod %s: %w", uid, err)
	}
	return nil
}

// UnpinIf unpins the pod's namespace if it is the one at path, and says
// whether it did. A sandbox that is deleted late must not take away the pin
// of the sandbox that followed it.
func (s *Store) UnpinIf(uid, path string) (bool, error) {
	if err := CheckUID(uid); err != nil {
		return false, fmt.Errorf("netns: %w", err)
	}
	it, err := identify(path)
	if err != nil {
		return false, fmt.Errorf("netns: unpin pod %s: %w", uid, err)
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	now, err := s.look(uid)
	switch {
	case errors.Is(err, ErrNotPinned):
		return false, nil
	case err != nil:
		return false, fmt.Errorf("netns: unpin pod %s: %w", uid, err)
	case now != it:
		return false, nil
	}
	return true, s.unpin(uid)
}

func (s *Store) removeFile(uid string) error {
	if err := os.Remove(s.file(uid)); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	return nil
}
