// Package cniconf puts signet-cni into a node's CNI configuration, keeps it
// there, and takes it away.
//
// The files of the node's own CNI are never changed. Beside the one that the
// container runtime uses, the lexically first, such as 10-foo.conflist, goes
// a copy with an entry of signet-cni at the end: 10-foo-signet.conflist. It
// sorts before the file that it was made from, so runtimes use it instead.
// This has two merits over writing into the CNI's own file. When the CNI
// writes its file anew, no moment exists in which pods start without
// signet-cni: the old copy is in use until the new one takes its place. And
// no edit of the CNI's is ever lost, because nobody else writes to its file.
// A .conf, which has room for one plugin only, becomes a list in the copy.
//
// Every change of a file is made in a file aside that is then renamed, so a
// crash leaves the old state or the new one. Installing again changes
// nothing; several installers do the same thing twice.
//
// # When the release is deleted
//
// An installer that is stopped leaves everything in place: an agent that is
// restarted or upgraded must not let pods start outside of the mesh. Nothing
// is removed until Remove is called, which needs somebody who knows that the
// release is gone. `signet-cni install --daemonset=NAMESPACE/NAME` finds out
// for itself: when it is stopped, it asks the API server for the DaemonSet
// that it is part of, and removes when that is gone, is being deleted, or is
// another one by its UID. This takes the right to get that one object, by its
// name. Rights are deleted together with the release, in any order, so it
// also counts as gone when that right, which was there at the start, is there
// no more while the caller is still known. When the API server does not
// answer, everything stays, and new pods of the node wait: the safe side.
// Whoever then wants to be rid of it runs `signet-cni remove` on the node.
// For Helm the same command in a hook (pre-delete) is not needed.
package cniconf

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"time"
)

const (
	// Plugin is the name of the program and the type of its entry.
	Plugin = "signet-cni"
	// suffix ends the names of the files that this package makes.
	suffix = "-signet.conflist"
)

// ErrNoNetwork says that there is no CNI configuration to build on, yet.
var ErrNoNetwork = errors.New("the node has no CNI configuration yet")

// Config is what an Installer works on.
type Config struct {
	// BinDir is where the runtime looks for plugins, such as /opt/cni/bin.
	BinDir string
	// ConfDir is where the runtime looks for its configuration, such as
	// /etc/cni/net.d.
	ConfDir string
	// Program is the file to install; the running program if empty.
	Program string
	// Entry is what the plugin is to know.
	Entry Entry
	// Grace is how long the CNI's own file may be missing before the copy is
	// removed, since some CNIs remove their file before they write it; 5
	// seconds if zero.
	Grace time.Duration
	Log   *slog.Logger
}

// Installer installs and removes. Its methods are called one at a time.
type Installer struct {
	cfg     Config
	missing map[string]time.Time // since when copies have nothing they are of
	now     func() time.Time
}

// New returns an installer. It touches nothing yet.
func New(cfg Config) (*Installer, error) {
	if !filepath.IsAbs(cfg.BinDir) || !filepath.IsAbs(cfg.ConfDir) {
		return nil, fmt.Errorf("cniconf: BinDir %q and ConfDir %q: use absolute paths, such as /opt/cni/bin and /etc/cni/net.d", cfg.BinDir, cfg.ConfDir)
	}
	if cfg.Program == "" {
		cfg.Program = "/proc/self/exe"
	}
	if cfg.Grace == 0 {
		cfg.Grace = 5 * time.Second
	}
	return &Installer{cfg: cfg, missing: map[string]time.Time{}, now: time.Now}, nil
}

// Install puts the program in place, then its entry, and says whether it
// changed anything. Without a configuration to build on, errors.Is(err,
// ErrNoNetwork). A file that does not parse is left alone and is an error,
// but does not keep the next one from being built on, which is what the
// runtime may do too.
func (i *Installer) Install() (changed bool, err error) {
	bin, err := i.program()
	if err != nil {
		return false, err
	}
	conf, err := i.sync()
	return bin || conf, err
}

// program puts the program in place.
func (i *Installer) program() (changed bool, err error) {
	if err := os.MkdirAll(i.cfg.BinDir, 0o755); err != nil {
		return false, fmt.Errorf("cniconf: %w", err)
	}
	raw, err := os.ReadFile(i.cfg.Program)
	if err != nil {
		return false, fmt.Errorf("cniconf: the program to install: %w", err)
	}
	changed, err = replace(filepath.Join(i.cfg.BinDir, Plugin), raw, 0o755, nil)
	if err != nil {
		return false, fmt.Errorf("cniconf: %w", err)
	}
	return changed, nil
}

// folder is the configuration directory as it is.
type folder struct {
	bases  []string // files of others that runtimes read, in their order
	copies []string // files of ours
}

func (i *Installer) read() (folder, error) {
	entries, err := os.ReadDir(i.cfg.ConfDir)
	if err != nil {
		return folder{}, fmt.Errorf("cniconf: %w", err)
	}
	var d folder
	for _, e := range entries { // sorted by name
		switch ext := filepath.Ext(e.Name()); {
		case e.IsDir():
		case strings.HasSuffix(e.Name(), suffix):
			d.copies = append(d.copies, e.Name())
		case ext == ".conf" || ext == ".conflist" || ext == ".json":
			d.bases = append(d.bases, e.Name())
		}
	}
	return d, nil
}

func copyOf(base string) string { return strings.TrimSuffix(base, filepath.Ext(base)) + suffix }

// sync makes the copies what they should be.
func (i *Installer) sync() (changed bool, err error) {
	if err := os.MkdirAll(i.cfg.ConfDir, 0o755); err != nil {
		return false, fmt.Errorf("cniconf: %w", err)
	}
	d, err := i.read()
	if err != nil {
		return false, err
	}
	var errs []error
	done := map[string]bool{}
	for _, base := range d.bases {
		to := copyOf(base)
		// The first is in use. Copies of others are kept right for the
		// moment in which theirs becomes the first again.
		if done[to] || (len(done) > 0 && !slices.Contains(d.copies, to)) {
			continue
		}
		did, err := i.copy(base, to)
		if errors.Is(err, os.ErrNotExist) {
			continue // removed since
		}
		if err != nil {
			errs = append(errs, fmt.Errorf("cniconf: %s: %w", filepath.Join(i.cfg.ConfDir, base), err))
			continue
		}
		done[to] = true
		changed = changed || did
	}
	did, err := i.orphans(d)
	errs = append(errs, err)
	if len(done) == 0 {
		errs = append(errs, fmt.Errorf("cniconf: %s: %w", i.cfg.ConfDir, ErrNoNetwork))
	}
	return changed || did, errors.Join(errs...)
}

func (i *Installer) copy(base, to string) (changed bool, err error) {
	from := filepath.Join(i.cfg.ConfDir, base)
	raw, err := os.ReadFile(from)
	if err != nil {
		return false, err
	}
	out, err := chain(raw, filepath.Ext(base) == ".conflist", i.cfg.Entry)
	if err != nil {
		return false, err
	}
	st, err := os.Stat(from)
	if err != nil {
		return false, err
	}
	return replace(filepath.Join(i.cfg.ConfDir, to), out, st.Mode().Perm(), st)
}

// orphans removes copies whose original has been missing for a while.
func (i *Installer) orphans(d folder) (changed bool, err error) {
	var errs []error
	for _, c := range d.copies {
		if slices.ContainsFunc(d.bases, func(b string) bool { return copyOf(b) == c }) {
			delete(i.missing, c)
			continue
		}
		since, ok := i.missing[c]
		if !ok {
			i.missing[c] = i.now()
			continue
		}
		if i.now().Sub(since) < i.cfg.Grace {
			continue
		}
		delete(i.missing, c)
		if err := remove(filepath.Join(i.cfg.ConfDir, c)); err != nil {
			errs = append(errs, fmt.Errorf("cniconf: %w", err))
			continue
		}
		changed = true
	}
	return changed, errors.Join(errs...)
}

// Remove takes away the copies, waits for settle so that runtimes notice and
// calls that they began end, and then takes the program away. What is not
// there is no error; without copies it does not wait.
func (i *Installer) Remove(settle time.Duration) error {
	d, err := i.read()
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	var errs []error
	for _, c := range d.copies {
		errs = append(errs, remove(filepath.Join(i.cfg.ConfDir, c)))
	}
	if len(d.copies) > 0 {
		time.Sleep(settle)
	}
	errs = append(errs, remove(filepath.Join(i.cfg.BinDir, Plugin)))
	for _, dir := range []string{i.cfg.ConfDir, i.cfg.BinDir} {
		errs = append(errs, removeAside(dir))
	}
	if err := errors.Join(errs...); err != nil {
		return fmt.Errorf("cniconf: %w", err)
	}
	return nil
}
