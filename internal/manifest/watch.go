package manifest

import (
	"context"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/fsnotify/fsnotify"
)

// Timing of Watch.
const (
	quietPeriod = 50 * time.Millisecond  // without an event, before loading
	maximumWait = 500 * time.Millisecond // after the first event, before loading
	recheck     = 5 * time.Second        // look at the files without any event
)

// Watch loads path and calls fn with the result, at once and after every
// edit, until ctx ends; it returns after its last call of fn. Calls do not
// overlap. Either the Manifest or the error (an *Error, see Load) is nil. When
// an edit changes nothing that has a meaning, fn is called only if the
// previous call had an error.
//
// Edits are noticed through inotify, also when an editor replaces files or
// when a symbolic link on the way is swapped; where inotify does not work,
// within five seconds by looking at the files.
func Watch(ctx context.Context, path, node string, log *slog.Logger, fn func(*Manifest, error)) {
	w := &watch{path: path, node: node, log: log, fn: fn}
	var events chan fsnotify.Event
	var faults chan error
	notifier, err := fsnotify.NewWatcher()
	if err != nil {
		log.WarnContext(ctx, "no inotify; edits are noticed late", "error", err, "within", recheck)
	} else {
		defer notifier.Close()
		w.notifier = notifier
		events, faults = notifier.Events, notifier.Errors
	}
	w.load(ctx)

	ticker := time.NewTicker(recheck)
	defer ticker.Stop()
	var due <-chan time.Time // nil: no edit is waiting
	var latest time.Time     // when a waiting edit is loaded at the latest
	edited := func() {
		now := time.Now()
		if due == nil {
			latest = now.Add(maximumWait)
		}
		due = time.After(min(quietPeriod, latest.Sub(now)))
	}
	for {
		select {
		case <-ctx.Done():
			return
		case event, ok := <-events:
			if !ok {
				events = nil
			} else if w.concerns(event.Name) {
				edited()
			}
		case err, ok := <-faults: // such as an overflow: events were lost
			if !ok {
				faults = nil
				continue
			}
			log.WarnContext(ctx, "inotify", "error", err)
			edited()
		case <-ticker.C:
			if due == nil && fingerprint(w.path) != w.print {
				edited()
			}
		case <-due:
			due = nil
			w.load(ctx)
		}
	}
}

// watch is used by the goroutine that runs Watch alone.
type watch struct {
	path, node string
	log        *slog.Logger
	fn         func(*Manifest, error)
	notifier   *fsnotify.Watcher // nil where inotify does not work

	print  string          // of the files, taken before they were read
	names  map[string]bool // the files and the symbolic links on the way to them
	called bool
	good   string // revision of the latest call; "" if it had an error
}

func (w *watch) load(ctx context.Context) {
	// Watch first, read after: an edit in between is an event.
	w.print = fingerprint(w.path)
	w.follow(ctx)
	m, err := Load(w.path, w.node)
	if ctx.Err() != nil {
		return
	}
	if err != nil {
		w.called, w.good = true, ""
		w.fn(nil, err)
		return
	}
	if w.called && w.good == m.Revision {
		return
	}
	w.called, w.good = true, m.Revision
	w.fn(m, nil)
}

// follow watches every folder in which something may be replaced: those of
// the files, and those of the symbolic links on the way to them.
func (w *watch) follow(ctx context.Context) {
	root, err := filepath.Abs(w.path)
	if err != nil {
		root = w.path
	}
	w.names = map[string]bool{}
	folders := map[string]bool{}
	add := func(path string) {
		path = canonical(path)
		w.names[path] = true
		folders[filepath.Dir(path)] = true
	}
	paths := []string{root}
	if info, err := os.Stat(root); err == nil && info.IsDir() {
		files, _ := yamlFiles(root) // an error is reported by Load
		paths = append(paths, files...)
		if real, err := filepath.EvalSymlinks(root); err == nil {
			folders[real] = true
		}
	}
	for _, path := range paths {
		add(path)
		for _, link := range linksOn(path) {
			add(link)
		}
	}
	if w.notifier == nil {
		return
	}
	for _, old := range w.notifier.WatchList() {
		// Removed and added again: the name may be another folder's now.
		_ = w.notifier.Remove(old)
	}
	for folder := range folders {
		if err := w.notifier.Add(folder); err != nil {
			w.log.DebugContext(ctx, "folder cannot be watched", "folder", folder, "error", err)
		}
	}
}

// canonical resolves the symbolic links in the folder of path, but not path
// itself, so that one folder is not watched under two names.
func canonical(path string) string {
	folder, err := filepath.EvalSymlinks(filepath.Dir(path))
	if err != nil {
		return path
	}
	return filepath.Join(folder, filepath.Base(path))
}

// concerns reports whether an event on a path can matter. Names that start
// with two dots are how Kubernetes swaps the content of a mounted volume.
func (w *watch) concerns(path string) bool {
	name := filepath.Base(path)
	return w.names[path] || isYAMLName(name) || strings.HasPrefix(name, "..")
}

// linksOn returns the symbolic links that are met when path is opened, and
// the file at the end if a link leads to it.
func linksOn(path string) []string {
	var links []string
	for range 40 { // the kernel follows as many
		link := firstLink(path)
		if link == "" {
			if len(links) > 0 {
				links = append(links, path)
			}
			return links
		}
		links = append(links, link)
		target, err := os.Readlink(link)
		if err != nil {
			return links
		}
		if !filepath.IsAbs(target) {
			target = filepath.Join(filepath.Dir(link), target)
		}
		path = filepath.Join(target, strings.TrimPrefix(path, link))
	}
	return links
}

// firstLink returns the shortest leading part of an absolute path that is a
// symbolic link.
func firstLink(path string) string {
	for i := 1; i <= len(path); i++ {
		if i < len(path) && path[i] != '/' {
			continue
		}
		info, err := os.Lstat(path[:i])
		if err != nil {
			return ""
		}
		if info.Mode()&os.ModeSymlink != 0 {
			return path[:i]
		}
	}
	return ""
}
