package audit

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// TestMain runs the child of a crash test, or the tests, after which no
// goroutine may be left.
func TestMain(m *testing.M) {
	if os.Getenv("AUDIT_TEST_CHILD") != "" {
		childMain()
		return
	}
	goleak.VerifyTestMain(m)
}

type testWriter struct{ testing.TB }

func (w testWriter) Write(b []byte) (int, error) {
	w.Logf("%s", strings.TrimSpace(string(b)))
	return len(b), nil
}

func testLog(t testing.TB) *slog.Logger { return slog.New(slog.NewTextHandler(testWriter{t}, nil)) }

var t0 = time.Date(2026, 3, 1, 12, 0, 0, 0, time.UTC)

// open opens a store that is closed, and before that verified, at the end.
func open(t testing.TB, dir string, o Options) *Store {
	t.Helper()
	s, err := OpenWith(dir, "n1", testLog(t), o)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func verified(t testing.TB, s *Store) {
	t.Helper()
	v, err := s.Verify(context.Background()) // also used in cleanups
	if err != nil || v.Fault != "" {
		t.Fatalf("Verify = %+v, %v", v, err)
	}
	if st := s.Stats(); st.Records != v.Records {
		t.Fatalf("Stats has %d records, Verify %d", st.Records, v.Records)
	}
}

func opened(id string, at time.Duration) Event {
	return Event{Record: Record{
		ID: id, Side: Source, Start: t0.Add(at), Verdict: Allowed, Reason: "policy shop/a admits it", Transport: "mtls",
		Source:      Party{ID: "spiffe://mesh.example/ns/shop/sa/web", Address: "10.0.0.1:4000"},
		Destination: Party{ID: "spiffe://mesh.example/ns/bank/sa/api", Address: "10.0.0.2:80"},
	}}
}

func ended(id string, at time.Duration) Event {
	return Event{Record: Record{ID: id, Side: Source, End: t0.Add(at), BytesSent: 10, BytesReceived: 20}, Final: true}
}

// pairs are n connections that opened and ended.
func pairs(prefix string, n int) []Event {
	var out []Event
	for i := range n {
		id := fmt.Sprintf("%s-%d", prefix, i)
		out = append(out, opened(id, 0), ended(id, time.Second))
	}
	return out
}

func add(t testing.TB, s *Store, events ...Event) {
	t.Helper()
	if err := s.Append(context.Background(), events, s.Position()); err != nil {
		t.Fatal(err)
	}
}

func ids(t testing.TB, s *Store, f Filter) []string {
	t.Helper()
	var out []string
	var last uint64
	err := s.Query(t.Context(), f, func(r Record) error {
		if r.Seq <= last {
			t.Errorf("record %s has seq %d after %d", r.ID, r.Seq, last)
		}
		last = r.Seq
		out = append(out, r.ID)
		return nil
	})
	if err != nil {
		t.Fatal(err)
	}
	return out
}

func gaps(t testing.TB, s *Store) []Gap {
	t.Helper()
	var out []Gap
	if err := s.Gaps(t.Context(), func(g Gap) error { out = append(out, g); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

// A connection is one record whatever number of events told of it, and what
// an event leaves empty is kept.
func TestMerge(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	add(t, s, opened("a", 0), opened("b", time.Second))
	add(t, s, Event{Record: Record{ID: "a", Side: Source, BytesSent: 5}}) // an update
	other := opened("a", 2*time.Second)
	other.Record.Side = Destination // the same id on the other side is another connection
	add(t, s, ended("a", 3*time.Second), other)
	refused := opened("r", 4*time.Second)
	refused.Final, refused.Record.Verdict = true, Denied
	add(t, s, refused)
	verified(t, s)

	check := func(s *Store) {
		t.Helper()
		var got []Record
		if err := s.Query(t.Context(), Filter{}, func(r Record) error { got = append(got, r); return nil }); err != nil {
			t.Fatal(err)
		}
		if len(got) != 4 {
			t.Fatalf("%d records, want 4: %+v", len(got), got)
		}
		a := got[0]
		if a.ID != "a" || a.Seq != 1 || a.Node != "n1" || a.Verdict != Allowed || a.BytesSent != 10 || a.BytesReceived != 20 ||
			!a.Start.Equal(t0) || !a.End.Equal(t0.Add(3*time.Second)) || a.Destination.Address != "10.0.0.2:80" {
			t.Errorf("a = %+v", a)
		}
		if got[3].ID != "r" || got[3].End.IsZero() {
			t.Errorf("r = %+v: a final event without an end must end it", got[3])
		}
		if st := s.Stats(); st.Records != 4 || st.Open != 2 || st.Gaps != 0 {
			t.Errorf("Stats = %+v", st)
		}
	}
	check(s)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, Options{})
	check(s)
	verified(t, s)
}

func TestAppendRefuses(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	for name, change := range map[string]func(*Record){
		"id":    func(r *Record) { r.ID = "" },
		"side":  func(r *Record) { r.Side = "left" },
		"start": func(r *Record) { r.Start = time.Date(12026, 1, 1, 0, 0, 0, 0, time.UTC) },
	} {
		e := opened("x", 0)
		change(&e.Record)
		err := s.Append(t.Context(), []Event{opened("good", 0), e}, Position{File: 9})
		if !errors.Is(err, ErrInvalidEvent) || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
	if st := s.Stats(); st.Records != 0 || s.Position() != (Position{}) {
		t.Errorf("a refused batch left something: %+v, %+v", st, s.Position())
	}
}

// Connections of a proxy that died end once; a final event that was still on
// its way completes the same record.
func TestCloseOpen(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	var events []Event
	for i := range 1200 { // more than a page
		events = append(events, opened(fmt.Sprint(i), time.Duration(i)*time.Millisecond))
	}
	add(t, s, events...)
	n, err := s.CloseOpen(t.Context(), "proxy-lost", t0.Add(time.Hour), func(r Record) bool { return r.ID != "7" })
	if err != nil || n != 1199 {
		t.Fatalf("CloseOpen = %d, %v", n, err)
	}
	n, err = s.CloseOpen(t.Context(), "proxy-lost", t0.Add(2*time.Hour), func(r Record) bool { return r.ID != "7" })
	if err != nil || n != 0 {
		t.Fatalf("second CloseOpen = %d, %v", n, err)
	}
	add(t, s, ended("3", time.Minute))
	verified(t, s)
	yes := true
	if got := ids(t, s, Filter{Open: &yes}); !slices.Equal(got, []string{"7"}) {
		t.Errorf("open: %v", got)
	}
	for id, end := range map[string]time.Duration{"3": time.Minute, "4": time.Hour} {
		count := 0
		err := s.Query(t.Context(), Filter{ID: id}, func(r Record) error {
			count++
			if r.Ended != "proxy-lost" || !r.End.Equal(t0.Add(end)) {
				t.Errorf("%+v", r)
			}
			return nil
		})
		if err != nil || count != 1 {
			t.Errorf("%s: %d records, %v", id, count, err)
		}
	}
}

func TestQueryFilter(t *testing.T) {
	s := open(t, t.TempDir(), Options{})
	denied := opened("denied", 10*time.Second)
	denied.Final, denied.Record.Verdict, denied.Record.Side = true, Denied, Destination
	denied.Record.End = t0.Add(10 * time.Second)
	plain := opened("plain", 20*time.Second)
	plain.Record.Source = Party{Address: "10.9.9.9:1"}
	plain.Record.Destination.ID, plain.Record.Destination.Workload = "", "bank/db"
	denied.Record.Source.Serial, plain.Record.Destination.Serial = "0a5f", "0b"
	add(t, s, opened("closed", 0), denied, opened("open", 5*time.Second), plain)
	add(t, s, ended("closed", 8*time.Second))
	yes, no := true, false
	for _, c := range []struct {
		name string
		f    Filter
		want string
	}{
		{"all", Filter{}, "closed denied open plain"},
		{"newest", Filter{Limit: 2}, "open plain"},
		{"limit beyond all", Filter{Limit: 9}, "closed denied open plain"},
		{"open", Filter{Open: &yes}, "open plain"},
		{"not open", Filter{Open: &no}, "closed denied"},
		{"since: what ended before is out", Filter{Since: t0.Add(9 * time.Second)}, "denied open plain"},
		{"since is inclusive", Filter{Since: t0.Add(8 * time.Second)}, "closed denied open plain"},
		{"until is exclusive", Filter{Until: t0.Add(10 * time.Second)}, "closed open"},
		{"verdict", Filter{Verdicts: []Verdict{Denied, Failed}}, "denied"},
		{"side", Filter{Side: Destination}, "denied"},
		{"id", Filter{ID: "open"}, "open"},
		{"serial of the source", Filter{Serial: "0a5f"}, "denied"},
		{"serial of the destination, as other tools write it", Filter{Serial: "00:0B"}, "plain"},
		{"serial, whole", Filter{Serial: "a5"}, ""},
		{"from id", Filter{From: "spiffe://mesh.example/ns/shop/sa/web"}, "closed denied open"},
		{"from id, whole", Filter{From: "spiffe://mesh.example/ns/shop/sa/we"}, ""},
		{"from name", Filter{From: "shop/web"}, "closed denied open"},
		{"from namespace", Filter{From: "shop/"}, "closed denied open"},
		{"namespace, whole", Filter{From: "sho/"}, ""},
		{"unproven end by its workload", Filter{To: "bank/db"}, "plain"},
		{"to namespace", Filter{To: "bank/"}, "closed denied open plain"},
		{"to other", Filter{To: "bank/api", Limit: 1}, "open"},
	} {
		if got := strings.Join(ids(t, s, c.f), " "); got != c.want {
			t.Errorf("%s: %q, want %q", c.name, got, c.want)
		}
	}
	for field, f := range map[string]Filter{
		"from": {From: "web"}, "to": {To: "spiffe://"}, "verdict": {Verdicts: []Verdict{"x"}}, "side": {Side: "x"}, "limit": {Limit: -1}, "serial": {Serial: "xyz"},
	} {
		if err := s.Query(t.Context(), f, nil); err == nil || !strings.Contains(err.Error(), field) {
			t.Errorf("%s: %v", field, err)
		}
	}
	stop := errors.New("stop")
	if err := s.Query(t.Context(), Filter{}, func(Record) error { return stop }); !errors.Is(err, stop) {
		t.Errorf("an error of fn: %v", err)
	}
}

// Connections that outlive their segment are found once, in order; retention
// deletes whole files and leaves a log that verifies.
func TestSegments(t *testing.T) {
	dir := t.TempDir()
	o := Options{SegmentSize: 128 << 10, MaxSegments: 1000}
	s := open(t, dir, o)
	var want []string
	for i := range 40 {
		var events []Event
		for j := range 50 {
			id := fmt.Sprintf("%d-%d", i, j)
			want = append(want, id)
			events = append(events, opened(id, time.Duration(i)*time.Second))
			if j%10 != 0 {
				events = append(events, ended(id, time.Duration(i)*time.Second+1))
			}
		}
		if i >= 20 { // long connections end many segments later
			events = append(events, ended(fmt.Sprintf("%d-0", i-20), time.Duration(i)*time.Second))
		}
		add(t, s, events...)
	}
	files, _ := filepath.Glob(filepath.Join(dir, "audit-*.db"))
	if len(files) < 5 {
		t.Fatalf("only %d segments", len(files))
	}
	for _, f := range files {
		if info, err := os.Stat(f); err != nil || info.Mode().Perm() != 0o600 {
			t.Errorf("%s: %v, %v; want mode 0600", f, info.Mode(), err)
		}
	}
	verified(t, s)
	if got := ids(t, s, Filter{}); !slices.Equal(got, want) {
		t.Fatalf("%d records, want %d", len(got), len(want))
	}
	if got := ids(t, s, Filter{Limit: 777}); !slices.Equal(got, want[len(want)-777:]) {
		t.Errorf("the newest 777 are not")
	}
	// The long ones that ended at or after 30 s, and the younger ones.
	got := ids(t, s, Filter{Since: t0.Add(30 * time.Second)})
	for _, c := range []struct {
		id   string
		want bool
	}{{"9-0", false}, {"10-0", true}, {"5-10", true}, {"5-1", false}, {"35-1", true}} {
		if slices.Contains(got, c.id) != c.want {
			t.Errorf("since: %s found: %v", c.id, !c.want)
		}
	}
	s.Close()

	o.MaxSegments = 3
	s = open(t, dir, o)
	files, _ = filepath.Glob(filepath.Join(dir, "audit-*.db"))
	if len(files) != 3 {
		t.Errorf("%d segments are left, want 3", len(files))
	}
	verified(t, s)
	if st := s.Stats(); st.Open != 40*5-20 {
		t.Errorf("%d open after retention, want %d: they must be carried over", st.Open, 40*5-20)
	}
	if got := ids(t, s, Filter{ID: "1-10"}); len(got) != 1 {
		t.Errorf("an open connection of a deleted segment: %v", got)
	}
	s.Close()

	oldest, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	now := t0.Add(100 * 24 * time.Hour)
	s = open(t, dir, Options{SegmentSize: 128 << 10, MaxAge: 24 * time.Hour, now: func() time.Time { return now }})
	if files, _ = filepath.Glob(filepath.Join(dir, "audit-*.db")); len(files) != 1 {
		t.Errorf("%d segments are left by MaxAge, want 1", len(files))
	}
	verified(t, s)
	s.Close()

	// A crash after a deletion was recorded leaves the file; it goes at the
	// next start.
	var n int
	fmt.Sscanf(filepath.Base(files[0]), "audit-%d.db", &n)
	if err := os.WriteFile(segmentPath(dir, uint64(n-1)), oldest, 0o600); err != nil {
		t.Fatal(err)
	}
	s = open(t, dir, Options{SegmentSize: 128 << 10})
	if files, _ = filepath.Glob(filepath.Join(dir, "audit-*.db")); len(files) != 1 {
		t.Errorf("%d segments are left after a crash in retention, want 1", len(files))
	}
	verified(t, s)
}

func TestUnrecordedRemoval(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{SegmentSize: 64 << 10})
	for i := range 60 {
		add(t, s, pairs(fmt.Sprint(i), 10)...)
	}
	s.Close()
	files, _ := filepath.Glob(filepath.Join(dir, "audit-*.db"))
	if len(files) < 4 {
		t.Fatalf("only %d segments", len(files))
	}
	for _, i := range []int{1, 0} { // the middle, then the oldest
		b, err := os.ReadFile(files[i])
		if err != nil {
			t.Fatal(err)
		}
		os.Remove(files[i])
		s = open(t, dir, Options{SegmentSize: 64 << 10})
		v, err := s.Verify(t.Context())
		if err != nil || !strings.Contains(v.Fault, "missing") {
			t.Errorf("segment %d removed: %+v, %v", i+1, v, err)
		}
		s.Close()
		if err := os.WriteFile(files[i], b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	s = open(t, dir, Options{SegmentSize: 64 << 10})
	verified(t, s)
}

// A directory is one node's and one process's.
func TestOpenRefuses(t *testing.T) {
	dir := t.TempDir()
	s := open(t, dir, Options{})
	if _, err := lockDir(dir, 0); err == nil {
		t.Error("a second process could take the directory")
	}
	s.Close()
	if err := s.Close(); err != nil {
		t.Errorf("second Close: %v", err)
	}
	if err := s.Append(t.Context(), nil, Position{}); !errors.Is(err, ErrClosed) {
		t.Errorf("Append after Close: %v", err)
	}
	if err := s.Query(t.Context(), Filter{}, nil); !errors.Is(err, ErrClosed) {
		t.Errorf("Query after Close: %v", err)
	}
	if _, err := s.Verify(t.Context()); !errors.Is(err, ErrClosed) {
		t.Errorf("Verify after Close: %v", err)
	}
	if _, err := Open(dir, "n2", testLog(t)); err == nil || !strings.Contains(err.Error(), `"n1"`) {
		t.Errorf("another node's directory: %v", err)
	}
	if _, err := Open(dir, "", testLog(t)); err == nil {
		t.Error("an empty node name was taken")
	}
	if _, err := OpenWith(dir, "n1", testLog(t), Options{MaxSegments: 1}); err == nil {
		t.Error("MaxSegments of 1 was taken")
	}
	open(t, dir, Options{}) // and it is free again
}

// Readers see whole records and each once while the writer works and files
// roll over and are deleted; run with -race.
func TestConcurrent(t *testing.T) {
	s := open(t, t.TempDir(), Options{SegmentSize: 256 << 10, MaxSegments: 4})
	var wg sync.WaitGroup
	var stop atomic.Bool
	for range 2 {
		wg.Go(func() {
			for !stop.Load() {
				seen := map[uint64]bool{}
				err := s.Query(context.Background(), Filter{Limit: 500}, func(r Record) error {
					if seen[r.Seq] || r.Node != "n1" {
						t.Errorf("seen before, or broken: %+v", r)
					}
					seen[r.Seq] = true
					return nil
				})
				if err != nil {
					t.Error(err)
				}
				s.Stats()
			}
		})
	}
	wg.Go(func() {
		for !stop.Load() {
			if v, err := s.Verify(context.Background()); err != nil || v.Fault != "" {
				t.Errorf("Verify: %+v, %v", v, err)
			}
			if err := s.Gaps(context.Background(), func(Gap) error { return nil }); err != nil {
				t.Error(err)
			}
		}
	})
	var writers sync.WaitGroup
	for w := range 2 {
		writers.Go(func() {
			for i := range 60 {
				var events []Event
				for j := range 20 {
					id := fmt.Sprintf("%d-%d-%d", w, i, j)
					events = append(events, opened(id, time.Duration(i)), ended(id, time.Duration(i+1)))
				}
				if err := s.Append(context.Background(), events, Position{Offset: int64(i)}); err != nil {
					t.Error(err)
				}
				if err := s.Gap(context.Background(), Source, 2, "test"); err != nil {
					t.Error(err)
				}
			}
		})
	}
	writers.Wait()
	stop.Store(true)
	wg.Wait()
	if _, err := s.CloseOpen(t.Context(), "x", t0, func(Record) bool { return true }); err != nil {
		t.Error(err)
	}
	verified(t, s)
}
