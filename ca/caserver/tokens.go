package caserver

import (
	"context"
	"crypto/rand"
	"crypto/sha256"
	"encoding/base64"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/wholefile"
)

// MaxTokenTTL is the longest that a join token may stay valid.
const MaxTokenTTL = 7 * 24 * time.Hour

// ErrToken is returned for a join token that is unknown, used or expired.
var ErrToken = errors.New("caserver: join token is unknown, used or expired")

const (
	tokenPrefix = "signet-join-"
	tokenExt    = ".token"
	maxToken    = 128 // bytes; the real length is less
)

// TokenStore holds join tokens, each a file named by the token's SHA-256: the
// tokens themselves are nowhere on disk. It is safe for concurrent use, also
// by several processes on one directory.
type TokenStore struct {
	dir string
	now func() time.Time
}

// tokenFile is the content of a token's file.
type tokenFile struct {
	Node    string    `json:"node"`
	Expires time.Time `json:"expires"`
}

// OpenTokens opens the token store in dir, which is made (0700) when missing.
func OpenTokens(dir string) (*TokenStore, error) {
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return nil, fmt.Errorf("caserver: make the token directory: %w", err)
	}
	info, err := os.Stat(dir)
	if err != nil {
		return nil, fmt.Errorf("caserver: token directory: %w", err)
	}
	if perm := info.Mode().Perm(); perm&0o077 != 0 {
		return nil, fmt.Errorf("caserver: token directory %s: mode %04o lets group or others in; run: chmod 700 %s", dir, perm, dir)
	}
	return &TokenStore{dir: dir, now: time.Now}, nil
}

// Create returns a new token that lets one caller become the named node, once,
// within ttl (at most MaxTokenTTL). It is durable when Create returns. The
// token is a secret: whoever has it is the node.
func (s *TokenStore) Create(node string, ttl time.Duration) (string, error) {
	if err := spiffeid.ValidatePathSegment(node); err != nil {
		return "", fmt.Errorf("caserver: create token: node %q: %w; use letters, digits, '.', '-' and '_'", node, err)
	}
	if ttl <= 0 || ttl > MaxTokenTTL {
		return "", fmt.Errorf("caserver: create token: ttl %s must be above 0 and at most %s", ttl, MaxTokenTTL)
	}
	s.sweep()
	var secret [32]byte
	if _, err := rand.Read(secret[:]); err != nil {
		return "", fmt.Errorf("caserver: create token: %w", err)
	}
	token := tokenPrefix + base64.RawURLEncoding.EncodeToString(secret[:])
	data, err := json.Marshal(tokenFile{Node: node, Expires: s.now().Add(ttl)})
	if err != nil {
		return "", fmt.Errorf("caserver: create token: %w", err)
	}
	if err := wholefile.Write(s.path(token), data); err != nil {
		return "", fmt.Errorf("caserver: create token: %w", err)
	}
	return token, nil
}

// Redeem implements Joiner: it spends a token and returns the node that it stands for. Of any number
// of callers, at once or one after another, at most one succeeds; the others
// get ErrToken. That it is spent is durable when Redeem returns: a crash does
// not bring the token back. Any other error means that nobody has the node's
// name from this call, and the token may be spent.
func (s *TokenStore) Redeem(_ context.Context, token string) (string, error) {
	if len(token) > maxToken || !strings.HasPrefix(token, tokenPrefix) {
		return "", ErrToken
	}
	path := s.path(token)
	data, err := os.ReadFile(path)
	if errors.Is(err, fs.ErrNotExist) {
		return "", ErrToken
	}
	if err != nil {
		return "", fmt.Errorf("caserver: redeem token: %w", err)
	}
	// Unlinking is the decision: the kernel lets one caller succeed.
	if err := os.Remove(path); errors.Is(err, fs.ErrNotExist) {
		return "", ErrToken
	} else if err != nil {
		return "", fmt.Errorf("caserver: redeem token: %w", err)
	}
	if err := wholefile.SyncDir(s.dir); err != nil {
		return "", fmt.Errorf("caserver: redeem token: %w", err)
	}
	var t tokenFile
	if err := json.Unmarshal(data, &t); err != nil {
		return "", fmt.Errorf("caserver: redeem token: its file is damaged: %w", err)
	}
	if !s.now().Before(t.Expires) {
		return "", ErrToken
	}
	return t.Node, nil
}

// sweep removes expired tokens. What it cannot read or remove it leaves:
// Redeem refuses expired tokens anyway.
func (s *TokenStore) sweep() {
	entries, err := os.ReadDir(s.dir)
	if err != nil {
		return
	}
	for _, e := range entries {
		path := filepath.Join(s.dir, e.Name())
		data, err := os.ReadFile(path)
		var t tokenFile
		if err != nil || !strings.HasSuffix(path, tokenExt) || json.Unmarshal(data, &t) != nil {
			continue
		}
		if !s.now().Before(t.Expires) {
			os.Remove(path)
		}
	}
}

func (s *TokenStore) path(token string) string {
	sum := sha256.Sum256([]byte(token))
	return filepath.Join(s.dir, hex.EncodeToString(sum[:])+tokenExt)
}
