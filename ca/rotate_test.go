package ca

import (
	"bytes"
	"crypto/x509"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// roles prints the roots' roles, each with the number of its root in seen.
func roles(a *Authority, seen map[Fingerprint]int) string {
	var out []string
	for _, r := range a.Roots() {
		f := FingerprintOf(r.Certificate)
		if seen[f] == 0 {
			seen[f] = len(seen) + 1
		}
		out = append(out, fmt.Sprintf("%s:%d", r.Role, seen[f]))
	}
	return strings.Join(out, " ")
}

// under reports which root of the bundle a fresh certificate chains to.
func under(t *testing.T, a *Authority) string {
	t.Helper()
	issued := issue(t, a, time.Minute)
	for _, r := range a.Roots() {
		if _, _, err := x509svid.Verify([]*x509.Certificate{parse(t, issued.Chain[0]), parse(t, issued.Chain[1])}, a.bundleOf(r.Certificate), x509svid.WithTime(a.now())); err == nil {
			return string(r.Role)
		}
	}
	return "none"
}

// Each step of a rotation is in the bundle, wakes who waits, and is there after a
// restart; what is issued always chains to the root that signs.
func TestRotateRoot(t *testing.T) {
	dir := t.TempDir()
	a := openTest(t, dir, nil)
	seen := map[Fingerprint]int{}
	check := func(want string) {
		t.Helper()
		for range 2 { // and after a restart
			if got := roles(a, seen); got != want {
				t.Fatalf("roots are %q, want %q", got, want)
			}
			if len(a.Bundle()) != len(a.Roots()) {
				t.Errorf("a bundle of %d for %d roots", len(a.Bundle()), len(a.Roots()))
			}
			if got := under(t, a); got != string(RootSigns) {
				t.Errorf("at %s a certificate chains to the root that is %q", want, got)
			}
			a.Close()
			a = openTest(t, dir, nil)
		}
	}
	step := func(f func() error) {
		t.Helper()
		_, changed := a.BundleUpdates()
		if err := f(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-changed:
		default:
			t.Error("who follows the bundle was not told")
		}
	}
	check("signs:1")
	if due, ok := a.RootDue(); !ok || time.Until(due) < DefaultRootTTL/2 || time.Until(due) > DefaultRootTTL*3/4 {
		t.Errorf("due at %s, %v", due, ok)
	}
	wantError(t, a.SwitchRoot(), "no next root")
	step(a.PrepareRoot)
	check("signs:1 next:2")
	if err := a.PrepareRoot(); err != nil { // again
		t.Error(err)
	}
	step(a.AbandonRoot)
	check("signs:1")
	step(a.PrepareRoot)
	check("signs:1 next:3")
	former, err := os.ReadFile(filepath.Join(dir, "ca", "root.key"))
	if err != nil {
		t.Fatal(err)
	}
	step(a.SwitchRoot)
	check("signs:3 former:1")
	wantError(t, a.PrepareRoot(), "still published")
	files, err := filepath.Glob(filepath.Join(dir, "ca", "*.key"))
	if err != nil {
		t.Fatal(err)
	}
	for _, f := range files {
		if b, err := os.ReadFile(f); err != nil || bytes.Equal(b, former) || strings.Contains(f, "next") {
			t.Errorf("%s holds a key that must be gone (%v)", f, err)
		}
	}
	step(a.RetireRoots)
	check("signs:3")
}

// What is distrusted is known after a restart, also once it is withdrawn; a root
// that was to be the next is distrusted too, and another made.
func TestDistrustRoot(t *testing.T) {
	dir := t.TempDir()
	a := openTest(t, dir, nil)
	seen := map[Fingerprint]int{}
	check := func(want, distrusted string) {
		t.Helper()
		for range 2 {
			var got []string
			text := roles(a, seen)
			for _, f := range a.Distrusted() {
				got = append(got, fmt.Sprint(seen[f]))
			}
			if text != want || strings.Join(got, " ") != distrusted {
				t.Fatalf("roots are %q, distrusted are %q; want %q and %q", text, got, want, distrusted)
			}
			a.Close()
			a = openTest(t, dir, nil)
		}
	}
	if err := a.PrepareRoot(); err != nil {
		t.Fatal(err)
	}
	check("signs:1 next:2", "")
	for range 2 { // the second time there is nothing to do
		_, changed := a.BundleUpdates()
		if err := a.DistrustRoot(); err != nil {
			t.Fatal(err)
		}
		select {
		case <-changed:
		default:
			if len(a.Distrusted()) == 0 {
				t.Error("who follows the bundle was not told")
			}
		}
		check("signs:1 next:3", "1 2")
	}
	if err := a.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	check("signs:3 former:1", "1 2")
	if err := a.RetireRoots(); err != nil {
		t.Fatal(err)
	}
	check("signs:3", "1 2")
	if err := a.DistrustRoot(); err != nil { // another time
		t.Fatal(err)
	}
	check("signs:3 next:4", "1 2 3")
}

// A crash in the middle of a switch leaves a rotation that can go on: whatever
// was written last, the old root is published and exactly one root signs.
func TestSwitchRootCrash(t *testing.T) {
	for name, test := range map[string]struct {
		files []string // of those after the switch, what had been written
		want  string
	}{
		"nothing":          {nil, "signs:1 next:2"},
		"the further root": {[]string{"further-roots.crt"}, "signs:1 next:2"},
		"the new root":     {[]string{"further-roots.crt", "root.key", "root.crt"}, "signs:2 former:1"},
		"the intermediate": {[]string{"further-roots.crt", "root.key", "root.crt", "intermediate.key", "intermediate.crt"}, "signs:2 former:1"},
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			a := openTest(t, dir, nil)
			seen := map[Fingerprint]int{}
			if err := a.PrepareRoot(); err != nil {
				t.Fatal(err)
			}
			roles(a, seen)
			a.Close()
			before := filepath.Join(t.TempDir(), "ca")
			if err := os.CopyFS(before, os.DirFS(filepath.Join(dir, "ca"))); err != nil {
				t.Fatal(err)
			}
			a = openTest(t, dir, nil)
			if err := a.SwitchRoot(); err != nil {
				t.Fatal(err)
			}
			a.Close()
			for _, f := range test.files {
				b, err := os.ReadFile(filepath.Join(dir, "ca", f))
				if err != nil {
					t.Fatal(err)
				}
				if err := os.WriteFile(filepath.Join(before, f), b, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			all, err := filepath.Glob(filepath.Join(before, "*"))
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range all {
				if err := os.Chmod(f, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			if err := os.Chmod(before, 0o700); err != nil {
				t.Fatal(err)
			}
			a = openTest(t, filepath.Dir(before), nil)
			if got := roles(a, seen); got != test.want {
				t.Errorf("roots are %q, want %q", got, test.want)
			}
			if got := under(t, a); got != string(RootSigns) {
				t.Errorf("a certificate chains to the root that is %q", got)
			}
			if err := a.SwitchRoot(); (err == nil) != strings.Contains(test.want, "next") {
				t.Errorf("going on: %v", err)
			}
			if err := a.RetireRoots(); err != nil || roles(a, seen) != "signs:2" {
				t.Errorf("at the end: %v, %s", err, roles(a, seen))
			}
		})
	}
}

// Issuing goes on while roots are switched, and nothing chains to a root that
// is not published.
func TestRotateRootUnderLoad(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	server, err := a.ServerCertificate(ControlID(testDomain), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wait sync.WaitGroup
	for range 3 {
		wait.Go(func() {
			for {
				select {
				case <-stop:
					return
				default:
				}
				issue(t, a, time.Minute) // verifies what it signs
			}
		})
	}
	for range 20 {
		for _, step := range []func() error{a.PrepareRoot, a.SwitchRoot, a.RetireRoots} {
			if err := step(); err != nil {
				t.Fatal(err)
			}
		}
		own, err := server.Get()
		if err != nil {
			t.Fatal(err)
		}
		if _, _, err := x509svid.ParseAndVerify(own.Certificate, a); err != nil {
			t.Fatalf("the control plane's own certificate after a retirement: %v", err)
		}
	}
	close(stop)
	wait.Wait()
}
