package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"
)

// screen writes what the reader sees.
type screen struct {
	w     io.Writer
	color bool
	steps int
}

// Styles of text, used only where colour is on.
const (
	bold  = "\x1b[1m"
	cyan  = "\x1b[36m"
	green = "\x1b[32m"
	dim   = "\x1b[2m"
)

func (s *screen) paint(style, text string) string {
	if !s.color {
		return text
	}
	return style + text + "\x1b[0m"
}

// step begins a part of the tour.
func (s *screen) step(title string) {
	s.steps++
	fmt.Fprintf(s.w, "\n%s\n", s.paint(bold, fmt.Sprintf("%d. %s", s.steps, title)))
}

// say writes a remark.
func (s *screen) say(format string, args ...any) {
	fmt.Fprintf(s.w, "   %s\n", fmt.Sprintf(format, args...))
}

// ok writes what was checked and found to be so.
func (s *screen) ok(format string, args ...any) {
	fmt.Fprintf(s.w, "   %s %s\n", s.paint(green, "ok:"), fmt.Sprintf(format, args...))
}

// command shows a command line and where it runs.
func (s *screen) command(where, line string) {
	fmt.Fprintf(s.w, "   %s\n", s.paint(cyan, where+"$ "+line))
}

// output shows what a command wrote.
func (s *screen) output(text string) {
	for line := range strings.Lines(text) {
		fmt.Fprintf(s.w, "     %s\n", strings.TrimRight(line, "\n"))
	}
}

// until calls f every 20 ms until it returns nil. It says what it waits for
// when that takes longer than two seconds, and gives up after d with f's
// error.
func (s *screen) until(ctx context.Context, d time.Duration, what string, f func() error) error {
	began := time.Now()
	next := 2 * time.Second
	for {
		err := f()
		if err == nil {
			return nil
		}
		var now *finalError
		if errors.As(err, &now) {
			return fmt.Errorf("waiting for %s: %w", what, now.err)
		}
		took := time.Since(began)
		if took > d {
			return fmt.Errorf("waited %s for %s: %w", d, what, err)
		}
		if took >= next {
			fmt.Fprintf(s.w, "   %s\n", s.paint(dim, fmt.Sprintf("... %d s, waiting for %s", int(next.Seconds()), what)))
			next += 2 * time.Second
		}
		select {
		case <-time.After(20 * time.Millisecond):
		case <-ctx.Done():
			return fmt.Errorf("waiting for %s: %w", what, err)
		}
	}
}

// finalError ends until at once.
type finalError struct{ err error }

func (e *finalError) Error() string { return e.err.Error() }
