package ca

import (
	"bufio"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"os"
	"time"
)

// eventRefused is a line about what was not issued, or not answered. It is no
// issuance's: it has no serial number.
const eventRefused = "refused"

// Refused is what the authority's server refused, once or again and again.
type Refused struct {
	First, Last time.Time
	Count       uint64
	// Several says that calls that differ are counted here; the rest describes
	// the latest.
	Several  bool
	Call     string // such as "Issue"
	Node     string // who called, proven by its certificate; empty: nobody is
	Workload string // that was asked for, in the caller's words
	From     string // the caller's address
	Why      string // in one word
	Reason   string
}

// LogRefused writes refusals into the issuance log. It returns when they are
// durable. Whoever calls it bounds how many there are.
func (a *Authority) LogRefused(list []Refused) error {
	var last uint64
	for _, r := range list {
		var err error
		if last, err = a.issuance.append(line{
			Event: eventRefused, Time: r.First.UTC(), Last: r.Last.UTC(), Count: r.Count, Several: r.Several,
			Call: r.Call, Node: r.Node, Workload: r.Workload, From: r.From, Why: r.Why, Reason: r.Reason,
		}); err != nil {
			return err
		}
	}
	return a.issuance.sync(last)
}

// Refused returns the refusals whose last was not before since, and of those
// the newest limit (0: all), oldest first. It reads the whole file. With
// ErrDamaged it returns what it could read.
func (l *Log) Refused(since time.Time, limit int) ([]Refused, error) {
	f, err := os.Open(l.path)
	if err != nil {
		return nil, fmt.Errorf("ca: open the issuance log: %w", err)
	}
	defer f.Close()
	var (
		out     []Refused
		damaged error
		r       = bufio.NewReader(f)
	)
	for n := 1; ; n++ {
		data, err := r.ReadBytes('\n')
		if errors.Is(err, io.EOF) {
			return out, damaged
		}
		if err != nil {
			return out, fmt.Errorf("ca: read the issuance log: %w", err)
		}
		if !isEvent(data, eventRefused) {
			continue
		}
		var e line
		if err := json.Unmarshal(data, &e); err != nil {
			damaged = errors.Join(damaged, fmt.Errorf("%w: %s:%d: %w", ErrDamaged, l.path, n, err))
			continue
		}
		if e.Last.Before(since) {
			continue
		}
		out = append(out, Refused{
			First: e.Time, Last: e.Last, Count: e.Count, Several: e.Several,
			Call: e.Call, Node: e.Node, Workload: e.Workload, From: e.From, Why: e.Why, Reason: e.Reason,
		})
		if limit > 0 && len(out) > limit {
			out = out[1:]
		}
	}
}
