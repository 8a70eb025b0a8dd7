// Package tally keeps what happens again and again from filling a log: the
// first event of a kind is told at once, and those that follow as a number.
package tally

import (
	"cmp"
	"context"
	"slices"
	"strings"
	"sync"
	"time"

	"golang.org/x/time/rate"
)

// Bounds, whoever causes events: what is told, and what is held.
const (
	// Every is how often one kind is told.
	Every = time.Minute
	// MaxKinds are told apart in one group, MaxGroups in all. What is beyond is
	// counted together.
	MaxKinds  = 16
	MaxGroups = 256
	// PerSecond entries are told in the long run, AtOnce in a burst. What is
	// beyond waits, and goes on counting.
	PerSecond = 1
	AtOnce    = 100

	again     = time.Second     // after a failed write
	lastWrite = 5 * time.Second // for what is left at the end
)

// Text is a text that whoever causes events has a say in, as it may be kept: of at
// most so many bytes, and a mark that there were more.
func Text(s string, most int) string {
	if len(s) > most {
		s = s[:most] + "..."
	}
	return strings.ToValidUTF8(s, "\uFFFD")
}

// Entry is what happened of one kind.
type Entry[T any] struct {
	Event       T // the latest
	Count       uint64
	First, Last time.Time
	// Several says that the events were of several kinds, too many to tell apart.
	Several bool
}

// Tally counts events. It is safe for concurrent use.
type Tally[T any] struct {
	wake  chan struct{}
	rate  *rate.Limiter // used by Run only
	mu    sync.Mutex
	group map[string]map[string]*kind[T] // guarded by mu
}

// kind is one kind of event. Its fields are guarded by Tally.mu.
type kind[T any] struct {
	Entry[T]
	due time.Time // when it is told, or forgotten if nothing happened
}

// New returns a Tally. Somebody has to call Run.
func New[T any]() *Tally[T] {
	return &Tally[T]{wake: make(chan struct{}, 1), rate: rate.NewLimiter(PerSecond, AtOnce), group: map[string]map[string]*kind[T]{}}
}

// several is the name of what is beyond the bounds; nobody else's begins so.
const several = "\x00"

// Add counts an event of a kind. A group is who causes events, and may choose
// its kinds: it has no share in what others may. Add does not block.
func (t *Tally[T]) Add(group, name string, event T) {
	now := time.Now()
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.group[group] == nil {
		if len(t.group) >= MaxGroups {
			group, name = several, several
		}
		if t.group[group] == nil {
			t.group[group] = map[string]*kind[T]{}
		}
	}
	kinds := t.group[group]
	k := kinds[name]
	if k == nil && len(kinds) >= MaxKinds {
		name = several
		k = kinds[name]
	}
	if k == nil {
		k = &kind[T]{due: now, Entry: Entry[T]{Several: name == several}}
		kinds[name] = k
	}
	if k.Count == 0 {
		k.First = now
	}
	k.Event, k.Last = event, now
	k.Count++
	if !k.due.After(now) {
		select {
		case t.wake <- struct{}{}:
		default:
		}
	}
}

// Run writes entries until ctx ends, and then what is left. What write refuses
// is tried again, together with what has happened since.
func (t *Tally[T]) Run(ctx context.Context, write func(context.Context, []Entry[T]) error) {
	for {
		taken, wait := t.take(time.Now(), false)
		if len(taken) > 0 {
			if err := write(ctx, entries(taken)); err != nil {
				t.giveBack(taken)
				wait = again
			}
		}
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			t.end(ctx, write)
			return
		case <-timer.C:
		case <-t.wake:
			timer.Stop()
		}
	}
}

func (t *Tally[T]) end(ctx context.Context, write func(context.Context, []Entry[T]) error) {
	taken, _ := t.take(time.Now(), true)
	if len(taken) == 0 {
		return
	}
	ctx, cancel := context.WithTimeout(context.WithoutCancel(ctx), lastWrite)
	defer cancel()
	_ = write(ctx, entries(taken)) // whoever writes says so; there is no later
}

// part is what was taken of a kind.
type part[T any] struct {
	from *kind[T]
	Entry[T]
}

func entries[T any](parts []part[T]) []Entry[T] {
	out := make([]Entry[T], len(parts))
	for i, p := range parts {
		out[i] = p.Entry
	}
	return out
}

// take returns what is due, or all, and how long it is until there is more.
func (t *Tally[T]) take(now time.Time, all bool) (out []part[T], wait time.Duration) {
	t.mu.Lock()
	defer t.mu.Unlock()
	var due []*kind[T]
	wait = Every
	for name, kinds := range t.group {
		for of, k := range kinds {
			switch {
			case k.Count > 0 && (all || !k.due.After(now)):
				due = append(due, k)
			case k.due.After(now):
				wait = min(wait, k.due.Sub(now))
			case k.Count == 0:
				delete(kinds, of)
			}
		}
		if len(kinds) == 0 {
			delete(t.group, name)
		}
	}
	slices.SortFunc(due, func(a, b *kind[T]) int { return cmp.Or(a.due.Compare(b.due), a.First.Compare(b.First)) })
	for _, k := range due {
		if !all && !t.rate.AllowN(now, 1) {
			return out, time.Second / PerSecond
		}
		out = append(out, part[T]{k, k.Entry})
		k.Count, k.due = 0, now.Add(Every)
	}
	return out, wait
}

// giveBack makes what could not be written due again.
func (t *Tally[T]) giveBack(parts []part[T]) {
	t.mu.Lock()
	defer t.mu.Unlock()
	for _, p := range parts {
		if p.from.Count == 0 {
			p.from.Entry = p.Entry
		} else {
			p.from.Count += p.Count
			p.from.First = p.First
		}
		p.from.due = p.Last
	}
}
