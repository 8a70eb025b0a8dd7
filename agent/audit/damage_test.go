package audit

import (
	"bytes"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	bolt "go.etcd.io/bbolt"
)

// Each way to tamper with the log or with the indexes that queries use is
// found by Verify.
func TestVerifyFindsTampering(t *testing.T) {
	replace := func(b *bolt.Bucket, k []byte, old, new string) error {
		v := b.Get(k)
		if !bytes.Contains(v, []byte(old)) {
			return fmt.Errorf("%q is not in %q", old, v)
		}
		return b.Put(k, bytes.Replace(v, []byte(old), []byte(new), 1))
	}
	swap := func(b *bolt.Bucket, k1, k2 []byte) error {
		v1, v2 := bytes.Clone(b.Get(k1)), bytes.Clone(b.Get(k2))
		return errors.Join(b.Put(k1, v2), b.Put(k2, v1))
	}
	for name, tamper := range map[string]func(tx *bolt.Tx) error{
		"verdict edited": func(tx *bolt.Tx) error {
			return replace(tx.Bucket(bucketEntries), number(7), `"allowed"`, `"denied!"`)
		},
		"one bit of an entry": func(tx *bolt.Tx) error {
			v := bytes.Clone(tx.Bucket(bucketEntries).Get(number(5)))
			v[len(v)/2] ^= 1
			return tx.Bucket(bucketEntries).Put(number(5), v)
		},
		"entry kind changed":   func(tx *bolt.Tx) error { return replace(tx.Bucket(bucketEntries), number(1), "o{", "e{") },
		"entry deleted":        func(tx *bolt.Tx) error { return tx.Bucket(bucketEntries).Delete(number(4)) },
		"last entry deleted":   func(tx *bolt.Tx) error { return tx.Bucket(bucketEntries).Delete(number(31)) },
		"entries swapped":      func(tx *bolt.Tx) error { return swap(tx.Bucket(bucketEntries), number(2), number(3)) },
		"entry added":          func(tx *bolt.Tx) error { return tx.Bucket(bucketEntries).Put(number(32), []byte("e{}")) },
		"batches swapped":      func(tx *bolt.Tx) error { return swap(tx.Bucket(bucketBatches), number(2), number(3)) },
		"batch deleted":        func(tx *bolt.Tx) error { return tx.Bucket(bucketBatches).Delete(number(2)) },
		"gap entry hidden":     func(tx *bolt.Tx) error { return tx.Bucket(bucketGaps).Delete(number(31)) },
		"connection hidden":    func(tx *bolt.Tx) error { return tx.Bucket(bucketConns).Delete(number(3)) },
		"connection redirect":  func(tx *bolt.Tx) error { return swap(tx.Bucket(bucketConns), number(1), number(2)) },
		"open one hidden":      func(tx *bolt.Tx) error { return tx.Bucket(bucketOpen).Delete([]byte("source\x009-2")) },
		"header edited":        func(tx *bolt.Tx) error { return replace(tx.Bucket(bucketMeta), keyHeader, `"n1"`, `"n1" `) },
		"count in head edited": func(tx *bolt.Tx) error { return replace(tx.Bucket(bucketMeta), keyHead, `"gaps":4`, `"gaps":0`) },
		"time of batch edited": func(tx *bolt.Tx) error {
			v := bytes.Clone(tx.Bucket(bucketBatches).Get(number(2)))
			v[23]++
			return tx.Bucket(bucketBatches).Put(number(2), v)
		},
		"cut at the end": func(tx *bolt.Tx) error {
			return errors.Join(tx.Bucket(bucketBatches).Delete(number(11)), tx.Bucket(bucketEntries).Delete(number(31)),
				tx.Bucket(bucketGaps).Delete(number(31)))
		},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			s := open(t, dir, Options{})
			for i := range 10 { // entries 1 to 30, batches 1 to 10
				a, b := fmt.Sprintf("%d-1", i), fmt.Sprintf("%d-2", i)
				add(t, s, opened(a, 0), ended(a, time.Second), opened(b, 0))
			}
			if err := s.Gap(t.Context(), "", 4, "test"); err != nil {
				t.Fatal(err)
			}
			verified(t, s)
			s.Close()
			update(t, dir, tamper)
			s = open(t, dir, Options{})
			v, err := s.Verify(t.Context())
			if err != nil || v.Fault == "" {
				t.Fatalf("Verify = %+v, %v", v, err)
			}
			t.Log(v.Fault)
		})
	}
}

// A log that was put back to an older state under a running agent shows.
func TestVerifyRollback(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	add(t, s, opened("a", 0))
	add(t, s, opened("b", 0))
	n, sum := s.Head()
	if n != 2 || sum == [32]byte{} {
		t.Errorf("Head = %d, %x", n, sum)
	}
	s.heads[0].Batch = 3 // as if a third had been written
	if v, err := s.Verify(t.Context()); err != nil || v.Fault == "" {
		t.Errorf("Verify = %+v, %v", v, err)
	}
}

// Files that cannot be read are moved aside, with a gap that says so, and
// the store goes on; what is in the other files is still found.
func TestDamagedFile(t *testing.T) {
	page := os.Getpagesize()
	junk := bytes.Repeat([]byte{0xa5}, page)
	damages := map[string]func(path string) error{
		"empty":    func(p string) error { return os.Truncate(p, 0) },
		"cut":      func(p string) error { return os.Truncate(p, int64(3*page)) },
		"not a db": func(p string) error { return os.WriteFile(p, []byte("hello"), 0o600) },
		"both metas": func(p string) error {
			return errors.Join(writeAt(p, junk, 0), writeAt(p, junk, int64(page)))
		},
		"all pages but the metas": func(p string) error {
			info, err := os.Stat(p)
			if err != nil {
				return err
			}
			return writeAt(p, bytes.Repeat(junk, int(info.Size())/page-2), int64(2*page))
		},
	}
	for name, harm := range damages {
		for _, which := range []string{"newest", "middle", "only"} {
			t.Run(name+" "+which, func(t *testing.T) {
				dir := t.TempDir()
				o := Options{SegmentSize: 64 << 10}
				s := open(t, dir, o)
				rounds := 25
				if which == "only" {
					rounds = 2
				}
				for i := range rounds {
					add(t, s, pairs(fmt.Sprint(i), 10)...)
				}
				total := s.Stats().Records
				s.Close()
				files, _ := filepath.Glob(filepath.Join(dir, "audit-*.db"))
				victim := map[string]int{"newest": len(files) - 1, "middle": 1, "only": 0}[which]
				if which != "only" && len(files) < 4 {
					t.Fatalf("only %d segments", len(files))
				}
				if err := harm(files[victim]); err != nil {
					t.Fatal(err)
				}
				s = open(t, dir, o)
				if got := gaps(t, s); len(got) != 1 || !strings.Contains(got[0].Reason, filepath.Base(files[victim])) {
					t.Errorf("gaps: %+v", got)
				} else if which == "middle" {
					if st := s.Stats(); got[0].Count == 0 || st.Records+got[0].Count != total {
						t.Errorf("%d records and a gap of %d, of %d", st.Records, got[0].Count, total)
					}
				}
				if aside, _ := filepath.Glob(filepath.Join(dir, "*.damaged-*")); len(aside) != 1 {
					t.Errorf("moved aside: %v", aside)
				}
				v, err := s.Verify(t.Context())
				if err != nil || v.Fault == "" {
					t.Errorf("Verify = %+v, %v: the loss must show", v, err)
				}
				before := len(ids(t, s, Filter{}))
				add(t, s, opened("new", 0))
				if got := ids(t, s, Filter{}); len(got) != before+1 || got[before] != "new" {
					t.Errorf("%d records after an append to %d", len(got), before)
				}
				s.Close()
				s = open(t, dir, o) // and it starts again without another gap
				if got := gaps(t, s); len(got) != 1 {
					t.Errorf("gaps after another start: %+v", got)
				}
			})
		}
	}
}

func writeAt(path string, b []byte, off int64) error {
	f, err := os.OpenFile(path, os.O_RDWR, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt(b, off)
	return errors.Join(err, f.Close())
}

// One entry that cannot be read neither hides the others nor goes unsaid, and
// an event about it is stored.
func TestDamagedEntry(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	add(t, s, opened("a", 0), opened("b", 0), opened("c", 0))
	s.Close()
	update(t, dir, func(tx *bolt.Tx) error { return tx.Bucket(bucketEntries).Put(number(2), []byte("o{broken")) })
	s = open(t, dir, Options{})
	var got []string
	err := s.Query(t.Context(), Filter{}, func(r Record) error { got = append(got, r.ID); return nil })
	if err == nil || len(got) != 2 {
		t.Errorf("Query = %v, %v; want a and c, and an error", got, err)
	}
	add(t, s, ended("b", time.Second))
	if g := gaps(t, s); len(g) != 1 || g[0].Count != 1 {
		t.Errorf("gaps: %+v", g)
	}
	if n, err := s.CloseOpen(t.Context(), "x", t0, func(Record) bool { return true }); n != 2 || err != nil {
		t.Errorf("CloseOpen = %d, %v", n, err)
	}
}

// Damage that appears while the store is open: the batch goes to a new
// segment, and the position is kept.
func TestDamageWhileOpen(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	for i := range 30 {
		add(t, s, pairs(fmt.Sprint(i), 10)...)
	}
	if err := s.Append(t.Context(), nil, Position{File: 5, Offset: 7}); err != nil {
		t.Fatal(err)
	}
	info, err := os.Stat(s.segments[0].path)
	if err != nil {
		t.Fatal(err)
	}
	page := os.Getpagesize()
	if err := writeAt(s.segments[0].path, bytes.Repeat([]byte{0xa5}, int(info.Size())-2*page), int64(2*page)); err != nil {
		t.Fatal(err)
	}
	if err := s.Gap(t.Context(), "", 1, "test"); err != nil {
		t.Fatal(err)
	}
	if s.Position() != (Position{File: 5, Offset: 7}) {
		t.Errorf("Position = %+v", s.Position())
	}
	if g := gaps(t, s); len(g) != 2 || g[0].Count != 300 {
		t.Errorf("gaps: %+v", g)
	}
	add(t, s, opened("new", 0))
	got := 0
	if err := s.Query(t.Context(), Filter{}, func(r Record) error {
		got++
		if r.Seq != 301 {
			t.Errorf("Seq = %d: numbers must not be given twice", r.Seq)
		}
		return nil
	}); err != nil || got != 1 {
		t.Errorf("Query = %d, %v", got, err)
	}
}

// A crash while a segment is being made leaves no half of one.
func TestHalfMadeSegment(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	add(t, s, opened("a", 0))
	s.Close()
	half := segmentPath(dir, 2) + ".new"
	if err := os.WriteFile(half, []byte("half"), 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, Options{})
	verified(t, s)
	if _, err := os.Stat(half); !os.IsNotExist(err) {
		t.Errorf("the half-made file is there: %v", err)
	}
}

// readOnlyCopy is a database that refuses writes.
func readOnlyCopy(t *testing.T, path string) *bolt.DB {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	to := filepath.Join(t.TempDir(), "copy.db")
	if err := os.WriteFile(to, b, 0o600); err != nil {
		t.Fatal(err)
	}
	db, err := bolt.Open(to, 0o600, &bolt.Options{ReadOnly: true})
	if err != nil {
		t.Fatal(err)
	}
	return db
}

// A commit whose failure left it on disk after all is not stored twice.
func TestRetryAfterUnsureCommit(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	pos := Position{File: 1, Offset: 100}
	if err := s.Append(t.Context(), []Event{opened("a", 0)}, pos); err != nil {
		t.Fatal(err)
	}
	s.unsure = true // as after an error from the sync of the commit
	if err := s.Append(t.Context(), []Event{opened("a", 0), ended("b", 0)}, pos); err != nil {
		t.Fatal(err)
	}
	if st := s.Stats(); st.Records != 1 {
		t.Errorf("%d records, want 1", st.Records)
	}
	verified(t, s)
}

// update changes a closed store's newest segment behind its back.
func update(t *testing.T, dir string, fn func(tx *bolt.Tx) error) {
	t.Helper()
	files, _ := filepath.Glob(filepath.Join(dir, "audit-*.db"))
	db, err := bolt.Open(files[len(files)-1], 0o600, nil)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(db.Update(fn), db.Close()); err != nil {
		t.Fatal(err)
	}
}
