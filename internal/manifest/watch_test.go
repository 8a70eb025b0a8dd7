package manifest

import (
	"context"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/fsnotify/fsnotify"
	"go.uber.org/goleak"
	"golang.org/x/sys/unix"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// prompt is how soon an edit has to be noticed. It is less than recheck, so
// that these tests fail where only the slow look at the files works.
const prompt = recheck * 3 / 4

type result struct {
	ttl time.Duration // of the manifest; tells the edits apart
	err error
}

// startWatch runs Watch until the test ends.
func startWatch(t *testing.T, path string) <-chan result {
	t.Helper()
	results := make(chan result, 1000)
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() {
		defer close(done)
		Watch(ctx, path, "here", slog.New(slog.NewTextHandler(t.Output(), nil)), func(m *Manifest, err error) {
			r := result{err: err}
			if (m == nil) == (err == nil) {
				t.Errorf("manifest %v with error %v", m, err)
			}
			if m != nil {
				r.ttl = m.State.SVIDTTL
			}
			results <- r
		})
	}()
	t.Cleanup(func() {
		cancel()
		<-done
	})
	return results
}

func config(ttl string) []byte {
	return []byte(meshConfig[:len(meshConfig)-2] + ", svidTTL: " + ttl + "}\n")
}

func put(t *testing.T, path string, data []byte) {
	t.Helper()
	if err := os.WriteFile(path, data, 0o600); err != nil {
		t.Fatal(err)
	}
}

func try(t *testing.T, err error) {
	t.Helper()
	if err != nil {
		t.Fatal(err)
	}
}

// wantTTL waits for a call with a good manifest of the given lifetime.
func wantTTL(t *testing.T, results <-chan result, ttl time.Duration) {
	t.Helper()
	select {
	case r := <-results:
		if r.err != nil || r.ttl != ttl {
			t.Fatalf("got %+v, want %v", r, ttl)
		}
	case <-time.After(prompt):
		t.Fatalf("nothing within %v, want %v", prompt, ttl)
	}
}

func wantError(t *testing.T, results <-chan result, text string) {
	t.Helper()
	select {
	case r := <-results:
		if r.err == nil || !strings.Contains(r.err.Error(), text) {
			t.Fatalf("got %+v, want an error with %q", r, text)
		}
	case <-time.After(prompt):
		t.Fatalf("nothing within %v, want an error with %q", prompt, text)
	}
}

func wantNothing(t *testing.T, results <-chan result) {
	t.Helper()
	select {
	case r := <-results:
		t.Fatalf("got %+v, want nothing", r)
	case <-time.After(6 * quietPeriod):
	}
}

func TestWatchEdits(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "mesh.yaml")
	put(t, path, config("1m"))
	results := startWatch(t, dir)
	wantTTL(t, results, time.Minute)

	put(t, path, config("2m")) // in place
	wantTTL(t, results, 2*time.Minute)
	put(t, path, append([]byte("# a comment\n"), config("2m")...)) // without a meaning
	wantNothing(t, results)
	put(t, filepath.Join(dir, "mesh.yaml~"), config("9m")) // a backup copy
	wantNothing(t, results)

	put(t, path, []byte("kind: ["))
	wantError(t, results, "not valid YAML")
	put(t, path, config("2m")) // back to what was good: must be said
	wantTTL(t, results, 2*time.Minute)

	temporary := filepath.Join(dir, ".mesh.yaml.swp") // an editor that renames
	put(t, temporary, config("3m"))
	try(t, os.Rename(temporary, path))
	wantTTL(t, results, 3*time.Minute)
	put(t, path, config("4m")) // the new file is watched like the old
	wantTTL(t, results, 4*time.Minute)

	other := filepath.Join(dir, "other.yml")
	put(t, other, config("5m"))
	wantError(t, results, "another MeshConfig")
	try(t, os.Remove(other))
	wantTTL(t, results, 4*time.Minute)

	try(t, os.RemoveAll(dir))
	wantError(t, results, "no") // no such file, or no *.yaml in between
	for len(results) > 0 {
		<-results
	}
	try(t, os.Mkdir(dir, 0o700))
	put(t, path, config("6m"))
	deadline := time.After(prompt)
	for {
		select {
		case r := <-results:
			if r.ttl == 6*time.Minute {
				return
			}
		case <-deadline:
			t.Fatal("a folder that came back is not noticed")
		}
	}
}

func TestWatchSingleFile(t *testing.T) {
	t.Parallel()
	path := filepath.Join(t.TempDir(), "mesh") // any name
	results := startWatch(t, path)
	wantError(t, results, "no such file")
	put(t, path, config("1m"))
	wantTTL(t, results, time.Minute)
	put(t, path+".new", config("2m"))
	try(t, os.Rename(path+".new", path))
	wantTTL(t, results, 2*time.Minute)
}

// Links are how deployments are switched: the folder itself, a folder on the
// way, a file, or the way Kubernetes mounts a volume.
func TestWatchLinks(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	for _, v := range []string{"1", "2", "3"} {
		try(t, os.MkdirAll(filepath.Join(base, "v"+v, "conf"), 0o700))
		put(t, filepath.Join(base, "v"+v, "conf", "mesh.yaml"), config(v+"m"))
		put(t, filepath.Join(base, "v"+v, "plain"), config(v+"m"))
	}
	link := func(t *testing.T, target, name string) {
		t.Helper()
		try(t, os.Symlink(target, name+".tmp"))
		try(t, os.Rename(name+".tmp", name))
	}
	t.Run("folder", func(t *testing.T) {
		current := filepath.Join(base, "folder")
		link(t, "v1/conf", current)
		results := startWatch(t, current)
		wantTTL(t, results, time.Minute)
		link(t, filepath.Join(base, "v2", "conf"), current)
		wantTTL(t, results, 2*time.Minute)
		put(t, filepath.Join(base, "v2", "conf", "mesh.yaml"), config("20m"))
		wantTTL(t, results, 20*time.Minute)
	})
	t.Run("on the way", func(t *testing.T) {
		current := filepath.Join(base, "way")
		link(t, "v1", current)
		results := startWatch(t, filepath.Join(current, "conf"))
		wantTTL(t, results, time.Minute)
		link(t, "v3", current)
		wantTTL(t, results, 3*time.Minute)
	})
	t.Run("file", func(t *testing.T) {
		dir := t.TempDir()
		name := filepath.Join(dir, "mesh.yaml")
		link(t, filepath.Join(base, "v1", "plain"), name)
		results := startWatch(t, dir)
		wantTTL(t, results, time.Minute)
		link(t, filepath.Join(base, "v3", "plain"), name)
		wantTTL(t, results, 3*time.Minute)
		put(t, filepath.Join(base, "v3", "plain"), config("30m")) // the link's target
		wantTTL(t, results, 30*time.Minute)
	})
	t.Run("volume", func(t *testing.T) {
		dir := t.TempDir()
		for _, v := range []string{"1", "2", "3"} {
			try(t, os.Mkdir(filepath.Join(dir, "..v"+v), 0o700))
			put(t, filepath.Join(dir, "..v"+v, "mesh.yaml"), config(v+"m"))
		}
		link(t, "..v1", filepath.Join(dir, "..data"))
		link(t, "..data/mesh.yaml", filepath.Join(dir, "mesh.yaml"))
		results := startWatch(t, dir)
		wantTTL(t, results, time.Minute)
		for i, v := range []string{"2", "3"} {
			link(t, "..v"+v, filepath.Join(dir, "..data"))
			wantTTL(t, results, time.Duration(i+2)*time.Minute)
		}
	})
}

// A folder that is moved away and replaced is another folder by the same name.
func TestWatchFolderIsReplaced(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	dir := filepath.Join(base, "conf")
	for _, name := range []string{dir, dir + ".new"} {
		try(t, os.Mkdir(name, 0o700))
	}
	put(t, filepath.Join(dir, "mesh.yaml"), config("1m"))
	put(t, filepath.Join(dir+".new", "mesh.yaml"), config("2m"))
	results := startWatch(t, dir)
	wantTTL(t, results, time.Minute)
	try(t, unix.Renameat2(unix.AT_FDCWD, dir+".new", unix.AT_FDCWD, dir, unix.RENAME_EXCHANGE))
	wantTTL(t, results, 2*time.Minute)
	put(t, filepath.Join(dir, "mesh.yaml"), config("3m"))
	wantTTL(t, results, 3*time.Minute)
}

// Each deployment may be a new folder: those of the past must not be watched
// for ever, the kernel gives a user only so many watches.
func TestWatchForgetsOldFolders(t *testing.T) {
	t.Parallel()
	base := t.TempDir()
	current := filepath.Join(base, "current")
	notifier, err := fsnotify.NewWatcher()
	try(t, err)
	defer notifier.Close()
	w := &watch{path: current, log: slog.New(slog.DiscardHandler), notifier: notifier}
	for i := range 20 {
		folder := filepath.Join(base, fmt.Sprint("v", i))
		try(t, os.Mkdir(folder, 0o700))
		put(t, filepath.Join(folder, "mesh.yaml"), config("1m"))
		try(t, os.Symlink(folder, current+".tmp"))
		try(t, os.Rename(current+".tmp", current))
		w.follow(t.Context())
		if list := notifier.WatchList(); len(list) != 2 || !slices.Contains(list, folder) {
			t.Fatalf("after %d swaps these are watched: %v", i, list)
		}
	}
}

// A save is many events: one call. An edit that never stops is still looked
// at, or a writer in a loop could keep an old policy in force.
func TestWatchBatches(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	path := filepath.Join(dir, "mesh.yaml")
	put(t, path, config("1m"))
	results := startWatch(t, dir)
	wantTTL(t, results, time.Minute)
	replace := func(ttl string) {
		put(t, filepath.Join(dir, ".tmp"), config(ttl))
		try(t, os.Rename(filepath.Join(dir, ".tmp"), path))
	}
	for i := range 10 {
		replace(fmt.Sprintf("%dm", i+2))
	}
	calls := 1
	for deadline := time.After(prompt); ; calls++ {
		var last result
		select {
		case last = <-results:
		case <-deadline:
			t.Fatal("the last of many edits is not noticed")
		}
		if last.ttl == 11*time.Minute {
			break
		}
	}
	if calls > 4 { // one, but for a machine that is busy
		t.Errorf("%d calls for one burst of edits", calls)
	}
	wantNothing(t, results)

	stop := time.Now().Add(3 * maximumWait)
	for i := 0; time.Now().Before(stop); i++ {
		replace(fmt.Sprintf("%ds", 60+i))
		if len(results) > 0 {
			return
		}
		time.Sleep(quietPeriod / 5)
	}
	t.Error("nothing is loaded while edits go on")
}

// Where events are lost, the slow look at the files finds the edit.
func TestWatchWithoutEvents(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	deep := filepath.Join(dir, "not", "yet", "there")
	results := startWatch(t, deep) // no folder to watch
	wantError(t, results, "no such file")
	try(t, os.MkdirAll(deep, 0o700))
	put(t, filepath.Join(deep, "mesh.yaml"), config("1m"))
	deadline := time.After(3 * recheck)
	for {
		select {
		case r := <-results:
			if r.ttl == time.Minute {
				return
			}
		case <-deadline:
			t.Fatal("not noticed")
		}
	}
}

// After the context ends fn is not called any more and nothing is left running
// (TestMain looks for goroutines).
func TestWatchEnds(t *testing.T) {
	t.Parallel()
	dir := t.TempDir()
	put(t, filepath.Join(dir, "mesh.yaml"), config("1m"))
	ctx, cancel := context.WithCancel(context.Background())
	calls := 0
	Watch(ctx, dir, "here", slog.New(slog.DiscardHandler), func(*Manifest, error) {
		calls++
		cancel()
	})
	if calls != 1 {
		t.Errorf("%d calls", calls)
	}
	Watch(ctx, dir, "here", slog.New(slog.DiscardHandler), func(*Manifest, error) {
		t.Error("called after the context ended")
	})
}
