package proxy

import (
	"bytes"
	"encoding/json"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	"go.uber.org/goleak"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// feed runs a spooler over a pipe until the returned function is called.
func feed(t *testing.T, path, proxy string) (w *os.File, end func()) {
	t.Helper()
	r, w, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	var running sync.WaitGroup
	running.Go(func() { newSpooler(path, proxy, slog.New(slog.DiscardHandler)).run(t.Context(), r) })
	end = sync.OnceFunc(func() { w.Close(); running.Wait(); r.Close() })
	t.Cleanup(end)
	return w, end
}

// entry is a line as the agent reads it.
type entry struct {
	Proxy string `json:"proxy"`
	N     int    `json:"n"`
	Fill  string `json:"fill"`
}

func entries(t *testing.T, b []byte) []entry {
	t.Helper()
	var out []entry
	for line := range bytes.Lines(b) {
		var e entry
		if err := json.Unmarshal(line, &e); err != nil || !bytes.HasSuffix(line, []byte("\n")) {
			t.Fatalf("a line that is none: %q: %v", line, err)
		}
		out = append(out, e)
	}
	return out
}

// TestLinesOfTwoProxiesStayWhole: Envoy writes chunks that end anywhere. If two
// of them appended to the spool themselves, or their parents passed chunks on
// as they come, the chunks would mix and records would be lost.
func TestLinesOfTwoProxiesStayWhole(t *testing.T) {
	const each = 3000
	path := filepath.Join(t.TempDir(), "access.log")
	var writing sync.WaitGroup
	for _, name := range []string{"one", "two"} {
		w, end := feed(t, path, name)
		writing.Go(func() {
			defer end()
			var all []byte
			for n := range each {
				all = fmt.Appendf(all, "{\"n\":%d,\"fill\":%q}\n", n, bytes.Repeat([]byte{'x'}, rand.IntN(900)))
			}
			for len(all) > 0 {
				n := min(len(all), 1+rand.IntN(5000))
				if _, err := w.Write(all[:n]); err != nil {
					t.Error(err)
					return
				}
				all = all[n:]
			}
		})
	}
	writing.Wait()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	next := map[string]int{}
	for _, e := range entries(t, b) {
		if e.N != next[e.Proxy] {
			t.Fatalf("proxy %q: line %d, want %d", e.Proxy, e.N, next[e.Proxy])
		}
		next[e.Proxy]++
	}
	if next["one"] != each || next["two"] != each || len(next) != 2 {
		t.Errorf("lines: %v, want %d of each", next, each)
	}
}

// TestSpoolIsMoved: the agent rotates the spool by renaming it, and waits until
// nobody has the old file open. A proxy without traffic must let it go, too.
func TestSpoolIsMoved(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	w, end := feed(t, path, "p")
	say := func(n int) {
		if _, err := fmt.Fprintf(w, "{\"n\":%d}\n", n); err != nil {
			t.Fatal(err)
		}
	}
	say(1)
	holds(t, path, 1)
	if err := os.Rename(path, path+".000001"); err != nil {
		t.Fatal(err)
	}
	holds(t, path, 0) // made anew, by an idle proxy
	say(2)
	end()
	holds(t, path, 1)
	holds(t, path+".000001", 1)
}

func holds(t *testing.T, path string, n int) {
	t.Helper()
	for began := time.Now(); ; time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(path)
		if err == nil && len(entries(t, b)) == n {
			return
		}
		if time.Since(began) > 10*time.Second {
			t.Fatalf("%s: %q, %v; want %d lines", path, b, err, n)
		}
	}
}

// TestUnfinishedLines: neither what a dead writer left in the spool nor what a
// dead Envoy left in the pipe spoils the line that follows.
func TestUnfinishedLines(t *testing.T) {
	path := filepath.Join(t.TempDir(), "access.log")
	if err := os.WriteFile(path, []byte(`{"proxy":"dead","n`), 0o600); err != nil {
		t.Fatal(err)
	}
	w, end := feed(t, path, "p")
	// As when Envoy has died: the parent ends the line.
	for _, s := range []string{"{\"n\":1}\n{\"n", "\n", "{\"n\":2}\n{\"cut"} {
		if _, err := io.WriteString(w, s); err != nil {
			t.Fatal(err)
		}
	}
	end()
	got, err := os.ReadFile(path)
	want := "{\"proxy\":\"dead\",\"n\n{\"proxy\":\"p\",\"n\":1}\n{\"proxy\":\"p\",\"n\n{\"proxy\":\"p\",\"n\":2}\n{\"proxy\":\"p\",\"cut\n"
	if err != nil || string(got) != want {
		t.Errorf("%q, %v; want %q", got, err, want)
	}
}

// TestConnectionsAreCounted: the workers' own statistics, and those of others,
// are not counted again.
func TestConnectionsAreCounted(t *testing.T) {
	c, err := parseConnections([]byte(`http.in.downstream_rq_active: 7
listener.0.0.0.0_15001.downstream_cx_active: 3
listener.0.0.0.0_15006.downstream_cx_active: 2
listener.0.0.0.0_15008.downstream_cx_active: 4
listener.[__]_15001.downstream_cx_active: 10
listener.0.0.0.0_8080.downstream_cx_active: 99
`))
	if want := (Connections{Outbound: 13, Inbound: 7, Plain: 2, Tunnels: 4}); err != nil || c != want || c.Open() != 22 {
		t.Errorf("%+v, %v; want %+v", c, err, want)
	}
	if _, err := parseConnections([]byte("http.in.downstream_rq_active: many\n")); err == nil {
		t.Error("a count that is no number was taken for none: the proxy would end with connections open")
	}
}
