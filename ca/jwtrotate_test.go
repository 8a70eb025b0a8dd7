package ca

import (
	"context"
	"errors"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"testing/synctest"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func published(a *Authority) map[string]bool {
	keys, _ := a.JWTKeys()
	out := map[string]bool{}
	for _, k := range keys {
		out[k.ID] = true
	}
	return out
}

// Over four days of rotations: each key but the first is published a quarter of
// its life before it signs, a token's key is in the bundle until the token has
// expired, and a key that nothing can need any more is gone.
func TestJWTKeysRotate(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	type token struct {
		key     string
		expires time.Time
	}
	start := c.now()
	var open []token
	seen, signed := map[string]time.Time{}, map[string]time.Time{}
	for c.now().Before(start.Add(4 * 24 * time.Hour)) {
		if err := a.turnJWTKeys(t.Context()); err != nil {
			t.Fatal(err)
		}
		now, keys := c.now(), published(a)
		for id := range keys {
			if _, ok := seen[id]; !ok {
				seen[id] = now
			}
		}
		issued := issueJWT(t, a, MaxJWTTTL, "x")
		if _, ok := signed[issued.KeyID]; !ok {
			signed[issued.KeyID] = now
		}
		open = append(open, token{issued.KeyID, issued.ExpiresAt})
		for len(open) > 0 && open[0].expires.Before(now) {
			open = open[1:]
		}
		for _, o := range open {
			if !keys[o.key] {
				t.Fatalf("%s: the key of a token that is valid until %s is gone", now, o.expires)
			}
		}
		if len(keys) > 2 {
			t.Fatalf("%s: %d keys", now, len(keys))
		}
		c.advance(7 * time.Minute)
	}
	if len(signed) != 4 {
		t.Errorf("%d keys signed, want 4", len(signed))
	}
	for id, at := range signed {
		if ahead := at.Sub(seen[id]); ahead < publishAhead(DefaultJWTKeyLife) && !at.Equal(start) {
			t.Errorf("key %s was published %s before it signed", id, ahead)
		}
	}
}

// The keys survive a restart: what was signed before verifies after it. A long
// absence gives new keys, which sign at once.
func TestJWTKeysSurviveARestart(t *testing.T) {
	c, dir := newClock(), t.TempDir()
	edit := func(o *Options) { o.Now = c.now }
	a := openTest(t, dir, edit)
	first := issueJWT(t, a, 0, "x").KeyID
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	if info, err := os.Stat(filepath.Join(dir, "ca", jwtKeysFile)); err != nil || info.Mode().Perm() != 0o600 {
		t.Errorf("%v, %v", info, err)
	}
	a = openTest(t, dir, edit)
	if got := issueJWT(t, a, 0, "x").KeyID; got != first {
		t.Errorf("signs with %s after a restart, want %s", got, first)
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	c.advance(30 * 24 * time.Hour)
	a = openTest(t, dir, edit)
	if got := issueJWT(t, a, 0, "x").KeyID; got == first || len(published(a)) != 1 {
		t.Errorf("signs with %s of %d after a month", got, len(published(a)))
	}
}

// A successor that is late, since the store is away: the key goes on, its
// tokens end before it does, and then nothing is signed. When the store is back
// the next key is published and waits its turn.
func TestJWTKeysWithoutTheStore(t *testing.T) {
	c, store := newClock(), &sharedKeys{}
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now, o.JWTKeyStore = c.now, store })
	key := a.jwtKeys[0]
	store.set(errors.New("the store is away"))
	for c.now().Before(key.notAfter.Add(-retireGrace - time.Minute)) {
		if err := a.turnJWTKeys(t.Context()); err == nil {
			t.Fatal("no error")
		}
		if issued := issueJWT(t, a, MaxJWTTTL, "x"); issued.KeyID != key.id || issued.ExpiresAt.After(key.notAfter) {
			t.Fatalf("%s: a token of %s until %s, its key ends %s", c.now(), issued.KeyID, issued.ExpiresAt, key.notAfter)
		}
		c.advance(30 * time.Minute)
	}
	c.advance(time.Hour)
	p, err := a.PrepareJWT(JWTRequest{ID: corpusID, Audience: []string{"x"}})
	if err != nil {
		t.Fatal(err)
	}
	_, err = a.IssueJWT(p)
	wantError(t, err, "no key that signs now")
	store.set(nil)
	if err := a.turnJWTKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	if got := issueJWT(t, a, 0, "x"); got.KeyID == key.id {
		t.Error("still the key that ended")
	}
}

// sharedKeys is a store in memory.
type sharedKeys struct {
	mu      sync.Mutex
	data    []byte // guarded by mu
	version string // guarded by mu
	err     error  // guarded by mu
}

func (s *sharedKeys) set(err error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	s.err = err
}

func (s *sharedKeys) Load(context.Context) ([]byte, string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	return s.data, s.version, s.err
}

func (s *sharedKeys) Save(_ context.Context, data []byte, version string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	switch {
	case s.err != nil:
		return s.err
	case s.version != version:
		return ErrJWTKeysChanged
	}
	s.data, s.version = data, s.version+"x"
	return nil
}

// Replicas that share a store hold the same keys, whoever made them, and switch
// at the same instant; one that starts while the store is away issues
// certificates, and tokens once it is back. Keys that somebody removed from the
// store are put back, since tokens of theirs are in use.
func TestReplicasShareJWTKeys(t *testing.T) {
	c, store := newClock(), &sharedKeys{err: errors.New("the store is away")}
	open := func() *Authority {
		return openTest(t, t.TempDir(), func(o *Options) {
			o.Now, o.JWTKeyStore = c.now, store
		})
	}
	a, b := open(), open()
	issue(t, a, 0)
	if len(published(a)) != 0 {
		t.Error("keys without a store")
	}
	store.set(nil)
	turn := func(all ...*Authority) {
		var wg sync.WaitGroup
		for _, r := range all {
			wg.Go(func() {
				if err := r.turnJWTKeys(t.Context()); err != nil {
					t.Error(err)
				}
			})
		}
		wg.Wait()
	}
	turn(a, b)
	used := map[string]bool{}
	for range 10 * 24 {
		turn(a, b)
		turn(a, b) // what the slower one stored
		x, y := issueJWT(t, a, 0, "x").KeyID, issueJWT(t, b, 0, "x").KeyID
		if x != y {
			t.Fatalf("replicas sign with %s and %s", x, y)
		}
		used[x] = true
		c.advance(time.Hour)
	}
	if len(used) < 9 {
		t.Errorf("%d keys in ten days", len(used))
	}
	before := issueJWT(t, a, 0, "x").KeyID
	store.mu.Lock()
	store.data, store.version = nil, ""
	store.mu.Unlock()
	turn(a)
	turn(b)
	if !published(a)[before] || !published(b)[before] || !strings.Contains(string(store.data), before) {
		t.Error("the key in use is gone with the store's content")
	}
}

// A file of keys that others can read, that is another trust domain's, or that
// was damaged, is refused, with words on what to do, and without quoting a key.
func TestJWTKeyFileRefuses(t *testing.T) {
	dir := t.TempDir()
	a := openTest(t, dir, nil)
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	path := filepath.Join(dir, "ca", jwtKeysFile)
	good, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	other, err := a.jwtKeys.encode(spiffeid.RequireTrustDomainFromString("other.example"))
	if err != nil {
		t.Fatal(err)
	}
	second, err := newJWTKey(time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	for name, c := range map[string]struct {
		data []byte
		mode os.FileMode
		want string
	}{
		"mode":          {good, 0o640, "chmod 600"},
		"empty":         {nil, 0o600, "is empty"},
		"half":          {good[:len(good)/2], 0o600, "not a ring of JWT keys"},
		"unknown field": {[]byte(strings.Replace(string(good), `"keys"`, `"more": 1, "keys"`, 1)), 0o600, "not a ring of JWT keys"},
		"trust domain":  {other, 0o600, "not of \"mesh.example\""},
		"kid":           {[]byte(strings.Replace(string(good), a.jwtKeys[0].id, second.id, 1)), 0o600, "is not the key's"},
		"key":           {[]byte(strings.Replace(string(good), "BEGIN PRIVATE", "BEGIN PUBLIC", 1)), 0o600, "want one PRIVATE KEY"},
	} {
		t.Run(name, func(t *testing.T) {
			if err := os.WriteFile(path, c.data, 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Chmod(path, c.mode); err != nil {
				t.Fatal(err)
			}
			_, err := tryOpen(t, dir, nil)
			wantError(t, err, c.want)
			if strings.Contains(err.Error(), "PRIVATE KEY-----") {
				t.Errorf("quotes a key: %v", err)
			}
		})
	}
	_, err = tryOpen(t, t.TempDir(), func(o *Options) { o.JWTKeyLife = time.Second })
	wantError(t, err, "JWTKeyLife")
}

// A clock that was far ahead when a key was made, and is right again: the keys
// from the future do not keep the present from signing.
func TestJWTKeysAfterAWrongClock(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	c.advance(365 * 24 * time.Hour)
	if err := a.turnJWTKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	c.advance(-365 * 24 * time.Hour)
	if err := a.turnJWTKeys(t.Context()); err != nil {
		t.Fatal(err)
	}
	issueJWT(t, a, 0, "x")
	if n := len(published(a)); n != 1 {
		t.Errorf("%d keys, want the one that signs", n)
	}
}

// KeepJWTKeys turns the keys on its own, tells who waits, and ends when told.
func TestKeepJWTKeys(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		a := openTest(t, t.TempDir(), func(o *Options) { o.JWTKeyLife = time.Hour })
		ctx, cancel := context.WithCancel(t.Context())
		done := make(chan struct{})
		go func() { defer close(done); a.KeepJWTKeys(ctx) }()
		first := issueJWT(t, a, 0, "x").KeyID
		_, changed := a.JWTKeys()
		time.Sleep(46 * time.Minute)
		select {
		case <-changed:
		default:
			t.Error("the next key is not published after three quarters of the first one's life")
		}
		if n := len(published(a)); n != 2 {
			t.Errorf("%d keys", n)
		}
		if got := issueJWT(t, a, 0, "x").KeyID; got != first {
			t.Error("the next key signs before its time")
		}
		time.Sleep(15 * time.Minute)
		if got := issueJWT(t, a, 0, "x").KeyID; got == first {
			t.Error("the next key does not sign at its time")
		}
		time.Sleep(61 * time.Minute)
		if published(a)[first] {
			t.Error("the first key is not retired")
		}
		cancel()
		<-done
	})
}
