package audit

import (
	"fmt"
	"slices"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// TestQueryOpenReadsOnlyWhatIsOpen: the open connections, from every segment,
// in order, and at a cost that does not grow with the log. The agent asks for
// them before it serves: were the whole log read, a node with a long history
// would be without its agent for minutes after a crash. Every ended entry is
// made unreadable here, so a query that looks at one says so.
func TestQueryOpenReadsOnlyWhatIsOpen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{SegmentSize: 64 << 10})
	var want []string
	for i := range 6 {
		id := fmt.Sprintf("open-%d", 9-i) // not in the order of the index
		add(t, s, opened(id, time.Duration(i)*time.Minute))
		want = append(want, id)
		for range 5 {
			add(t, s, pairs(fmt.Sprintf("past-%d-%d", i, time.Now().UnixNano()), 40)...)
		}
	}
	if n := len(s.segments); n < 3 {
		t.Fatalf("%d segments, want several", n)
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	update(t, dir, func(tx *bolt.Tx) error {
		keep := map[string]bool{}
		if err := tx.Bucket(bucketOpen).ForEach(func(_, at []byte) error { keep[string(at)] = true; return nil }); err != nil {
			return err
		}
		entries := tx.Bucket(bucketEntries)
		var spoil [][]byte
		if err := entries.ForEach(func(k, _ []byte) error {
			if !keep[string(k)] {
				spoil = append(spoil, slices.Clone(k))
			}
			return nil
		}); err != nil {
			return err
		}
		for _, k := range spoil {
			if err := entries.Put(k, []byte("e{")); err != nil {
				return err
			}
		}
		return nil
	})
	s = open(t, dir, Options{})
	yes := true
	if got := ids(t, s, Filter{Open: &yes}); !slices.Equal(got, want) {
		t.Errorf("open connections %v, want %v", got, want)
	}
	if got := ids(t, s, Filter{Open: &yes, Limit: 2}); !slices.Equal(got, want[4:]) {
		t.Errorf("the newest two are %v, want %v", got, want[4:])
	}
	if got := ids(t, s, Filter{Open: &yes, Since: t0.Add(time.Hour), Until: t0.Add(2 * time.Minute)}); !slices.Equal(got, want[:2]) {
		t.Errorf("those from before minute 2 are %v, want %v", got, want[:2])
	}
	if got := ids(t, s, Filter{Open: &yes, Side: Destination}); len(got) != 0 {
		t.Errorf("at the destination: %v, want none", got)
	}
}
