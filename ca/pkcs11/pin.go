package pkcs11

import (
	"bytes"
	"crypto/pbkdf2"
	"crypto/rand"
	"crypto/sha256"
	"crypto/subtle"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"io/fs"
	"os"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/wholefile"
)

// maxPIN is the size of the largest PIN file that is read.
const maxPIN = 256

// readPIN reads the file with the PIN, which may end in a line feed. One that
// others than its owner can read is refused.
func readPIN(path string) (string, error) {
	f, err := os.Open(path)
	if err != nil {
		return "", err
	}
	defer f.Close()
	info, err := f.Stat()
	if err != nil {
		return "", err
	}
	if !info.Mode().IsRegular() {
		return "", fmt.Errorf("%s: is no regular file; name the file with the PIN", path)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return "", fmt.Errorf("%s: mode %04o lets group or others at the PIN; run: chmod 600 %s, and change the PIN if it may have been read", path, perm, path)
	}
	data, err := io.ReadAll(io.LimitReader(f, maxPIN+1))
	if err != nil {
		return "", err
	}
	data = bytes.TrimSuffix(bytes.TrimSuffix(data, []byte("\n")), []byte("\r"))
	switch {
	case len(data) > maxPIN:
		return "", fmt.Errorf("%s: has more than %d bytes; it holds the PIN alone", path, maxPIN)
	case len(data) == 0:
		return "", fmt.Errorf("%s: is empty; write the PIN into it", path)
	case bytes.ContainsAny(data, "\x00\r\n"):
		return "", fmt.Errorf("%s: has more than one line; it holds the PIN alone", path)
	}
	return string(data), nil
}

// refusal is what is remembered of a PIN that a token has refused, also across
// restarts: whoever brings the control plane back must not lock the token. The PIN
// itself is not in it, and it was not the right one.
type refusal struct {
	Token string    `json:"token"`
	At    time.Time `json:"at"`
	Salt  []byte    `json:"salt"`
	Hash  []byte    `json:"hash"`
}

// refusedRounds makes guessing the refused PIN from its hash slow.
const refusedRounds = 200_000

func hashPIN(pin string, salt []byte) ([]byte, error) {
	return pbkdf2.Key(sha256.New, pin, salt, refusedRounds, sha256.Size)
}

// checkRefused fails for a PIN that the token is known to refuse.
func checkRefused(file, token, source, pin string) error {
	data, err := os.ReadFile(file)
	if errors.Is(err, fs.ErrNotExist) {
		return nil
	}
	if err != nil {
		return err
	}
	var r refusal
	if err := json.Unmarshal(data, &r); err != nil {
		return fmt.Errorf("%s: %w; remove the file if the PIN in %s is right (%w)", file, err, source, ca.ErrNoRetry)
	}
	hash, err := hashPIN(pin, r.Salt)
	if err != nil {
		return err
	}
	if r.Token != token || subtle.ConstantTimeCompare(hash, r.Hash) != 1 {
		return nil
	}
	return fmt.Errorf("the PIN in %s was refused at %s, and a token locks itself after a few wrong ones; write the right PIN into the file, or, if the token has got this one meanwhile, remove %s (%w)",
		source, r.At.UTC().Format(time.RFC3339), file, ca.ErrNoRetry)
}

// noteRefused remembers a PIN that was refused.
func noteRefused(file, token, pin string) error {
	r := refusal{Token: token, At: time.Now(), Salt: make([]byte, 16)}
	if _, err := rand.Read(r.Salt); err != nil {
		return err
	}
	var err error
	if r.Hash, err = hashPIN(pin, r.Salt); err != nil {
		return err
	}
	data, err := json.Marshal(r)
	if err != nil {
		return err
	}
	return wholefile.Write(file, append(data, '\n'))
}
