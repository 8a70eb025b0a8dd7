package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"syscall"
	"time"

	bolt "go.etcd.io/bbolt"
)

// OpenWith is Open with options.
func OpenWith(dir, node string, log *slog.Logger, opts Options) (_ *Store, err error) {
	if node == "" {
		return nil, errors.New("audit: open: the node's name is empty")
	}
	opts, err = opts.withDefaults()
	if err != nil {
		return nil, err
	}
	dir, err = filepath.Abs(dir)
	if err != nil {
		return nil, fmt.Errorf("audit: open: %w", err)
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("audit: open: %w", err)
	}
	s := &Store{dir: dir, node: node, log: log, opts: opts, writing: make(chan struct{}, 1)}
	if s.lock, err = lockDir(dir, 3*time.Second); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil {
			for _, g := range s.segments {
				err = errors.Join(err, g.close())
			}
			err = errors.Join(err, s.lock.Close())
		}
	}()
	if err := s.load(); err != nil {
		return nil, fmt.Errorf("audit: open %s: %w", dir, err)
	}
	return s, nil
}

// lockDir takes the directory for this process. It waits a little for a
// process that was killed and has not quite gone.
func lockDir(dir string, wait time.Duration) (*os.File, error) {
	d, err := os.Open(dir)
	if err != nil {
		return nil, fmt.Errorf("audit: open: %w", err)
	}
	deadline := time.Now().Add(wait)
	for {
		err := syscall.Flock(int(d.Fd()), syscall.LOCK_EX|syscall.LOCK_NB)
		if err == nil {
			return d, nil
		}
		if !errors.Is(err, syscall.EWOULDBLOCK) && !errors.Is(err, syscall.EINTR) || time.Now().After(deadline) {
			return nil, errors.Join(fmt.Errorf("audit: open %s: lock: %w; is another agent running?", dir, err), d.Close())
		}
		time.Sleep(20 * time.Millisecond)
	}
}

// load opens the segments in the directory, moves damaged ones aside, and
// sees to it that there is one to write.
func (s *Store) load() error {
	numbers, err := s.list()
	if err != nil {
		return err
	}
	var between []*damage // sealed ones that cannot be read
	var lostActive *lostSegment
	for i, n := range numbers {
		last := i == len(numbers)-1
		g, hd, err := openSegment(segmentPath(s.dir, n), s.opts.SegmentSize, !last, last)
		var d *damage
		switch {
		case errors.As(err, &d) && last:
			lostActive = &lostSegment{number: n, why: d, head: hd}
			continue
		case errors.As(err, &d):
			between = append(between, d)
			continue
		case err != nil:
			return err
		}
		s.segments, s.heads = append(s.segments, g), append(s.heads, hd)
		if g.header.Node != s.node {
			return fmt.Errorf("it holds the records of node %q, not of %q; name another directory", g.header.Node, s.node)
		}
	}
	if lostActive != nil || len(s.segments) == 0 {
		if err := s.begin(s.segments, s.heads, lostActive); err != nil {
			return err
		}
	}
	// The loss is in the log before the file is moved: a crash between the
	// two reports it twice, never not at all.
	if lostActive != nil {
		if err := s.moveAside(lostActive.why); err != nil {
			return err
		}
	}
	for _, d := range between {
		gap := Gap{Count: s.missingIn(d), Reason: d.Error() + "; moved aside"}
		if err := s.append(context.Background(), nil, []Gap{gap}, nil); err != nil {
			return err
		}
		if err := s.moveAside(d); err != nil {
			return err
		}
	}
	s.retain()
	return nil
}

// missingIn is how many connections were first seen in a segment that has
// been lost from between two others; 0 when that cannot be told.
func (s *Store) missingIn(d *damage) uint64 {
	for i := 1; i < len(s.segments); i++ {
		before, after := s.segments[i-1].header, s.segments[i].header
		if after.Number == before.Number+2 && segmentPath(s.dir, before.Number+1) == d.path {
			return after.FirstSeq - s.heads[i-1].NextSeq
		}
	}
	return 0
}

// list returns the numbers of the segment files, rising, and removes files
// that a crash left half made.
func (s *Store) list() ([]uint64, error) {
	files, err := os.ReadDir(s.dir)
	if err != nil {
		return nil, err
	}
	var numbers []uint64
	for _, f := range files {
		name := f.Name()
		if strings.HasPrefix(name, "audit-") && strings.HasSuffix(name, ".db.new") {
			if err := os.Remove(filepath.Join(s.dir, name)); err != nil {
				return nil, err
			}
			continue
		}
		digits, ok := strings.CutSuffix(strings.TrimPrefix(name, "audit-"), ".db")
		if !ok {
			continue
		}
		n, err := strconv.ParseUint(digits, 10, 64)
		if err != nil || filepath.Base(segmentPath(s.dir, n)) != name {
			continue
		}
		numbers = append(numbers, n)
	}
	slices.Sort(numbers)
	return numbers, nil
}

func (s *Store) moveAside(d *damage) error {
	aside := fmt.Sprintf("%s.damaged-%s", d.path, s.opts.now().UTC().Format("20060102T150405.000000000Z"))
	s.log.Error("audit segment is damaged; it is moved aside and its records are no longer found by queries",
		slog.String("segment", d.path), slog.String("aside", aside), slog.Any("error", d))
	if err := os.Rename(d.path, aside); err != nil {
		return fmt.Errorf("move a damaged segment aside: %w", err)
	}
	return syncDir(s.dir)
}

// lostSegment is an active segment that had to be moved aside.
type lostSegment struct {
	number uint64
	why    *damage
	// head is its last state; zero when that could not be read.
	head head
}

// begin makes and opens the segment that follows segments, and publishes the
// list with it; after a loss, the lost one is not in segments. On error
// nothing has changed. The caller holds the right to write.
func (s *Store) begin(segments []*segment, heads []head, lost *lostSegment) error {
	h := header{Version: segmentVersion, Node: s.node, Number: 1, Created: s.opts.now().UTC(), FirstBatch: 1, FirstEntry: 1, FirstSeq: 1}
	var hd head
	var prev *segment
	if n := len(segments); n > 0 {
		prev, hd = segments[n-1], heads[n-1]
		h.Number, h.Prev = prev.header.Number+1, hd.Hash
		h.FirstBatch, h.FirstEntry, h.FirstSeq = hd.Batch+1, hd.NextEntry, hd.NextSeq
	}
	if lost != nil {
		h.Number = lost.number + 1
		h.Lost = lost.why.Error()
		h.Prev = hash{}
		if known := lost.head; known.NextSeq > 0 {
			h.FirstBatch, h.FirstEntry, h.FirstSeq = known.Batch+1, known.NextEntry, known.NextSeq
			hd.Position, hd.Retired = known.Position, max(hd.Retired, known.Retired)
		} else {
			// Skip every number that it can have given out: an entry takes
			// more than 64 bytes.
			skip := uint64(s.opts.SegmentSize)/64 + 1<<20
			h.FirstBatch, h.FirstEntry, h.FirstSeq = h.FirstBatch+skip, h.FirstEntry+skip, h.FirstSeq+skip
		}
	}
	err := createSegment(s.dir, h, hd.Position, hd.Retired, s.opts.SegmentSize, func(w *batchWriter) error {
		if prev != nil {
			if err := s.carryOver(prev, w); err != nil {
				return err
			}
		}
		if lost == nil {
			return nil
		}
		return w.gap(Gap{At: h.Created, Count: lost.head.Records, Reason: lost.why.Error() + "; moved aside"})
	})
	if err != nil {
		return err
	}
	next, nextHead, err := openSegment(segmentPath(s.dir, h.Number), s.opts.SegmentSize, false, false)
	if err != nil {
		return err
	}
	s.setSegments(append(append([]*segment(nil), segments...), next), append(append([]head(nil), heads...), nextHead))
	return nil
}

func (s *Store) carryOver(prev *segment, w *batchWriter) error {
	return prev.view(func(tx *bolt.Tx) error {
		entries := tx.Bucket(bucketEntries)
		return tx.Bucket(bucketOpen).ForEach(func(key, at []byte) error {
			return w.carry(key, entries.Get(at))
		})
	})
}

// rollIfDue begins a new segment when the active one is large or old.
func (s *Store) rollIfDue() error {
	g := s.active()
	hd := s.heads[len(s.heads)-1]
	// At least as many entries as were carried over, or a node with very many
	// open connections would do nothing but carry them.
	if n := hd.NextEntry - g.header.FirstEntry; n <= 2*hd.Carried {
		return nil
	}
	var size int64
	err := g.view(func(tx *bolt.Tx) error { size = tx.Size(); return nil })
	if err != nil {
		return fmt.Errorf("audit: %w", err)
	}
	if size < s.opts.SegmentSize && s.opts.now().Sub(g.header.Created) < s.opts.SegmentAge {
		return nil
	}
	if err := s.begin(s.segments, s.heads, nil); err != nil {
		return fmt.Errorf("audit: begin a segment: %w", err)
	}
	s.retain()
	return nil
}

// replaceActive begins a new segment after damage to the active one.
func (s *Store) replaceActive(d *damage) error {
	n := len(s.segments) - 1
	bad, hd := s.segments[n], s.heads[n]
	if err := s.begin(s.segments[:n], s.heads[:n], &lostSegment{number: bad.header.Number, why: d, head: hd}); err != nil {
		return err
	}
	return s.moveAside(d)
}

// retain deletes the oldest segments beyond what is kept. Each deletion is
// first written into the log, so that Verify can tell it from a removal. What
// fails is tried again the next time; records are not held up by it.
func (s *Store) retain() {
	for len(s.segments) > 1 {
		oldest, hd := s.segments[0], s.heads[0]
		tooMany := len(s.segments) > s.opts.MaxSegments
		tooOld := s.opts.MaxAge > 0 && s.opts.now().Sub(hd.Last) > s.opts.MaxAge
		recorded := s.heads[len(s.heads)-1].Retired >= oldest.header.Number // and then a crash
		if !tooMany && !tooOld && !recorded {
			return
		}
		if !recorded {
			err := s.commitOnce(func(w *batchWriter) error {
				return w.retire(retirement{Segment: oldest.header.Number, Hash: hd.Hash})
			})
			if err != nil {
				s.log.Error("audit retention: the deletion of a segment could not be recorded; the segment is kept",
					slog.String("segment", oldest.path), slog.Any("error", err))
				return
			}
		}
		s.setSegments(s.segments[1:len(s.segments):len(s.segments)], s.heads[1:len(s.heads):len(s.heads)])
		if err := errors.Join(os.Remove(oldest.path), oldest.close()); err != nil {
			s.log.Error("audit retention: a segment could not be deleted", slog.String("segment", oldest.path), slog.Any("error", err))
			continue
		}
		s.log.Info("audit segment deleted by retention", slog.String("segment", oldest.path))
	}
}
