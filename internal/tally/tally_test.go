package tally

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"sync"
	"testing"
	"testing/synctest"
	"time"
)

// sink keeps what is written.
type sink struct {
	mu   sync.Mutex
	got  []Entry[string] // guarded by mu
	fail error           // guarded by mu
}

// all waits until everybody waits, and returns what was written.
func (s *sink) all() []Entry[string] {
	synctest.Wait()
	s.mu.Lock()
	defer s.mu.Unlock()
	return slices.Clone(s.got)
}

func (s *sink) failing(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.fail = err
}

func (s *sink) write(_ context.Context, e []Entry[string]) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.fail != nil {
		return s.fail
	}
	s.got = append(s.got, e...)
	return nil
}

func run(t *testing.T, f func(tally *Tally[string], s *sink, stop func())) {
	synctest.Test(t, func(t *testing.T) {
		ctx, cancel := context.WithCancel(t.Context())
		tally, s, done := New[string](), &sink{}, make(chan struct{})
		go func() { defer close(done); tally.Run(ctx, s.write) }()
		f(tally, s, func() { cancel(); <-done })
		cancel()
		<-done
	})
}

// The first is told at once, the rest of a minute together, and after a minute
// of quiet the next is a first again.
func TestCollapse(t *testing.T) {
	run(t, func(tally *Tally[string], s *sink, _ func()) {
		start := time.Now()
		tally.Add("a", "k", "first")
		if len(s.all()) != 1 || s.all()[0].Count != 1 || s.all()[0].Event != "first" {
			t.Fatalf("%+v", s.all())
		}
		for i := range 1000 {
			tally.Add("a", "k", fmt.Sprint(i))
			time.Sleep(10 * time.Millisecond)
		}
		tally.Add("a", "other", "other")
		tally.Add("b", "k", "b")
		if len(s.all()) != 3 {
			t.Fatalf("%d entries; another kind and another group are told apart, the rest waits: %+v", len(s.all()), s.all())
		}
		time.Sleep(Every)
		if len(s.all()) != 4 || s.all()[3].Count != 1000 || s.all()[3].Event != "999" || !s.all()[3].First.Equal(start) || !s.all()[3].Last.Equal(start.Add(9990*time.Millisecond)) {
			t.Fatalf("%+v", s.all()[3:])
		}
		time.Sleep(3 * Every)
		tally.mu.Lock()
		if len(tally.group) != 0 {
			t.Errorf("%d groups are remembered", len(tally.group))
		}
		tally.mu.Unlock()
		tally.Add("a", "k", "again")
		if len(s.all()) != 5 || s.all()[4].Count != 1 {
			t.Fatalf("%+v", s.all()[4:])
		}
	})
}

// Defends: whoever causes events of ever new kinds, under ever new names, fills
// neither memory nor the log, takes nothing from others, and is counted.
func TestBounds(t *testing.T) {
	run(t, func(tally *Tally[string], s *sink, stop func()) {
		const loud = 5000
		for i := range loud {
			tally.Add("loud", fmt.Sprint(i), "loud")
		}
		tally.Add("quiet", "k", "quiet")
		if len(s.all()) > MaxKinds+2 {
			t.Fatalf("%d entries", len(s.all()))
		}
		for i := range loud {
			tally.Add(fmt.Sprint(i), "k", "groups")
		}
		tally.mu.Lock()
		if n := len(tally.group); n > MaxGroups+1 {
			t.Errorf("%d groups are held", n)
		}
		tally.mu.Unlock()
		time.Sleep(Every)
		if n := len(s.all()); n < AtOnce || n > AtOnce+PerSecond*int(Every/time.Second)+1 {
			t.Errorf("%d entries in a minute", n)
		}
		stop()
		counts, several := map[string]uint64{}, 0
		for _, e := range s.all() {
			counts[e.Event] += e.Count
			if e.Several {
				several++
			}
		}
		if counts["loud"] != loud || counts["groups"] != loud || counts["quiet"] != 1 || several == 0 {
			t.Errorf("counted %v, %d of several kinds", counts, several)
		}
	})
}

// What could not be written is written later, once.
func TestFailedWrite(t *testing.T) {
	run(t, func(tally *Tally[string], s *sink, stop func()) {
		s.failing(errors.New("full"))
		tally.Add("a", "k", "1")
		synctest.Wait()
		tally.Add("a", "k", "2")
		time.Sleep(5 * time.Second)
		synctest.Wait()
		s.failing(nil)
		time.Sleep(2 * time.Second)
		if len(s.all()) != 1 || s.all()[0].Count != 2 || s.all()[0].Event != "2" {
			t.Fatalf("%+v", s.all())
		}
		tally.Add("a", "k", "3") // not due when it ends
		stop()
		if len(s.all()) != 2 || s.all()[1].Count != 1 {
			t.Errorf("at the end: %+v", s.all())
		}
	})
}

// Defends the log that entries go to: no text of a caller is longer than it may be,
// or breaks what it is written in.
func TestText(t *testing.T) {
	for _, c := range []struct{ in, want string }{
		{"", ""}, {"four", "four"}, {"fives", "five..."}, {"a\xff", "a\uFFFD"}, {"abc\u00e9", "abc\uFFFD..."},
	} {
		if got := Text(c.in, 4); got != c.want {
			t.Errorf("%q: %q, want %q", c.in, got, c.want)
		}
	}
}
