package ca

import (
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// An issued certificate is what was asked for, verifies with go-spiffe, and is
// in the log under its serial.
func TestIssue(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	issued := issue(t, a, 0)
	leaf := parse(t, issued.Chain[0])
	if id, _, err := x509svid.ParseAndVerify(issued.Chain, a); err != nil || id != corpusID {
		t.Errorf("verified as %q, %v; want %q", id, err, corpusID)
	}
	if len(issued.Chain) != 2 || !parse(t, issued.Chain[1]).Equal(a.intermediate.cert) {
		t.Error("the chain is not leaf and intermediate")
	}
	if got, want := leaf.NotAfter, c.now().Add(time.Hour); !got.Equal(want) || !issued.NotAfter.Equal(want) {
		t.Errorf("NotAfter %s; want %s", got, want)
	}
	if got, want := leaf.NotBefore, c.now().Add(-10*time.Second); !got.Equal(want) {
		t.Errorf("NotBefore %s; want %s", got, want)
	}
	if want := fmt.Sprintf("%x", leaf.SerialNumber.Bytes()); issued.Serial != want {
		t.Errorf("serial %s; want %s", issued.Serial, want)
	}
	e, ok, err := a.IssuanceLog().Find(issued.Serial)
	if err != nil || !ok {
		t.Fatalf("serial not in the log: %t, %v", ok, err)
	}
	if e.Outcome != OutcomeIssued || e.ID != corpusID.String() || e.Node != "one" || e.Workload != "shop/web-1" || e.CertSHA256 == "" || e.KeySHA256 == "" {
		t.Errorf("entry is %+v", e)
	}
}

// A prepared request yields at most one certificate, however many try at once.
func TestIssueOnce(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	p := prepare(t, a, 0)
	var won atomic.Int32
	var wg sync.WaitGroup
	for range 32 {
		wg.Go(func() {
			if _, err := a.Issue(p); err == nil {
				won.Add(1)
			} else if !errors.Is(err, ErrUsed) {
				t.Error(err)
			}
		})
	}
	wg.Wait()
	if won.Load() != 1 {
		t.Errorf("issued %d times", won.Load())
	}
	if entries, _ := a.IssuanceLog().Entries(time.Time{}); len(entries) != 1 {
		t.Errorf("%d entries; want 1", len(entries))
	}
}

// A request is issued soon after it was checked, and only by the authority
// that checked it.
func TestIssueRefusesStaleAndForeign(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	b := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	if _, err := b.Issue(prepare(t, a, 0)); err == nil {
		t.Error("issued what another authority prepared")
	}
	if _, err := a.Issue(nil); err == nil {
		t.Error("issued nothing")
	}
	p := prepare(t, a, 0)
	c.advance(2 * time.Minute)
	_, err := a.Issue(p)
	wantError(t, err, "prepare it again")
}

// Certificates for IDs that are none of the authority's business die in
// Prepare.
func TestPrepareRefusesIDsAndTTLs(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	csr := newCSR(t)
	for _, id := range []string{
		"spiffe://mesh.example", "spiffe://other.example/ns/shop/sa/web", "spiffe://mesh.example/ns/shop",
		"spiffe://mesh.example/ns/shop/sa/web/x", "spiffe://mesh.example/ns/shop/pod/web", "spiffe://mesh.example/x/shop/sa/web",
		"spiffe://mesh.example/signet", "spiffe://mesh.example/signet/control/x", "spiffe://mesh.example/signet/node",
		"spiffe://mesh.example/signet/node/a/b", "spiffe://mesh.example/signet/other", "spiffe://mesh.example/host/a",
	} {
		if _, err := a.Prepare(Request{ID: spiffeid.RequireFromString(id), CSR: csr}); err == nil {
			t.Errorf("%s passed", id)
		}
	}
	if _, err := a.Prepare(Request{CSR: csr}); err == nil {
		t.Error("a zero ID passed")
	}
	for _, id := range []string{"spiffe://mesh.example/ns/a/sa/b", "spiffe://mesh.example/signet/node/a", "spiffe://mesh.example/signet/control"} {
		if _, err := a.Prepare(Request{ID: spiffeid.RequireFromString(id), CSR: csr}); err != nil {
			t.Error(err)
		}
	}
	for _, ttl := range []time.Duration{-1, 1, time.Second - 1, MaxTTL + 1} {
		if _, err := a.Prepare(Request{ID: corpusID, CSR: csr, TTL: ttl}); err == nil {
			t.Errorf("ttl %s passed", ttl)
		}
	}
}

// The intermediate is replaced past half its life; leaves never outlive it;
// certificates of the former one stay valid.
func TestIntermediateRenewal(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	edit := func(o *Options) { o.Now, o.IntermediateTTL = c.now, 10*time.Hour }
	a := openTest(t, dir, edit)
	first := a.intermediate.cert
	old := issue(t, a, 6*time.Hour)
	c.advance(4 * time.Hour)
	if issue(t, a, time.Hour); !a.intermediate.cert.Equal(first) {
		t.Error("renewed before half its life")
	}
	// 4.5 h in, 5.5 h left: more than half of 10 h, but less than half of 12.
	c.advance(30 * time.Minute)
	if got := issue(t, a, 8*time.Hour); !a.intermediate.cert.Equal(first) || !got.NotAfter.Equal(first.NotAfter) {
		t.Errorf("NotAfter %s is not clamped to the intermediate's %s", got.NotAfter, first.NotAfter)
	}
	issue(t, a, 12*time.Hour)
	second := a.intermediate.cert
	if second.Equal(first) {
		t.Error("a lifetime cut by more than half did not force a renewal")
	}
	c.advance(30 * time.Minute)
	if _, _, err := x509svid.ParseAndVerify(old.Chain, a, x509svid.WithTime(c.now())); err != nil {
		t.Errorf("a certificate of the former intermediate: %v", err)
	}
	c.advance(5 * time.Hour)
	if issue(t, a, time.Hour); a.intermediate.cert.Equal(second) {
		t.Error("not renewed past half its life")
	}
	third := a.intermediate.cert
	a.Close()
	if b := openTest(t, dir, edit); !b.intermediate.cert.Equal(third) {
		t.Error("the renewed intermediate was not stored")
	}
}

// Near its end the root clamps everything, and past it nothing is issued. The
// intermediate is not replaced at every call meanwhile.
func TestEndOfRoot(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now, o.RootTTL, o.IntermediateTTL = c.now, 10*time.Hour, 4*time.Hour })
	end := a.roots.signs.cert.NotAfter
	c.advance(9*time.Hour + 30*time.Minute)
	if got := issue(t, a, 12*time.Hour); !got.NotAfter.Equal(end) {
		t.Errorf("NotAfter %s; want the root's %s", got.NotAfter, end)
	}
	inter := a.intermediate.cert
	issue(t, a, time.Hour)
	if !a.intermediate.cert.Equal(inter) {
		t.Error("the intermediate was replaced by one that ends no later")
	}
	c.advance(31 * time.Minute)
	_, err := a.Issue(prepare(t, a, time.Hour))
	wantError(t, err, "replace the root")
}

// watchedKey is a signer that tells when it is used.
type watchedKey struct {
	crypto.Signer
	onSign func()
}

func (k watchedKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	k.onSign()
	return k.Signer.Sign(r, digest, opts)
}

// The intent is in the log when the key is used, and when the log cannot be
// written the key is not used at all, then and afterwards.
func TestRecordedBeforeSigned(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	signed := 0
	a.intermediate = &pair{cert: a.intermediate.cert, key: watchedKey{a.intermediate.key, func() {
		signed++
		entries, err := ReadLog(a.dir).Entries(time.Time{})
		if err != nil || len(entries) != 1 || entries[0].Outcome != OutcomeUnknown {
			t.Errorf("while signing the log holds %+v, %v", entries, err)
		}
	}}}
	issue(t, a, 0)
	if signed != 1 {
		t.Fatalf("signed %d times", signed)
	}
	good := a.issuance.f
	readOnly, err := os.Open(filepath.Join(a.dir, logFile))
	if err != nil {
		t.Fatal(err)
	}
	defer readOnly.Close()
	a.issuance.f = readOnly
	for range 2 {
		_, err = a.Issue(prepare(t, a, 0))
		wantError(t, err, "record the intent")
		a.issuance.f = good // an error is for good: what was written is not known
	}
	if signed != 1 {
		t.Error("signed without a record")
	}
}

// A record that the disk did not confirm is no record: when syncing fails, the
// key is not used. A pipe takes writes and refuses to be synced.
func TestUnsyncedIsNotSigned(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	a.intermediate = &pair{cert: a.intermediate.cert, key: watchedKey{a.intermediate.key, func() { t.Error("signed before the record was durable") }}}
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer pipe.Close()
	good := a.issuance.f
	a.issuance.f = pipe
	for range 2 {
		_, err = a.Issue(prepare(t, a, 0))
		wantError(t, err, "record the intent")
		a.issuance.f = good // an error is for good: what the kernel dropped is not known
	}
}

// A clock that is set back while the authority serves does not stop it, as
// long as its certificates are valid then.
func TestClockSetBack(t *testing.T) {
	c := newClock()
	dir := t.TempDir()
	edit := func(o *Options) { o.Now = c.now }
	openTest(t, dir, edit).Close()
	c.advance(2 * time.Hour)
	a := openTest(t, dir, edit)
	c.advance(-time.Hour)
	issue(t, a, 0)
}

// A torn last line is cut off; what was written before it stays, and the log
// goes on behind it.
func TestLogTornLine(t *testing.T) {
	dir := t.TempDir()
	a := openTest(t, dir, nil)
	first := issue(t, a, 0)
	a.Close()
	path := filepath.Join(dir, "ca", logFile)
	whole, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	for _, tail := range []string{`{"event":"intent","serial":"ab`, strings.Repeat("\x00", 9000)} {
		if err := os.WriteFile(path, append(append([]byte{}, whole...), tail...), 0o600); err != nil {
			t.Fatal(err)
		}
		if got, err := ReadLog(filepath.Join(dir, "ca")).Entries(time.Time{}); err != nil || len(got) != 1 {
			t.Errorf("before the repair: %d entries, %v", len(got), err)
		}
		b := openTest(t, dir, nil)
		second := issue(t, b, 0)
		got, err := b.IssuanceLog().Entries(time.Time{})
		if err != nil || len(got) != 2 || got[0].Serial != first.Serial || got[1].Serial != second.Serial {
			t.Errorf("after the repair: %+v, %v", got, err)
		}
		b.Close()
	}
	// Damage in the middle is not passed over in silence.
	if err := os.WriteFile(path, append([]byte("garbage\n"), whole...), 0o600); err != nil {
		t.Fatal(err)
	}
	got, err := ReadLog(filepath.Join(dir, "ca")).Entries(time.Time{})
	if !errors.Is(err, ErrDamaged) || len(got) != 1 {
		t.Errorf("%d entries, %v; want 1 and ErrDamaged", len(got), err)
	}
}

// A crash between intent and outcome leaves an entry whose outcome is unknown.
func TestLogUnknownOutcome(t *testing.T) {
	dir := t.TempDir()
	a := openTest(t, dir, nil)
	at := time.Now()
	if err := a.issuance.intent(line{Time: at, Serial: "abc", ID: corpusID.String()}); err != nil {
		t.Fatal(err)
	}
	e, ok, err := a.IssuanceLog().Find("abc")
	if err != nil || !ok || e.Outcome != OutcomeUnknown {
		t.Errorf("%+v, %t, %v", e, ok, err)
	}
	if got, _ := a.IssuanceLog().Entries(at.Add(time.Second)); len(got) != 0 {
		t.Errorf("%d entries since a later instant", len(got))
	}
}

// Many at once: every certificate has its own serial and its own entry.
func TestIssueParallel(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	const n = 100
	var serials sync.Map
	var wg sync.WaitGroup
	for range n {
		p := prepare(t, a, 0)
		wg.Go(func() {
			issued, err := a.Issue(p)
			if err != nil {
				t.Error(err)
				return
			}
			if _, dup := serials.LoadOrStore(issued.Serial, true); dup {
				t.Errorf("serial %s twice", issued.Serial)
			}
		})
	}
	wg.Wait()
	entries, err := a.IssuanceLog().Entries(time.Time{})
	if err != nil || len(entries) != n {
		t.Errorf("%d entries, %v; want %d", len(entries), err, n)
	}
	for _, e := range entries {
		if e.Outcome != OutcomeIssued {
			t.Errorf("%s: %s", e.Serial, e.Outcome)
		}
	}
}

// A serial number is found however a tool writes it; one whose first digit is
// zero keeps that digit, as in the proxies' logs.
func TestSerialForms(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	p := prepare(t, a, 0)
	p.tmpl.SerialNumber, p.trial = big.NewInt(0x0abc), nil
	issued, err := a.Issue(p)
	if err != nil {
		t.Fatal(err)
	}
	if issued.Serial != "0abc" {
		t.Errorf("serial %q; want 0abc", issued.Serial)
	}
	for _, form := range []string{"0abc", "abc", "ABC", "0A:BC", "000abc"} {
		if _, ok, err := a.IssuanceLog().Find(form); !ok || err != nil {
			t.Errorf("%q not found: %v", form, err)
		}
	}
	if _, ok, _ := a.IssuanceLog().Find("bc"); ok {
		t.Error("found by a part of the number")
	}
}

// Lint refuses every certificate that differs from the profile in one thing.
func TestLint(t *testing.T) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	weak, err := ecdsa.GenerateKey(elliptic.P224(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	now := time.Now()
	other := spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/db").URL()
	for _, tt := range []struct {
		name string
		edit func(*x509.Certificate)
		pub  crypto.PublicKey
		want string
	}{
		{"good", func(c *x509.Certificate) {}, nil, ""},
		{"subject", func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "a"} }, nil, "subject"},
		{"two IDs", func(c *x509.Certificate) { c.URIs = append(c.URIs, other) }, nil, "more than one URI"},
		{"no ID", func(c *x509.Certificate) { c.URIs = nil }, nil, "no URI"},
		{"no path", func(c *x509.Certificate) { c.URIs = []*url.URL{testDomain.ID().URL()} }, nil, "no path"},
		{"not SPIFFE", func(c *x509.Certificate) { c.URIs[0] = &url.URL{Scheme: "https", Host: "a.example"} }, nil, "scheme"},
		{"DNS name", func(c *x509.Certificate) { c.DNSNames = []string{"a.example"} }, nil, "nothing else"},
		{"IP", func(c *x509.Certificate) { c.IPAddresses = []net.IP{{10, 0, 0, 1}} }, nil, "nothing else"},
		{"CA", func(c *x509.Certificate) { c.IsCA = true }, nil, "no CA"},
		{"no basic constraints", func(c *x509.Certificate) { c.BasicConstraintsValid = false }, nil, "no CA"},
		{"signs certificates", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign }, nil, "key usage"},
		{"encipherment", func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageKeyEncipherment }, nil, "key usage"},
		{"no key usage", func(c *x509.Certificate) { c.KeyUsage = 0 }, nil, "key usage"},
		{"client only", func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[1:] }, nil, "extended key usage"},
		{"any use", func(c *x509.Certificate) { c.ExtKeyUsage = append(c.ExtKeyUsage, x509.ExtKeyUsageAny) }, nil, "extended key usage"},
		{"key usage not critical", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{2, 5, 29, 15}, Value: []byte{3, 2, 7, 0x80}}}
		}, nil, "key usage: critical is false"},
		{"name not critical", func(c *x509.Certificate) {
			c.URIs, c.ExtraExtensions = nil, []pkix.Extension{{Id: oidSAN, Value: tlv(0x30, uri(corpusID.String()))}}
		}, nil, "name: critical is false"},
		{"unknown extension", func(c *x509.Certificate) {
			c.ExtraExtensions = []pkix.Extension{{Id: []int{1, 2, 3}, Value: derNull}}
		}, nil, "does not belong"},
		{"CRL", func(c *x509.Certificate) { c.CRLDistributionPoints = []string{"http://a.example"} }, nil, "does not belong"},
		{"key identifier", func(c *x509.Certificate) { // what this authority signs has none
			bits, _ := key.PublicKey.Bytes()
			sum := sha1.Sum(bits)
			c.SubjectKeyId = sum[:]
		}, nil, "does not belong"},
		{"too long", func(c *x509.Certificate) { c.NotAfter = now.Add(MaxTTL + time.Minute) }, nil, "lifetime"},
		{"ends before it starts", func(c *x509.Certificate) { c.NotAfter = now.Add(-time.Hour) }, nil, "lifetime"},
		{"serial too long", func(c *x509.Certificate) { c.SerialNumber = new(big.Int).Lsh(big.NewInt(1), 159) }, nil, "serial"},
		{"weak key", func(c *x509.Certificate) {}, weak.Public(), "P-224"},
	} {
		t.Run(tt.name, func(t *testing.T) {
			tmpl := &x509.Certificate{
				SerialNumber: big.NewInt(5), NotBefore: now, NotAfter: now.Add(time.Hour), URIs: []*url.URL{corpusID.URL()},
				KeyUsage:              x509.KeyUsageDigitalSignature,
				ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
				BasicConstraintsValid: true, AuthorityKeyId: []byte{1},
			}
			tt.edit(tmpl)
			issuer := &x509.Certificate{SubjectKeyId: []byte{1}, Subject: pkix.Name{CommonName: "test"}}
			pub := tt.pub
			if pub == nil {
				pub = key.Public()
			}
			der, err := x509.CreateCertificate(rand.Reader, tmpl, issuer, pub, key)
			if err != nil {
				t.Fatal(err)
			}
			err = Lint(parse(t, der))
			if tt.want == "" {
				if err != nil {
					t.Error(err)
				}
				return
			}
			wantError(t, err, tt.want)
		})
	}
}
