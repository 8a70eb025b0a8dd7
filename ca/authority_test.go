package ca

import (
	"bytes"
	"crypto/rand"
	"crypto/rsa"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"math/big"
	"net/url"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// A new directory gets a root and an intermediate of the documented shape,
// with keys that only the owner can read; opening it again changes nothing.
func TestOpenMakesAndKeeps(t *testing.T) {
	dir := t.TempDir()
	a := openTest(t, dir, nil)
	root := a.Bundle()[0]
	if root.Subject.CommonName != "signet root" || len(root.URIs) != 1 || root.URIs[0].String() != "spiffe://mesh.example" {
		t.Errorf("root is %s with URIs %v", root.Subject, root.URIs)
	}
	inter := a.intermediate.cert
	if !inter.IsCA || !inter.MaxPathLenZero || inter.MaxPathLen != 0 || len(inter.URIs) != 1 || inter.URIs[0].String() != "spiffe://mesh.example" {
		t.Errorf("intermediate: CA %t, path length %d, URIs %v", inter.IsCA, inter.MaxPathLen, inter.URIs)
	}
	for _, c := range []*x509.Certificate{root, inter} {
		if want := x509.KeyUsageCertSign | x509.KeyUsageCRLSign; c.KeyUsage != want {
			t.Errorf("%s: key usage %#x; want %#x", c.Subject, c.KeyUsage, want)
		}
	}
	for name, want := range map[string]os.FileMode{"": 0o700, "root.key": 0o600, "intermediate.key": 0o600} {
		info, err := os.Stat(filepath.Join(dir, "ca", name))
		if err != nil {
			t.Fatal(err)
		}
		if got := info.Mode().Perm(); got != want {
			t.Errorf("%q has mode %04o; want %04o", name, got, want)
		}
	}
	key, err := os.ReadFile(filepath.Join(dir, "ca", "root.key"))
	if err != nil {
		t.Fatal(err)
	}
	if block, _ := pem.Decode(key); block == nil || block.Type != "PRIVATE KEY" {
		t.Error("root.key is not PKCS#8 in PEM")
	}
	if err := a.Close(); err != nil {
		t.Fatal(err)
	}
	b := openTest(t, dir, nil)
	if !b.Bundle()[0].Equal(root) || !b.intermediate.cert.Equal(inter) {
		t.Error("opening again replaced the root or the intermediate")
	}
	if left, _ := filepath.Glob(filepath.Join(dir, "ca", ".*")); len(left) != 0 {
		t.Errorf("left behind: %v", left)
	}
}

// Open refuses what an operator has to mend, and says how.
func TestOpenRefuses(t *testing.T) {
	at := func(name string) func(string) string {
		return func(dir string) string { return filepath.Join(dir, "ca", name) }
	}
	rootCrt, rootKey, interKey := at("root.crt"), at("root.key"), at("intermediate.key")
	for _, tt := range []struct {
		name string
		harm func(t *testing.T, dir string) error
		opts func(*Options)
		want string
	}{
		{"root key readable by group", func(t *testing.T, dir string) error { return os.Chmod(rootKey(dir), 0o640) }, nil, "chmod 600"},
		{"intermediate key readable by others", func(t *testing.T, dir string) error { return os.Chmod(interKey(dir), 0o604) }, nil, "chmod 600"},
		{"directory open to others", func(t *testing.T, dir string) error { return os.Chmod(at("")(dir), 0o755) }, nil, "chmod 700"},
		{"other trust domain", nil, func(o *Options) { o.TrustDomain = spiffeid.RequireTrustDomainFromString("other.example") }, `belongs to trust domain "mesh.example", not "other.example"`},
		{"root key lost", func(t *testing.T, dir string) error { return os.Remove(rootKey(dir)) }, nil, "put the key beside"},
		{"root certificate lost", func(t *testing.T, dir string) error { return os.Remove(rootCrt(dir)) }, nil, "put the certificate beside"},
		{"whole root lost", func(t *testing.T, dir string) error {
			os.Remove(rootCrt(dir))
			return os.Remove(rootKey(dir))
		}, nil, "restore them"},
		{"key of another certificate", func(t *testing.T, dir string) error {
			data, err := os.ReadFile(interKey(dir))
			if err != nil {
				return err
			}
			return os.WriteFile(rootKey(dir), data, 0o600)
		}, nil, "is not the key of"},
		{"garbage in the key", func(t *testing.T, dir string) error { return os.WriteFile(rootKey(dir), []byte("x"), 0o600) }, nil, "no private key in PEM"},
		{"root expired", nil, func(o *Options) { o.Now = func() time.Time { return time.Now().AddDate(11, 0, 0) } }, "expired"},
		{"clock before the root", nil, func(o *Options) { o.Now = func() time.Time { return time.Now().AddDate(-1, 0, 0) } }, "check the clock"},
		{"no directory named", nil, func(o *Options) { o.Dir = "" }, "Dir is empty"},
		{"no trust domain", nil, func(o *Options) { o.TrustDomain = spiffeid.TrustDomain{} }, "TrustDomain is empty"},
		{"intermediate longer than root", nil, func(o *Options) { o.RootTTL = time.Hour }, "IntermediateTTL"},
		{"leaf too long", nil, func(o *Options) { o.Profile.TTL = 48 * time.Hour }, "Profile.TTL"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			if err := openTest(t, dir, nil).Close(); err != nil {
				t.Fatal(err)
			}
			if tt.harm != nil {
				if err := tt.harm(t, dir); err != nil {
					t.Fatal(err)
				}
			}
			_, err := tryOpen(t, dir, tt.opts)
			wantError(t, err, tt.want)
		})
	}
}

// Two authorities on one directory would mix their logs and keys.
func TestOpenTwice(t *testing.T) {
	dir := t.TempDir()
	openTest(t, dir, nil)
	_, err := tryOpen(t, dir, nil)
	wantError(t, err, "another authority uses this directory")
}

// placeRoot writes an operator's own RSA root, made from tmpl.
func placeRoot(t *testing.T, dir string, edit func(*x509.Certificate), keyType string) *x509.Certificate {
	t.Helper()
	key, err := rsa.GenerateKey(rand.Reader, 2048)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(7), Subject: pkix.Name{Organization: []string{"mesh.example"}},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().AddDate(100, 0, 0),
		BasicConstraintsValid: true, IsCA: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if edit != nil {
		edit(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER := x509.MarshalPKCS1PrivateKey(key)
	if keyType == "PRIVATE KEY" {
		if keyDER, err = x509.MarshalPKCS8PrivateKey(key); err != nil {
			t.Fatal(err)
		}
	}
	if err := os.Mkdir(filepath.Join(dir, "ca"), 0o700); err != nil {
		t.Fatal(err)
	}
	cert := parse(t, der)
	for name, data := range map[string][]byte{
		"root.crt": encodeCerts(cert),
		"root.key": pem.EncodeToMemory(&pem.Block{Type: keyType, Bytes: keyDER}),
	} {
		if err := os.WriteFile(filepath.Join(dir, "ca", name), data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert
}

// An operator's own RSA root, without a SPIFFE ID, is used as it is.
func TestOperatorsRoot(t *testing.T) {
	for _, keyType := range []string{"PRIVATE KEY", "RSA PRIVATE KEY"} {
		t.Run(keyType, func(t *testing.T) {
			dir := t.TempDir()
			root := placeRoot(t, dir, nil, keyType)
			a := openTest(t, dir, nil)
			if !a.Bundle()[0].Equal(root) {
				t.Error("the operator's root is not the bundle")
			}
			if due, ok := a.RootDue(); ok {
				t.Errorf("the operator's root is to be replaced by itself at %s", due)
			}
			issued := issue(t, a, 0)
			if _, _, err := x509svid.ParseAndVerify(issued.Chain, a); err != nil {
				t.Error(err)
			}
		})
	}
}

// A root that cannot carry the mesh is refused at the start, not at the first
// handshake.
func TestOperatorsRootRefused(t *testing.T) {
	for _, tt := range []struct {
		name string
		edit func(*x509.Certificate)
		want string
	}{
		{"no CA", func(c *x509.Certificate) { c.IsCA = false }, "not a CA"},
		{"may not sign", func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, "keyCertSign"},
		{"no room for an intermediate", func(c *x509.Certificate) { c.MaxPathLenZero = true }, "path length is 0"},
		{"other trust domain", func(c *x509.Certificate) {
			c.URIs = append(c.URIs, spiffeid.RequireFromString("spiffe://other.example").URL())
		}, "other.example"},
		{"a path", func(c *x509.Certificate) {
			c.URIs = []*url.URL{spiffeid.RequireFromString("spiffe://mesh.example/root").URL()}
		}, "has a path"},
		{"name constraints without the mesh", func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"other.example"}, true
		}, "does not verify under the root"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			dir := t.TempDir()
			placeRoot(t, dir, tt.edit, "PRIVATE KEY")
			_, err := tryOpen(t, dir, nil)
			wantError(t, err, tt.want)
		})
	}
}

// A crash between the two renames of a pair is finished at the next start, and
// leftovers of an uncommitted write go away.
func TestPairSurvivesCrash(t *testing.T) {
	for _, moved := range []string{"", "intermediate.key"} {
		t.Run("moved "+moved, func(t *testing.T) {
			dir := t.TempDir()
			a := openTest(t, dir, nil)
			next, err := newIntermediate(testDomain, a.roots.signs, time.Now(), time.Hour)
			if err != nil {
				t.Fatal(err)
			}
			a.Close()
			cadir := filepath.Join(dir, "ca")
			staging := stagingDir(cadir, intermediateName)
			for _, d := range []string{staging, filepath.Join(cadir, ".tmp-1")} {
				if err := os.Mkdir(d, 0o700); err != nil {
					t.Fatal(err)
				}
			}
			key, err := encodeKey(next.key)
			if err != nil {
				t.Fatal(err)
			}
			for name, data := range map[string][]byte{"intermediate.crt": encodeCerts(next.cert), "intermediate.key": key} {
				d := staging
				if name == moved {
					d = cadir
				}
				if err := os.WriteFile(filepath.Join(d, name), data, 0o600); err != nil {
					t.Fatal(err)
				}
			}
			b := openTest(t, dir, nil)
			if !b.intermediate.cert.Equal(next.cert) {
				t.Error("the committed intermediate was not taken over")
			}
			if left, _ := filepath.Glob(filepath.Join(cadir, ".*")); len(left) != 0 {
				t.Errorf("left behind: %v", left)
			}
		})
	}
}

// Published roots are in the bundle at once, wake those who wait, and are
// there after a restart.
func TestPublishRoots(t *testing.T) {
	dir := t.TempDir()
	a := openTest(t, dir, nil)
	next, err := newRoot(testDomain, time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	_, changed := a.BundleUpdates()
	if err := a.PublishRoots([]*x509.Certificate{next.cert, a.roots.signs.cert}); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("the channel was not closed")
	}
	foreign, err := newRoot(spiffeid.RequireTrustDomainFromString("other.example"), time.Now(), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	wantError(t, a.PublishRoots([]*x509.Certificate{foreign.cert}), "other.example")
	a.Close()
	b := openTest(t, dir, nil)
	if got := b.Bundle(); len(got) != 2 || !got[1].Equal(next.cert) {
		t.Errorf("%d roots after a restart; want 2", len(got))
	}
	if err := b.PublishRoots(nil); err != nil {
		t.Fatal(err)
	}
	if got := b.Bundle(); len(got) != 1 {
		t.Errorf("%d roots after withdrawal; want 1", len(got))
	}
}

// The control plane's own certificate renews itself past half its life, with
// a new key, and is used meanwhile.
func TestServerCertificate(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	s, err := a.ServerCertificate(ControlID(testDomain), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	get := func() *tls.Certificate {
		cert, err := s.GetCertificate(nil)
		if err != nil {
			t.Fatal(err)
		}
		return cert
	}
	first := get()
	c.advance(29 * time.Minute)
	if get() != first {
		t.Error("renewed before half its life")
	}
	c.advance(2 * time.Minute)
	second := get()
	if second == first || bytes.Equal(second.Leaf.RawSubjectPublicKeyInfo, first.Leaf.RawSubjectPublicKeyInfo) {
		t.Error("not renewed with a new key past half its life")
	}
	// The authority is gone: the certificate serves until it expires.
	a.Close()
	c.advance(31 * time.Minute)
	if get() != second {
		t.Error("a failed renewal dropped a valid certificate")
	}
	c.advance(time.Hour)
	if _, err := s.GetCertificate(nil); err == nil {
		t.Error("an expired certificate was served")
	}
}
