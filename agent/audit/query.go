package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	bolt "go.etcd.io/bbolt"
	bolterrors "go.etcd.io/bbolt/errors"
)

// Filter selects records. The zero Filter selects all of connections and refusals;
// each field that is set narrows it.
type Filter struct {
	// Since and Until bound the time: a record is selected when any part of
	// the connection lies at or after Since and before Until. An open
	// connection reaches to now.
	Since, Until time.Time
	// From and To select by the identity of the source and the destination:
	// a SPIFFE ID, "namespace/serviceaccount", or "namespace/" for all of a
	// namespace. An end that proved no identity is selected by its local
	// workload's name.
	From, To string
	// Verdicts selects any of these. None: all but Issued, which tells of no use of an
	// identity, and is selected by name or with Serial.
	Verdicts []Verdict
	Side     Side
	// Open selects by whether the connection is still open.
	Open *bool
	// ID selects the connection with this Record.ID.
	ID string
	// Serial selects the connections that one end proved itself in with this
	// certificate, and its issuance: its serial number in hexadecimal of either
	// case, with or without colons and leading zeros.
	Serial string
	// Limit selects the newest so many; 0 is no limit.
	Limit int
}

func (f Filter) check() error {
	for _, p := range []struct{ name, v string }{{"from", f.From}, {"to", f.To}} {
		if err := checkPartyFilter(p.v); err != nil {
			return fmt.Errorf("audit: filter: %s: %w", p.name, err)
		}
	}
	for _, v := range f.Verdicts {
		if _, err := ParseVerdict(string(v)); err != nil {
			return fmt.Errorf("audit: filter: verdict: %w", err)
		}
	}
	switch f.Side {
	case "", Source, Destination:
	default:
		return fmt.Errorf("audit: filter: side is %q; use source or destination", f.Side)
	}
	if strings.Trim(normalSerial(f.Serial), "0123456789abcdef") != "" {
		return fmt.Errorf("audit: filter: serial is %q; use hexadecimal digits", f.Serial)
	}
	if f.Limit < 0 {
		return fmt.Errorf("audit: filter: limit is %d; use 0 for no limit, or a positive number", f.Limit)
	}
	return nil
}

func normalSerial(s string) string {
	return strings.TrimLeft(strings.ToLower(strings.ReplaceAll(s, ":", "")), "0")
}

// matchSerial reports whether one of the ends showed the certificate.
func matchSerial(serial string, r *Record) bool {
	want := normalSerial(serial)
	for _, p := range []Party{r.Source, r.Destination} {
		if p.Serial != "" && normalSerial(p.Serial) == want {
			return true
		}
	}
	return false
}

func checkPartyFilter(v string) error {
	if v == "" {
		return nil
	}
	if strings.HasPrefix(v, "spiffe://") {
		_, err := spiffeid.FromString(v)
		return err
	}
	ns, sa, ok := strings.Cut(v, "/")
	if !ok || ns == "" || strings.Contains(sa, "/") {
		return fmt.Errorf(`%q is not an identity; use a SPIFFE ID, "namespace/serviceaccount", or "namespace/"`, v)
	}
	return nil
}

func matchParty(v string, p Party) bool {
	if v == "" {
		return true
	}
	if strings.HasPrefix(v, "spiffe://") {
		return p.ID == v
	}
	name := p.Workload
	if p.ID != "" {
		_, rest, _ := strings.Cut(strings.TrimPrefix(p.ID, "spiffe://"), "/")
		rest, ok := strings.CutPrefix(rest, "ns/")
		if !ok {
			return false
		}
		name = strings.Replace(rest, "/sa/", "/", 1)
	}
	if strings.HasSuffix(v, "/") {
		return strings.HasPrefix(name, v)
	}
	return name == v
}

func (f Filter) match(r *Record) bool {
	switch {
	case f.ID != "" && r.ID != f.ID,
		f.Serial != "" && !matchSerial(f.Serial, r),
		f.Side != "" && r.Side != f.Side,
		f.Open != nil && *f.Open != r.End.IsZero(),
		!f.Until.IsZero() && !r.Start.Before(f.Until),
		!f.Since.IsZero() && !r.End.IsZero() && r.End.Before(f.Since),
		!matchParty(f.From, r.Source),
		!matchParty(f.To, r.Destination):
		return false
	}
	if len(f.Verdicts) == 0 {
		return r.Verdict != Issued || f.Serial != ""
	}
	for _, v := range f.Verdicts {
		if r.Verdict == v {
			return true
		}
	}
	return false
}

// Query calls fn with each selected record, oldest first (by Seq), each
// connection once, in its newest state. fn may take its time: no transaction
// is open while it runs. An error from fn ends the query and is returned.
//
// Records that cannot be read are passed over, and counted in an error once
// everything else has been delivered. With a Limit, the selected records are
// held in memory.
func (s *Store) Query(ctx context.Context, f Filter, fn func(Record) error) error {
	if err := f.check(); err != nil {
		return err
	}
	if f.Open != nil && *f.Open {
		return s.queryOpen(ctx, f, fn)
	}
	segments, heads, err := s.snapshot()
	if err != nil {
		return err
	}
	q := &query{filter: f, backward: f.Limit > 0}
	for i, g := range segments {
		last := i == len(segments)-1
		if !last && !f.Since.IsZero() && heads[i].Last.Before(f.Since) {
			continue // what was open then was carried over to the next
		}
		q.readers = append(q.readers, &segmentReader{segment: g, active: last, more: true})
	}
	var newest []Record
	for {
		r, ok, err := q.next(ctx)
		if err != nil {
			return err
		}
		if !ok {
			break
		}
		if !q.backward {
			if err := fn(r); err != nil {
				return err
			}
			continue
		}
		if newest = append(newest, r); len(newest) == f.Limit {
			break
		}
	}
	if _, _, err := s.snapshot(); err != nil {
		return err // closed meanwhile, so some of it was not read
	}
	for i := len(newest) - 1; i >= 0; i-- {
		if err := fn(newest[i]); err != nil {
			return err
		}
	}
	for _, err := range q.faults {
		s.log.Error("audit records cannot be read", slog.Any("error", err))
	}
	if len(q.faults) > 0 {
		return fmt.Errorf("audit: the answer is not complete: %w", errors.Join(q.faults...))
	}
	return nil
}

// query merges the segments by Seq: a connection that outlived its segment
// is in a later one, and belongs between the older ones.
type query struct {
	filter   Filter
	backward bool
	readers  []*segmentReader
	faults   []error
}

func (q *query) next(ctx context.Context) (Record, bool, error) {
	var best *segmentReader
	for _, r := range q.readers {
		for len(r.page) == 0 && r.more {
			if err := ctx.Err(); err != nil {
				return Record{}, false, err
			}
			if err := r.fill(q.filter, q.backward); err != nil {
				q.faults = append(q.faults, err)
			}
		}
		if len(r.page) == 0 {
			continue
		}
		if best == nil || (r.page[0].Seq < best.page[0].Seq) != q.backward {
			best = r
		}
	}
	if best == nil {
		return Record{}, false, nil
	}
	out := best.page[0]
	best.page = best.page[1:]
	return out, true, nil
}

// segmentReader copies selected records out of one segment, a page at a time.
type segmentReader struct {
	segment *segment
	active  bool
	page    []Record
	after   []byte // key of the last one looked at
	more    bool
}

// Bounds on one read transaction: records looked at, and copied.
const (
	pageScan  = 1000
	pageMatch = 200
)

func (r *segmentReader) fill(f Filter, backward bool) error {
	r.page = r.page[:0]
	var bad uint64
	var firstBad error
	err := r.segment.view(func(tx *bolt.Tx) error {
		entries := tx.Bucket(bucketEntries)
		c := tx.Bucket(bucketConns).Cursor()
		step := c.Next
		k, at := seekAfter(c, r.after)
		if backward {
			step = c.Prev
			if r.after == nil {
				k, at = c.Last()
			} else {
				c.Seek(r.after) // it is there: nothing is ever deleted
				k, at = c.Prev()
			}
		}
		for n := 0; k != nil && n < pageScan && len(r.page) < pageMatch; n++ {
			r.after = append(r.after[:0], k...)
			kd, rec, err := decodeRecord(entries.Get(at))
			switch {
			case err != nil:
				bad++
				firstBad = err
			case !r.active && kd != kindEnd && rec.End.IsZero():
				// Open when the segment was sealed: the next one has it.
			case f.match(&rec):
				r.page = append(r.page, rec)
			}
			k, at = step()
		}
		r.more = k != nil
		return nil
	})
	if err != nil {
		r.more = false
		if errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
			return nil // retention has deleted it, or the store was closed
		}
		return err
	}
	if bad > 0 {
		return fmt.Errorf("%d records in a part of %s: %w", bad, r.segment.path, firstBad)
	}
	return nil
}

// Gaps calls fn with each gap, oldest first. No transaction is open while fn
// runs. An error from fn ends it and is returned.
func (s *Store) Gaps(ctx context.Context, fn func(Gap) error) error {
	segments, _, err := s.snapshot()
	if err != nil {
		return err
	}
	var faults []error
	for _, g := range segments {
		var after []byte
		for more := true; more; {
			if err := ctx.Err(); err != nil {
				return err
			}
			var page []Gap
			err := g.view(func(tx *bolt.Tx) error {
				entries := tx.Bucket(bucketEntries)
				c := tx.Bucket(bucketGaps).Cursor()
				k, _ := seekAfter(c, after)
				for ; k != nil && len(page) < pageMatch; k, _ = c.Next() {
					after = append(after[:0], k...)
					gap, err := decodeGap(entries.Get(k))
					if err != nil {
						faults = append(faults, fmt.Errorf("%s: %w", g.path, err))
						gap = Gap{Reason: fmt.Sprintf("a gap entry cannot be read: %v", err)}
					}
					page = append(page, gap)
				}
				more = k != nil
				return nil
			})
			if err != nil {
				more = false
				if !errors.Is(err, bolterrors.ErrDatabaseNotOpen) {
					faults = append(faults, err)
				}
			}
			for _, gap := range page {
				if err := fn(gap); err != nil {
					return err
				}
			}
		}
	}
	if _, _, err := s.snapshot(); err != nil {
		return err
	}
	return errors.Join(faults...)
}
