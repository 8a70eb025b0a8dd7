package svidfiles

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"io/fs"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

var id = spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/web")

// The key's file is its owner's, and nobody else's; the other files are public.
func TestKeyOwner(t *testing.T) {
	f := files(filepath.Join(t.TempDir(), "tls"))
	f.KeyMode, f.KeyOwner = 0o440, &Owner{UID: 33, GID: 4242}
	svid, bundle := newSVID(t, 1)
	if _, err := f.Write(svid, bundle); err != nil {
		t.Fatal(err)
	}
	for name, want := range map[string][3]uint32{"tls.key": {33, 4242, 0o440}, "tls.crt": {0, 0, 0o644}, "ca.crt": {0, 0, 0o644}} {
		info, err := os.Stat(filepath.Join(f.Dir, name))
		if err != nil {
			t.Fatal(err)
		}
		st := info.Sys().(*syscall.Stat_t)
		if got := [3]uint32{st.Uid, st.Gid, uint32(info.Mode().Perm())}; got != want {
			t.Errorf("%s: owner, group and mode %o, want %o", name, got, want)
		}
	}
}

// newSVID makes a certificate, which is its own root too.
func newSVID(t *testing.T, serial int64) (*x509svid.SVID, *x509bundle.Bundle) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(serial), URIs: []*url.URL{id.URL()}, NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &x509svid.SVID{ID: id, Certificates: []*x509.Certificate{cert}, PrivateKey: key}, x509bundle.FromX509Authorities(id.TrustDomain(), []*x509.Certificate{cert})
}

func files(dir string) *Files {
	return &Files{Dir: dir, Certificate: DefaultCertificate, Key: DefaultKey, Bundle: DefaultBundle, KeyMode: 0o600}
}

// left names what is in a directory.
func left(t *testing.T, dir string) string {
	t.Helper()
	entries, err := os.ReadDir(dir)
	if err != nil {
		t.Fatal(err)
	}
	var names []string
	for _, e := range entries {
		if name := e.Name(); strings.HasPrefix(name, "..svid-") {
			names = append(names, "VERSION")
		} else {
			names = append(names, name)
		}
	}
	return strings.Join(names, " ")
}

// The files are what TLS can load, change when the certificate does and only
// then, keep this version and the one before on disk, and have the modes that were asked for.
func TestWrite(t *testing.T) {
	dir := filepath.Join(t.TempDir(), "tls")
	f := files(dir)
	f.KeyMode = 0o640
	for serial := range int64(3) {
		svid, bundle := newSVID(t, serial+1)
		for again := range 2 {
			changed, err := f.Write(svid, bundle)
			if err != nil || changed != (again == 0) {
				t.Fatalf("write %d, %d: changed %v, %v", serial, again, changed, err)
			}
		}
		pair, err := tls.LoadX509KeyPair(filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key"))
		if err != nil || pair.Leaf.SerialNumber.Int64() != serial+1 {
			t.Fatalf("%v, %v", pair.Leaf, err)
		}
		if b, err := x509bundle.Load(id.TrustDomain(), filepath.Join(dir, "ca.crt")); err != nil || !b.HasX509Authority(svid.Certificates[0]) {
			t.Errorf("bundle: %v", err)
		}
		want := "..data VERSION VERSION ca.crt tls.crt tls.key"
		if serial == 0 {
			want = "..data VERSION ca.crt tls.crt tls.key"
		}
		if got := left(t, dir); got != want {
			t.Errorf("on disk: %s", got)
		}
	}
	for name, want := range map[string]fs.FileMode{"": fs.ModeDir | 0o700, "tls.key": 0o640, "tls.crt": 0o644, "ca.crt": 0o644} {
		if info, err := os.Stat(filepath.Join(dir, name)); err != nil || info.Mode() != want {
			t.Errorf("%q: %v, %v; want %v", name, info.Mode(), err, want)
		}
	}
	// Somebody took one away: all are there again.
	svid, bundle := newSVID(t, 9)
	if _, err := f.Write(svid, bundle); err != nil {
		t.Fatal(err)
	}
	if err := os.Remove(filepath.Join(dir, "ca.crt")); err != nil {
		t.Fatal(err)
	}
	if changed, err := f.Write(svid, bundle); err != nil || !changed {
		t.Errorf("with one file gone: changed %v, %v", changed, err)
	}
	if err := f.Remove(); err != nil || left(t, dir) != "" {
		t.Errorf("removed: %v, left %q", err, left(t, dir))
	}
	if err := f.Remove(); err != nil {
		t.Errorf("removed again: %v", err)
	}
}

// Defends programs that read in the middle of a change: certificate and key of
// one version always belong together.
func TestReadersNeverSeeHalf(t *testing.T) {
	dir := t.TempDir()
	f := files(dir)
	svid, bundle := newSVID(t, 1)
	if _, err := f.Write(svid, bundle); err != nil {
		t.Fatal(err)
	}
	stop := make(chan struct{})
	var wait sync.WaitGroup
	reads := 0
	wait.Go(func() {
		for {
			select {
			case <-stop:
				return
			default:
			}
			to, err := os.Readlink(filepath.Join(dir, current))
			if err != nil {
				t.Errorf("the link: %v", err)
				return
			}
			at := filepath.Join(dir, to)
			_, err = tls.LoadX509KeyPair(filepath.Join(at, "tls.crt"), filepath.Join(at, "tls.key"))
			if _, gone := os.Stat(at); err != nil && gone == nil {
				t.Errorf("half: %v", err)
				return
			}
			reads++
		}
	})
	for serial := range int64(50) {
		svid, bundle := newSVID(t, serial+2)
		if _, err := f.Write(svid, bundle); err != nil {
			t.Fatal(err)
		}
	}
	close(stop)
	wait.Wait()
	if reads == 0 {
		t.Error("nothing was read, so the test shows nothing")
	}
}

// Nobody else's file is replaced, and what makes no sense is refused before
// anything is written.
func TestCheck(t *testing.T) {
	for name, change := range map[string]func(*Files){
		"no directory":        func(f *Files) { f.Dir = "" },
		"no name":             func(f *Files) { f.Key = "" },
		"a path":              func(f *Files) { f.Certificate = "../tls.crt" },
		"a hidden name":       func(f *Files) { f.Bundle = "..data" },
		"one name twice":      func(f *Files) { f.Key = f.Certificate },
		"a key for all":       func(f *Files) { f.KeyMode = 0o644 },
		"a key for nobody":    func(f *Files) { f.KeyMode = 0 },
		"an executable key":   func(f *Files) { f.KeyMode = 0o700 },
		"somebody's own file": func(f *Files) { f.Certificate = "theirs.crt" },
		"somebody's own link": func(f *Files) { f.Key = "theirs.key" },
	} {
		t.Run(name, func(t *testing.T) {
			dir := t.TempDir()
			if err := os.WriteFile(filepath.Join(dir, "theirs.crt"), []byte("theirs"), 0o600); err != nil {
				t.Fatal(err)
			}
			if err := os.Symlink("theirs.crt", filepath.Join(dir, "theirs.key")); err != nil {
				t.Fatal(err)
			}
			f := files(dir)
			change(f)
			svid, bundle := newSVID(t, 1)
			if _, err := f.Write(svid, bundle); err == nil {
				t.Error("written")
			}
			if err := f.Remove(); err == nil {
				t.Error("removed")
			}
			if got, err := os.ReadFile(filepath.Join(dir, "theirs.key")); err != nil || string(got) != "theirs" || left(t, dir) != "theirs.crt theirs.key" {
				t.Errorf("%q, %v; %s", got, err, left(t, dir))
			}
		})
	}
}
