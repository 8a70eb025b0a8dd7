package cniconf

import (
	"bytes"
	"errors"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"syscall"
	"time"
)

// aside begins the names of files that are being written. Runtimes do not
// read them, whatever their directory.
const aside = ".signet-cni-"

// replace makes path a file with this content and mode, and with the owner of
// like, in one step, and says whether it was another before. A reader, or
// whoever looks after a crash, finds the old file or the new one.
func replace(path string, content []byte, mode fs.FileMode, like fs.FileInfo) (changed bool, err error) {
	if st, err := os.Lstat(path); err == nil && st.Mode() == mode {
		if now, err := os.ReadFile(path); err == nil && bytes.Equal(now, content) {
			return false, nil
		}
	}
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, aside)
	if err != nil {
		return false, err
	}
	defer func() {
		if err != nil {
			err = errors.Join(err, f.Close(), remove(f.Name()))
		}
	}()
	if _, err := f.Write(content); err != nil {
		return false, err
	}
	if like != nil {
		if st, ok := like.Sys().(*syscall.Stat_t); ok {
			if err := f.Chown(int(st.Uid), int(st.Gid)); err != nil {
				return false, err
			}
		}
	}
	if err := errors.Join(f.Chmod(mode), f.Sync()); err != nil {
		return false, err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return false, err
	}
	return true, errors.Join(f.Close(), syncDir(dir))
}

// remove removes a file for good; one that is not there is no error.
func remove(path string) error {
	err := os.Remove(path)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	return syncDir(filepath.Dir(path))
}

func syncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	return errors.Join(d.Sync(), d.Close())
}

// removeAside removes what a crash left in a directory, but not what another
// installer may be writing.
func removeAside(dir string) error {
	const fresh = time.Minute
	entries, err := os.ReadDir(dir)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var errs []error
	for _, e := range entries {
		if !strings.HasPrefix(e.Name(), aside) {
			continue
		}
		if st, err := e.Info(); err == nil && time.Since(st.ModTime()) > fresh {
			errs = append(errs, remove(filepath.Join(dir, e.Name())))
		}
	}
	return errors.Join(errs...)
}
