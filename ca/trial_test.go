package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"os"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// keys are of every kind that signs or is certified.
func keys(t testing.TB) map[string]crypto.Signer {
	t.Helper()
	out := map[string]crypto.Signer{}
	var err error
	for name, curve := range map[string]elliptic.Curve{"P-256": elliptic.P256(), "P-384": elliptic.P384()} {
		if out[name], err = ecdsa.GenerateKey(curve, rand.Reader); err != nil {
			t.Fatal(err)
		}
	}
	if out["RSA"], err = rsa.GenerateKey(rand.Reader, 2048); err != nil {
		t.Fatal(err)
	}
	return out
}

func csrOf(t testing.TB, key crypto.Signer) []byte {
	t.Helper()
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

// intermediateOf makes an intermediate below root with a key of its own.
func intermediateOf(t testing.TB, root *pair, key crypto.Signer, edit func(*x509.Certificate)) *pair {
	t.Helper()
	tmpl, err := caTemplate(testDomain, "signet intermediate", time.Now(), time.Now().Add(24*time.Hour))
	if err != nil {
		t.Fatal(err)
	}
	if edit != nil {
		edit(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, root.cert, key.Public(), root.key)
	if err != nil {
		t.Fatal(err)
	}
	return &pair{cert: parse(t, der), key: key}
}

// Whatever kinds of keys sign and are certified: what Prepare looks at, without any
// key, is what is signed, and the result verifies.
func TestTrialIsWhatIsSigned(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	for by, signer := range keys(t) {
		for of, key := range keys(t) {
			t.Run(by+" signs "+of, func(t *testing.T) {
				used := false
				a.intermediate = intermediateOf(t, a.roots.signs, watchedKey{signer, func() { used = true }}, nil)
				p, err := a.Prepare(Request{ID: corpusID, CSR: csrOf(t, key)})
				if err != nil {
					t.Fatal(err)
				}
				if used {
					t.Error("the key was used before the request was good")
				}
				issued, err := a.Issue(p)
				if err != nil {
					t.Fatal(err)
				}
				id, chains, err := x509svid.ParseAndVerify(issued.Chain, a)
				if err != nil || id != corpusID {
					t.Fatalf("verified as %q, %v", id, err)
				}
				leaf := chains[0][0]
				if !bytes.Equal(leaf.RawTBSCertificate, p.trial.cert.RawTBSCertificate) {
					t.Error("another certificate was signed than was looked at")
				}
				if pub, ok := leaf.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(key.Public()) {
					t.Error("another key was certified")
				}
			})
		}
	}
}

// Defends: what Prepare has built is looked at as a whole, so that a mistake in the
// code before it is no certificate.
func TestTrialIsLooked(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	for _, tc := range []struct {
		want string
		edit func(*Prepared)
	}{
		{"nothing else", func(p *Prepared) { p.tmpl.DNSNames = []string{"web.shop"} }},
		{"key usage", func(p *Prepared) { p.tmpl.KeyUsage |= x509.KeyUsageCertSign }},
		{"no CA", func(p *Prepared) { p.tmpl.IsCA = true }},
		{"instead of", func(p *Prepared) { p.req.ID = spiffeid.RequireFromPath(testDomain, "/ns/shop/sa/db") }},
		{"another key", func(p *Prepared) { p.spki = prepare(t, a, 0).spki }},
		{"not at", func(p *Prepared) { p.tmpl.NotAfter = p.tmpl.NotBefore.Add(time.Second) }},
	} {
		p := prepare(t, a, 0)
		tc.edit(p)
		_, err := p.try(p.tmpl, a.intermediate, a.now())
		wantError(t, err, tc.want)
	}
}

// Defends: a certificate that is not what was looked at, to the last byte, is not
// handed out, and the log says that it failed.
func TestSignedIsWhatWasLooked(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	for name, edit := range map[string]func(*Prepared){
		"a name more":    func(p *Prepared) { p.tmpl.DNSNames = []string{"web.shop"} },
		"another ID":     func(p *Prepared) { p.tmpl.URIs = prepare(t, a, 0).tmpl.URIs[:0] },
		"another serial": func(p *Prepared) { p.tmpl.SerialNumber = prepare(t, a, 0).tmpl.SerialNumber },
		"another key":    func(p *Prepared) { p.pub = prepare(t, a, 0).pub },
	} {
		p := prepare(t, a, 0)
		edit(p)
		issued, err := a.Issue(p)
		wantError(t, err, "not what was prepared")
		if issued != nil {
			t.Errorf("%s: handed out", name)
		}
		e, ok, err := a.IssuanceLog().Find(formatSerial(p.tmpl.SerialNumber))
		if err != nil || !ok || e.Outcome != OutcomeFailed {
			t.Errorf("%s: the log has %+v, %t, %v", name, e, ok, err)
		}
	}
}

// faultyKey signs something else than it is asked to.
type faultyKey struct{ crypto.Signer }

func (k faultyKey) Sign(r io.Reader, digest []byte, opts crypto.SignerOpts) ([]byte, error) {
	digest = bytes.Clone(digest)
	digest[0] ^= 1
	return k.Signer.Sign(r, digest, opts)
}

// Defends: a signature that is wrong does not leave the authority. One that a fault,
// or somebody who causes faults, has spoiled may give the key away. It is verified at
// each certificate, also while the chain above is not verified anew.
func TestFaultyKey(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	for kind, key := range keys(t) {
		good := intermediateOf(t, a.roots.signs, key, nil)
		a.intermediate = good
		issue(t, a, 0)
		good.key = faultyKey{key} // the same pair, so the chain above is believed
		p := prepare(t, a, 0)
		issued, err := a.Issue(p)
		wantError(t, err, "sign")
		if issued != nil {
			t.Errorf("%s: handed out", kind)
		}
		if e, ok, err := a.IssuanceLog().Find(formatSerial(p.tmpl.SerialNumber)); err != nil || !ok || e.Outcome != OutcomeFailed {
			t.Errorf("%s: the log has %+v, %t, %v", kind, e, ok, err)
		}
	}
}

// Defends: what is looked at names the issuer that signs, also when that was replaced
// in between.
func TestSignerReplacedMeanwhile(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	p := prepare(t, a, 0)
	was := p.trial.signer
	next := intermediateOf(t, a.roots.signs, keys(t)["P-384"], nil)
	a.intermediate = next
	issued, err := a.Issue(p)
	if err != nil {
		t.Fatal(err)
	}
	if next == was || !bytes.Equal(issued.Chain[1], next.cert.Raw) || !bytes.Equal(parse(t, issued.Chain[0]).AuthorityKeyId, next.cert.SubjectKeyId) {
		t.Error("the certificate is not of the intermediate that signs now")
	}
	if _, _, err := x509svid.ParseAndVerify(issued.Chain, a); err != nil {
		t.Error(err)
	}
}

// Defends: the first certificate below a signer is verified up to the root, as a
// peer does, and one each minute after it. A signer that peers do not believe issues
// none, before and after one that they do.
func TestChainIsVerified(t *testing.T) {
	c := newClock()
	a := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now })
	good := a.intermediate
	other := openTest(t, t.TempDir(), nil)
	bad := map[string]*pair{
		"of another root": intermediateOf(t, other.roots.signs, keys(t)["P-256"], nil),
		"for other names": intermediateOf(t, a.roots.signs, keys(t)["P-256"], func(c *x509.Certificate) {
			c.PermittedURIDomains, c.PermittedDNSDomainsCritical = []string{"other.example"}, true
		}),
	}
	for range 2 {
		for name, p := range bad {
			a.intermediate = p
			for range 2 {
				if issued, err := a.Issue(prepare(t, a, 0)); err == nil || issued != nil {
					t.Errorf("an intermediate %s issues", name)
				}
			}
		}
		a.intermediate = good
		issue(t, a, 0)
	}
	// The same signer, spoiled in place, is noticed within a minute.
	spoiled := *good.cert
	spoiled.RawTBSCertificate = bytes.Clone(spoiled.RawTBSCertificate)
	spoiled.RawTBSCertificate[len(spoiled.RawTBSCertificate)-1] ^= 1
	good.cert = &spoiled
	issue(t, a, 0) // its own signature is good
	c.advance(believeAgain + time.Second)
	_, err := a.Issue(prepare(t, a, 0))
	wantError(t, err, "verify")
}

// A batch has the results in order, each as by itself; one that cannot be issued
// takes nothing from the others.
func TestIssueMany(t *testing.T) {
	c := newClock()
	a, b := openTest(t, t.TempDir(), func(o *Options) { o.Now = c.now }), openTest(t, t.TempDir(), nil)
	stale := prepare(t, a, 0)
	c.advance(2 * time.Minute)
	used := prepare(t, a, 0)
	if _, err := a.Issue(used); err != nil {
		t.Fatal(err)
	}
	spoiled := prepare(t, a, 0)
	spoiled.tmpl.DNSNames = []string{"web.shop"}
	twice := prepare(t, a, 0)
	list := []*Prepared{prepare(t, a, 0), stale, used, nil, prepare(t, b, 0), spoiled, twice, twice, prepare(t, a, 2*time.Hour)}
	want := []string{"", "prepare it again", "issued already", "not prepared", "not prepared", "not what was prepared", "", "issued already", ""}
	got := a.IssueMany(list)
	if len(got) != len(list) {
		t.Fatalf("%d results for %d", len(got), len(list))
	}
	for i, r := range got {
		if want[i] != "" {
			wantError(t, r.Err, want[i])
			if r.Issued != nil {
				t.Errorf("%d: handed out", i)
			}
			continue
		}
		if r.Err != nil {
			t.Fatalf("%d: %v", i, r.Err)
		}
		if r.Issued.Serial != formatSerial(list[i].tmpl.SerialNumber) || !bytes.Equal(parse(t, r.Issued.Chain[0]).RawSubjectPublicKeyInfo, list[i].spki) {
			t.Errorf("%d: another's certificate", i)
		}
		if _, _, err := x509svid.ParseAndVerify(r.Issued.Chain, a, x509svid.WithTime(c.now())); err != nil {
			t.Errorf("%d: %v", i, err)
		}
		if e, ok, err := a.IssuanceLog().Find(r.Issued.Serial); err != nil || !ok || e.Outcome != OutcomeIssued || e.CertSHA256 == "" {
			t.Errorf("%d: the log has %+v, %t, %v", i, e, ok, err)
		}
	}
	if e, ok, err := a.IssuanceLog().Find(formatSerial(spoiled.tmpl.SerialNumber)); err != nil || !ok || e.Outcome != OutcomeFailed {
		t.Errorf("the log has %+v, %t, %v of what failed", e, ok, err)
	}
	if got := a.IssueMany(nil); len(got) != 0 {
		t.Errorf("%d results for nothing", len(got))
	}
}

// Defends: every intent of a batch is durable when the key is used for the first
// time, and when the log cannot be written or synced it is not used at all.
func TestManyRecordedBeforeSigned(t *testing.T) {
	a := openTest(t, t.TempDir(), nil)
	const n = 20
	signed := 0
	a.intermediate = &pair{cert: a.intermediate.cert, key: watchedKey{a.intermediate.key, func() {
		signed++
		a.issuance.syncMu.Lock()
		synced := a.issuance.synced
		a.issuance.syncMu.Unlock()
		entries, err := ReadLog(a.dir).Entries(time.Time{})
		if err != nil || len(entries) != n || synced != n {
			t.Errorf("when it signs for the %dth time the log holds %d, %v, of which %d are durable; want %d", signed, len(entries), err, synced, n)
		}
	}}}
	many := func() (list []*Prepared) {
		for range n {
			list = append(list, prepare(t, a, 0))
		}
		return list
	}
	for _, r := range a.IssueMany(many()) {
		if r.Err != nil {
			t.Fatal(r.Err)
		}
	}
	if signed != n {
		t.Fatalf("signed %d times", signed)
	}
	good := a.issuance.f
	r, pipe, err := os.Pipe()
	if err != nil {
		t.Fatal(err)
	}
	defer r.Close()
	defer pipe.Close()
	a.issuance.f = pipe // takes writes and refuses to be synced
	for range 2 {
		for _, r := range a.IssueMany(many()) {
			wantError(t, r.Err, "record the intent")
			if r.Issued != nil {
				t.Error("handed out")
			}
		}
		a.issuance.f = good // an error is for good
	}
	if signed != n {
		t.Error("signed without a record")
	}
}

// What the authority above certifies is not issued in a batch: it may take long. What
// the intermediate signs is.
func TestManySingly(t *testing.T) {
	w := newPerWorkload(t, false)
	p, err := w.Prepare(Request{ID: corpusID, CSR: wholeCSR(t, corpusID, nil)})
	if err != nil {
		t.Fatal(err)
	}
	node, err := NodeID(testDomain, "one")
	if err != nil {
		t.Fatal(err)
	}
	q, err := w.Prepare(Request{ID: node, CSR: newCSR(t)})
	if err != nil {
		t.Fatal(err)
	}
	got := w.IssueMany([]*Prepared{p, q})
	if !errors.Is(got[0].Err, ErrSingly) || got[0].Issued != nil || !w.LeavesAbove() {
		t.Errorf("a workload's: %+v", got[0])
	}
	if got[1].Err != nil || got[1].Issued == nil {
		t.Errorf("a node's: %+v", got[1])
	}
	if len(w.issuer.asked) != 0 {
		t.Error("the authority above was asked")
	}
	if a := openTest(t, t.TempDir(), nil); a.LeavesAbove() {
		t.Error("nobody is above, and each is to be issued by itself")
	}
}

// One write and one sync of the log are for all of a batch; for go test -bench.
func BenchmarkIssueMany(b *testing.B) {
	for _, n := range []int{1, 20} {
		b.Run(fmt.Sprint(n), func(b *testing.B) {
			a := openTest(b, b.TempDir(), nil)
			csr := newCSR(b)
			for i := 0; i < b.N; i += n {
				var list []*Prepared
				for range n {
					p, err := a.Prepare(Request{ID: corpusID, CSR: csr, TTL: time.Hour, Node: "one", Workload: "shop/web-1"})
					if err != nil {
						b.Fatal(err)
					}
					list = append(list, p)
				}
				for _, r := range a.IssueMany(list) {
					if r.Err != nil {
						b.Fatal(r.Err)
					}
				}
			}
		})
	}
}
