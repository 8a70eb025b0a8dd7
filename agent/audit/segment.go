package audit

import (
	"crypto/sha256"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime/debug"
	"sync/atomic"
	"time"

	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// The buckets of a segment file. entries and batches are only appended to;
// the others are indexes that can be derived from them, and Verify does.
var (
	bucketMeta    = []byte("meta")
	bucketEntries = []byte("entries") // entry number -> entry
	bucketBatches = []byte("batches") // batch number -> batch
	bucketConns   = []byte("conns")   // Seq -> number of the connection's newest entry
	bucketOpen    = []byte("open")    // connection key -> number of its newest entry
	bucketLost    = []byte("lost")    // the same, of those that CloseOpen ended
	bucketGaps    = []byte("gaps")    // number of each gap entry -> nothing

	keyHeader = []byte("header")
	keyHead   = []byte("head")
)

const segmentVersion = 1

// header is written once, when a segment file is made. Its hash is what the
// segment's first batch links to.
type header struct {
	Version int       `json:"version"`
	Node    string    `json:"node"`
	Number  uint64    `json:"number"`
	Created time.Time `json:"created"`
	// Prev is the hash of the last batch of the segment before.
	Prev hash `json:"prev"`

	FirstBatch uint64 `json:"firstBatch"`
	FirstEntry uint64 `json:"firstEntry"`
	FirstSeq   uint64 `json:"firstSeq"`

	// Lost says why the segment before is not there; the chain is broken
	// here.
	Lost string `json:"lost,omitempty"`
}

// head is the state after the newest batch.
type head struct {
	Batch     uint64 `json:"batch"` // number of the newest batch
	Hash      hash   `json:"hash"`  // of the newest batch
	NextEntry uint64 `json:"nextEntry"`
	NextSeq   uint64 `json:"nextSeq"`

	Records uint64 `json:"records"` // connections first seen in this segment
	Carried uint64 `json:"carried"` // connections that were open when it began
	Open    uint64 `json:"open"`    // connections open now
	Gaps    uint64 `json:"gaps"`    // records that its gaps say are missing
	Retired uint64 `json:"retired"` // newest segment that retention deleted

	// Last is the newest Start or End in the segment.
	Last     time.Time `json:"last,omitzero"`
	Position Position  `json:"position"`
}

// segment is one open segment file. Immutable, but for what bbolt guards
// itself.
type segment struct {
	path   string
	header header
	link   hash // of the header's bytes
	db     *bolt.DB
}

// damage is the error for a file whose bytes are not what was written.
type damage struct {
	path string
	what any
}

func (d *damage) Error() string {
	return fmt.Sprintf("%s is damaged: %v", filepath.Base(d.path), d.what)
}

func damaged(path, format string, args ...any) error {
	return &damage{path: path, what: fmt.Sprintf(format, args...)}
}

// guard turns what bbolt does on a damaged file (it panics, or the mapping
// faults) into an error. Nothing but bbolt and this package runs inside.
func guard(path string, fn func() error) (err error) {
	defer debug.SetPanicOnFault(debug.SetPanicOnFault(true))
	defer func() {
		if p := recover(); p != nil {
			err = &damage{path: path, what: p}
		}
	}()
	return fn()
}

// segmentPath is the file of a segment.
func segmentPath(dir string, n uint64) string {
	return filepath.Join(dir, fmt.Sprintf("audit-%06d.db", n))
}

func boltOptions(size int64, readOnly bool) *bolt.Options {
	return &bolt.Options{
		Timeout:      2 * time.Second, // the store's own lock is held; nobody else should be here
		FreelistType: bolt.FreelistMapType,
		// Map more than the file will hold: growing the mapping would make
		// the writer wait for every reader.
		InitialMmapSize: int(2 * size),
		ReadOnly:        readOnly,
		NoStatistics:    true,
	}
}

// createSegment makes a segment file that is either whole or not there. fill
// may write the first batch.
func createSegment(dir string, h header, pos Position, retired uint64, size int64, fill func(*batchWriter) error) error {
	path := segmentPath(dir, h.Number)
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	db, err := bolt.Open(tmp, 0o600, boltOptions(size, false))
	if err != nil {
		return fmt.Errorf("create audit segment: %w", err)
	}
	err = db.Update(func(tx *bolt.Tx) error {
		for _, name := range [][]byte{bucketMeta, bucketEntries, bucketBatches, bucketConns, bucketOpen, bucketLost, bucketGaps} {
			if _, err := tx.CreateBucket(name); err != nil {
				return err
			}
		}
		b, err := json.Marshal(h)
		if err != nil {
			return err
		}
		hd := head{
			Batch: h.FirstBatch - 1, Hash: sha256.Sum256(b),
			NextEntry: h.FirstEntry, NextSeq: h.FirstSeq,
			Position: pos, Retired: retired,
		}
		if err := tx.Bucket(bucketMeta).Put(keyHeader, b); err != nil {
			return err
		}
		w := newBatchWriter(tx, hd)
		if err := fill(w); err != nil {
			return err
		}
		return w.finish(h.Created)
	})
	if err = errors.Join(err, db.Close()); err != nil {
		return fmt.Errorf("create audit segment: %w", errors.Join(err, os.Remove(tmp)))
	}
	// bbolt has synced the content.
	if err := os.Rename(tmp, path); err != nil {
		return fmt.Errorf("create audit segment: %w", err)
	}
	return syncDir(dir)
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// touched keeps the compiler from leaving out the reads in openSegment.
var touched atomic.Uint32

// openSegment opens a segment file and checks its frame; deep also walks
// every page. A *damage error means that the file's content is at fault; the
// file is then left open, because the locks of a transaction that failed
// inside bbolt may never be released: one descriptor until the process ends.
func openSegment(path string, size int64, readOnly, deep bool) (*segment, head, error) {
	var hd head
	s := &segment{path: path}
	err := guard(path, func() error {
		info, err := os.Stat(path)
		if err != nil {
			return err
		}
		if info.Size() == 0 {
			return damaged(path, "the file is empty")
		}
		s.db, err = bolt.Open(path, 0o600, boltOptions(size, readOnly))
		if err != nil {
			return classify(path, err)
		}
		return s.db.View(func(tx *bolt.Tx) error {
			if tx.Size() > info.Size() {
				return damaged(path, "cut to %d of %d bytes", info.Size(), tx.Size())
			}
			if err := s.readFrame(tx, &hd); err != nil {
				return err
			}
			if !deep {
				return nil
			}
			var sum byte // reads each page, so that one the disk cannot give is found
			err = tx.ForEach(func(name []byte, b *bolt.Bucket) error {
				return b.ForEach(func(k, v []byte) error {
					if len(v) > 0 {
						sum ^= v[0] ^ v[len(v)-1]
					}
					return nil
				})
			})
			touched.Store(uint32(sum))
			return err
		})
	})
	var d *damage
	if err != nil && s.db != nil && !errors.As(err, &d) {
		err = errors.Join(err, s.db.Close())
	}
	return s, hd, err
}

// readFrame reads the header and the head.
func (s *segment) readFrame(tx *bolt.Tx, hd *head) error {
	for _, name := range [][]byte{bucketMeta, bucketEntries, bucketBatches, bucketConns, bucketOpen, bucketLost, bucketGaps} {
		if tx.Bucket(name) == nil {
			return damaged(s.path, "bucket %s is missing", name)
		}
	}
	b := tx.Bucket(bucketMeta).Get(keyHeader)
	if err := json.Unmarshal(b, &s.header); err != nil {
		return damaged(s.path, "header: %v", err)
	}
	s.link = sha256.Sum256(b)
	if s.header.Version != segmentVersion {
		return fmt.Errorf("%s has version %d; this program reads version %d", s.path, s.header.Version, segmentVersion)
	}
	if segmentPath(filepath.Dir(s.path), s.header.Number) != s.path {
		return damaged(s.path, "it says it is segment %d", s.header.Number)
	}
	var err error
	*hd, err = readHead(tx)
	if err != nil {
		return damaged(s.path, "%v", err)
	}
	return nil
}

func readHead(tx *bolt.Tx) (head, error) {
	var hd head
	if err := json.Unmarshal(tx.Bucket(bucketMeta).Get(keyHead), &hd); err != nil {
		return head{}, fmt.Errorf("head: %w", err)
	}
	return hd, nil
}

// classify tells a file that bbolt cannot read from one that it cannot get.
func classify(path string, err error) error {
	for _, bad := range []error{bolterrors.ErrInvalid, bolterrors.ErrVersionMismatch, bolterrors.ErrChecksum, bolterrors.ErrInvalidMapping} {
		if errors.Is(err, bad) {
			return &damage{path: path, what: err}
		}
	}
	if errors.Is(err, bolterrors.ErrTimeout) {
		return fmt.Errorf("open %s: another process holds it", path)
	}
	var sys *os.PathError
	if errors.As(err, &sys) {
		return err
	}
	return &damage{path: path, what: err}
}

// view runs fn in a read transaction. Keep it short, and never call code of
// another package in it.
func (s *segment) view(fn func(tx *bolt.Tx) error) error {
	return guard(s.path, func() error { return s.db.View(fn) })
}

// close closes the file; readers are waited for.
func (s *segment) close() error { return s.db.Close() }
