package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"path/filepath"

	bolt "go.etcd.io/bbolt"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
)

// Verify reads the whole store. It recomputes the hash of every batch and
// the indexes that queries use, and compares them, the links between batches
// and files, and the newest batch with the one this process wrote last. An
// edited, cut, reordered or removed entry is named in Fault (the first one
// found; what follows is then not read). The error is for a store that could
// not be read to the end for another reason, such as ctx.
//
// Chaining cannot show that someone with write access rebuilt the whole
// chain, or put an older copy of all files in place while no agent ran; for
// that, compare Head with one that is kept elsewhere.
func (s *Store) Verify(ctx context.Context) (adminv1.AuditVerification, error) {
	segments, heads, err := s.snapshot()
	if err != nil {
		return adminv1.AuditVerification{}, err
	}
	v := &verifier{ctx: ctx, retired: map[uint64]hash{}}
	for i, g := range segments {
		// The active segment moves on, but never back.
		if err := v.segment(g, heads[i], i == len(segments)-1); err != nil {
			if ctx.Err() != nil {
				return adminv1.AuditVerification{}, ctx.Err()
			}
			v.result.Fault = err.Error()
			return v.result, nil
		}
	}
	if first := segments[0].header; first.Number > 1 && first.Lost == "" {
		if h, ok := v.retired[first.Number-1]; !ok || h != first.Prev {
			v.result.Fault = fmt.Sprintf("segment %d and those before it are missing, and were not deleted by retention", first.Number-1)
		}
	}
	return v.result, nil
}

// Head is the number and the hash of the newest batch. Whoever keeps it
// elsewhere can later tell whether the log was rebuilt or rolled back.
func (s *Store) Head() (batch uint64, sum [32]byte) {
	s.mu.RLock()
	defer s.mu.RUnlock()
	hd := s.heads[len(s.heads)-1]
	return hd.Batch, hd.Hash
}

type verifier struct {
	ctx     context.Context
	result  adminv1.AuditVerification
	retired map[uint64]hash // what retire entries say

	prev *segment // the segment before
	head head     // computed at its end
}

// segmentCheck is the state that one segment's entries add up to.
type segmentCheck struct {
	*verifier
	name  string
	head  head
	conns map[uint64]uint64 // Seq -> newest entry
	open  map[string]uint64 // connection key -> newest entry
	gaps  map[uint64]bool
}

// segment checks one file. Its error is the fault.
func (v *verifier) segment(g *segment, seen head, active bool) error {
	name := filepath.Base(g.path)
	h := g.header
	if h.Lost != "" {
		return fmt.Errorf("%s: the chain is broken before it: %s", name, h.Lost)
	}
	if v.prev != nil {
		p := v.prev.header
		switch {
		case h.Number != p.Number+1:
			return fmt.Errorf("segment %d is missing", p.Number+1)
		case h.Prev != v.head.Hash || h.FirstBatch != v.head.Batch+1 || h.FirstEntry != v.head.NextEntry || h.FirstSeq != v.head.NextSeq:
			return fmt.Errorf("%s does not continue %s: batches are missing or were changed", name, filepath.Base(v.prev.path))
		}
	}
	c := &segmentCheck{
		verifier: v, name: name,
		head:  head{Batch: h.FirstBatch - 1, Hash: g.link, NextEntry: h.FirstEntry, NextSeq: h.FirstSeq},
		conns: map[uint64]uint64{}, open: map[string]uint64{}, gaps: map[uint64]bool{},
	}
	err := g.view(func(tx *bolt.Tx) error {
		stored, err := readHead(tx)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		if b := tx.Bucket(bucketMeta).Get(keyHeader); !sameHeader(b, h) {
			return fmt.Errorf("%s: its header was changed", name)
		}
		if stored.Batch < seen.Batch || stored.Batch == seen.Batch && stored.Hash != seen.Hash || !active && stored.Batch != seen.Batch {
			return fmt.Errorf("%s: its newest batch is not %d, which this agent wrote", name, seen.Batch)
		}
		if err := c.batches(tx, seen); err != nil {
			return err
		}
		return c.indexes(tx, stored)
	})
	if err != nil {
		return err
	}
	if v.prev == nil {
		v.result.Records += c.head.Carried
	}
	v.result.Records += c.head.Records
	v.prev, v.head = g, c.head
	return nil
}

func sameHeader(b []byte, h header) bool {
	want, err := json.Marshal(h)
	return err == nil && bytes.Equal(b, want)
}

// batches walks batches and entries side by side.
func (c *segmentCheck) batches(tx *bolt.Tx, seen head) error {
	entries := tx.Bucket(bucketEntries).Cursor()
	ek, ev := entries.First()
	cur := tx.Bucket(bucketBatches).Cursor()
	for k, v := cur.First(); k != nil; k, v = cur.Next() {
		if err := c.ctx.Err(); err != nil {
			return err
		}
		n, err := parseNumber(k)
		if err != nil {
			return fmt.Errorf("%s: batches: %w", c.name, err)
		}
		if n != c.head.Batch+1 {
			return fmt.Errorf("%s: batch %d is missing", c.name, c.head.Batch+1)
		}
		b, err := decodeBatch(v)
		if err != nil {
			return fmt.Errorf("%s: batch %d: %w", c.name, n, err)
		}
		d := newBatchDigest(c.head.Hash, n, c.head.NextEntry)
		for range b.Count {
			if ek == nil || !bytes.Equal(ek, number(c.head.NextEntry)) {
				return fmt.Errorf("%s: entry %d (batch %d) is missing", c.name, c.head.NextEntry, n)
			}
			if err := c.entry(ev); err != nil {
				return fmt.Errorf("%s: entry %d (batch %d): %w", c.name, c.head.NextEntry, n, err)
			}
			d.add(ev)
			c.head.NextEntry++
			ek, ev = entries.Next()
		}
		if sum := d.sum(b.time()); sum != b {
			return fmt.Errorf("%s: batch %d (entries %d to %d) is not what was written: an entry was changed, moved or removed",
				c.name, n, b.First, c.head.NextEntry-1)
		}
		c.head.Batch, c.head.Hash = n, b.Hash
		c.result.Batches++
		if n == seen.Batch && b.Hash != seen.Hash {
			return fmt.Errorf("%s: batch %d is not the one that this agent wrote", c.name, n)
		}
	}
	if ek != nil {
		return fmt.Errorf("%s: an entry after %d belongs to no batch", c.name, c.head.NextEntry-1)
	}
	return nil
}

// entry adds one entry to what the indexes must be.
func (c *segmentCheck) entry(v []byte) error {
	k, body, err := entryKind(v)
	if err != nil {
		return err
	}
	n := c.head.NextEntry
	switch k {
	case kindGap:
		g, err := decodeGap(v)
		c.gaps[n] = true
		c.head.Gaps += g.counted()
		return err
	case kindRetire:
		var r retirement
		if err := json.Unmarshal(body, &r); err != nil {
			return err
		}
		c.retired[r.Segment], c.head.Retired = r.Hash, r.Segment
		return nil
	}
	_, r, err := decodeRecord(v)
	if err != nil {
		return err
	}
	_, known := c.conns[r.Seq]
	switch {
	case k == kindCarry:
		c.head.Carried++
	case !known && r.Seq != c.head.NextSeq:
		return fmt.Errorf("connection %d comes where %d was expected", r.Seq, c.head.NextSeq)
	case !known:
		c.head.NextSeq++
		c.head.Records++
	}
	c.conns[r.Seq] = n
	key := string(connKey(&r))
	delete(c.open, key)
	if r.End.IsZero() {
		c.open[key] = n
	}
	return nil
}

// indexes compares the stored indexes and head with the computed ones.
func (c *segmentCheck) indexes(tx *bolt.Tx, stored head) error {
	c.head.Open = uint64(len(c.open))
	want := c.head
	want.Position, want.Last, want.Retired = stored.Position, stored.Last, stored.Retired
	if want != stored {
		return fmt.Errorf("%s: its head does not fit its entries: they end at batch %d (entry %d, %d records), not %d (entry %d, %d records)",
			c.name, want.Batch, want.NextEntry-1, want.Records, stored.Batch, stored.NextEntry-1, stored.Records)
	}
	if err := compareIndex(tx.Bucket(bucketConns), len(c.conns), func(k []byte) (uint64, bool) {
		seq, err := parseNumber(k)
		n, ok := c.conns[seq]
		return n, ok && err == nil
	}); err != nil {
		return fmt.Errorf("%s: index of connections: %w", c.name, err)
	}
	if err := compareIndex(tx.Bucket(bucketOpen), len(c.open), func(k []byte) (uint64, bool) {
		n, ok := c.open[string(k)]
		return n, ok
	}); err != nil {
		return fmt.Errorf("%s: index of open connections: %w", c.name, err)
	}
	found := 0
	err := tx.Bucket(bucketGaps).ForEach(func(k, _ []byte) error {
		n, err := parseNumber(k)
		if err != nil || !c.gaps[n] {
			return fmt.Errorf("%s: index of gaps: %x is not a gap", c.name, k)
		}
		found++
		return nil
	})
	if err == nil && found != len(c.gaps) {
		err = fmt.Errorf("%s: index of gaps: %d of %d are there", c.name, found, len(c.gaps))
	}
	return err
}

func compareIndex(b *bolt.Bucket, want int, lookup func(k []byte) (uint64, bool)) error {
	found := 0
	err := b.ForEach(func(k, v []byte) error {
		n, err := parseNumber(v)
		at, ok := lookup(k)
		if err != nil || !ok || at != n {
			return fmt.Errorf("the entry for %q was changed", k)
		}
		found++
		return nil
	})
	if err == nil && found != want {
		err = fmt.Errorf("%d of %d entries are there", found, want)
	}
	return err
}
