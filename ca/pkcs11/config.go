package pkcs11

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"syscall"
	"time"
)

// Config says which token keeps the keys.
type Config struct {
	// URI is what ParseTokenURI returned.
	URI URI
	// KeyType is the kind of the keys that are made.
	KeyType KeyType
	// RefusedFile remembers a PIN that the token has refused; it is in a directory
	// of the owner's that is there when a key is used first.
	RefusedFile string
	Log         *slog.Logger

	// How long the token may take; zero: usual values.
	signTime, makeTime time.Duration
}

// Limits of time. A smart card takes up to half a minute for an RSA key.
const (
	defaultSignTime = 10 * time.Second
	defaultMakeTime = time.Minute
)

// ErrHangs is returned while an earlier call has not come back from the token.
var ErrHangs = errors.New("the token does not answer")

// CheckFiles refuses a library or a PIN file that is missing, or that others may
// change or read. It does not call the token.
func (u URI) CheckFiles() error {
	info, err := os.Stat(u.ModulePath)
	if err != nil {
		return fmt.Errorf("module-path: %w", err)
	}
	if !info.Mode().IsRegular() {
		return fmt.Errorf("module-path: %s is no regular file; name the library", u.ModulePath)
	}
	if perm := info.Mode().Perm(); perm&0o022 != 0 {
		return fmt.Errorf("module-path: %s: mode %04o lets others change code that handles the root's key; run: chmod go-w %s", u.ModulePath, perm, u.ModulePath)
	}
	if s, ok := info.Sys().(*syscall.Stat_t); ok && s.Uid != 0 && int(s.Uid) != os.Geteuid() {
		return fmt.Errorf("module-path: %s belongs to user %d, who could change code that handles the root's key; have it belong to root", u.ModulePath, s.Uid)
	}
	if _, err := readPIN(u.PINSource); err != nil {
		return fmt.Errorf("pin-source: %w", err)
	}
	return nil
}
