package svid

import (
	"context"
	"crypto/x509"
	"errors"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"testing/synctest"
	"time"

	"golang.org/x/sys/unix"
)

func files(t *testing.T, dir string) []string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var out []string
	for _, e := range entries {
		out = append(out, e.Name())
	}
	return out
}

// The agent restarts while the control plane is away: certificates, keys and
// bundle are there before and after the first Update, and are renewed at the
// instant they would have been.
func TestRestartFromCache(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "svid")
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{Dir: dir}, "web", "b=db", "a=db")
		synctest.Wait()
		web, db := n.must("web"), n.must("db")
		n.stop()

		is.set(func(i *issuer) { i.before = func(context.Context, string) error { return errors.New("away") } })
		time.Sleep(10 * time.Minute)
		again := prepare(t, is, Config{Dir: dir})
		if got := again.must("web"); got.Serial != web.Serial || !got.RenewAt.Equal(web.RenewAt) || !slices.Equal(got.Workloads, web.Workloads) {
			t.Errorf("from the cache: %+v, want %+v", got, web)
		}
		if b := again.Bundle(); len(b) != 1 || !b[0].Equal(is.root) {
			t.Error("the bundle did not survive")
		}
		again.run()
		again.Update(n.state)
		synctest.Wait()
		if got := again.must("db"); got.Serial != db.Serial || !slices.Equal(got.Workloads, []string{"default/a", "default/b"}) {
			t.Errorf("after Update: %+v, want %+v", got, db)
		}
		is.set(func(i *issuer) { i.before = nil })
		time.Sleep(21 * time.Minute)
		synctest.Wait()
		if again.must("web").Serial == web.Serial {
			t.Error("a certificate from the cache is not renewed")
		}
		again.stop()
	})
}

// Keys on disk are for root alone, and nothing is left of an identity that
// has left the node, nor of a write that was interrupted.
func TestCacheHygiene(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "svid")
		if err := os.Mkdir(dir, 0o755); err != nil {
			t.Fatal(err)
		}
		for _, name := range []string{".svid-123", "notes.txt"} {
			if err := os.WriteFile(filepath.Join(dir, name), []byte("x"), 0o600); err != nil {
				t.Fatal(err)
			}
		}
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{Dir: dir}, "web", "db")
		defer n.stop()
		synctest.Wait()
		info, err := os.Stat(dir)
		if err != nil || info.Mode().Perm() != 0o700 {
			t.Errorf("directory mode %v, %v; want 0700", info.Mode(), err)
		}
		want := []string{fileOf(sa("db")), fileOf(sa("web")), bundleFile, "notes.txt"}
		slices.Sort(want)
		if got := files(t, dir); !slices.Equal(got, want) {
			t.Errorf("files %v, want %v", got, want)
		}
		for _, name := range want {
			if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode().Perm() != 0o600 {
				t.Errorf("%s: mode %v, %v; want 0600", name, info.Mode(), err)
			}
		}
		n.state.Workloads = is.workloads("web")
		n.Update(n.state)
		synctest.Wait()
		if _, err := os.Stat(filepath.Join(dir, fileOf(sa("db")))); !errors.Is(err, os.ErrNotExist) {
			t.Errorf("the key of an identity that left is on disk (%v)", err)
		}
		if _, err := os.Stat(filepath.Join(dir, fileOf(sa("web")))); err != nil {
			t.Error(err)
		}
	})
}

// What the cache holds is checked like an issuer's answer. Each row spoils
// it; the entry is ignored with a log line, and a new one is asked for.
func TestSpoiledCache(t *testing.T) {
	for _, tc := range []struct {
		name  string
		spoil func(t *testing.T, dir, web, db string)
		after time.Duration
	}{
		{name: "cut short", spoil: func(t *testing.T, _, web, _ string) {
			if err := os.Truncate(web, 100); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "another identity's file", spoil: func(t *testing.T, _, web, db string) {
			if err := os.Rename(db, web); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "readable by others", spoil: func(t *testing.T, _, web, _ string) {
			if err := os.Chmod(web, 0o644); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "a link", spoil: func(t *testing.T, dir, web, _ string) {
			elsewhere := filepath.Join(filepath.Dir(dir), "elsewhere")
			if err := errors.Join(os.Rename(web, elsewhere), os.Symlink(elsewhere, web)); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "a fifo", spoil: func(t *testing.T, _, web, _ string) {
			if err := errors.Join(os.Remove(web), unix.Mkfifo(web, 0o600)); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "certificate and key apart", spoil: func(t *testing.T, _, web, db string) {
			a, err1 := os.ReadFile(web)
			b, err2 := os.ReadFile(db)
			if err := errors.Join(err1, err2); err != nil {
				t.Fatal(err)
			}
			key := func(s []byte) string {
				_, rest, _ := strings.Cut(string(s), `"key":"`)
				k, _, _ := strings.Cut(rest, `"`)
				return k
			}
			mixed := strings.Replace(string(a), key(a), key(b), 1)
			if err := os.WriteFile(web, []byte(mixed), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
		{name: "expired", after: 2 * time.Hour, spoil: func(*testing.T, string, string, string) {}},
		{name: "no bundle beside it", spoil: func(t *testing.T, dir, _, _ string) {
			if err := os.WriteFile(filepath.Join(dir, bundleFile), []byte("{}"), 0o600); err != nil {
				t.Fatal(err)
			}
		}},
	} {
		t.Run(tc.name, func(t *testing.T) {
			synctest.Test(t, func(t *testing.T) {
				dir := filepath.Join(t.TempDir(), "svid")
				is := newIssuer(t, time.Hour)
				n := start(t, is, Config{Dir: dir}, "web", "db")
				synctest.Wait()
				first := n.must("web")
				n.stop()
				tc.spoil(t, dir, filepath.Join(dir, fileOf(sa("web"))), filepath.Join(dir, fileOf(sa("db"))))
				time.Sleep(tc.after)

				again := prepare(t, is, Config{Dir: dir})
				if _, ok := again.Get(sa("web")); ok {
					t.Error("a spoiled cache entry is handed out")
				}
				if !strings.Contains(again.log.String(), "level=WARN") {
					t.Errorf("nothing was logged:\n%s", again.log)
				}
				again.run()
				defer again.stop()
				again.Update(n.state)
				synctest.Wait()
				if again.must("web").Serial == first.Serial {
					t.Error("the spoiled entry came back")
				}
			})
		})
	}
}

// A directory that others own is not used for keys; the agent works without.
func TestForeignDirectory(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "svid")
		if err := errors.Join(os.Mkdir(dir, 0o700), os.Chown(dir, 12345, 12345)); err != nil {
			t.Fatal(err)
		}
		n := start(t, newIssuer(t, time.Hour), Config{Dir: dir}, "web")
		defer n.stop()
		synctest.Wait()
		n.must("web")
		if got := files(t, dir); len(got) != 0 {
			t.Errorf("keys in a directory of another user: %v", got)
		}
		if !strings.Contains(n.log.String(), "belongs to uid 12345") {
			t.Errorf("log does not say why:\n%s", n.log)
		}
	})
}

// A certificate from the cache that no longer chains to the bundle is
// replaced at once.
func TestCacheOfRetiredRoot(t *testing.T) {
	synctest.Test(t, func(t *testing.T) {
		dir := filepath.Join(t.TempDir(), "svid")
		is := newIssuer(t, time.Hour)
		n := start(t, is, Config{Dir: dir}, "web")
		synctest.Wait()
		first := n.must("web")
		n.stop()
		next := newAuthority(t, time.Now())
		is.set(func(i *issuer) { i.authority = next })
		n.state.Bundle = []*x509.Certificate{next.root}
		again := prepare(t, is, Config{Dir: dir})
		again.run()
		defer again.stop()
		again.Update(n.state)
		synctest.Wait()
		if again.must("web").Serial == first.Serial {
			t.Error("kept a certificate under a root that is no longer trusted")
		}
	})
}
