package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"sync"
	"time"

	bolt "go.etcd.io/bbolt"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// ErrClosed is returned by every method of a closed store.
var ErrClosed = errors.New("audit store is closed")

// Options bound the space and the time that records take. Zero values mean
// the defaults.
type Options struct {
	// SegmentSize is the size in bytes at which a segment file is closed and
	// the next begun. Default 256 MiB.
	SegmentSize int64
	// SegmentAge is the age at which that happens to a smaller one that has
	// records. Default 24 h.
	SegmentAge time.Duration
	// MaxSegments is how many files are kept, the one being written included.
	// Default 16; at least 2.
	MaxSegments int
	// MaxAge deletes a file when the newest record in it is older. Default:
	// no limit. It is looked at when a segment is begun and in Open.
	MaxAge time.Duration

	now func() time.Time // for tests
}

func (o Options) withDefaults() (Options, error) {
	set := func(d *time.Duration, v time.Duration) {
		if *d == 0 {
			*d = v
		}
	}
	if o.SegmentSize == 0 {
		o.SegmentSize = 256 << 20
	}
	set(&o.SegmentAge, 24*time.Hour)
	if o.MaxSegments == 0 {
		o.MaxSegments = 16
	}
	switch {
	case o.SegmentSize < 0:
		return o, fmt.Errorf("audit: SegmentSize is %d; use a positive number of bytes", o.SegmentSize)
	case o.SegmentAge < 0:
		return o, fmt.Errorf("audit: SegmentAge is %v; use a positive duration", o.SegmentAge)
	case o.MaxSegments < 2:
		return o, fmt.Errorf("audit: MaxSegments is %d; use 2 or more", o.MaxSegments)
	case o.MaxAge < 0:
		return o, fmt.Errorf("audit: MaxAge is %v; use a positive duration, or 0 for no limit", o.MaxAge)
	}
	if o.now == nil {
		o.now = time.Now
	}
	return o, nil
}

// Store is the log of one node's connections: segment files in one directory,
// append-only, chained by hash. All methods may be called concurrently;
// writes take turns.
type Store struct {
	dir  string
	node string
	log  *slog.Logger
	opts Options
	lock *os.File // held while the store is open

	// writing holds one token; whoever took it may write and may change the
	// list of segments.
	writing chan struct{}
	// unsure is set when a commit failed in a way that may have stored it
	// after all. Guarded by writing.
	unsure bool

	mu sync.RWMutex // guards what follows
	// segments are in order; the last is being written. Replaced whole.
	segments []*segment
	// heads are the heads of segments. Replaced whole, but for the last.
	heads  []head
	closed bool
}

// Open opens the store in dir with default Options, or begins one. node is
// the name of this node: a directory that holds another node's records is
// refused. A damaged file is moved aside with a gap entry in its place. One
// process can have a directory open; it must call Close.
func Open(dir, node string, log *slog.Logger) (*Store, error) {
	return OpenWith(dir, node, log, Options{})
}

// Append stores events, and pos with them, in one durable transaction: when
// it returns nil, both survive a crash; when it returns an error, neither is
// stored. An error that wraps ErrInvalidEvent means that nothing of the batch
// can be stored as it is.
//
// After an error, the same batch may be tried again with the same pos: if the
// failed attempt turns out to be on disk it is not stored twice.
func (s *Store) Append(ctx context.Context, events []Event, pos Position) error {
	return s.append(ctx, events, nil, &pos)
}

// Add stores events that come from no spool, in one durable transaction.
func (s *Store) Add(ctx context.Context, events []Event) error {
	return s.append(ctx, events, nil, nil)
}

// append stores events, gaps and, unless nil, a position.
func (s *Store) append(ctx context.Context, events []Event, gaps []Gap, pos *Position) error {
	for _, e := range events {
		if err := e.check(); err != nil {
			return err
		}
	}
	if err := s.acquire(ctx); err != nil {
		return err
	}
	defer s.release()
	err := s.commit(func(w *batchWriter) error {
		if pos != nil && s.unsure && *pos != (Position{}) && w.head.Position == *pos {
			return nil
		}
		now := s.opts.now()
		for _, e := range events {
			if err := w.event(e, s.node, now); err != nil {
				return err
			}
		}
		for _, g := range gaps {
			if g.At.IsZero() {
				g.At = now
			}
			if err := w.gap(g); err != nil {
				return err
			}
		}
		if pos != nil {
			w.head.Position = *pos
		}
		return nil
	})
	if err == nil && pos != nil {
		s.unsure = false
	}
	return err
}

// Gap records that count records are known to be missing (0: at least one,
// number unknown) and why. side is empty when it is not known.
func (s *Store) Gap(ctx context.Context, side Side, count uint64, reason string) error {
	return s.append(ctx, nil, []Gap{{Side: side, Count: count, Reason: reason}}, nil)
}

// CloseOpen ends every open connection that filter selects, at the time at,
// with reason as Record.Ended: for connections of a proxy that died, of which
// no final event will come. If one comes nevertheless it is merged into the
// same record. It returns how many it ended. filter may run more than once
// for a record and must not call the store.
//
// Read the spool to its end first (Tailer.Sync), so that connections whose
// final event is already there are not touched.
func (s *Store) CloseOpen(ctx context.Context, reason string, at time.Time, filter func(Record) bool) (int, error) {
	if reason == "" {
		return 0, errors.New("audit: CloseOpen needs a reason")
	}
	if !marshals(at) {
		return 0, errors.New("audit: CloseOpen: at is outside the years 0 to 9999")
	}
	if err := s.acquire(ctx); err != nil {
		return 0, err
	}
	defer s.release()
	var after []byte
	total := 0
	for {
		var keys [][]byte
		var records []Record
		err := s.active().view(func(tx *bolt.Tx) error {
			c := tx.Bucket(bucketOpen).Cursor()
			k, at := seekAfter(c, after)
			for ; k != nil && len(keys) < 500; k, at = c.Next() {
				// One that cannot be read is chosen or not as an empty
				// record; the commit deals with it.
				_, r, _ := decodeRecord(tx.Bucket(bucketEntries).Get(at))
				keys = append(keys, append([]byte(nil), k...))
				records = append(records, r)
			}
			return nil
		})
		if err != nil {
			return total, fmt.Errorf("audit: read open connections: %w", err)
		}
		if len(keys) == 0 {
			return total, nil
		}
		after = keys[len(keys)-1]
		var chosen [][]byte
		for i, r := range records {
			if filter(r) {
				chosen = append(chosen, keys[i])
			}
		}
		if len(chosen) == 0 {
			continue
		}
		n := 0
		err = s.commit(func(w *batchWriter) error {
			n = 0
			for _, k := range chosen {
				ok, err := w.closeOpen(k, reason, at)
				if err != nil {
					return err
				}
				if ok {
					n++
				}
			}
			return nil
		})
		if err != nil {
			return total, err
		}
		total += n
		if err := ctx.Err(); err != nil {
			return total, err
		}
	}
}

// seekAfter moves c to the first key after k; nil is before all.
func seekAfter(c *bolt.Cursor, k []byte) (key, value []byte) {
	if k == nil {
		return c.First()
	}
	return c.Seek(append(append([]byte(nil), k...), 0))
}

// Position is the spool position of the newest durable Append.
func (s *Store) Position() Position {
	s.mu.RLock()
	defer s.mu.RUnlock()
	return s.heads[len(s.heads)-1].Position
}

// Stats counts what is in the store, without reading it. Records counts
// connections, open ones included. A gap of unknown size counts as 1.
func (s *Store) Stats() adminv1.AuditStatus {
	s.mu.RLock()
	defer s.mu.RUnlock()
	st := adminv1.AuditStatus{Records: s.heads[0].Carried, Open: s.heads[len(s.heads)-1].Open}
	for _, hd := range s.heads {
		st.Records += hd.Records
		st.Gaps += hd.Gaps
	}
	return st
}

// Close waits for the write under way and for readers, and closes the files.
// Further calls do nothing.
func (s *Store) Close() error {
	s.writing <- struct{}{}
	defer s.release()
	s.mu.Lock()
	if s.closed {
		s.mu.Unlock()
		return nil
	}
	s.closed = true
	segments := s.segments
	s.mu.Unlock()
	var errs []error
	for _, g := range segments {
		errs = append(errs, g.close())
	}
	return errors.Join(append(errs, s.lock.Close())...)
}

// acquire takes the right to write.
func (s *Store) acquire(ctx context.Context) error {
	select {
	case s.writing <- struct{}{}:
	case <-ctx.Done():
		return ctx.Err()
	}
	s.mu.RLock()
	closed := s.closed
	s.mu.RUnlock()
	if closed {
		s.release()
		return ErrClosed
	}
	return nil
}

func (s *Store) release() { <-s.writing }

func (s *Store) active() *segment { return s.segments[len(s.segments)-1] }

// snapshot returns the segments for reading.
func (s *Store) snapshot() ([]*segment, []head, error) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	if s.closed {
		return nil, nil, ErrClosed
	}
	return s.segments, append([]head(nil), s.heads...), nil
}

// setSegments publishes a new list. The caller holds the right to write.
func (s *Store) setSegments(segments []*segment, heads []head) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.segments, s.heads = segments, heads
}

// commit runs fill in a durable transaction on the active segment, which it
// may begin anew first. The caller holds the right to write. When the active
// segment turns out to be damaged it is moved aside, and the batch goes to a
// new one.
func (s *Store) commit(fill func(*batchWriter) error) error {
	if err := s.rollIfDue(); err != nil {
		return err
	}
	err := s.commitOnce(fill)
	var d *damage
	if errors.As(err, &d) {
		if err := s.replaceActive(d); err != nil {
			return fmt.Errorf("audit: %w; and the segment could not be replaced: %w", d, err)
		}
		err = s.commitOnce(fill)
	}
	if err != nil {
		return fmt.Errorf("audit: commit: %w", err)
	}
	return nil
}

func (s *Store) commitOnce(fill func(*batchWriter) error) error {
	g := s.active()
	var hd head
	filled := false
	err := guard(g.path, func() error {
		return g.db.Update(func(tx *bolt.Tx) error {
			hd2, err := readHead(tx)
			if err != nil {
				return damaged(g.path, "%v", err)
			}
			w := newBatchWriter(tx, hd2)
			if err := fill(w); err != nil {
				return err
			}
			if err := w.finish(s.opts.now()); err != nil {
				return err
			}
			hd, filled = w.head, true
			return nil
		})
	})
	if err != nil {
		s.unsure = s.unsure || filled
		return err
	}
	s.mu.Lock()
	s.heads[len(s.heads)-1] = hd
	s.mu.Unlock()
	return nil
}
