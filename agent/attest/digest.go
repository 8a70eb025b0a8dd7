package attest

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

const (
	maxExecutable = 1 << 30 // bytes of the largest executable that is read
	maxDigests    = 512     // digests that are remembered
	// defaultSettled is how long a file must have been left alone before its
	// digest is remembered: file systems stamp changes coarsely, so a second
	// change right after the first may leave the same stamp.
	defaultSettled = 2 * time.Second
)

// version is a file in one state. A writer cannot set ctime, so a change of
// the content shows even when size and mtime are put back.
type version struct {
	inode
	size         int64
	mtime, ctime unix.Timespec
}

// digests computes SHA-256 digests and remembers them. It is safe for
// concurrent use.
type digests struct {
	turn    chan struct{} // bounds the files that are read at a time
	settled time.Duration

	mu    sync.Mutex
	known map[version]string // guarded by mu
}

func newDigests() *digests {
	return &digests{turn: make(chan struct{}, 2), settled: defaultSettled, known: map[version]string{}}
}

// of returns the digest of f, which must be the file want and must not change
// meanwhile.
func (d *digests) of(ctx context.Context, f *os.File, want inode) (string, error) {
	v, err := versionOf(f)
	if err != nil {
		return "", err
	}
	switch {
	case v.inode != want:
		return "", fmt.Errorf("%w: the executable is another file", ErrGone)
	case v.size > maxExecutable:
		return "", fmt.Errorf("the executable has %d bytes; at most %d are read", v.size, maxExecutable)
	}
	d.mu.Lock()
	sum, ok := d.known[v]
	d.mu.Unlock()
	if ok {
		return sum, nil
	}
	select {
	case d.turn <- struct{}{}:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	defer func() { <-d.turn }()

	started := time.Now()
	h := sha256.New()
	if _, err := io.Copy(h, io.LimitReader(&reader{ctx, f}, maxExecutable)); err != nil {
		return "", fmt.Errorf("read the executable: %w", err)
	}
	after, err := versionOf(f)
	if err != nil {
		return "", err
	}
	if after != v {
		return "", fmt.Errorf("the executable changed while it was read")
	}
	sum = hex.EncodeToString(h.Sum(nil))
	if started.Sub(time.Unix(v.ctime.Unix())) > d.settled {
		d.mu.Lock()
		if len(d.known) >= maxDigests {
			clear(d.known)
		}
		d.known[v] = sum
		d.mu.Unlock()
	}
	return sum, nil
}

func versionOf(f *os.File) (version, error) {
	var st unix.Stat_t
	if err := unix.Fstat(int(f.Fd()), &st); err != nil {
		return version{}, fmt.Errorf("stat the executable: %w", err)
	}
	return version{inodeOf(&st), st.Size, st.Mtim, st.Ctim}, nil
}

// reader stops reading when ctx ends.
type reader struct {
	ctx context.Context
	f   *os.File
}

func (r *reader) Read(b []byte) (int, error) {
	if err := r.ctx.Err(); err != nil {
		return 0, err
	}
	return r.f.Read(b)
}
