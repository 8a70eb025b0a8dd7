package proxy

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"log/slog"
	"os"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

const (
	// lookEvery is how soon a spool that the agent has moved away is noticed.
	lookEvery = 100 * time.Millisecond
	// longestLine is where a line without an end is cut, in bytes.
	longestLine = 1 << 20
	// retryEvery is how often a write that failed is tried again.
	retryEvery = 100 * time.Millisecond
)

// spooler takes Envoy's audit lines out of a pipe and appends them to the spool
// file that all proxies of the node share. Envoy does not do that itself: it
// writes in chunks that end anywhere, and the chunks of two Envoys would mix.
// Each line gets the name of its proxy, so that what a dead proxy had open can
// be told from what another still has.
//
// Nothing is dropped while the disk is full: the pipe fills, Envoy keeps its
// lines in memory, and the writing is tried until it works.
type spooler struct {
	path string
	tag  []byte // what every line begins with
	log  *slog.Logger

	f    *os.File // the spool as it is open now; owned by run's goroutine
	rest []byte   // a line that has not ended; owned by run's goroutine
}

func newSpooler(path, proxy string, log *slog.Logger) *spooler {
	return &spooler{path: path, tag: fmt.Appendf(nil, `{"proxy":%q,`, proxy), log: log}
}

// deadlineReader is the reading end of a pipe.
type deadlineReader interface {
	io.Reader
	SetReadDeadline(time.Time) error
}

// run copies until the pipe has no writer any more. When ctx ends it gives up
// what cannot be written.
func (s *spooler) run(ctx context.Context, pipe deadlineReader) {
	defer func() { s.close() }()
	buf := make([]byte, 256<<10)
	for {
		if err := pipe.SetReadDeadline(time.Now().Add(lookEvery)); err != nil {
			s.log.Error("audit lines cannot be read from the proxy", "error", err)
			return
		}
		n, err := pipe.Read(buf)
		if n > 0 {
			s.save(ctx, s.lines(buf[:n]))
		}
		switch {
		case err == nil:
		case errors.Is(err, os.ErrDeadlineExceeded):
			// The spool may have been moved away: it is read to its end and
			// deleted only when nobody has it open.
			if s.f != nil && !s.current() {
				s.close()
			}
			if s.f == nil {
				_, _ = s.try(ctx, nil) // if it fails, so does the next line's, which says so
			}
		default:
			if !errors.Is(err, io.EOF) {
				s.log.Error("audit lines cannot be read from the proxy", "error", err)
			}
			if len(s.rest) > 0 {
				s.save(ctx, s.lines([]byte("\n")))
			}
			return
		}
	}
}

// lines returns the whole lines of what has been read so far, tagged.
func (s *spooler) lines(chunk []byte) []byte {
	var out []byte
	for {
		line, after, found := bytes.Cut(chunk, []byte{'\n'})
		s.rest = append(s.rest, line...)
		if !found && len(s.rest) < longestLine {
			return out
		}
		switch {
		case len(s.rest) == 0:
		case s.rest[0] == '{':
			out = append(append(append(out, s.tag...), s.rest[1:]...), '\n')
		default: // the reader says what is wrong with it
			out = append(append(out, s.rest...), '\n')
		}
		s.rest, chunk = s.rest[:0], after
	}
}

// save appends lines for as long as that takes.
func (s *spooler) save(ctx context.Context, b []byte) {
	for said := false; len(b) > 0; {
		n, err := s.try(ctx, b)
		b = b[n:]
		if err == nil {
			continue
		}
		if !said {
			s.log.Error("audit lines cannot be written; trying again", "spool", s.path, "error", err)
			said = true
		}
		if !pause(ctx, retryEvery) {
			s.log.Error("audit lines are lost: the proxy ends and they cannot be written", "spool", s.path, "bytes", len(b), "error", err)
			return
		}
	}
}

// try appends b, at least to the end of a line unless ctx ends, and returns how
// much of it is there. With nothing to append it opens the spool.
func (s *spooler) try(ctx context.Context, b []byte) (int, error) {
	if s.f != nil && !s.current() {
		s.close()
	}
	if s.f == nil {
		f, err := os.OpenFile(s.path, os.O_RDWR|os.O_CREATE|os.O_APPEND, 0o600)
		if err != nil {
			return 0, err
		}
		s.f = f
	}
	if len(b) == 0 {
		return 0, nil
	}
	// One writer at a time: a write may be cut short by a full disk.
	if err := lockFile(s.f); err != nil {
		return 0, err
	}
	defer func() { _ = unix.Flock(int(s.f.Fd()), unix.LOCK_UN) }()
	if err := endLine(s.f); err != nil {
		return 0, err
	}
	for done := 0; ; {
		n, err := s.f.Write(b[done:])
		done += n
		if err == nil || done == 0 || b[done-1] == '\n' || !pause(ctx, retryEvery) {
			return done, err
		}
	}
}

func lockFile(f *os.File) error {
	for {
		if err := unix.Flock(int(f.Fd()), unix.LOCK_EX); err != unix.EINTR {
			return err
		}
	}
}

// endLine ends a line that a writer that was killed left unfinished.
func endLine(f *os.File) error {
	info, err := f.Stat()
	if err != nil || info.Size() == 0 {
		return err
	}
	var last [1]byte
	if _, err := f.ReadAt(last[:], info.Size()-1); err != nil {
		return err
	}
	if last[0] != '\n' {
		_, err = f.Write([]byte{'\n'})
	}
	return err
}

// current reports whether the open file is still the one at the path.
func (s *spooler) current() bool {
	there, err := os.Stat(s.path)
	if err != nil {
		return !errors.Is(err, fs.ErrNotExist)
	}
	here, err := s.f.Stat()
	if err != nil {
		return false
	}
	a, ok1 := there.Sys().(*syscall.Stat_t)
	b, ok2 := here.Sys().(*syscall.Stat_t)
	return ok1 && ok2 && a.Ino == b.Ino && a.Dev == b.Dev
}

func (s *spooler) close() {
	if s.f != nil {
		_ = s.f.Close() // every write has been checked
		s.f = nil
	}
}

// pause reports false if ctx ends meanwhile.
func pause(ctx context.Context, d time.Duration) bool {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return true
	case <-ctx.Done():
		return false
	}
}
