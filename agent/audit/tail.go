package audit

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"sync"
	"time"
)

// MaxLine is the longest line, in bytes, that a Tailer decodes. A longer one
// becomes a gap.
const MaxLine = 64 << 10

// TailOptions configure a Tailer. Path and Decode are required; zero values
// of the others mean the defaults.
type TailOptions struct {
	// Path is the spool file, to which the proxy appends lines. It need not
	// be there yet. Its directory must be on a local file system.
	Path string
	// Decode reads one line, without its newline. It reports false for a
	// line that carries no record. The line is only valid during the call.
	// A line that it refuses becomes a gap.
	Decode func(line []byte) (Event, bool, error)

	// OnEventsEarly receives events as soon as they are decoded, before they
	// are durable; after a crash it receives some again. OnEvents receives
	// them once they are durable; a crash can keep them from it. Both run on
	// the goroutine of Run, which waits for them. They may keep the slice
	// and must not change it.
	OnEventsEarly func([]Event)
	OnEvents      func([]Event)

	// Reopen makes the proxy close the spool file and open Path again; it
	// may return before the proxy has done so, and is called again while it
	// has not. Nil: the spool is never rotated by this Tailer.
	Reopen func(ctx context.Context) error
	// MaxSize is the size in bytes from which the spool is rotated. Default
	// 64 MiB.
	MaxSize int64

	// Poll is how often the file is looked at while nothing comes. Default
	// 50 ms.
	Poll time.Duration
	// BatchLines bounds the lines of one transaction. Default 1000.
	BatchLines int
	// Grace is how long a rotated file must have been quiet before it is
	// given up although a process still has it open for writing; a gap is
	// recorded. Default 30 s. Where the kernel cannot tell whether one has,
	// a tenth of it must pass, and there is no gap.
	Grace time.Duration
}

// Tailer follows the spool and commits what it reads to a Store, each line
// exactly once. One Tailer may follow a spool and write to a Store.
type Tailer struct {
	store *Store
	o     TailOptions
	log   *slog.Logger

	mu      sync.Mutex
	waiting []chan struct{} // of Sync; guarded by mu

	// What follows belongs to the goroutine of Run.
	cur      *spoolFile // nil while there is none
	pos      Position   // in cur
	noLine   int64      // no line ends between pos and here
	skip     bool       // the rest of a line that was cut away comes first
	quiet    time.Time  // when cur last grew
	reopened time.Time  // when Reopen was last called

	step func(string) // for tests: called after each step of a rotation
}

// NewTailer returns a Tailer that does nothing until Run.
func NewTailer(store *Store, log *slog.Logger, o TailOptions) (*Tailer, error) {
	if o.Path == "" {
		return nil, errors.New("audit: tail: Path is empty; name the spool file")
	}
	if o.Decode == nil {
		return nil, errors.New("audit: tail: Decode is nil")
	}
	if o.MaxSize < 0 || o.Poll < 0 || o.BatchLines < 0 || o.Grace < 0 {
		return nil, errors.New("audit: tail: MaxSize, Poll, BatchLines and Grace cannot be negative")
	}
	if o.MaxSize == 0 {
		o.MaxSize = 64 << 20
	}
	if o.Poll == 0 {
		o.Poll = 50 * time.Millisecond
	}
	if o.BatchLines == 0 {
		o.BatchLines = 1000
	}
	if o.Grace == 0 {
		o.Grace = 30 * time.Second
	}
	return &Tailer{store: store, o: o, log: log, step: func(string) {}}, nil
}

// Run follows the spool until ctx ends (it then returns nil) or the store is
// closed (ErrClosed). Other failures, such as a full disk, are logged and
// tried again: the spool keeps what has not been read. Call it once.
func (t *Tailer) Run(ctx context.Context) error {
	defer func() {
		if t.cur != nil {
			t.cur.Close()
		}
	}()
	tick := time.NewTicker(t.o.Poll)
	defer tick.Stop()
	var lastErr string
	backoff := t.o.Poll
	for {
		t.mu.Lock()
		waiting := len(t.waiting)
		t.mu.Unlock()
		busy, atEnd, err := t.advance(ctx)
		switch {
		case ctx.Err() != nil:
			return nil
		case errors.Is(err, ErrClosed):
			return err
		case err != nil:
			if err.Error() != lastErr {
				t.log.Error("audit spool: cannot go on; trying again", slog.String("spool", t.o.Path), slog.Any("error", err))
				lastErr = err.Error()
			}
			select {
			case <-time.After(backoff):
			case <-ctx.Done():
				return nil
			}
			backoff = min(2*backoff, 5*time.Second)
			continue
		}
		if lastErr != "" {
			t.log.Info("audit spool: going on", slog.String("spool", t.o.Path))
		}
		lastErr, backoff = "", t.o.Poll
		if atEnd {
			t.synced(waiting)
		}
		if busy {
			continue
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			return nil
		}
	}
}

// Sync waits until Run has committed every whole line that the spool held
// when Sync was called. What the proxy still buffers is not in the spool.
func (t *Tailer) Sync(ctx context.Context) error {
	done := make(chan struct{})
	t.mu.Lock()
	t.waiting = append(t.waiting, done)
	t.mu.Unlock()
	select {
	case <-done:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}

// synced answers the first n callers of Sync: they came before the look at
// the spool that found nothing more.
func (t *Tailer) synced(n int) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, done := range t.waiting[:n] {
		close(done)
	}
	t.waiting = append([]chan struct{}(nil), t.waiting[n:]...)
}

// advance does one thing. busy: there may be more to do at once. atEnd: all
// that there is has been read.
func (t *Tailer) advance(ctx context.Context) (busy, atEnd bool, err error) {
	if t.cur == nil {
		found, err := t.attach(ctx)
		return found, !found, err
	}
	size, err := t.cur.size()
	if err != nil {
		return false, false, err
	}
	if size != t.pos.Offset {
		m, err := t.pos.match(t.cur.File, size)
		if err != nil {
			return false, false, err
		}
		if m != matchSame {
			return true, false, t.resume(ctx, m, size)
		}
	}
	named, err := inodeAt(t.o.Path)
	if err != nil {
		return false, false, err
	}
	if !t.cur.retired && named == t.cur.inode && size >= t.o.MaxSize && t.o.Reopen != nil {
		return true, false, t.rotate(ctx)
	}
	if t.cur.retired && named == 0 {
		// Before more is read: the end may never be reached while the proxy
		// writes to this file.
		t.reopen(ctx)
	}
	if size > max(t.pos.Offset, t.noLine) {
		t.quiet = time.Now()
		return true, false, t.read(ctx, size)
	}
	if t.cur.retired {
		done, err := t.finish(ctx, named)
		return done, false, err
	}
	if named != t.cur.inode {
		t.log.Warn("audit spool: another program has moved the file; reading it to its end", slog.String("spool", t.o.Path))
		t.cur.retired, t.cur.path = true, ""
		return true, false, nil
	}
	return false, true, nil
}

// read commits the next batch of lines.
func (t *Tailer) read(ctx context.Context, size int64) error {
	off := t.pos.Offset
	if t.noLine-off > MaxLine {
		// Too long already: look for its end only.
		end, err := t.findNewline(t.noLine, size)
		if err != nil {
			return err
		}
		if end < 0 {
			t.noLine = size
			return nil
		}
		var b lineBatch
		t.tooLong(&b)
		return t.commit(ctx, b, end+1)
	}
	buf := make([]byte, min(size-off, 1<<20))
	n, err := t.cur.ReadAt(buf, off)
	if err != nil && !errors.Is(err, io.EOF) {
		return err
	}
	buf = buf[:n]
	var b lineBatch
	used := 0
	for b.lines < t.o.BatchLines {
		end := bytes.IndexByte(buf[used:], '\n')
		if end < 0 {
			break
		}
		t.line(&b, buf[used:used+end])
		used += end + 1
	}
	if used == 0 {
		t.noLine = off + int64(n)
		return nil
	}
	return t.commit(ctx, b, off+int64(used))
}

// findNewline returns the offset of the first newline in [from, to), or -1.
func (t *Tailer) findNewline(from, to int64) (int64, error) {
	buf := make([]byte, 256<<10)
	for from < to {
		n, err := t.cur.ReadAt(buf[:min(int64(len(buf)), to-from)], from)
		if i := bytes.IndexByte(buf[:n], '\n'); i >= 0 {
			return from + int64(i), nil
		}
		if err != nil && !errors.Is(err, io.EOF) {
			return 0, err
		}
		if n == 0 {
			break
		}
		from += int64(n)
	}
	return -1, nil
}

// lineBatch is what a run of lines adds up to.
type lineBatch struct {
	lines  int
	events []Event
	gaps   []Gap
}

// lose counts a line that gives no record. Lines lost for the same cause
// share one gap, whose reason has the details of the first.
func (b *lineBatch) lose(cause, detail string) {
	for i := range b.gaps {
		if len(b.gaps[i].Reason) >= len(cause) && b.gaps[i].Reason[:len(cause)] == cause {
			b.gaps[i].Count++
			return
		}
	}
	const longest = 300
	if len(detail) > longest {
		detail = detail[:longest] + "..."
	}
	b.gaps = append(b.gaps, Gap{Count: 1, Reason: cause + detail})
}

func (t *Tailer) tooLong(b *lineBatch) {
	b.lines++
	if t.skip {
		t.skip = false
		return // it has a gap already
	}
	b.lose("spool line too long", fmt.Sprintf(": more than %d bytes", MaxLine))
}

func (t *Tailer) line(b *lineBatch, line []byte) {
	if t.skip || len(line) > MaxLine {
		t.tooLong(b)
		return
	}
	b.lines++
	line = bytes.TrimSuffix(line, []byte("\r"))
	if len(line) == 0 {
		return
	}
	e, ok, err := t.o.Decode(line)
	if err == nil && ok {
		err = e.check()
	}
	switch {
	case err != nil:
		b.lose("spool line cannot be read", fmt.Sprintf(": %v", err))
	case ok:
		b.events = append(b.events, e)
	}
}

// commit stores a batch with the position after it, for as long as that
// takes.
func (t *Tailer) commit(ctx context.Context, b lineBatch, off int64) error {
	pos, err := positionAt(t.cur.File, t.cur.inode, off)
	if err != nil {
		return err
	}
	return t.commitAt(ctx, b, pos)
}

func (t *Tailer) commitAt(ctx context.Context, b lineBatch, pos Position) error {
	for _, g := range b.gaps {
		t.log.Error("audit records are missing", slog.Uint64("count", g.Count), slog.String("reason", g.Reason), slog.String("spool", t.o.Path))
	}
	if len(b.events) > 0 && t.o.OnEventsEarly != nil {
		t.o.OnEventsEarly(b.events)
	}
	wait := 100 * time.Millisecond
	for {
		err := t.store.append(ctx, b.events, b.gaps, &pos)
		if err == nil {
			break
		}
		if ctx.Err() != nil || errors.Is(err, ErrClosed) {
			return err
		}
		t.log.Error("audit records cannot be stored; trying again", slog.Any("error", err), slog.Int("events", len(b.events)))
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return ctx.Err()
		}
		wait = min(2*wait, 5*time.Second)
	}
	t.pos, t.noLine = pos, 0
	if len(b.events) > 0 && t.o.OnEvents != nil {
		t.o.OnEvents(b.events)
	}
	return nil
}
