package federation

import (
	"context"
	"crypto/x509"
	"errors"
	"io"
	"log/slog"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/bundle"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	meshTD    = spiffeid.RequireTrustDomainFromString("mesh.test")
	partnerTD = spiffeid.RequireTrustDomainFromString("partner.test")
)

func openAuthority(t *testing.T, td spiffeid.TrustDomain) *ca.Authority {
	t.Helper()
	a, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

func discard() *slog.Logger { return slog.New(slog.DiscardHandler) }

// shared is a Store as replicas share one.
type shared struct {
	data    []byte
	version int
	err     error
	before  func() // of the next Save
}

func (s *shared) Load(context.Context) ([]byte, string, error) {
	if s.err != nil || s.version == 0 {
		return nil, "", s.err
	}
	return s.data, string(rune('a' + s.version)), nil
}

func (s *shared) Save(_ context.Context, data []byte, version string) error {
	if f := s.before; f != nil {
		s.before = nil
		f()
	}
	have := ""
	if s.version > 0 {
		have = string(rune('a' + s.version))
	}
	switch {
	case s.err != nil:
		return s.err
	case version != have:
		return ErrChanged
	}
	s.data, s.version = data, s.version+1
	return nil
}

// content is an authority's keys at a time.
type content struct {
	roots []*x509.Certificate
	keys  []ca.JWTKey
}

func contentOf(a *ca.Authority) content {
	roots, _ := a.BundleUpdates()
	keys, _ := a.JWTKeys()
	return content{roots, keys}
}

func newPublisher(s Store) *Publisher {
	return &Publisher{TrustDomain: meshTD, Store: s, RefreshHint: 10 * time.Second, Log: discard()}
}

func look(t *testing.T, p *Publisher, c content, now time.Time) uint64 {
	t.Helper()
	if err := p.look(t.Context(), c.roots, c.keys, now); err != nil {
		t.Fatal(err)
	}
	_, n := p.Document()
	return n
}

// TestSequence: the number rises exactly when the keys change: not with a restart,
// not with a look, not with a second replica that finds the same, and also when
// former keys come back. Whoever follows takes a document whose number has not
// risen for the one that it has, and refuses one whose number has fallen.
func TestSequence(t *testing.T) {
	authority := openAuthority(t, meshTD)
	store := File(filepath.Join(t.TempDir(), "published.json"))
	now := time.Now()
	first := contentOf(authority)
	p := newPublisher(store)
	for range 3 {
		if n := look(t, p, first, now); n != 1 {
			t.Fatalf("the first document is number %d", n)
		}
	}
	if n := look(t, newPublisher(store), first, now); n != 1 {
		t.Errorf("after a restart it is number %d", n)
	}
	if err := authority.PrepareRoot(); err != nil {
		t.Fatal(err)
	}
	second := contentOf(authority)
	if n := look(t, p, second, now); n != 2 {
		t.Errorf("with another root it is number %d", n)
	}
	doc, _ := p.Document()
	if b, err := bundle.Parse(meshTD, doc); err != nil || b.Sequence != 2 || len(b.Roots) != 2 || len(b.JWTKeys) != len(second.keys) || b.RefreshHint != 10*time.Second {
		t.Errorf("%+v %v", b, err)
	}
	// The next root is withdrawn: former content, and news all the same.
	look(t, p, first, now)
	if n := look(t, p, first, now.Add(settleTime)); n != 3 {
		t.Errorf("with the former keys again it is number %d", n)
	}
}

// TestReplicas: of two replicas one hears of a change first. The other is no
// second change, and shows what the first has stored: one bundle, one number.
func TestReplicas(t *testing.T) {
	authority := openAuthority(t, meshTD)
	store, now := &shared{}, time.Now()
	former := contentOf(authority)
	a, b := newPublisher(store), newPublisher(store)
	look(t, a, former, now)
	look(t, b, former, now)
	if err := authority.PrepareRoot(); err != nil {
		t.Fatal(err)
	}
	newer := contentOf(authority)
	look(t, a, newer, now)
	for _, late := range []time.Duration{0, time.Second, settleTime - time.Millisecond} {
		if n := look(t, b, former, now.Add(late)); n != 2 {
			t.Errorf("%s behind: number %d", late, n)
		}
		mine, _ := a.Document()
		if doc, _ := b.Document(); string(doc) != string(mine) {
			t.Errorf("%s behind: the replicas show two documents", late)
		}
	}
	if n := look(t, b, newer, now.Add(settleTime)); n != 2 {
		t.Errorf("caught up: number %d", n)
	}
	// Both at once: whoever is second finds the first's.
	if err := authority.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	if err := authority.RetireRoots(); err != nil {
		t.Fatal(err)
	}
	last := contentOf(authority)
	store.before = func() { look(t, b, last, now) }
	if n := look(t, a, last, now); n != 3 {
		t.Errorf("both at once: number %d", n)
	}
}

// TestPublishFails: while the store is away the last document is shown, and a
// control plane that does not have its keys yet shows none, not an empty bundle,
// by which everybody would distrust it.
func TestPublishFails(t *testing.T) {
	authority := openAuthority(t, meshTD)
	store, all := &shared{}, contentOf(authority)
	p := newPublisher(store)
	for what, c := range map[string]content{"no roots": {nil, all.keys}, "no keys of tokens": {all.roots, nil}} {
		if err := p.look(t.Context(), c.roots, c.keys, time.Now()); err == nil {
			t.Errorf("%s: shown", what)
		}
	}
	if doc, _ := p.Document(); doc != nil {
		t.Errorf("shows %s", doc)
	}
	recorder := httptest.NewRecorder()
	p.ServeHTTP(recorder, httptest.NewRequestWithContext(t.Context(), http.MethodGet, Path, nil))
	if recorder.Code != http.StatusServiceUnavailable {
		t.Errorf("without a document: %d", recorder.Code)
	}
	look(t, p, all, time.Now())
	store.err = errors.New("away")
	if err := p.look(t.Context(), all.roots, all.keys, time.Now()); err == nil {
		t.Error("no error")
	}
	if _, n := p.Document(); n != 1 {
		t.Error("the last document is not shown")
	}
	store.err, store.data = nil, []byte("{")
	if err := p.look(t.Context(), all.roots, all.keys, time.Now()); err == nil {
		t.Error("a document that cannot be read is replaced, and counting begins anew")
	}
}

// TestKnown: the next root signs only when others had three chances to fetch it.
func TestKnown(t *testing.T) {
	authority := openAuthority(t, meshTD)
	p, now := newPublisher(&shared{}), time.Now()
	before := contentOf(authority)
	look(t, p, before, now)
	if err := authority.PrepareRoot(); err != nil {
		t.Fatal(err)
	}
	after := contentOf(authority)
	if _, shown := p.Known(after.roots); shown {
		t.Error("a root counts as known before it is shown")
	}
	look(t, p, after, now)
	if from, shown := p.Known(after.roots); !shown || !from.Equal(now.Add(3*p.RefreshHint)) {
		t.Errorf("%v %v, want %v", from, shown, now.Add(3*p.RefreshHint))
	}
}

func TestCheckRefreshHint(t *testing.T) {
	for _, c := range []struct {
		hint, life time.Duration
		good       bool
	}{
		{time.Second, 24 * time.Hour, true}, {time.Hour, 24 * time.Hour, true}, {5 * time.Minute, time.Hour, true},
		{0, 24 * time.Hour, false}, {2 * time.Hour, 24 * time.Hour, false}, {1500 * time.Millisecond, time.Hour, false},
		{6 * time.Minute, time.Hour, false}, // keys of tokens sign before others have them
	} {
		if err := CheckRefreshHint(c.hint, c.life); (err == nil) != c.good {
			t.Errorf("%s with keys of %s: %v", c.hint, c.life, err)
		}
	}
}

// The endpoint is read by anybody, and nothing else is done with it.
func TestServeHTTP(t *testing.T) {
	authority := openAuthority(t, meshTD)
	p := newPublisher(&shared{})
	look(t, p, contentOf(authority), time.Now())
	for method, want := range map[string]int{http.MethodGet: 200, http.MethodHead: 200, http.MethodPost: 405, http.MethodPut: 405, http.MethodDelete: 405} {
		w := httptest.NewRecorder()
		p.ServeHTTP(w, httptest.NewRequestWithContext(t.Context(), method, Path, nil))
		body, _ := io.ReadAll(w.Body)
		if w.Code != want || want == 200 && w.Header().Get("Content-Type") != "application/json" {
			t.Errorf("%s: %d %v %s", method, w.Code, w.Header(), body)
		}
	}
}

// What is carried over by hand is the authority's bundle as it is shown, without a
// number, which nobody has counted.
//
// What it defends: a control plane that does not know its keys yet gives out no
// bundle without any, by which whoever takes it believes nobody.
func TestUnnumbered(t *testing.T) {
	authority := openAuthority(t, meshTD)
	doc, err := Unnumbered(meshTD, authority)
	if err != nil {
		t.Fatal(err)
	}
	b, err := bundle.Parse(meshTD, doc)
	if err != nil || len(b.Ignored) > 0 || b.Sequence != 0 || b.RefreshHint != 0 || len(b.Roots) != 1 || !b.Roots[0].Equal(authority.Bundle()[0]) || len(b.JWTKeys) == 0 {
		t.Errorf("%+v, %v", b, err)
	}
	keys, _ := authority.JWTKeys()
	for name, c := range map[string]content{"no roots": {keys: keys}, "no keys": {roots: authority.Bundle()}} {
		if doc, err := Unnumbered(meshTD, c); err == nil {
			t.Errorf("%s: %s", name, doc)
		}
	}
}

// BundleUpdates implements Authority.
func (c content) BundleUpdates() ([]*x509.Certificate, <-chan struct{}) { return c.roots, nil }

// JWTKeys implements Authority.
func (c content) JWTKeys() ([]ca.JWTKey, <-chan struct{}) { return c.keys, nil }
