package audit

import (
	"encoding/json"
	"fmt"
	"time"

	bolt "go.etcd.io/bbolt"
)

// batchWriter adds entries within one write transaction. finish must be
// called last.
type batchWriter struct {
	tx     *bolt.Tx
	head   head
	digest *batchDigest

	entries, conns, open, lost, gaps *bolt.Bucket
}

func newBatchWriter(tx *bolt.Tx, hd head) *batchWriter {
	w := &batchWriter{
		tx: tx, head: hd,
		digest:  newBatchDigest(hd.Hash, hd.Batch+1, hd.NextEntry),
		entries: tx.Bucket(bucketEntries),
		conns:   tx.Bucket(bucketConns),
		open:    tx.Bucket(bucketOpen),
		lost:    tx.Bucket(bucketLost),
		gaps:    tx.Bucket(bucketGaps),
	}
	// Keys rise, so pages need no room for later insertions.
	w.entries.FillPercent = 1
	w.conns.FillPercent = 1
	return w
}

// put appends an encoded entry and returns its number.
func (w *batchWriter) put(v []byte) (uint64, error) {
	n := w.head.NextEntry
	if err := w.entries.Put(number(n), v); err != nil {
		return 0, err
	}
	w.head.NextEntry++
	w.digest.add(v)
	return n, nil
}

// record appends the state of a connection and points the indexes at it.
func (w *batchWriter) record(k kind, r *Record) error {
	v, err := encodeEntry(k, r)
	if err != nil {
		return err
	}
	n, err := w.put(v)
	if err != nil {
		return err
	}
	for _, t := range []time.Time{r.Start, r.End} {
		if t.After(w.head.Last) {
			w.head.Last = t
		}
	}
	return w.conns.Put(number(r.Seq), number(n))
}

// current is what the log says of a connection in an index. An entry that
// cannot be read any more is given up, with a gap in its place, so that one
// bad entry does not stop the log.
func (w *batchWriter) current(index *bolt.Bucket, key []byte) (Record, bool, error) {
	at := index.Get(key)
	if at == nil {
		return Record{}, false, nil
	}
	_, r, err := decodeRecord(w.entries.Get(at))
	if err == nil {
		return r, true, nil
	}
	if index == w.open {
		w.head.Open--
	}
	if err := index.Delete(key); err != nil {
		return Record{}, false, err
	}
	return Record{}, false, w.gap(Gap{At: time.Now(), Count: 1, Reason: fmt.Sprintf("the open connection %q cannot be read: %v", key, err)})
}

// event merges an event into the log.
func (w *batchWriter) event(e Event, node string, now time.Time) error {
	key := connKey(&e.Record)
	index := w.open
	at := w.open.Get(key)
	if at == nil {
		index = w.lost
		at = w.lost.Get(key)
	}
	r := e.Record
	old, known, err := w.current(index, key)
	if err != nil {
		return err
	}
	if !known {
		at = nil
	}
	if at == nil {
		r.Seq = w.head.NextSeq
		w.head.NextSeq++
		w.head.Records++
	} else {
		r = merge(old, r)
	}
	r.Node = node
	r.Start, r.End = r.Start.UTC(), r.End.UTC()
	k := kindUpdate
	switch {
	case e.Final:
		k = kindEnd
		if r.End.IsZero() {
			r.End = now.UTC()
		}
	case index == w.lost && at != nil:
		// Late news of a connection that CloseOpen ended: it stays ended.
	default:
		if at == nil {
			k = kindOpen
		}
		r.End = time.Time{}
	}
	if err := w.record(k, &r); err != nil {
		return err
	}
	n := number(w.head.NextEntry - 1)
	switch {
	case e.Final && at != nil:
		if index == w.open {
			w.head.Open--
		}
		return index.Delete(key)
	case e.Final:
		return nil
	case at == nil:
		w.head.Open++
		return w.open.Put(key, n)
	default:
		return index.Put(key, n)
	}
}

// closeOpen ends an open connection that no final event will end. It reports
// false when the connection is no longer open.
func (w *batchWriter) closeOpen(key []byte, reason string, end time.Time) (bool, error) {
	r, known, err := w.current(w.open, key)
	if err != nil || !known {
		return false, err
	}
	r.Ended, r.End = reason, end.UTC()
	if r.End.Before(r.Start) {
		r.End = r.Start
	}
	if err := w.record(kindEnd, &r); err != nil {
		return false, err
	}
	w.head.Open--
	if err := w.open.Delete(key); err != nil {
		return false, err
	}
	return true, w.lost.Put(key, number(w.head.NextEntry-1))
}

// carry copies an open connection's entry from the segment before.
func (w *batchWriter) carry(key, entry []byte) error {
	_, r, err := decodeRecord(entry)
	if err != nil {
		return w.gap(Gap{At: time.Now(), Count: 1, Reason: fmt.Sprintf("the open connection %q cannot be read: %v", key, err)})
	}
	if err := w.record(kindCarry, &r); err != nil {
		return err
	}
	w.head.Carried++
	w.head.Open++
	return w.open.Put(key, number(w.head.NextEntry-1))
}

func (w *batchWriter) gap(g Gap) error {
	g.At = g.At.UTC()
	v, err := encodeEntry(kindGap, g)
	if err != nil {
		return err
	}
	n, err := w.put(v)
	if err != nil {
		return err
	}
	w.head.Gaps += g.counted()
	return w.gaps.Put(number(n), nil)
}

func (w *batchWriter) retire(r retirement) error {
	v, err := encodeEntry(kindRetire, r)
	if err != nil {
		return err
	}
	w.head.Retired = r.Segment
	_, err = w.put(v)
	return err
}

// finish closes the batch, if it has entries, and stores the new head.
func (w *batchWriter) finish(now time.Time) error {
	if w.digest.count > 0 {
		b := w.digest.sum(now)
		w.head.Batch++
		w.head.Hash = b.Hash
		if err := w.tx.Bucket(bucketBatches).Put(number(w.head.Batch), b.encode()); err != nil {
			return err
		}
	}
	v, err := json.Marshal(w.head)
	if err != nil {
		return fmt.Errorf("encode audit head: %w", err)
	}
	return w.tx.Bucket(bucketMeta).Put(keyHead, v)
}
