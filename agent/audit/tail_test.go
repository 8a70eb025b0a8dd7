package audit

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// decodeTest reads the tests' lines: "#..." carries no record, others are
// an Event in JSON.
func decodeTest(line []byte) (Event, bool, error) {
	if line[0] == '#' {
		return Event{}, false, nil
	}
	var e Event
	err := json.Unmarshal(line, &e)
	return e, err == nil, err
}

func encodeTest(e Event) string {
	b, err := json.Marshal(e)
	if err != nil {
		panic(err)
	}
	return string(b) + "\n"
}

// spool is a spool file with its reader.
type spool struct {
	t      *testing.T
	path   string
	dir    string
	store  *Store
	tailer *Tailer
	stop   func()
}

func newSpool(t *testing.T) *spool {
	dir := t.TempDir()
	return &spool{t: t, dir: dir, path: filepath.Join(dir, "spool.log")}
}

// start opens the store and runs a Tailer; stop ends both.
func (s *spool) start(change func(*TailOptions)) {
	s.t.Helper()
	s.store = open(s.t, filepath.Join(s.dir, "audit"), Options{})
	o := TailOptions{Path: s.path, Decode: decodeTest, Poll: 2 * time.Millisecond}
	if change != nil {
		change(&o)
	}
	var err error
	if s.tailer, err = NewTailer(s.store, testLog(s.t), o); err != nil {
		s.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- s.tailer.Run(ctx) }()
	stopped := false
	s.stop = func() {
		if stopped {
			return
		}
		stopped = true
		cancel()
		if err := <-done; err != nil {
			s.t.Errorf("Run: %v", err)
		}
		verified(s.t, s.store)
		if err := s.store.Close(); err != nil {
			s.t.Error(err)
		}
	}
	s.t.Cleanup(s.stop)
}

func (s *spool) write(text string) {
	s.t.Helper()
	f, err := os.OpenFile(s.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	if err != nil {
		s.t.Fatal(err)
	}
	_, err = f.WriteString(text)
	if err = errors.Join(err, f.Close()); err != nil {
		s.t.Fatal(err)
	}
}

func (s *spool) sync() {
	s.t.Helper()
	ctx, cancel := context.WithTimeout(s.t.Context(), 20*time.Second)
	defer cancel()
	if err := s.tailer.Sync(ctx); err != nil {
		s.t.Fatalf("Sync: %v", err)
	}
}

func (s *spool) want(want ...string) {
	s.t.Helper()
	s.sync()
	if got := ids(s.t, s.store, Filter{}); !slices.Equal(got, want) {
		s.t.Errorf("records %v, want %v", got, want)
	}
}

func line(id string) string { return encodeTest(opened(id, 0)) }

// The spool appears late, lines come in pieces, and a restart goes on where
// the last commit was.
func TestTail(t *testing.T) {
	s := newSpool(t)
	var order []string
	hooks := func(o *TailOptions) {
		o.OnEventsEarly = func(es []Event) {
			for _, e := range es {
				order = append(order, fmt.Sprintf("early %s %d", e.Record.ID, s.store.Stats().Records))
			}
		}
		o.OnEvents = func(es []Event) {
			for _, e := range es {
				order = append(order, fmt.Sprintf("durable %s %d", e.Record.ID, s.store.Stats().Records))
			}
		}
	}
	s.start(hooks)
	s.want()
	l := line("a")
	s.write(l[:20])
	s.want()
	s.write(l[20:] + "\n# nothing\r\n")
	s.want("a")
	s.stop()
	if want := []string{"early a 0", "durable a 1"}; !slices.Equal(order, want) {
		t.Errorf("hooks: %v, want %v", order, want)
	}
	s.write(line("b"))
	s.start(nil)
	s.want("a", "b")
	if g := gaps(t, s.store); len(g) != 0 {
		t.Errorf("gaps: %+v", g)
	}
}

// A line that gives no record is counted in a gap with its reason, whatever
// is wrong with it, and the lines around it are kept.
func TestTailBadLines(t *testing.T) {
	long := strings.Repeat("x", MaxLine)
	noID := opened("", 0)
	for _, c := range []struct {
		name, text string
		gaps       []uint64
		reason     string
	}{
		{"undecodable", "{\n{\n", []uint64{2}, "cannot be read"},
		{"binary", "\x00\xff\xfe\n", []uint64{1}, "cannot be read"},
		{"event without id", encodeTest(noID), []uint64{1}, "id is empty"},
		{"longest", "#" + long[1:] + "\n", nil, ""},
		{"too long", "#" + long + "\n", []uint64{1}, "too long"},
		{"longer than the buffer", strings.Repeat(long, 40) + "\n", []uint64{1}, "too long"},
		{"two causes", "{\n#" + long + "\n{\n", []uint64{2, 1}, "cannot be read"},
	} {
		t.Run(c.name, func(t *testing.T) {
			s := newSpool(t)
			s.start(nil)
			s.write(line("a") + c.text + line("b"))
			s.want("a", "b")
			// and the same in pieces
			for piece := range slices.Chunk([]byte(line("c")+c.text+line("d")), 700_000) {
				s.write(string(piece))
				s.sync()
			}
			s.want("a", "b", "c", "d")
			g := gaps(t, s.store)
			if len(g) != 2*len(c.gaps) {
				t.Fatalf("gaps: %+v", g)
			}
			for i, n := range c.gaps {
				if g[i].Count != n {
					t.Errorf("gap %d has count %d, want %d", i, g[i].Count, n)
				}
			}
			if len(g) > 0 && !strings.Contains(g[0].Reason, c.reason) {
				t.Errorf("reason %q", g[0].Reason)
			}
		})
	}
}

// What another hand does to the spool loses nothing that is still there,
// repeats nothing, and leaves a gap where something may have been lost; while
// the Tailer runs, and while it does not.
func TestTailDisturbed(t *testing.T) {
	pad := "#" + strings.Repeat("p", 600) + "\n" // so that positions lie beyond the first bytes
	old := pad + line("a") + line("b")
	for _, c := range []struct {
		name string
		do   func(s *spool)
		want string
		gaps int
	}{
		{"truncated", func(s *spool) { os.Truncate(s.path, 0); s.write(line("c")) }, "a b c", 1},
		{"truncated and written beyond", func(s *spool) {
			text := "#" + strings.Repeat("q", 5000) + "\n" + line("c")
			if err := writeOver(s.path, text); err != nil {
				s.t.Error(err)
			}
		}, "a b c", 1},
		{"end cut off", func(s *spool) { os.Truncate(s.path, int64(len(pad+line("a")))); s.sync2(); s.write(line("c")) }, "a b c", 1},
		{"end cut off and written beyond", func(s *spool) {
			text := pad + line("a") + "#" + strings.Repeat("q", 5000) + "\n" + line("c")
			if err := writeOver(s.path, text); err != nil {
				s.t.Error(err)
			}
		}, "a b c", 1},
		{"replaced", func(s *spool) { os.Remove(s.path); s.write(line("c")) }, "a b c", 1},
	} {
		for _, running := range []bool{true, false} {
			t.Run(fmt.Sprintf("%s running=%v", c.name, running), func(t *testing.T) {
				s := newSpool(t)
				s.write(old)
				s.start(nil)
				s.want("a", "b")
				if !running {
					s.stop()
				}
				c.do(s)
				if !running {
					s.start(nil)
				}
				if c.name == "end cut off" && !running {
					// What was written after the cut ends where the cut
					// part did: only the gap can tell.
					c.want = "a b"
				}
				s.want(strings.Fields(c.want)...)
				want := c.gaps
				if c.name == "replaced" && running {
					want = 0 // the old one is open and is read to its end
				}
				if g := gaps(t, s.store); len(g) != want {
					t.Errorf("gaps: %+v, want %d", g, want)
				}
				s.stop()
				s.start(nil)
				s.want(strings.Fields(c.want)...)
			})
		}
	}
}

// sync2 lets a running Tailer see the file as it is.
func (s *spool) sync2() {
	if s.tailer != nil && s.store.closedForTest() {
		return
	}
	s.sync()
}

func (s *Store) closedForTest() bool { _, _, err := s.snapshot(); return err != nil }

// writeOver replaces a file's content in one step, as seen by a reader that
// polls: what is there first is as long as before.
func writeOver(path, text string) error {
	f, err := os.OpenFile(path, os.O_WRONLY, 0)
	if err != nil {
		return err
	}
	_, err = f.WriteAt([]byte(text), 0)
	return errors.Join(err, f.Close())
}

// proxy writes to the spool as Envoy does: it holds the file open, and opens
// it again some time after it was asked.
type proxy struct {
	path string
	f    *os.File
}

func (p *proxy) open() error {
	f, err := os.OpenFile(p.path, os.O_WRONLY|os.O_APPEND|os.O_CREATE, 0o600)
	p.f = f
	return err
}

func (p *proxy) reopen() error { return errors.Join(p.f.Close(), p.open()) }

// The spool is rotated at its size. What the proxy writes to the old file
// after the rename, as long as it has it open, is read before the new file.
func TestRotate(t *testing.T) {
	s := newSpool(t)
	p := &proxy{path: s.path}
	if err := p.open(); err != nil {
		t.Fatal(err)
	}
	defer func() { p.f.Close() }()
	asked := make(chan struct{}, 100)
	s.start(func(o *TailOptions) {
		o.MaxSize = 4096
		o.Reopen = func(context.Context) error { asked <- struct{}{}; return nil }
	})
	var want []string
	put := func(n int) {
		for range n {
			id := fmt.Sprint(len(want))
			want = append(want, id)
			if _, err := p.f.WriteString(line(id)); err != nil {
				t.Fatal(err)
			}
		}
	}
	for range 3 {
		put(20)
		<-asked
		put(5)
		time.Sleep(10 * time.Millisecond)
		put(5)
		p.f.WriteString(strings.TrimSpace(line(fmt.Sprint(len(want))))) // its newline was never written
		want = append(want, fmt.Sprint(len(want)))
		if err := p.reopen(); err != nil {
			t.Fatal(err)
		}
		put(1)
		s.want(want...)
	}
	if left, _ := filepath.Glob(s.path + ".*"); len(left) != 0 {
		t.Errorf("left: %v", left)
	}
	if g := gaps(t, s.store); len(g) != 0 {
		t.Errorf("gaps: %+v", g)
	}
}

// A proxy that never lets go of a rotated file does not hold up the records
// in the new one for ever, and the log says that some may be missing.
func TestRotateStuckWriter(t *testing.T) {
	s := newSpool(t)
	p := &proxy{path: s.path}
	if err := p.open(); err != nil {
		t.Fatal(err)
	}
	defer p.f.Close()
	p.f.WriteString(line("a"))
	s.start(func(o *TailOptions) {
		o.MaxSize = 1
		o.Grace = 100 * time.Millisecond
		o.Reopen = func(context.Context) error { return nil }
	})
	deadline := time.Now().Add(10 * time.Second)
	for time.Now().Before(deadline) {
		if left, _ := filepath.Glob(s.path + ".*"); len(left) == 1 {
			break
		}
		time.Sleep(time.Millisecond)
	}
	s.write("# new\n" + line("b"))
	s.want("a", "b")
	if g := gaps(t, s.store); len(g) == 0 || !strings.Contains(g[0].Reason, "given up") {
		t.Errorf("gaps: %+v", g)
	}
}

// A full disk, or any failed commit, is tried again and the events are
// announced once.
func TestTailCommitFails(t *testing.T) {
	s := newSpool(t)
	early, durable := 0, 0
	s.start(func(o *TailOptions) {
		o.OnEventsEarly = func(es []Event) { early += len(es) }
		o.OnEvents = func(es []Event) { durable += len(es) }
	})
	s.sync()
	s.store.writing <- struct{}{} // hold the writer
	g := s.store.active()
	s.store.setSegments([]*segment{{path: g.path, header: g.header, link: g.link, db: readOnlyCopy(t, g.path)}}, s.store.heads)
	bad := s.store.active()
	<-s.store.writing
	s.write(line("a"))
	time.Sleep(150 * time.Millisecond)
	s.store.writing <- struct{}{}
	if st := s.store.Stats(); st.Records != 0 {
		t.Errorf("%d records were stored read-only", st.Records)
	}
	s.store.setSegments([]*segment{g}, s.store.heads)
	bad.close()
	<-s.store.writing
	s.want("a")
	s.stop()
	if early != 1 || durable != 1 {
		t.Errorf("early %d, durable %d times", early, durable)
	}
}

func TestNewTailerRefuses(t *testing.T) {
	for name, o := range map[string]TailOptions{
		"Path":   {Decode: decodeTest},
		"Decode": {Path: "x"},
		"Poll":   {Path: "x", Decode: decodeTest, Poll: -1},
	} {
		if _, err := NewTailer(nil, testLog(t), o); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Every position in a file is told from the same place in a file that
// differs in any one byte that is looked at.
func TestPositionMatch(t *testing.T) {
	path := filepath.Join(t.TempDir(), "f")
	content := bytes.Repeat([]byte("0123456789abcdef"), 320)
	for _, off := range []int64{0, 1, headBytes, headBytes + 1, tailBytes, tailBytes + 1, 5120} {
		if err := os.WriteFile(path, content, 0o600); err != nil {
			t.Fatal(err)
		}
		f, err := os.Open(path)
		if err != nil {
			t.Fatal(err)
		}
		pos, err := positionAt(f, 1, off)
		if err != nil {
			t.Fatal(err)
		}
		for i := range content {
			if i%7 != 0 && i != int(off) && i != int(off)-1 {
				continue
			}
			changed := bytes.Clone(content)
			changed[i] ^= 1
			if err := writeOver(path, string(changed)); err != nil {
				t.Fatal(err)
			}
			want := matchSame
			switch at := int64(i); {
			case at < min(off, headBytes):
				want = matchReplaced
			case at < off && at >= off-tailBytes:
				want = matchSpliced
			}
			if m, err := pos.match(f, int64(len(content))); err != nil || m != want {
				t.Fatalf("offset %d, byte %d: %v, %v, want %v", off, i, m, err, want)
			}
		}
		f.Close()
	}
}
