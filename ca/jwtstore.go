package ca

import (
	"context"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// JWTKeyStore keeps the keys that sign JWT-SVIDs. Replicas of a control plane
// share one, so that each verifies, and signs with, the keys of all.
type JWTKeyStore interface {
	// Load returns what was last saved and a version of it; both are zero when
	// nothing was.
	Load(ctx context.Context) (data []byte, version string, err error)
	// Save replaces what Load returned with that version. It is durable when
	// Save returns. When something else is stored meanwhile, Save returns
	// ErrJWTKeysChanged and changes nothing.
	Save(ctx context.Context, data []byte, version string) error
}

// ErrJWTKeysChanged is returned by JWTKeyStore.Save when another replica was
// first.
var ErrJWTKeysChanged = errors.New("ca: the JWT keys were changed meanwhile")

// jwtKeyFile is a JWTKeyStore in the authority's directory, which no other
// authority uses.
type jwtKeyFile string

const jwtKeysFile = "jwt-keys.json"

func newJWTKeyFile(dir string) jwtKeyFile { return jwtKeyFile(filepath.Join(dir, jwtKeysFile)) }

func (f jwtKeyFile) Load(context.Context) ([]byte, string, error) {
	info, err := os.Lstat(string(f))
	switch {
	case errors.Is(err, fs.ErrNotExist):
		return nil, "", nil
	case err != nil:
		return nil, "", err
	case !info.Mode().IsRegular():
		return nil, "", fmt.Errorf("%s: not a regular file", string(f))
	case info.Mode().Perm()&0o077 != 0:
		return nil, "", fmt.Errorf("%s: mode %04o lets group or others at the private keys; run: chmod 600 %s, or remove it to start with new keys if they may have been read", string(f), info.Mode().Perm(), string(f))
	}
	data, err := os.ReadFile(string(f))
	if err == nil && len(data) == 0 {
		err = fmt.Errorf("%s: is empty; restore it from a copy, or remove it to start with new keys", string(f))
	}
	return data, "", err
}

func (f jwtKeyFile) Save(_ context.Context, data []byte, _ string) error {
	return wholefile.Write(string(f), data)
}
