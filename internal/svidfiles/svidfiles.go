// Package svidfiles keeps an X509-SVID in files, for programs that read files and
// nothing else: certificate, key and trust bundle, always those that belong
// together.
package svidfiles

import (
	"bytes"
	"encoding/pem"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"strings"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// Default names are those of a Kubernetes Secret of type kubernetes.io/tls.
const (
	DefaultCertificate = "tls.crt"
	DefaultKey         = "tls.key"
	DefaultBundle      = "ca.crt"
)

// Names beside the files. As kubelet does with Secrets, the files are links
// through one link to a directory, which is replaced as one.
const (
	current = "..data"
	version = "..svid-*"
)

// Files say where an SVID goes.
type Files struct {
	// Dir is made, mode 0700, when it is missing.
	Dir string
	// Certificate, Key and Bundle are names in Dir: the chain, leaf first; the key
	// as PKCS#8; the roots. All are PEM.
	Certificate, Key, Bundle string
	// KeyMode is the mode of the key's file. The others are 0644.
	KeyMode fs.FileMode
	// KeyOwner is whose the key's file is; nil: the writer's.
	KeyOwner *Owner
}

// Owner is a user and a group, by number.
type Owner struct{ UID, GID uint32 }

func (f *Files) names() []string { return []string{f.Certificate, f.Key, f.Bundle} }

// Check says what is wrong with the settings, or with what is in the directory
// already: nobody else's file is replaced.
func (f *Files) Check() error {
	if f.Dir == "" {
		return errors.New("no directory is named")
	}
	seen := map[string]bool{}
	for _, name := range f.names() {
		switch {
		case name == "" || name != filepath.Base(name) || strings.HasPrefix(name, "."):
			return fmt.Errorf("%q is no name of a file; a path is not allowed, nor a dot at the start", name)
		case seen[name]:
			return fmt.Errorf("two files have the name %q", name)
		}
		seen[name] = true
		path := filepath.Join(f.Dir, name)
		to, err := os.Readlink(path)
		switch _, statErr := os.Lstat(path); {
		case errors.Is(statErr, fs.ErrNotExist):
		case statErr != nil:
			return statErr
		case err != nil || to != filepath.Join(current, name):
			return fmt.Errorf("%s is there already, and not from here; remove it, or choose another name", path)
		}
	}
	if f.KeyMode&^0o660 != 0 || f.KeyMode&0o400 == 0 {
		return fmt.Errorf("a key's file cannot have the mode %04o: the owner reads it, others do not, nobody executes it", f.KeyMode)
	}
	return nil
}

// Write replaces the files by an SVID and its trust bundle, and reports whether
// they differ from what was there. A crash leaves the files of before, or these.
func (f *Files) Write(svid *x509svid.SVID, bundle *x509bundle.Bundle) (changed bool, err error) {
	if err := f.Check(); err != nil {
		return false, err
	}
	chain, key, err := svid.Marshal()
	if err != nil {
		return false, err
	}
	var roots bytes.Buffer
	for _, c := range bundle.X509Authorities() {
		_ = pem.Encode(&roots, &pem.Block{Type: "CERTIFICATE", Bytes: c.Raw}) // a buffer does not fail
	}
	content := map[string][]byte{f.Certificate: chain, f.Key: key, f.Bundle: roots.Bytes()}
	if f.has(content) {
		return false, nil
	}
	if err := os.MkdirAll(f.Dir, 0o700); err != nil {
		return false, err
	}
	dir, err := os.MkdirTemp(f.Dir, version) // mode 0700
	if err != nil {
		return false, err
	}
	if err := f.fill(dir, content); err != nil {
		return false, errors.Join(err, os.RemoveAll(dir))
	}
	before, err := os.Readlink(filepath.Join(f.Dir, current))
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		return false, errors.Join(err, os.RemoveAll(dir))
	}
	if err := link(filepath.Base(dir), filepath.Join(f.Dir, current)); err != nil {
		return false, errors.Join(err, os.RemoveAll(dir))
	}
	for _, name := range f.names() {
		if err := link(filepath.Join(current, name), filepath.Join(f.Dir, name)); err != nil {
			return true, err
		}
	}
	// The version of before stays until the next change: who followed the link
	// just now still opens its files.
	return true, errors.Join(wholefile.SyncDir(f.Dir), f.sweep(filepath.Base(dir), before))
}

// fill writes the files of one version.
func (f *Files) fill(dir string, content map[string][]byte) error {
	for name, data := range content {
		path := filepath.Join(dir, name)
		if err := wholefile.Write(path, data); err != nil {
			return err
		}
		mode := fs.FileMode(0o644)
		if name == f.Key {
			mode = f.KeyMode
			if o := f.KeyOwner; o != nil {
				if err := os.Chown(path, int(o.UID), int(o.GID)); err != nil {
					return err
				}
			}
		}
		if err := os.Chmod(path, mode); err != nil {
			return err
		}
	}
	return os.Chmod(dir, 0o755) // who may enter is for the directory above to say
}

// has reports whether the files hold this already.
func (f *Files) has(content map[string][]byte) bool {
	for name, want := range content {
		if got, err := os.ReadFile(filepath.Join(f.Dir, name)); err != nil || !bytes.Equal(got, want) {
			return false
		}
	}
	return true
}

// link makes a symbolic link, in place of one that is there.
func link(to, path string) error {
	if now, err := os.Readlink(path); err == nil && now == to {
		return nil
	}
	tmp := path + ".new"
	if err := os.Remove(tmp); err != nil && !errors.Is(err, fs.ErrNotExist) {
		return err
	}
	if err := os.Symlink(to, tmp); err != nil {
		return err
	}
	return os.Rename(tmp, path)
}

// sweep removes all versions but some.
func (f *Files) sweep(keep ...string) error {
	old, err := filepath.Glob(filepath.Join(f.Dir, version))
	errs := []error{err}
	for _, path := range old {
		if !slices.Contains(keep, filepath.Base(path)) {
			errs = append(errs, os.RemoveAll(path))
		}
	}
	return errors.Join(errs...)
}

// Remove removes the files, and leaves the directory.
func (f *Files) Remove() error {
	if err := f.Check(); err != nil {
		return err
	}
	var errs []error
	for _, name := range append(f.names(), current) {
		if err := os.Remove(filepath.Join(f.Dir, name)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			errs = append(errs, err)
		}
	}
	return errors.Join(append(errs, f.sweep())...)
}
