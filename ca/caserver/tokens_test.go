package caserver

import (
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func openTokens(t *testing.T) *TokenStore {
	t.Helper()
	s, err := OpenTokens(filepath.Join(t.TempDir(), "tokens"))
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// Of 1,000 who redeem a token at once, through two stores on one directory as
// two processes would have, exactly one becomes the node.
func TestRedeemOnce(t *testing.T) {
	s := openTokens(t)
	second, err := OpenTokens(s.dir)
	if err != nil {
		t.Fatal(err)
	}
	token, err := s.Create("one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	var won atomic.Int32
	var wg sync.WaitGroup
	start := make(chan struct{})
	for i := range 1000 {
		store := s
		if i%2 == 1 {
			store = second
		}
		wg.Go(func() {
			<-start
			node, err := store.Redeem(t.Context(), token)
			switch {
			case err == nil && node == "one":
				won.Add(1)
			case !errors.Is(err, ErrToken):
				t.Errorf("%q, %v", node, err)
			}
		})
	}
	close(start)
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("%d became the node; want 1", won.Load())
	}
}

// A token is refused from the instant that it expires, and expired files do
// not pile up.
func TestRedeemExpired(t *testing.T) {
	s := openTokens(t)
	now := time.Now()
	s.now = func() time.Time { return now }
	token, err := s.Create("one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Minute)
	if _, err := s.Redeem(t.Context(), token); !errors.Is(err, ErrToken) {
		t.Errorf("%v; want ErrToken", err)
	}
	if _, err := s.Create("two", time.Minute); err != nil {
		t.Fatal(err)
	}
	now = now.Add(time.Hour)
	if _, err := s.Create("three", time.Minute); err != nil {
		t.Fatal(err)
	}
	if files, _ := filepath.Glob(filepath.Join(s.dir, "*")); len(files) != 1 {
		t.Errorf("%d files; want only the newest token's", len(files))
	}
}

// Who reads the directory learns no token.
func TestTokensAreStoredHashed(t *testing.T) {
	s := openTokens(t)
	token, err := s.Create("one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	files, _ := filepath.Glob(filepath.Join(s.dir, "*"))
	if len(files) != 1 {
		t.Fatalf("%d files; want 1", len(files))
	}
	data, err := os.ReadFile(files[0])
	if err != nil {
		t.Fatal(err)
	}
	secret := strings.TrimPrefix(token, tokenPrefix)
	if strings.Contains(files[0], secret) || strings.Contains(string(data), secret) {
		t.Error("the token can be read from the store")
	}
	if info, _ := os.Stat(files[0]); info.Mode().Perm() != 0o600 {
		t.Errorf("mode %04o; want 0600", info.Mode().Perm())
	}
}

// Bad arguments, an open directory and a damaged file are errors, not tokens.
func TestTokensRefuse(t *testing.T) {
	s := openTokens(t)
	for _, node := range []string{"", "a/b", "..", ".", "a b", "ü"} {
		if _, err := s.Create(node, time.Minute); err == nil {
			t.Errorf("node %q passed", node)
		}
	}
	for _, ttl := range []time.Duration{0, -1, MaxTokenTTL + 1} {
		if _, err := s.Create("one", ttl); err == nil {
			t.Errorf("ttl %s passed", ttl)
		}
	}
	token, err := s.Create("one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(s.path(token), []byte("{"), 0o600); err != nil {
		t.Fatal(err)
	}
	if node, err := s.Redeem(t.Context(), token); err == nil {
		t.Errorf("a damaged file gave %q", node)
	}
	if err := os.Chmod(s.dir, 0o755); err != nil {
		t.Fatal(err)
	}
	if _, err := OpenTokens(s.dir); err == nil || !strings.Contains(err.Error(), "chmod 700") {
		t.Errorf("an open directory: %v", err)
	}
}
