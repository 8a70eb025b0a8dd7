// Package wholefile replaces files whole: who reads one, or looks after a crash,
// finds the old content or the new, and never a mixture.
package wholefile

import (
	"os"
	"path/filepath"
)

// TempPattern is the name of a file that is being written, beside the one that
// it is to replace. A crash may leave such files; whoever owns the directory may
// remove them while nobody writes there.
const TempPattern = ".tmp-*"

// Write replaces the file at path, readable by its owner only. The content is on
// disk, under that name, when Write returns.
func Write(path string, data []byte) error {
	dir := filepath.Dir(path)
	f, err := os.CreateTemp(dir, TempPattern) // mode 0600
	if err != nil {
		return err
	}
	defer os.Remove(f.Name())
	if _, err := f.Write(data); err != nil {
		f.Close()
		return err
	}
	if err := f.Sync(); err != nil {
		f.Close()
		return err
	}
	if err := f.Close(); err != nil {
		return err
	}
	if err := os.Rename(f.Name(), path); err != nil {
		return err
	}
	return SyncDir(dir)
}

// SyncDir makes what was renamed or removed in a directory durable.
func SyncDir(dir string) error {
	d, err := os.Open(dir)
	if err != nil {
		return err
	}
	defer d.Close()
	return d.Sync()
}
