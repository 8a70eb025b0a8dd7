package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/sha1"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/url"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// leafIssuer is an authority above that certifies workloads, and can be made to do
// it wrongly.
type leafIssuer struct {
	t     *testing.T
	now   func() time.Time
	above *authority

	mu     sync.Mutex
	edit   func(*x509.Certificate)                          // of what is certified; nil: nothing
	key    crypto.PublicKey                                 // certified in place of the request's
	answer func(*UpstreamAnswer)                            // edits it; nil: nothing
	before func(ctx context.Context, req LeafRequest) error // nil: nothing
	asked  []LeafRequest                                    // guarded by mu
}

func (l *leafIssuer) CertifyLeaf(ctx context.Context, req LeafRequest) (*UpstreamAnswer, error) {
	l.mu.Lock()
	l.asked = append(l.asked, req)
	l.mu.Unlock()
	if err := req.Record(); err != nil {
		return nil, err
	}
	if l.before != nil {
		if err := l.before(ctx, req); err != nil {
			return nil, err
		}
	}
	csr, err := x509.ParseCertificateRequest(req.CSR)
	if err != nil {
		return nil, err
	}
	by := &pair{cert: l.above.root, key: l.above.key}
	if len(l.above.via) > 0 {
		by = l.above.via[0]
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), URIs: csr.URIs, NotBefore: l.now(), NotAfter: l.now().Add(req.TTL),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}
	if l.edit != nil {
		l.edit(tmpl)
	}
	pub := csr.PublicKey
	if l.key != nil {
		pub = l.key
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, by.cert, pub, by.key)
	if err != nil {
		return nil, err
	}
	answer := &UpstreamAnswer{Chain: []*x509.Certificate{parse(l.t, der)}, Roots: []*x509.Certificate{l.above.root}}
	for _, p := range l.above.via {
		answer.Chain = append(answer.Chain, p.cert)
	}
	if l.answer != nil {
		l.answer(answer)
	}
	return answer, nil
}

// perWorkload is an authority below one that certifies workloads itself.
type perWorkload struct {
	*Authority
	t      *testing.T
	clock  *clock
	issuer *leafIssuer
	e      *Enrolment
}

func newPerWorkload(t *testing.T, via bool) *perWorkload {
	t.Helper()
	clk, store := newClock(), &sharedRoots{}
	u := newUpstream(t, clk.now)
	if via {
		u.via = []*pair{caCert(t, "between", clk.now(), 300*24*time.Hour, &pair{cert: u.root, key: u.key}, nil)}
	}
	e := newEnrolment(t, store, u, clk.now, nil)
	if s := e.steps(t); s.Reason != UpstreamReady {
		t.Fatalf("%+v", s)
	}
	issuer := &leafIssuer{t: t, now: clk.now, above: u}
	a := openTest(t, t.TempDir(), func(o *Options) { o.RootStore, o.Above, o.Now, o.Leaves = store, true, clk.now, issuer })
	e.SetLeaves(a.Leaves)
	e.SetDue(a.LeavesElsewhere)
	return &perWorkload{Authority: a, t: t, clock: clk, issuer: issuer, e: e}
}

// wholeCSR names an identity, as agents' requests do.
func wholeCSR(t testing.TB, id spiffeid.ID, edit func(*x509.CertificateRequest)) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.CertificateRequest{URIs: []*url.URL{id.URL()}}
	if edit != nil {
		edit(tmpl)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func (w *perWorkload) ask(ctx context.Context, id spiffeid.ID, csr []byte) (*Issued, error) {
	w.t.Helper()
	p, err := w.Prepare(Request{ID: id, CSR: csr, TTL: time.Hour, Node: "one", Workload: "shop/web-1"})
	if err != nil {
		w.t.Fatal(err)
	}
	return w.IssueContext(ctx, p)
}

// A workload's certificate is the issuer's own, is logged under its own serial number,
// and can be found and revoked by that; a node's and the control plane's are below the
// intermediate, and peers that trust the one root believe all.
func TestLeafFromAbove(t *testing.T) {
	for _, via := range []bool{false, true} {
		w := newPerWorkload(t, via)
		issued, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil))
		if err != nil {
			t.Fatal(err)
		}
		leaf := parse(t, issued.Chain[0])
		want := 1
		if via {
			want = 2
		}
		if err := verifies(t, issued, w.issuer.above.root, w.clock.now()); err != nil || len(issued.Chain) != want || hexOf(leaf.AuthorityKeyId) == hexOf(w.intermediate.cert.SubjectKeyId) {
			t.Errorf("via %t: a chain of %d: %v", via, len(issued.Chain), err)
		}
		entries, err := w.IssuanceLog().Entries(time.Time{})
		if err != nil || len(entries) != 1 || entries[0].Serial != formatSerial(leaf.SerialNumber) || entries[0].Outcome != OutcomeIssued || entries[0].Kind != "" ||
			entries[0].Node != "one" || !entries[0].NotAfter.Equal(leaf.NotAfter) || entries[0].CertSHA256 == "" || entries[0].KeySHA256 == "" {
			t.Errorf("logged %+v, %v", entries, err)
		}
		if e, ok, err := w.IssuanceLog().Find(issued.Serial); !ok || err != nil || e.ID != corpusID.String() {
			t.Errorf("%+v, %v", e, err)
		}
		if of, _, err := w.IssuanceLog().Of(corpusID, w.clock.now()); len(of) != 1 || err != nil {
			t.Errorf("%d to revoke, %v", len(of), err)
		}
		node, err := NodeID(testDomain, "one")
		if err != nil {
			t.Fatal(err)
		}
		for _, id := range []spiffeid.ID{node, ControlID(testDomain), BundleEndpointID(testDomain)} {
			p, err := w.Prepare(Request{ID: id, CSR: newCSR(t)})
			if err != nil {
				t.Fatal(err)
			}
			own, err := w.Issue(p)
			if err != nil {
				t.Fatal(err)
			}
			if err := verifies(t, own, w.issuer.above.root, w.clock.now()); err != nil || hexOf(parse(t, own.Chain[0]).AuthorityKeyId) != hexOf(w.intermediate.cert.SubjectKeyId) {
				t.Errorf("%s: %v", id, err)
			}
		}
		if len(w.issuer.asked) != 1 || w.issuer.asked[0].TTL != time.Hour || w.issuer.asked[0].ID != corpusID {
			t.Errorf("asked for %+v", w.issuer.asked)
		}
	}
}

func hexOf(b []byte) string { return fmt.Sprintf("%x", b) }

// Defends identities from what an authority above would copy out of a request: before
// it sees one, the request names its identity and nothing else. Older agents' name none.
func TestLeafWholeRequest(t *testing.T) {
	w := newPerWorkload(t, false)
	for want, csr := range map[string][]byte{
		"update signet-agent": newCSR(t),
		"has the subject":     wholeCSR(t, corpusID, func(r *x509.CertificateRequest) { r.Subject = pkix.Name{CommonName: "admin"} }),
		"2 names":             wholeCSR(t, corpusID, func(r *x509.CertificateRequest) { r.DNSNames = []string{"bank.example"} }),
		"the only identity":   wholeCSR(t, spiffeid.RequireFromString("spiffe://mesh.example/ns/bank/sa/vault"), nil),
		"basic constraints": wholeCSR(t, corpusID, func(r *x509.CertificateRequest) {
			r.ExtraExtensions = []pkix.Extension{{Id: oidBasicConstraints, Value: []byte{0x30, 3, 1, 1, 255}}}
		}),
	} {
		_, err := w.Prepare(Request{ID: corpusID, CSR: csr})
		wantError(t, err, want)
	}
	if len(w.issuer.asked) != 0 {
		t.Errorf("asked %d times", len(w.issuer.asked))
	}
}

// Defends the mesh from an authority above that certifies something else than what was
// asked for: nothing of it is handed out, it is logged, and not asked for again at once.
func TestLeafRefusesAnswer(t *testing.T) {
	stranger, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	other := spiffeid.RequireFromString("spiffe://mesh.example/ns/bank/sa/vault").URL()
	foreign := spiffeid.RequireFromString("spiffe://other.example/ns/shop/sa/web").URL()
	for _, c := range []struct {
		name, want string
		spoil      func(*leafIssuer)
	}{
		{"another key", "for another key", func(l *leafIssuer) { l.key = stranger.Public() }},
		{"another identity", "it names", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.URIs = []*url.URL{other} } }},
		{"another trust domain", "it names", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.URIs = []*url.URL{foreign} } }},
		{"two identities", "more than one URI", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.URIs = append(c.URIs, other) } }},
		{"a DNS name", "nothing else", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.DNSNames = []string{"bank.example"} } }},
		{"an address", "nothing else", func(l *leafIssuer) {
			l.edit = func(c *x509.Certificate) { c.IPAddresses = []net.IP{net.IPv4(10, 0, 0, 1)} }
		}},
		{"a mailbox", "nothing else", func(l *leafIssuer) {
			l.edit = func(c *x509.Certificate) { c.EmailAddresses = []string{"a@bank.example"} }
		}},
		{"a subject", "subject", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.Subject = pkix.Name{CommonName: "web"} } }},
		{"a CA", "no CA", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.IsCA = true } }},
		{"may sign certificates", "key usage", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.KeyUsage |= x509.KeyUsageCertSign } }},
		{"servers only", "extended key usage", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.ExtKeyUsage = c.ExtKeyUsage[:1] } }},
		{"an extension more", "does not belong", func(l *leafIssuer) {
			l.edit = func(c *x509.Certificate) { c.CRLDistributionPoints = []string{"http://crl.example"} }
		}},
		{"another key's identifier", "hash of the key", func(l *leafIssuer) {
			l.edit = func(c *x509.Certificate) { c.SubjectKeyId = []byte("20 bytes of anything") }
		}},
		{"a long identifier", "hash of the key", func(l *leafIssuer) {
			l.edit = func(c *x509.Certificate) { c.SubjectKeyId = make([]byte, 1000) }
		}},
		{"a longer life", "spec.duration", func(l *leafIssuer) {
			l.edit = func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(2 * time.Minute) }
		}},
		{"a past life", "expired", func(l *leafIssuer) {
			l.edit = func(c *x509.Certificate) {
				c.NotBefore, c.NotAfter = c.NotBefore.Add(-2*time.Hour), c.NotAfter.Add(-2*time.Hour)
			}
		}},
		{"a life to come", "expired or is not yet valid", func(l *leafIssuer) { l.edit = func(c *x509.Certificate) { c.NotBefore = c.NotBefore.Add(time.Minute) } }},
		{"no certificate", "there is none", func(l *leafIssuer) { l.answer = func(a *UpstreamAnswer) { a.Chain = nil } }},
		{"no answer", "there is none", func(l *leafIssuer) { l.answer = func(a *UpstreamAnswer) { *a = UpstreamAnswer{} } }},
		{"too much", "certificates came", func(l *leafIssuer) { l.answer = func(a *UpstreamAnswer) { a.Roots = slices.Repeat(a.Roots, 30) } }},
		{"another root of the same name", "unknown authority", func(l *leafIssuer) {
			l.above = newUpstream(l.t, l.now)
			l.answer = func(a *UpstreamAnswer) { a.Roots = nil }
		}},
	} {
		t.Run(c.name, func(t *testing.T) {
			w := newPerWorkload(t, false)
			c.spoil(w.issuer)
			csr := wholeCSR(t, corpusID, nil)
			issued, err := w.ask(t.Context(), corpusID, csr)
			wantError(t, err, c.want)
			var no *UpstreamError
			if !errors.As(err, &no) || no.Reason != UpstreamUnusable || issued != nil {
				t.Errorf("%+v, %v", no, issued)
			}
			entries, err := w.IssuanceLog().Entries(time.Time{})
			if err != nil || len(entries) != 1 || entries[0].Outcome != OutcomeFailed || entries[0].Kind != KindRequest || !strings.Contains(entries[0].Error, c.want) {
				t.Errorf("logged %+v, %v", entries, err)
			}
			if _, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil)); err == nil || len(w.issuer.asked) != 1 {
				t.Errorf("asked %d times: %v", len(w.issuer.asked), err)
			}
			w.issuer.edit, w.issuer.key, w.issuer.answer, w.issuer.above = nil, nil, nil, w.e.cfg.Upstream.(*authority)
			w.clock.advance(leafHoldOff)
			if _, err := w.ask(t.Context(), corpusID, csr); err != nil {
				t.Errorf("after that: %v", err)
			}
			entries, err = w.IssuanceLog().Entries(time.Time{})
			if err != nil || len(entries) != 1 || entries[0].Outcome != OutcomeIssued || entries[0].Error != "" {
				t.Errorf("then logged %+v, %v", entries, err)
			}
		})
	}
}

// An authority above may name the key in a leaf, by a hash of either kind.
func TestLeafKeyID(t *testing.T) {
	csr := wholeCSR(t, corpusID, nil)
	request, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		t.Fatal(err)
	}
	bits, err := request.PublicKey.(*ecdsa.PublicKey).Bytes()
	if err != nil {
		t.Fatal(err)
	}
	old, long := sha1.Sum(bits), sha256.Sum256(bits)
	for name, id := range map[string][]byte{"SHA-1": old[:], "SHA-256": long[:20]} {
		w := newPerWorkload(t, false)
		w.issuer.edit = func(c *x509.Certificate) { c.SubjectKeyId = id }
		if issued, err := w.ask(t.Context(), corpusID, csr); err != nil || hexOf(parse(t, issued.Chain[0]).SubjectKeyId) != hexOf(id) {
			t.Errorf("%s: %v", name, err)
		}
	}
}

// Defends what was issued from outliving who signed it, and peers from a chain through
// a certificate that may not sign for the mesh.
func TestLeafChain(t *testing.T) {
	w := newPerWorkload(t, true)
	w.clock.advance(300*24*time.Hour - 31*time.Minute)
	issued, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil))
	if err != nil || issued.NotAfter.Sub(w.clock.now()) != 30*time.Minute {
		t.Fatalf("%+v, %v", issued, err)
	}
	w.issuer.edit = func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(leafLate + time.Second) }
	_, err = w.ask(t.Context(), spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/b"), wholeCSR(t, spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/b"), nil))
	wantError(t, err, "lives until")
	w.issuer.edit = func(c *x509.Certificate) { c.NotAfter = c.NotAfter.Add(leafLate) }
	w.issuer.above.via[0] = caCert(t, "between", w.clock.now(), 20*time.Minute, &pair{cert: w.issuer.above.root, key: w.issuer.above.key}, nil)
	_, err = w.ask(t.Context(), spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/c"), wholeCSR(t, spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/c"), nil))
	wantError(t, err, "outlives")
	w.issuer.edit = nil
	other := spiffeid.RequireTrustDomainFromString("other.example").ID().URL()
	w.issuer.above.via[0] = caCert(t, "between", w.clock.now(), 200*24*time.Hour, &pair{cert: w.issuer.above.root, key: w.issuer.above.key}, func(c *x509.Certificate) { c.URIs = []*url.URL{other} })
	_, err = w.ask(t.Context(), spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/d"), wholeCSR(t, spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/d"), nil))
	wantError(t, err, "stands above it")
}

// Defends nodes from certificates below a root that they do not trust yet: what comes
// from below another one is refused, an intermediate from there is asked for, and once
// its root signs, workloads are certified again.
func TestLeafMovedRoot(t *testing.T) {
	w := newPerWorkload(t, false)
	w.issuer.above.replace(nil)
	_, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil))
	wantError(t, err, "replaces the old one everywhere first")
	if s := w.e.steps(t); s.Reason != UpstreamReady {
		t.Fatalf("%+v", s)
	}
	follow(t, w.Authority)
	if roots := w.Roots(); len(roots) != 2 || roots[1].Role != RootNext || !roots[1].Certificate.Equal(w.issuer.above.root) {
		t.Fatalf("%+v", roots)
	}
	w.clock.advance(leafHoldOff)
	if _, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil)); err == nil {
		t.Error("certified below a root that is not trusted everywhere")
	}
	if err := w.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	w.clock.advance(leafHoldOff)
	issued, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil))
	if err != nil {
		t.Fatal(err)
	}
	if err := verifies(t, issued, w.issuer.above.root, w.clock.now()); err != nil || w.LeavesElsewhere(w.Bundle()[0]) != "" {
		t.Error(err)
	}
}

// A no is handed on with its words and is not asked again at once; what waits is asked
// again with the same number; the status says it while it lasts, and no longer.
func TestLeafNotYet(t *testing.T) {
	w := newPerWorkload(t, false)
	w.issuer.before = func(context.Context, LeafRequest) error { return &UpstreamError{UpstreamDenied, "denied by a policy"} }
	_, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil))
	wantError(t, err, "denied by a policy")
	if _, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil)); err == nil || !strings.Contains(err.Error(), "denied by a policy") || len(w.issuer.asked) != 1 {
		t.Errorf("asked %d times: %v", len(w.issuer.asked), err)
	}
	w.clock.advance(leafHoldOff)
	w.issuer.before = func(context.Context, LeafRequest) error { return &UpstreamError{UpstreamPending, "waits for approval"} }
	csr := wholeCSR(t, corpusID, nil)
	for range 3 {
		_, err = w.ask(t.Context(), corpusID, csr)
		wantError(t, err, "waits for approval")
	}
	if len(w.issuer.asked) != 4 {
		t.Errorf("asked %d times", len(w.issuer.asked))
	}
	entries, err := w.IssuanceLog().Entries(time.Time{})
	if err != nil || len(entries) != 2 || entries[0].Outcome != OutcomeFailed || entries[1].Outcome != OutcomeUnknown || entries[1].Kind != KindRequest {
		t.Errorf("logged %+v, %v", entries, err)
	}
	if of, _, err := w.IssuanceLog().Of(corpusID, w.clock.now()); len(of) != 0 || err != nil {
		t.Errorf("%+v can be revoked, %v", of, err)
	}
	w.clock.advance(leafTrouble)
	s := w.e.steps(t)
	reason, message := s.Said()
	if reason != UpstreamPending || !strings.Contains(message, "waits for approval") || !strings.Contains(message, "until they expire") {
		t.Errorf("%s: %s", reason, message)
	}
	w.issuer.before = nil
	if _, err := w.ask(t.Context(), corpusID, csr); err != nil {
		t.Fatal(err)
	}
	s = w.e.steps(t)
	if reason, _ := s.Said(); reason != UpstreamReady {
		t.Errorf("%+v", s)
	}
	if entries, err := w.IssuanceLog().Entries(time.Time{}); err != nil || len(entries) != 2 || entries[1].Outcome != OutcomeIssued {
		t.Errorf("then logged %+v, %v", entries, err)
	}
}

// What it defends: that who asks hears why no certificate came. A caller whose own
// patience ends first hears of that alone.
func TestLeafAnswersInTime(t *testing.T) {
	w := newPerWorkload(t, false)
	w.issuer.before = func(ctx context.Context, _ LeafRequest) error {
		<-ctx.Done()
		return &UpstreamError{UpstreamPending, "waits for approval"}
	}
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	id := spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/web")
	_, err := w.ask(ctx, id, wholeCSR(t, id, nil))
	if err == nil || !strings.Contains(err.Error(), "waits for approval") || ctx.Err() != nil {
		t.Errorf("%v; the caller's patience: %v", err, ctx.Err())
	}
}

// The intent is durable before anything is asked for: without a log nothing is.
func TestLeafIntentFirst(t *testing.T) {
	w := newPerWorkload(t, false)
	seen := false
	w.issuer.before = func(_ context.Context, req LeafRequest) error {
		entries, err := w.IssuanceLog().Entries(time.Time{})
		seen = err == nil && len(entries) == 1 && entries[0].ID == req.ID.String() && entries[0].Outcome == OutcomeUnknown
		return nil
	}
	if _, err := w.ask(t.Context(), corpusID, wholeCSR(t, corpusID, nil)); err != nil || !seen {
		t.Errorf("intent seen %t: %v", seen, err)
	}
	p, err := w.Prepare(Request{ID: corpusID, CSR: wholeCSR(t, corpusID, nil)})
	if err != nil {
		t.Fatal(err)
	}
	w.issuance.f.Close()
	seen = false
	w.issuer.before = func(context.Context, LeafRequest) error { seen = true; return nil }
	if _, err := w.Issue(p); err == nil || seen {
		t.Errorf("asked %t: %v", seen, err)
	}
	w.issuance.mu.Lock()
	w.issuance.f = nil
	w.issuance.mu.Unlock()
}

// No more than a few are asked for at a time, and who waits for a place is bounded by
// its own context.
func TestLeafAtOnce(t *testing.T) {
	w := newPerWorkload(t, false)
	release, in := make(chan struct{}), make(chan struct{}, 100)
	w.issuer.before = func(ctx context.Context, _ LeafRequest) error {
		in <- struct{}{}
		if d, ok := ctx.Deadline(); !ok || time.Until(d) > leafWait {
			t.Errorf("bounded by %v, %t", d, ok)
		}
		select {
		case <-release:
		case <-ctx.Done():
			return ctx.Err()
		}
		return nil
	}
	var waits sync.WaitGroup
	for i := range leavesAtOnce {
		id := spiffeid.RequireFromString(fmt.Sprintf("spiffe://mesh.example/ns/shop/sa/w%d", i))
		csr := wholeCSR(t, id, nil)
		waits.Go(func() {
			if _, err := w.ask(t.Context(), id, csr); err != nil {
				t.Error(err)
			}
		})
	}
	for range leavesAtOnce {
		<-in
	}
	ctx, cancel := context.WithTimeout(t.Context(), 100*time.Millisecond)
	defer cancel()
	_, err := w.ask(ctx, corpusID, wholeCSR(t, corpusID, nil))
	wantError(t, err, "8 other certificates")
	if len(in) != 0 {
		t.Error("a ninth is asked for")
	}
	close(release)
	waits.Wait()
}

// In a mesh whose own root still signs, that goes on until the issuer's is trusted.
func TestLeafBeforeSwitch(t *testing.T) {
	clk, store := newClock(), &sharedRoots{}
	own := openTest(t, t.TempDir(), func(o *Options) { o.RootStore, o.Now = store, clk.now })
	root := own.Bundle()[0]
	issuer := &leafIssuer{t: t, now: clk.now, above: newUpstream(t, clk.now)}
	a := openTest(t, t.TempDir(), func(o *Options) { o.RootStore, o.Above, o.Now, o.Leaves = store, true, clk.now, issuer })
	p, err := a.Prepare(Request{ID: corpusID, CSR: wholeCSR(t, corpusID, nil)})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := a.Issue(p)
	if err != nil || len(issuer.asked) != 0 {
		t.Fatalf("asked %d times: %v", len(issuer.asked), err)
	}
	if err := verifies(t, issued, root, clk.now()); err != nil {
		t.Error(err)
	}
	if _, err := tryOpen(t, t.TempDir(), func(o *Options) { o.RootStore, o.Leaves = &sharedRoots{}, issuer }); err == nil || !strings.Contains(err.Error(), "Leaves needs Above") {
		t.Errorf("opened: %v", err)
	}
}
