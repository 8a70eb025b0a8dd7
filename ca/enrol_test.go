package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"maps"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// sharedRoots is a RootStore in memory, with versions as an API server has them.
type sharedRoots struct {
	mu    sync.Mutex
	files map[string][]byte // guarded by mu; replaced whole
	n     int               // guarded by mu
	away  error             // guarded by mu
}

func (s *sharedRoots) String() string { return "the test's store" }

func (s *sharedRoots) Load(context.Context) (map[string][]byte, string, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.n == 0 || s.away != nil {
		return nil, "", s.away
	}
	return maps.Clone(s.files), fmt.Sprint(s.n), nil
}

func (s *sharedRoots) Save(_ context.Context, files map[string][]byte, version string) error {
	s.mu.Lock()
	defer s.mu.Unlock()
	if s.away != nil {
		return s.away
	}
	if version != fmt.Sprint(s.n) && !(version == "" && s.n == 0) {
		return ErrRootsChanged
	}
	s.files, s.n = files, s.n+1
	return nil
}

// authority is a CA that certifies what it is asked for.
type authority struct {
	t    *testing.T
	now  func() time.Time
	root *x509.Certificate
	key  crypto.Signer
	via  []*pair // between the root and what is certified, the nearest first

	edit   func(tmpl *x509.Certificate)      // of what is certified; nil: nothing
	answer func(*authority, *UpstreamAnswer) // edits the answer; nil: nothing
	no     error                             // the answer instead

	asked map[string]int // times, by key
	done  map[string]*UpstreamAnswer
}

func caCert(t *testing.T, cn string, now time.Time, life time.Duration, by *pair, edit func(*x509.Certificate)) *pair {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(now.UnixNano()), Subject: pkix.Name{CommonName: cn}, NotBefore: now, NotAfter: now.Add(life),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	if edit != nil {
		edit(tmpl)
	}
	parent, signer := tmpl, crypto.Signer(key)
	if by != nil {
		parent, signer = by.cert, by.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, key.Public(), signer)
	if err != nil {
		t.Fatal(err)
	}
	return &pair{cert: parse(t, der), key: key}
}

func newUpstream(t *testing.T, now func() time.Time) *authority {
	u := &authority{t: t, now: now, asked: map[string]int{}, done: map[string]*UpstreamAnswer{}}
	u.replace(nil)
	return u
}

// replace gives it another certificate and key, as who edits the Secret of an issuer.
func (u *authority) replace(edit func(*x509.Certificate)) {
	p := caCert(u.t, "above", u.now(), 365*24*time.Hour, nil, edit)
	u.root, u.key, u.via = p.cert, p.key, nil
}

func (u *authority) String() string { return "Issuer test/above" }

func (u *authority) Ask(_ context.Context, req UpstreamRequest) (*UpstreamAnswer, error) {
	csr, err := x509.ParseCertificateRequest(req.CSR)
	if err == nil {
		err = csr.CheckSignature()
	}
	if err != nil {
		u.t.Error(err)
		return nil, err
	}
	known := string(csr.RawSubjectPublicKeyInfo)
	u.asked[known]++
	if u.no != nil {
		return nil, u.no
	}
	if answer := u.done[known]; answer != nil {
		return answer, nil
	}
	by := &pair{cert: u.root, key: u.key}
	if len(u.via) > 0 {
		by = u.via[0]
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(u.now().UnixNano()), Subject: csr.Subject, URIs: csr.URIs, NotBefore: u.now(), NotAfter: u.now().Add(req.TTL),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	if u.edit != nil {
		u.edit(tmpl)
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, csr.PublicKey, by.key)
	if err != nil {
		return nil, err
	}
	answer := &UpstreamAnswer{Chain: []*x509.Certificate{parse(u.t, der)}, Roots: []*x509.Certificate{u.root}}
	for _, p := range u.via {
		answer.Chain = append(answer.Chain, p.cert)
	}
	if u.answer != nil {
		u.answer(u, answer)
	}
	u.done[known] = answer
	return answer, nil
}

func newEnrolment(t *testing.T, store RootStore, u Upstream, now func() time.Time, edit func(*EnrolmentConfig)) *Enrolment {
	t.Helper()
	cfg := EnrolmentConfig{TrustDomain: testDomain, Store: store, Upstream: u, TTL: 24 * time.Hour, Now: now, Log: testLog(t)}
	if edit != nil {
		edit(&cfg)
	}
	e, err := NewEnrolment(cfg)
	if err != nil {
		t.Fatal(err)
	}
	return e
}

// steps takes as many as one request needs.
func (e *Enrolment) steps(t *testing.T) UpstreamStatus {
	for range 4 {
		e.step(t.Context())
	}
	s, _ := e.Status()
	return s
}

// below opens an authority whose roots an Enrolment keeps.
func below(t *testing.T, store RootStore, now func() time.Time) *Authority {
	return openTest(t, t.TempDir(), func(o *Options) { o.RootStore, o.Above, o.Now = store, true, now })
}

func verifies(t *testing.T, issued *Issued, root *x509.Certificate, now time.Time) error {
	t.Helper()
	var chain []*x509.Certificate
	for _, der := range issued.Chain {
		chain = append(chain, parse(t, der))
	}
	a := &Authority{td: testDomain}
	_, _, err := x509svid.Verify(chain, a.bundleOf(root), x509svid.WithTime(now))
	return err
}

// follow has an authority look at the store now.
func follow(t *testing.T, a *Authority) {
	t.Helper()
	if err := a.followRoots(t.Context()); err != nil {
		t.Fatal(err)
	}
}

// The life of an intermediate from above: got, used, renewed at half of its life
// below the same root. No key of a root is stored.
func TestEnrol(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	for range 2 { // two authorities between root and intermediate
		by := &pair{cert: u.root, key: u.key}
		if len(u.via) > 0 {
			by = u.via[0]
		}
		u.via = append([]*pair{caCert(t, "between", clk.now(), 300*24*time.Hour, by, nil)}, u.via...)
	}
	if _, err := tryOpen(t, t.TempDir(), func(o *Options) { o.RootStore, o.Above, o.Now = store, true, clk.now }); err == nil || !strings.Contains(err.Error(), "no root of the authority above yet") {
		t.Errorf("opened without a root: %v", err)
	}
	e := newEnrolment(t, store, u, clk.now, nil)
	if s := e.steps(t); s.Reason != UpstreamReady || !s.Signs(clk.now()) || s.Wanted != "" {
		t.Fatalf("%+v", s)
	}
	if err := e.Ready(t.Context()); err != nil {
		t.Error(err)
	}
	a := below(t, store, clk.now)
	issued := issue(t, a, time.Hour)
	if err := verifies(t, issued, u.root, clk.now()); err != nil || len(issued.Chain) != 4 {
		t.Errorf("a chain of %d: %v", len(issued.Chain), err)
	}
	for name := range store.files {
		if name == "root.key" || name == askedFile {
			t.Errorf("%s is stored", name)
		}
	}
	if _, ok := a.RootDue(); ok {
		t.Error("a root of somebody else is due by itself")
	}
	wantError(t, a.PrepareRoot(), "replaced there")

	first := a.intermediate.cert
	clk.advance(11 * time.Hour)
	if s := e.steps(t); s.Wanted != "" || len(u.asked) != 1 {
		t.Fatalf("asked before half of its life: %+v", s)
	}
	clk.advance(4 * time.Hour)
	e.steps(t)
	follow(t, a)
	if a.intermediate.cert.Equal(first) || len(u.asked) != 2 || len(a.Bundle()) != 1 {
		t.Errorf("not renewed, or not once: asked for %d keys, %d roots", len(u.asked), len(a.Bundle()))
	}
	if a.intermediate.key.Public().(*ecdsa.PublicKey).Equal(first.PublicKey) {
		t.Error("the key is the old one's")
	}
	if err := verifies(t, issue(t, a, time.Hour), u.root, clk.now()); err != nil {
		t.Error(err)
	}
	// Without being told of the authority above nobody signs below its root.
	_, err := tryOpen(t, t.TempDir(), func(o *Options) { o.RootStore, o.Now = store, clk.now })
	wantError(t, err, "the root is that of an authority above")
}

// Authorities above certify what outlives themselves; what is issued here ends with
// the first of them, or peers would drop it in the middle of its life.
func TestEnrolClamps(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	u.via = []*pair{caCert(t, "between", clk.now(), 30*time.Minute, &pair{cert: u.root, key: u.key}, nil)}
	newEnrolment(t, store, u, clk.now, nil).steps(t)
	issued := issue(t, below(t, store, clk.now), time.Hour)
	if want := u.via[0].cert.NotAfter; !issued.NotAfter.Equal(want) {
		t.Errorf("ends at %s, want %s", issued.NotAfter, want)
	}
}

// An issuer switches at once; the mesh does not. The new root is published while the
// old intermediate signs, signs when the rotation switches, and the old is withdrawn.
func TestEnrolAnotherRoot(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	e := newEnrolment(t, store, u, clk.now, nil)
	e.steps(t)
	a := below(t, store, clk.now)
	old := u.root
	u.replace(nil)
	clk.advance(15 * time.Hour)
	s := e.steps(t)
	follow(t, a)
	seen := map[Fingerprint]int{}
	if got := roles(a, seen); got != "signs:1 next:2" || s.Reason != UpstreamReady || !strings.Contains(s.Message, "another root is published") {
		t.Fatalf("roots are %q, %+v", got, s)
	}
	if err := verifies(t, issue(t, a, time.Hour), old, clk.now()); err != nil {
		t.Errorf("while the next root is published: %v", err)
	}
	asked := len(u.asked)
	e.steps(t)
	if len(u.asked) != asked {
		t.Error("asked again while the next root waits for nodes")
	}
	_, changed := a.BundleUpdates()
	if err := a.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	select {
	case <-changed:
	default:
		t.Error("who follows the bundle was not told")
	}
	if got := roles(a, seen); got != "signs:2 former:1" {
		t.Errorf("roots are %q", got)
	}
	if err := verifies(t, issue(t, a, time.Hour), u.root, clk.now()); err != nil {
		t.Errorf("after the switch: %v", err)
	}
	// Another replica, and one that starts now, sign with the same.
	b := below(t, store, clk.now)
	if !b.intermediate.cert.Equal(a.intermediate.cert) {
		t.Error("replicas have intermediates of their own")
	}
	if err := a.RetireRoots(); err != nil {
		t.Fatal(err)
	}
	if got := roles(a, seen); got != "signs:2" {
		t.Errorf("roots are %q", got)
	}

	// The issuer goes on to a third root, and a node that does not answer holds the
	// rotation up until nothing else can sign. Then the issuer comes back to the second,
	// which is still published.
	back, backKey := u.root, u.key
	u.replace(nil)
	clk.advance(15 * time.Hour)
	e.steps(t)
	follow(t, a)
	if got := roles(a, seen); got != "signs:2 next:3" {
		t.Errorf("roots are %q", got)
	}
	clk.advance(10 * time.Hour)
	e.steps(t)
	follow(t, a)
	if got := roles(a, seen); got != "signs:3 former:2" {
		t.Errorf("roots are %q", got)
	}
	if err := verifies(t, issue(t, a, time.Hour), u.root, clk.now()); err != nil {
		t.Errorf("after the end of the second: %v", err)
	}
	u.root, u.key = back, backKey
	clk.advance(5 * time.Hour)
	e.steps(t)
	follow(t, a)
	if got := roles(a, seen); got != "signs:3 next:2" {
		t.Errorf("roots are %q", got)
	}
}

// When nothing that is valid is left below the old root, waiting helps nobody.
func TestEnrolAfterTheEnd(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	e := newEnrolment(t, store, u, clk.now, nil)
	e.steps(t)
	a := below(t, store, clk.now)
	clk.advance(25 * time.Hour)
	if _, err := a.Issue(prepare(t, a, time.Hour)); err == nil || !strings.Contains(err.Error(), "nothing can be issued") {
		t.Errorf("issued with what has expired: %v", err)
	}
	u.replace(nil)
	e.steps(t)
	follow(t, a)
	if got := roles(a, map[Fingerprint]int{}); got != "signs:1 former:2" {
		t.Errorf("roots are %q", got)
	}
	if err := verifies(t, issue(t, a, time.Hour), u.root, clk.now()); err != nil {
		t.Error(err)
	}
}

// A mesh with a root of its own gets one from above the same way: nothing is cut off.
func TestEnrolInsteadOfOwnRoot(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	own := openTest(t, t.TempDir(), func(o *Options) { o.RootStore, o.Now = store, clk.now })
	u := newUpstream(t, clk.now)
	e := newEnrolment(t, store, u, clk.now, nil)
	if s := e.steps(t); s.Reason != UpstreamReady || !strings.Contains(s.Message, "mesh's own signs until") {
		t.Fatalf("%+v", s)
	}
	a := below(t, store, clk.now)
	follow(t, own)
	seen := map[Fingerprint]int{}
	for _, replica := range []*Authority{own, a} { // one without and one with the option
		if got := roles(replica, seen); got != "signs:1 next:2" {
			t.Errorf("roots are %q", got)
		}
		if got := under(t, replica); got != string(RootSigns) {
			t.Errorf("a certificate chains to the root that is %q", got)
		}
	}
	wantError(t, own.SwitchRoot(), "authority above")
	if err := a.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	follow(t, own)
	for _, replica := range []*Authority{own, a} {
		if err := verifies(t, issue(t, replica, time.Hour), u.root, clk.now()); err != nil {
			t.Error(err)
		}
	}
	if store.files["root.key"] != nil {
		t.Error("the own root's key is still stored")
	}
}

// A no is not asked about again at once, each time later, and with another key; the
// present intermediate goes on. A yes ends that.
func TestEnrolDenied(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	e := newEnrolment(t, store, u, clk.now, nil)
	e.steps(t)
	a := below(t, store, clk.now)
	clk.advance(15 * time.Hour)
	u.no = &UpstreamError{UpstreamDenied, "denied by the policy"}
	for i, wait := range []time.Duration{time.Minute, 2 * time.Minute, 4 * time.Minute} {
		s := e.steps(t)
		if s.Reason != UpstreamDenied || s.Message != "denied by the policy" || len(u.asked) != i+2 || !s.RetryAt.Equal(clk.now().Add(wait)) || !s.Signs(clk.now()) {
			t.Fatalf("%d: %d asked, %+v", i, len(u.asked), s)
		}
		if store.files[askedFile] != nil {
			t.Error("a request that was denied stays stored")
		}
		clk.advance(wait - time.Second)
		if e.steps(t); len(u.asked) != i+2 {
			t.Fatalf("asked again after %s", wait-time.Second)
		}
		clk.advance(2 * time.Second)
	}
	follow(t, a)
	issue(t, a, time.Hour)
	u.no = nil
	if s := e.steps(t); s.Reason != UpstreamReady || !s.RetryAt.IsZero() {
		t.Errorf("%+v", s)
	}
}

// A request that waits, for a person perhaps, is one request: after a restart and
// for every replica. A way there that is broken is no answer.
func TestEnrolPending(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	u.no = &UpstreamError{UpstreamPending, "waits for approval"}
	for i := range 3 {
		e := newEnrolment(t, store, u, clk.now, nil)
		if s := e.steps(t); s.Reason != UpstreamPending || s.Message != "waits for approval" || s.Signs(clk.now()) || len(u.asked) != 1 {
			t.Fatalf("%d: %d asked, %+v", i, len(u.asked), s)
		}
		clk.advance(time.Hour)
	}
	e := newEnrolment(t, store, u, clk.now, nil)
	u.no = errors.New("connection refused")
	if s := e.steps(t); s.Reason != UpstreamUnreachable || len(u.asked) != 1 {
		t.Errorf("%+v", s)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 50*time.Millisecond)
	if err := e.Ready(ctx); !errors.Is(err, context.DeadlineExceeded) {
		t.Errorf("ready: %v", err)
	}
	cancel()
	store.away = errors.New("the store is away")
	if s := e.steps(t); s.Reason != UpstreamUnreachable || !strings.Contains(s.Message, "store is away") {
		t.Errorf("%+v", s)
	}
	store.away, u.no = nil, nil
	if s := e.steps(t); s.Reason != UpstreamReady || len(u.asked) != 1 {
		t.Errorf("%d asked, %+v", len(u.asked), s)
	}
}

// A distrusted root is followed by another only once the issuer has another; what
// still comes from below it is refused.
func TestEnrolDistrusted(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	e := newEnrolment(t, store, u, clk.now, nil)
	e.steps(t)
	a := below(t, store, clk.now)
	if err := a.DistrustRoot(); err != nil {
		t.Fatal(err)
	}
	if s := e.steps(t); s.Reason != UpstreamUnusable || !strings.Contains(s.Message, "distrusted") {
		t.Errorf("%+v", s)
	}
	u.replace(nil)
	clk.advance(2 * time.Minute)
	e.steps(t)
	follow(t, a)
	seen := map[Fingerprint]int{}
	if got := roles(a, seen); got != "signs:1 next:2" {
		t.Errorf("roots are %q", got)
	}
}

// Who wants another root is told when the issuer has none yet, and the issuer is not
// asked all the time.
func TestEnrolDue(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	due := ""
	e := newEnrolment(t, store, u, clk.now, func(c *EnrolmentConfig) {
		c.Due = func(root *x509.Certificate) string {
			if root.Equal(u.root) {
				return due
			}
			return ""
		}
	})
	e.steps(t)
	due = "an operator wants another"
	if s := e.steps(t); s.Reason != UpstreamPending || !strings.Contains(s.Message, "still signs below the root") || len(u.asked) != 2 || s.Wanted != due {
		t.Errorf("%d asked, %+v", len(u.asked), s)
	}
	u.replace(nil)
	due = ""
	if s := e.steps(t); s.Reason != UpstreamReady {
		t.Errorf("%+v", s)
	}
}

// Each of these answers would make certificates that peers refuse, or that are not
// this mesh's to issue. None is taken, and what signs goes on.
func TestEnrolRefuses(t *testing.T) {
	foreign := func(c *x509.Certificate) { c.URIs = []*url.URL{{Scheme: "spiffe", Host: "other.example"}} }
	for name, c := range map[string]struct {
		root   func(*x509.Certificate)
		edit   func(*x509.Certificate)
		answer func(*authority, *UpstreamAnswer)
		roots  bool // only another root may be taken
		want   string
	}{
		"no certificate": {answer: func(u *authority, a *UpstreamAnswer) { a.Chain = nil }, want: "no certificate"},
		"no root":        {answer: func(u *authority, a *UpstreamAnswer) { a.Roots = nil }, want: "which root"},
		"another root": {answer: func(u *authority, a *UpstreamAnswer) {
			a.Roots = []*x509.Certificate{caCert(t, "else", time.Now(), time.Hour*24*99, nil, nil).cert}
		}, want: "does not verify under its root"},
		"a root that is no CA": {answer: func(u *authority, a *UpstreamAnswer) { a.Roots = a.Chain[:1] }, want: "which root"},
		"an unknown root":      {roots: true, want: "does not verify under its root"},
		"another key": {answer: func(u *authority, a *UpstreamAnswer) {
			a.Chain = []*x509.Certificate{caCert(t, "else", u.now(), time.Hour, &pair{cert: u.root, key: u.key}, nil).cert}
		}, want: "another key"},
		"a root itself":      {answer: func(_ *authority, a *UpstreamAnswer) { a.Chain = []*x509.Certificate{a.Roots[0]} }, want: "issued a root"},
		"no CA":              {edit: func(c *x509.Certificate) { c.IsCA = false; c.KeyUsage = x509.KeyUsageDigitalSignature }, want: "not a CA"},
		"no keyCertSign":     {edit: func(c *x509.Certificate) { c.KeyUsage = x509.KeyUsageCRLSign }, want: "keyCertSign"},
		"for clients only":   {edit: func(c *x509.Certificate) { c.ExtKeyUsage = []x509.ExtKeyUsage{x509.ExtKeyUsageClientAuth} }, want: "other purposes"},
		"of another domain":  {edit: foreign, want: "other.example"},
		"a root of another":  {root: foreign, want: "other.example"},
		"a root of length 0": {root: func(c *x509.Certificate) { c.MaxPathLenZero = true }, want: "path length is 0"},
		"limited to DNS": {edit: func(c *x509.Certificate) {
			c.PermittedURIDomains = []string{"other.example"}
			c.PermittedDNSDomainsCritical = true
		}, want: "would not be believed"},
		"expired": {edit: func(c *x509.Certificate) {
			c.NotBefore = c.NotBefore.Add(-time.Hour)
			c.NotAfter = c.NotBefore.Add(time.Minute)
		}, want: "expired"},
		"about to expire": {edit: func(c *x509.Certificate) { c.NotAfter = c.NotBefore.Add(5 * time.Second) }, want: "already"},
		"not valid yet":   {edit: func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(time.Hour) }, want: "not yet valid"},
		"more than can be read": {answer: func(u *authority, a *UpstreamAnswer) {
			for range 30 {
				a.Roots = append(a.Roots, a.Roots[0])
			}
		}, want: "32 certificates"},
	} {
		t.Run(name, func(t *testing.T) {
			clk, store := newClock(), &sharedRoots{}
			good := newUpstream(t, clk.now)
			newEnrolment(t, store, good, clk.now, nil).steps(t)
			a := below(t, store, clk.now)
			clk.advance(15 * time.Hour)
			u := newUpstream(t, clk.now)
			u.edit, u.answer = c.edit, c.answer
			u.replace(c.root)
			e := newEnrolment(t, store, u, clk.now, func(cfg *EnrolmentConfig) {
				if c.roots {
					cfg.Roots = []*x509.Certificate{good.root}
				}
			})
			s := e.steps(t)
			if s.Reason != UpstreamUnusable || !strings.Contains(s.Message, c.want) || !s.Signs(clk.now()) {
				t.Errorf("want %q: %+v", c.want, s)
			}
			follow(t, a)
			if got := roles(a, map[Fingerprint]int{}); got != "signs:1" {
				t.Errorf("roots are %q", got)
			}
			if err := verifies(t, issue(t, a, time.Hour), good.root, clk.now()); err != nil {
				t.Error(err)
			}
		})
	}
}
