// Package instance is what the processes of a node know of its proxies: each
// running proxy has a directory of its own, so that two can work side by side
// while one replaces the other.
package instance

import (
	"cmp"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// Names below an instance's directory.
const (
	lockName     = "lock"
	epochName    = "epoch"
	drainingName = "draining"
	ownerName    = "owner"
)

// idLayout makes names that sort by the time of their making.
const idLayout = "20060102T150405.000000"

// Instance is one running proxy.
type Instance struct {
	// ID is unique on the node, and greater than those of older instances.
	ID string
	// Dir is the instance's own directory.
	Dir string
	// Owner is what Create was told.
	Owner string
	// Epoch is when its Envoy was last started: what that had open before is
	// gone.
	Epoch time.Time
	// Draining says that it takes no new connections.
	Draining bool
}

// Admin is the admin socket of the instance's Envoy.
func (i *Instance) Admin() string { return filepath.Join(i.Dir, "admin.sock") }

// Root is the directory of all instances below a run directory.
func Root(runDir string) string { return filepath.Join(runDir, "proxies") }

// List returns the instances that live, the oldest first. What a dead one left
// is not listed: the kernel releases an instance's lock when its process ends,
// in whatever way.
func List(runDir string) ([]Instance, error) {
	var out []Instance
	err := each(runDir, func(i Instance) error {
		lock, err := os.Open(filepath.Join(i.Dir, lockName))
		if errors.Is(err, fs.ErrNotExist) {
			return nil // it is going
		}
		if err != nil {
			return err
		}
		defer lock.Close()
		switch err := unix.Flock(int(lock.Fd()), unix.LOCK_SH|unix.LOCK_NB); {
		case err == nil:
			return nil // dead
		case !errors.Is(err, unix.EWOULDBLOCK):
			return fmt.Errorf("%s: lock: %w", i.Dir, err)
		}
		info, err := os.Stat(filepath.Join(i.Dir, epochName))
		if err == nil {
			i.Epoch = info.ModTime()
		} else if !errors.Is(err, fs.ErrNotExist) {
			return err
		}
		owner, err := os.ReadFile(filepath.Join(i.Dir, ownerName))
		if err != nil && !errors.Is(err, fs.ErrNotExist) { // an older version's has none
			return err
		}
		i.Owner = string(owner)
		_, err = os.Stat(filepath.Join(i.Dir, drainingName))
		i.Draining = err == nil
		out = append(out, i)
		return nil
	})
	slices.SortFunc(out, func(a, b Instance) int { return cmp.Compare(a.ID, b.ID) })
	return out, err
}

// Draining reports whether an instance has said that it takes no new
// connections. One that does not exist does not say so.
func Draining(runDir, id string) bool {
	if id == "" || id != filepath.Base(id) {
		return false
	}
	_, err := os.Stat(filepath.Join(Root(runDir), id, drainingName))
	return err == nil
}

// each calls f for every directory of an instance, dead or alive.
func each(runDir string, f func(Instance) error) error {
	entries, err := os.ReadDir(Root(runDir))
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	for _, e := range entries {
		if _, err := time.Parse(idLayout, e.Name()); err != nil || !e.IsDir() {
			continue
		}
		if err := f(Instance{ID: e.Name(), Dir: filepath.Join(Root(runDir), e.Name())}); err != nil {
			return err
		}
	}
	return nil
}

// Own is this process's instance. Its methods are not safe for concurrent use.
type Own struct {
	Instance
	lock *os.File
}

// Create makes an instance and removes what dead ones left. The caller closes
// it. owner tells which of the node's is which, such as by the name of a pod; it
// may be empty.
func Create(runDir, owner string) (*Own, error) {
	root := Root(runDir)
	if err := os.MkdirAll(root, 0o700); err != nil {
		return nil, err
	}
	if err := sweep(runDir); err != nil {
		return nil, err
	}
	// Locked before it has its name: nobody takes it for dead.
	making, err := os.MkdirTemp(root, ".making-")
	if err != nil {
		return nil, err
	}
	o := &Own{Instance: Instance{Owner: owner}}
	if o.lock, err = os.OpenFile(filepath.Join(making, lockName), os.O_RDWR|os.O_CREATE|os.O_EXCL, 0o600); err != nil {
		return nil, errors.Join(err, os.RemoveAll(making))
	}
	if err := unix.Flock(int(o.lock.Fd()), unix.LOCK_EX|unix.LOCK_NB); err != nil {
		return nil, errors.Join(fmt.Errorf("%s: lock: %w", making, err), o.lock.Close(), os.RemoveAll(making))
	}
	if err := os.WriteFile(filepath.Join(making, ownerName), []byte(owner), 0o600); err != nil {
		return nil, errors.Join(err, o.lock.Close(), os.RemoveAll(making))
	}
	for {
		o.ID = time.Now().UTC().Format(idLayout)
		o.Dir = filepath.Join(root, o.ID)
		err := os.Rename(making, o.Dir)
		if err == nil {
			return o, nil
		}
		// One with files in it is not replaced: it was made in the same microsecond.
		if !errors.Is(err, fs.ErrExist) && !errors.Is(err, unix.ENOTEMPTY) {
			return nil, errors.Join(err, o.lock.Close(), os.RemoveAll(making))
		}
	}
}

// sweep removes the directories of dead instances.
func sweep(runDir string) error {
	living, err := List(runDir)
	if err != nil {
		return err
	}
	err = each(runDir, func(i Instance) error {
		if slices.ContainsFunc(living, func(l Instance) bool { return l.ID == i.ID }) {
			return nil
		}
		// Made, locked and named since the list?
		again, err := List(runDir)
		if err != nil || slices.ContainsFunc(again, func(l Instance) bool { return l.ID == i.ID }) {
			return err
		}
		return os.RemoveAll(i.Dir)
	})
	if err != nil {
		return err
	}
	entries, err := os.ReadDir(Root(runDir))
	if err != nil {
		return err
	}
	for _, e := range entries {
		// An hour: whoever makes one now is done in milliseconds.
		if info, err := e.Info(); err == nil && strings.HasPrefix(e.Name(), ".making-") && time.Since(info.ModTime()) > time.Hour {
			if err := os.RemoveAll(filepath.Join(Root(runDir), e.Name())); err != nil {
				return err
			}
		}
	}
	return nil
}

// Renew begins a new epoch: call it before each start of Envoy.
func (o *Own) Renew() error {
	path := filepath.Join(o.Dir, epochName)
	if err := os.WriteFile(path, nil, 0o600); err != nil {
		return err
	}
	o.Epoch = time.Now()
	return os.Chtimes(path, o.Epoch, o.Epoch)
}

// Drain says that the instance takes no new connections.
func (o *Own) Drain() error {
	o.Draining = true
	return os.WriteFile(filepath.Join(o.Dir, drainingName), nil, 0o600)
}

// Close removes the instance. Call it when its Envoy has ended.
func (o *Own) Close() error {
	return errors.Join(os.RemoveAll(o.Dir), o.lock.Close())
}
