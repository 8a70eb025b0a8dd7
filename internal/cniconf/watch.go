package cniconf

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"time"

	"github.com/fsnotify/fsnotify"
)

const (
	// every is how often the node is looked at even when nothing is heard.
	every = time.Second
	// quiet keeps a CNI that fights over the folder from keeping this busy.
	quiet = 50 * time.Millisecond
)

// Watch installs, and installs again whenever the node's CNI changed its
// configuration or somebody removed the program or the copy, until ctx ends.
// What goes wrong is logged, once, and tried again. ready, if not nil, is
// told of each look: nil when signet-cni is in place.
func (i *Installer) Watch(ctx context.Context, ready func(error)) error {
	for _, dir := range []string{i.cfg.ConfDir, i.cfg.BinDir} {
		if err := removeAside(dir); err != nil {
			return err
		}
	}
	w, err := fsnotify.NewWatcher()
	if err != nil {
		i.cfg.Log.WarnContext(ctx, "cannot watch for changes, so looking every second", "error", err)
		w = &fsnotify.Watcher{} // its channels never say anything
	} else {
		defer w.Close()
	}
	tick := time.NewTicker(every)
	defer tick.Stop()
	said := ""
	for first := true; ; first = false {
		if err == nil {
			// Again each time: the folder may have been made anew.
			if err := w.Add(i.cfg.ConfDir); err != nil && !errors.Is(err, os.ErrNotExist) && first {
				i.cfg.Log.WarnContext(ctx, "cannot watch for changes, so looking every second", "dir", i.cfg.ConfDir, "error", err)
			}
		}
		changed, lookErr := i.look(first)
		if changed {
			i.cfg.Log.InfoContext(ctx, "installed signet-cni", "conf", i.cfg.ConfDir, "bin", i.cfg.BinDir)
		}
		now := ""
		if lookErr != nil {
			now = lookErr.Error()
		}
		if now != said && now != "" {
			i.cfg.Log.ErrorContext(ctx, "signet-cni is not in place everywhere; trying again", "error", lookErr)
		}
		said = now
		if ready != nil {
			ready(lookErr)
		}
		if !i.wait(ctx, w, tick.C) {
			return nil
		}
	}
}

// look installs. The program is put in place at the start and when it is
// missing, but not when it differs later: then another release's installer
// runs, and the two must not take turns.
func (i *Installer) look(first bool) (changed bool, err error) {
	if !first {
		if _, err := os.Stat(filepath.Join(i.cfg.BinDir, Plugin)); err == nil {
			return i.sync()
		}
	}
	return i.Install()
}

// wait returns true when it is time to look again, and false when ctx ended.
func (i *Installer) wait(ctx context.Context, w *fsnotify.Watcher, tick <-chan time.Time) bool {
	select {
	case <-ctx.Done():
		return false
	case <-tick:
	case <-w.Events:
	case err := <-w.Errors:
		i.missed(ctx, err)
	}
	select { // let what is under way come to its end
	case <-ctx.Done():
		return false
	case <-time.After(quiet):
	}
	for {
		select {
		case <-w.Events:
		case err := <-w.Errors:
			i.missed(ctx, err)
		default:
			return true
		}
	}
}

// missed notes that changes may not have been heard of; the next look sees
// them in any case.
func (i *Installer) missed(ctx context.Context, err error) {
	i.cfg.Log.DebugContext(ctx, "watching for changes", "error", err)
}
