package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"
)

// vault is RootKeys in memory, with the faults of a token.
type vault struct {
	mu    sync.Mutex
	keys  map[string]*ecdsa.PrivateKey // guarded by mu
	made  int                          // guarded by mu
	fault error                        // guarded by mu; of every call
	hang  chan struct{}                // guarded by mu; if set, calls wait for its end
}

func newVault() *vault { return &vault{keys: map[string]*ecdsa.PrivateKey{}} }

func (v *vault) set(fault error, hang chan struct{}) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.fault, v.hang = fault, hang
}

// enter takes mu, or fails.
func (v *vault) enter() error {
	v.mu.Lock()
	hang := v.hang
	v.mu.Unlock()
	if hang != nil {
		<-hang
	}
	v.mu.Lock()
	if v.fault != nil {
		v.mu.Unlock()
		return v.fault
	}
	return nil
}

func (v *vault) Name() (string, error) {
	v.mu.Lock()
	defer v.mu.Unlock()
	v.made++
	return fmt.Sprintf("vault:%d", v.made), nil
}

func (v *vault) Make(name string) (crypto.PublicKey, error) {
	if err := v.enter(); err != nil {
		return nil, err
	}
	defer v.mu.Unlock()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	v.keys[name] = key
	return key.Public(), nil
}

func (v *vault) Sign(name string, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	if err := v.enter(); err != nil {
		return nil, err
	}
	defer v.mu.Unlock()
	key := v.keys[name]
	if key == nil {
		return nil, fmt.Errorf("there is no key %q", name)
	}
	return key.Sign(rand.Reader, digest, opts)
}

func (v *vault) Destroy(name string) error {
	if err := v.enter(); err != nil {
		return err
	}
	defer v.mu.Unlock()
	delete(v.keys, name)
	return nil
}

func (v *vault) String() string { return "the vault" }

// names lists the keys that there are.
func (v *vault) names() string {
	v.mu.Lock()
	defer v.mu.Unlock()
	var out []string
	for name := range v.keys {
		out = append(out, name)
	}
	slices.Sort(out)
	return strings.Join(out, " ")
}

func (v *vault) option(o *Options) { o.RootKeys = v }

// keyFiles lists the files of an authority that hold keys, or the names of some.
func keyFiles(t *testing.T, dir string) string {
	t.Helper()
	all, err := filepath.Glob(filepath.Join(dir, "ca", "*.key*"))
	if err != nil {
		t.Fatal(err)
	}
	for i := range all {
		all[i] = filepath.Base(all[i])
	}
	return strings.Join(all, " ")
}

// A root's key that is kept elsewhere is never in a file, lives as long as its
// root can sign, and goes when that can no more, after a restart as before.
func TestHeldRootKey(t *testing.T) {
	dir, v := t.TempDir(), newVault()
	a := openTest(t, dir, v.option)
	seen := map[Fingerprint]int{}
	check := func(want, keys, files string) {
		t.Helper()
		for range 2 {
			if got := roles(a, seen); got != want {
				t.Fatalf("roots are %q, want %q", got, want)
			}
			if got := under(t, a); got != string(RootSigns) {
				t.Errorf("at %s a certificate chains to the root that is %q", want, got)
			}
			if got := v.names(); got != keys {
				t.Errorf("at %s the vault holds %q, want %q", want, got, keys)
			}
			for _, r := range a.Roots() {
				if held := r.Key != "" && strings.Contains(keys, r.Key); held != (r.Role != RootFormer) {
					t.Errorf("at %s the key of the root that is %q is %q", want, r.Role, r.Key)
				}
			}
			if got := keyFiles(t, dir); got != files {
				t.Errorf("at %s there are %q, want %q", want, got, files)
			}
			a.Close()
			a = openTest(t, dir, v.option)
		}
	}
	check("signs:1", "vault:1", "intermediate.key root.key-uri")
	for _, step := range []struct {
		take              func() error
		want, keys, files string
	}{
		{func() error { return a.PrepareRoot() }, "signs:1 next:2", "vault:1 vault:2", "intermediate.key next-root.key-uri root.key-uri"},
		{func() error { return a.AbandonRoot() }, "signs:1", "vault:1", "intermediate.key root.key-uri"},
		{func() error { return a.PrepareRoot() }, "signs:1 next:3", "vault:1 vault:3", "intermediate.key next-root.key-uri root.key-uri"},
		{func() error { return a.DistrustRoot() }, "signs:1 next:4", "vault:1 vault:4", "intermediate.key next-root.key-uri root.key-uri"},
		{func() error { return a.SwitchRoot() }, "signs:4 former:1", "vault:4", "intermediate.key root.key-uri"},
		{func() error { return a.RetireRoots() }, "signs:4", "vault:4", "intermediate.key root.key-uri"},
	} {
		if err := step.take(); err != nil {
			t.Fatal(err)
		}
		check(step.want, step.keys, step.files)
	}
	a.Close()
	_, err := tryOpen(t, dir, nil)
	wantError(t, err, "root.key-uri: the key of")
	wantError(t, err, "--root-key")
}

// A mesh whose root's key is in a file gets one elsewhere with its next root, and
// the file goes.
func TestHeldRootKeyReplacesFile(t *testing.T) {
	dir, v := t.TempDir(), newVault()
	openTest(t, dir, nil).Close()
	a := openTest(t, dir, v.option)
	for _, step := range []func() error{a.PrepareRoot, a.SwitchRoot} {
		if got := keyFiles(t, dir); !strings.Contains(got, "root.key") {
			t.Fatalf("before the switch there are %q", got)
		}
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
	if got := keyFiles(t, dir); got != "intermediate.key root.key-uri" {
		t.Errorf("there are %q", got)
	}
	a.Close()
	// A crash between the two renames of the pair leaves the old key beside the new
	// root: the next start goes on.
	staging := stagingDir(filepath.Join(dir, "ca"), rootName)
	if err := os.Mkdir(staging, 0o700); err != nil {
		t.Fatal(err)
	}
	for _, ext := range []string{".crt", keyNameExt} {
		if err := os.Rename(filepath.Join(dir, "ca", rootName+ext), filepath.Join(staging, rootName+ext)); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.WriteFile(filepath.Join(dir, "ca", "root.key"), []byte("the old one"), 0o600); err != nil {
		t.Fatal(err)
	}
	a = openTest(t, dir, v.option)
	if got := keyFiles(t, dir); got != "intermediate.key root.key-uri" {
		t.Errorf("after a crash there are %q", got)
	}
	if got := under(t, a); got != string(RootSigns) {
		t.Errorf("after a crash a certificate chains to %q", got)
	}
}

// No key stays behind that nobody knows: neither one that was made just before a
// crash, nor one whose destruction failed.
func TestHeldRootKeyLeftovers(t *testing.T) {
	dir, v := t.TempDir(), newVault()
	a := openTest(t, dir, v.option)
	// A crash after the key was made, before the root was stored.
	if _, err := a.makeRoot(); err != nil {
		t.Fatal(err)
	}
	a.Close()
	if got := v.names(); got != "vault:1 vault:2" {
		t.Fatalf("the vault holds %q", got)
	}
	a = openTest(t, dir, v.option)
	if got := v.names(); got != "vault:1" {
		t.Errorf("after the next start the vault holds %q", got)
	}
	// The place is away just when a key is to be destroyed.
	if err := a.PrepareRoot(); err != nil {
		t.Fatal(err)
	}
	v.set(errors.New("away"), nil)
	if err := a.AbandonRoot(); err != nil {
		t.Fatal(err)
	}
	v.set(nil, nil)
	a.Close()
	openTest(t, dir, v.option).Close()
	if got := v.names(); got != "vault:1" {
		t.Errorf("after another start the vault holds %q", got)
	}
	// A key that the authority has not made is none of its business.
	if _, err := v.Make("operator's"); err != nil {
		t.Fatal(err)
	}
	openTest(t, dir, v.option).Close()
	if got := v.names(); got != "operator's vault:1" {
		t.Errorf("the vault holds %q", got)
	}
}

// While the root's key does not answer, certificates are issued below the
// intermediate, and nobody waits for more than a moment; what needs the key fails,
// changes nothing, and works again afterwards.
func TestRootKeyHangs(t *testing.T) {
	v, c := newVault(), newClock()
	dir := t.TempDir()
	a := openTest(t, dir, func(o *Options) { v.option(o); o.Now = c.now; o.IntermediateTTL = 8 * time.Hour })
	first := a.intermediate.cert
	c.advance(5 * time.Hour)
	hang := make(chan struct{})
	v.set(nil, hang)
	began := time.Now()
	for range 20 { // only the first waits
		issue(t, a, time.Hour)
	}
	if waited := time.Since(began); waited > 10*renewalPatience {
		t.Errorf("20 certificates took %s", waited)
	}
	if !a.intermediate.cert.Equal(first) {
		t.Error("another intermediate signs")
	}
	v.set(errors.New("the token does not answer"), nil)
	close(hang)
	a.renewals.Wait()
	began = time.Now()
	c.advance(2 * retryRenewal)
	v.set(nil, make(chan struct{})) // it hangs again
	for range 20 {
		issue(t, a, time.Hour)
	}
	if waited := time.Since(began); waited > 10*renewalPatience {
		t.Errorf("after a failure 20 certificates took %s", waited)
	}
	v.mu.Lock()
	hang = v.hang
	v.mu.Unlock()
	v.set(errors.New("the token does not answer"), nil)
	close(hang)
	a.renewals.Wait()
	if until, failed := a.Renewal(); failed == nil || !until.Equal(first.NotAfter) {
		t.Errorf("good until %s, failed: %v", until, failed)
	}
	// Near its end the intermediate is not enough, and the error says why.
	c.advance(2*time.Hour + 40*time.Minute)
	_, err := a.Issue(prepare(t, a, time.Hour))
	wantError(t, err, "the token does not answer")
	v.set(nil, nil)
	issue(t, a, time.Hour)
	if a.intermediate.cert.Equal(first) {
		t.Error("the intermediate was not renewed once the key was back")
	}
	if until, failed := a.Renewal(); failed != nil || !until.After(first.NotAfter) {
		t.Errorf("good until %s, failed: %v", until, failed)
	}
}

// A step of a rotation that the next root's key could not take has not happened:
// it can be taken again.
func TestSwitchRootWithoutKey(t *testing.T) {
	dir, v := t.TempDir(), newVault()
	a := openTest(t, dir, v.option)
	seen := map[Fingerprint]int{}
	if err := a.PrepareRoot(); err != nil {
		t.Fatal(err)
	}
	roles(a, seen)
	v.set(errors.New("away"), nil)
	wantError(t, a.SwitchRoot(), "away")
	if got := roles(a, seen); got != "signs:1 next:2" {
		t.Errorf("roots are %q", got)
	}
	if got := keyFiles(t, dir); got != "intermediate.key next-root.key-uri root.key-uri" {
		t.Errorf("there are %q", got)
	}
	v.set(nil, nil)
	if err := a.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	if got := roles(a, seen); got != "signs:2 former:1" {
		t.Errorf("roots are %q", got)
	}
}

// At the start a place that is away is no obstacle while the stored intermediate
// is valid. What another try would make worse, or another key, is one.
func TestOpenWithoutRootKey(t *testing.T) {
	dir, v := t.TempDir(), newVault()
	v.set(errors.New("away"), nil)
	_, err := tryOpen(t, dir, v.option)
	wantError(t, err, "away") // there is nothing to go on with
	v.set(nil, nil)
	openTest(t, dir, v.option).Close()

	v.set(errors.New("away"), nil)
	a := openTest(t, dir, v.option)
	if got := under(t, a); got != string(RootSigns) {
		t.Errorf("a certificate chains to %q", got)
	}
	a.Close()

	v.set(fmt.Errorf("the PIN is wrong: %w", ErrNoRetry), nil)
	if _, err := tryOpen(t, dir, v.option); !errors.Is(err, ErrNoRetry) {
		t.Errorf("with a wrong PIN: %v", err)
	}
	v.set(nil, nil)
	for name := range v.keys {
		if _, err := v.Make(name); err != nil { // in its place
			t.Fatal(err)
		}
	}
	_, err = tryOpen(t, dir, v.option)
	wantError(t, err, "does not verify with the certificate")
}

// Of two keys for one root, neither is taken.
func TestTwoRootKeys(t *testing.T) {
	dir, v := t.TempDir(), newVault()
	openTest(t, dir, v.option).Close()
	key, err := os.ReadFile(filepath.Join(dir, "ca", "intermediate.key"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(filepath.Join(dir, "ca", "root.key"), key, 0o600); err != nil {
		t.Fatal(err)
	}
	_, err = tryOpen(t, dir, v.option)
	wantError(t, err, "both exist")
}
