package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"slices"

	bolt "go.etcd.io/bbolt"
)

// queryOpen is Query for a filter that selects open connections only. The
// index of those answers it, so it takes as long as there are open
// connections, however long the log is: an agent asks at its start, and
// nothing else on the node may wait for that.
func (s *Store) queryOpen(ctx context.Context, f Filter, fn func(Record) error) error {
	segments, _, err := s.snapshot()
	if err != nil {
		return err
	}
	var selected []Record
	var bad error
	// Each segment begins with what was open in the one before.
	active := segments[len(segments)-1]
	err = active.view(func(tx *bolt.Tx) error {
		entries := tx.Bucket(bucketEntries)
		return tx.Bucket(bucketOpen).ForEach(func(_, at []byte) error {
			if err := ctx.Err(); err != nil {
				return err
			}
			_, r, err := decodeRecord(entries.Get(at))
			if err != nil {
				bad = errors.Join(bad, fmt.Errorf("%s: %w", active.path, err))
			} else if f.match(&r) {
				selected = append(selected, r)
			}
			return nil
		})
	})
	if _, _, closed := s.snapshot(); closed != nil {
		return closed
	}
	if err != nil {
		return fmt.Errorf("audit: read open connections: %w", err)
	}
	slices.SortFunc(selected, func(a, b Record) int {
		if a.Seq < b.Seq {
			return -1
		}
		return 1 // no two are equal
	})
	if f.Limit > 0 && len(selected) > f.Limit {
		selected = selected[len(selected)-f.Limit:]
	}
	for _, r := range selected {
		if err := fn(r); err != nil {
			return err
		}
	}
	if bad != nil {
		s.log.Error("audit records cannot be read", slog.Any("error", bad))
		return fmt.Errorf("audit: the answer is not complete: %w", bad)
	}
	return nil
}
