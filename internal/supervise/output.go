package supervise

import (
	"bytes"
	"io"
	"sync"
)

// maxLine is where a line without an end is cut, in bytes.
const maxLine = 64 << 10

// output serializes the lines of all processes.
type output struct {
	mu sync.Mutex
	w  io.Writer // guarded by mu
}

func (o *output) line(name string, line []byte) {
	b := make([]byte, 0, len(name)+len(line)+4)
	b = append(b, name...)
	b = append(b, " | "...)
	b = append(b, line...)
	b = append(b, '\n')
	o.mu.Lock()
	defer o.mu.Unlock()
	// A process must not block or die because its log cannot be written.
	_, _ = o.w.Write(b)
}

// lineWriter passes whole lines on. It belongs to one goroutine: exec's
// copier, and after that has ended the one that waited.
type lineWriter struct {
	out  *output
	name string
	rest []byte // a line that has not ended
}

// Write never fails: exec would stop reading, and the process would hang.
func (w *lineWriter) Write(p []byte) (int, error) {
	n := len(p)
	for {
		line, after, found := bytes.Cut(p, []byte{'\n'})
		w.rest = append(w.rest, line...)
		for len(w.rest) > maxLine {
			w.out.line(w.name, w.rest[:maxLine])
			w.rest = append(w.rest[:0], w.rest[maxLine:]...)
		}
		if !found {
			return n, nil
		}
		w.out.line(w.name, w.rest)
		w.rest, p = w.rest[:0], after
	}
}

// flush passes on what a process wrote last without ending the line.
func (w *lineWriter) flush() {
	if len(w.rest) > 0 {
		w.out.line(w.name, w.rest)
		w.rest = nil
	}
}
