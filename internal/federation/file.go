package federation

import (
	"context"
	"errors"
	"io/fs"
	"os"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// File is a Store on disk, which nobody else writes.
type File string

// Load implements Store.
func (f File) Load(context.Context) ([]byte, string, error) {
	data, err := os.ReadFile(string(f))
	if errors.Is(err, fs.ErrNotExist) {
		return nil, "", nil
	}
	return data, "1", err
}

// Save implements Store. Without data there is no file.
func (f File) Save(_ context.Context, data []byte, _ string) error {
	if len(data) == 0 {
		return os.Remove(string(f))
	}
	return wholefile.Write(string(f), data)
}
