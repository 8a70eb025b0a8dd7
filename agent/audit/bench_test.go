package audit

import (
	"context"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"
)

// BenchmarkAppend measures durable events, in batches and one per commit.
func BenchmarkAppend(b *testing.B) {
	for _, size := range []int{1, 100, 1000} {
		b.Run(fmt.Sprintf("batch=%d", size), func(b *testing.B) {
			s := open(b, b.TempDir(), Options{})
			var events []Event
			for i := 0; b.Loop(); i++ {
				id := fmt.Sprintf("connection-%d", i/2)
				if i%2 == 0 {
					events = append(events, opened(id, time.Duration(i)))
				} else {
					events = append(events, ended(id, time.Duration(i)))
				}
				if len(events) == size {
					add(b, s, events...)
					events = events[:0]
				}
			}
			add(b, s, events...)
			b.ReportMetric(float64(b.N)/b.Elapsed().Seconds(), "events/s")
		})
	}
}

// BenchmarkTail measures lines from the spool to the disk; the decoder is the
// tests' (plain JSON).
func BenchmarkTail(b *testing.B) {
	dir := b.TempDir()
	path := filepath.Join(dir, "spool.log")
	const lines = 20_000
	var text strings.Builder
	for i := range lines / 2 {
		id := fmt.Sprintf("connection-%d", i)
		text.WriteString(encodeTest(opened(id, 0)) + encodeTest(ended(id, time.Second)))
	}
	if err := os.WriteFile(path, []byte(text.String()), 0o600); err != nil {
		b.Fatal(err)
	}
	b.SetBytes(int64(text.Len()))
	for i := 0; b.Loop(); i++ {
		s := open(b, filepath.Join(dir, fmt.Sprint("audit", i)), Options{})
		t, err := NewTailer(s, testLog(b), TailOptions{Path: path, Decode: decodeTest})
		if err != nil {
			b.Fatal(err)
		}
		ctx, cancel := context.WithCancel(context.Background())
		done := make(chan error, 1)
		go func() { done <- t.Run(ctx) }()
		if err := t.Sync(ctx); err != nil {
			b.Fatal(err)
		}
		cancel()
		<-done
		if err := s.Close(); err != nil {
			b.Fatal(err)
		}
	}
	b.ReportMetric(float64(b.N*lines)/b.Elapsed().Seconds(), "lines/s")
}
