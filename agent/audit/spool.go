package audit

import (
	"crypto/sha256"
	"encoding/hex"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"
)

// Position is a place in the spool: everything before it is in the store. The
// zero Position is before everything.
type Position struct {
	// File is the inode number of the spool file.
	File uint64 `json:"file"`
	// Offset is in bytes from the start of the file.
	Offset int64 `json:"offset"`
	// Head and Tail are digests of the first bytes of the file (at most 512)
	// and of those just before Offset (at most 4096). They tell the file from
	// another with the same inode number, and from itself after a cut. Empty:
	// not checked.
	Head string `json:"head,omitempty"`
	Tail string `json:"tail,omitempty"`
	// Done says that the file was read to its end and is to be deleted.
	Done bool `json:"done,omitempty"`
}

const (
	headBytes = 512
	tailBytes = 4096
)

// positionAt describes the place off in f.
func positionAt(f *os.File, inode uint64, off int64) (Position, error) {
	p := Position{File: inode, Offset: off}
	var err error
	if p.Head, err = digestAt(f, 0, min(off, headBytes)); err != nil {
		return Position{}, err
	}
	n := min(off, tailBytes)
	p.Tail, err = digestAt(f, off-n, n)
	return p, err
}

func digestAt(f *os.File, off, n int64) (string, error) {
	if n == 0 {
		return "", nil
	}
	b := make([]byte, n)
	if _, err := f.ReadAt(b, off); err != nil {
		return "", err
	}
	sum := sha256.Sum256(b)
	return hex.EncodeToString(sum[:12]), nil
}

// A match says what a file is to a position that has its inode number.
type match int

const (
	matchSame     match = iota // go on at the position
	matchReplaced              // another content: nothing of it has been read
	matchCut                   // shorter now: all of it has been read
	matchSpliced               // cut, and written again beyond the position
)

func (p Position) match(f *os.File, size int64) (match, error) {
	same, err := sameDigest(f, 0, min(p.Offset, headBytes), p.Head)
	switch {
	case err != nil:
		return 0, err
	case !same:
		return matchReplaced, nil
	case size < p.Offset:
		return matchCut, nil
	}
	n := min(p.Offset, tailBytes)
	same, err = sameDigest(f, p.Offset-n, n, p.Tail)
	if err != nil || same {
		return matchSame, err
	}
	return matchSpliced, nil
}

func sameDigest(f *os.File, off, n int64, want string) (bool, error) {
	if want == "" {
		return true, nil
	}
	got, err := digestAt(f, off, n)
	if errors.Is(err, io.EOF) {
		return false, nil // the file is shorter
	}
	return got == want, err
}

// spoolFile is one file of the spool, open for reading.
type spoolFile struct {
	*os.File
	path  string
	inode uint64
	// retired: it was renamed, and is to be read to its end and deleted.
	retired bool
}

func openSpool(path string, retired bool) (*spoolFile, error) {
	f, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	info, err := f.Stat()
	if err == nil && !info.Mode().IsRegular() {
		err = fmt.Errorf("%s is not a regular file", path)
	}
	if err != nil {
		return nil, errors.Join(err, f.Close())
	}
	return &spoolFile{File: f, path: path, inode: info.Sys().(*syscall.Stat_t).Ino, retired: retired}, nil
}

func (f *spoolFile) size() (int64, error) {
	info, err := f.Stat()
	if err != nil {
		return 0, err
	}
	return info.Size(), nil
}

// inodeAt is the inode number of the file that path names now; 0 for none.
func inodeAt(path string) (uint64, error) {
	info, err := os.Stat(path)
	if errors.Is(err, os.ErrNotExist) {
		return 0, nil
	}
	if err != nil {
		return 0, err
	}
	return info.Sys().(*syscall.Stat_t).Ino, nil
}

// A writers says whether a process has a file open for writing.
type writers int

const (
	writersUnknown writers = iota
	writersNone
	writersSome
)

// hasWriters asks the kernel: it grants a read lease only on a file that
// nobody has open for writing.
func (f *spoolFile) hasWriters() writers {
	_, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_RDLCK)
	if errors.Is(err, unix.EAGAIN) {
		return writersSome
	}
	if err != nil {
		return writersUnknown
	}
	if _, err := unix.FcntlInt(f.Fd(), unix.F_SETLEASE, unix.F_UNLCK); err != nil {
		return writersUnknown
	}
	return writersNone
}

// retiredPath names the nth renamed spool file.
func retiredPath(path string, n uint64) string { return fmt.Sprintf("%s.%06d", path, n) }

// retiredSpools returns the numbers of the renamed files, rising.
func retiredSpools(path string) ([]uint64, error) {
	files, err := os.ReadDir(filepath.Dir(path))
	if errors.Is(err, os.ErrNotExist) {
		return nil, nil
	}
	if err != nil {
		return nil, err
	}
	var out []uint64
	for _, f := range files {
		digits, ok := strings.CutPrefix(f.Name(), filepath.Base(path)+".")
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 64)
		if err == nil && filepath.Base(retiredPath(path, n)) == f.Name() {
			out = append(out, n)
		}
	}
	slices.Sort(out)
	return out, nil
}
