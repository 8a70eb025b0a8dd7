package federation

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/bundle"
	"github.com/signet-mesh/signet/internal/mesh"
)

// shows is a handler that answers with whatever it holds.
type shows struct{ atomic.Pointer[string] }

func (s *shows) set(doc string) { s.Store(&doc) }

func (s *shows) ServeHTTP(w http.ResponseWriter, _ *http.Request) {
	_, _ = w.Write([]byte(*s.Load()))
}

// document is an authority's bundle with a number.
func document(t *testing.T, a *ca.Authority, sequence uint64) string {
	t.Helper()
	b := &bundle.Bundle{TrustDomain: a.TrustDomain(), Sequence: sequence, RefreshHint: time.Second}
	b.Roots = a.Bundle()
	keys, _ := a.JWTKeys()
	b.JWTKeys = map[string]crypto.PublicKey{}
	for _, k := range keys {
		b.JWTKeys[k.ID] = k.Key
	}
	doc, err := b.Marshal()
	if err != nil {
		t.Fatal(err)
	}
	return string(doc)
}

// follower is a Follower whose copies are in a directory.
func newFollower(dir string) *Follower {
	return &Follower{Own: meshTD, Log: discard(), Timeout: 2 * time.Second, Store: func(td spiffeid.TrustDomain) Store {
		return File(filepath.Join(dir, td.Name()+".json"))
	}}
}

// take begins to follow, without asking by itself.
func take(t *testing.T, f *Follower, spec *mesh.Federation) *followed {
	t.Helper()
	one := f.begin(t.Context(), spec)
	if f.follows == nil {
		f.follows = map[spiffeid.TrustDomain]*followed{}
	}
	f.follows[spec.TrustDomain] = one
	return one
}

// trusts returns the roots that are trusted of the partner.
func trusts(f *Follower) []*x509.Certificate {
	all, _ := f.Bundles()
	for _, b := range all {
		if b.TrustDomain == partnerTD {
			return b.Roots
		}
	}
	return nil
}

// onWeb serves a handler with a certificate of the test's own web authority.
func onWeb(t *testing.T, f *Follower, h http.Handler) *httptest.Server {
	t.Helper()
	s := httptest.NewTLSServer(h)
	t.Cleanup(s.Close)
	if f.Web == nil {
		f.Web = x509.NewCertPool()
	}
	f.Web.AddCert(s.Certificate())
	return s
}

// TestFetchFails: whatever an endpoint answers instead of a bundle, what is
// trusted stays so, and the status says what was wrong.
func TestFetchFails(t *testing.T) {
	partner := openAuthority(t, partnerTD)
	f := newFollower(t.TempDir())
	var answers shows
	hangs := make(chan struct{})
	defer close(hangs)
	mux := http.NewServeMux()
	mux.Handle("/bundle", &answers)
	s := onWeb(t, f, mux)
	answers.set(document(t, partner, 5))
	spec := &mesh.Federation{TrustDomain: partnerTD, URL: s.URL + "/bundle"}
	one := take(t, f, spec)
	if err := f.once(t.Context(), one); err != nil || len(trusts(f)) != 1 {
		t.Fatal(err)
	}
	mux.HandleFunc("/error", func(w http.ResponseWriter, _ *http.Request) {
		w.WriteHeader(http.StatusInternalServerError)
		_, _ = w.Write([]byte(document(t, openAuthority(t, partnerTD), 9))) // nobody believes it
	})
	mux.HandleFunc("/huge", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = fmt.Fprintf(w, `{"keys":[],"x":"%s"}`, strings.Repeat("x", bundle.MaxDocument))
	})
	mux.HandleFunc("/hangs", func(w http.ResponseWriter, _ *http.Request) {
		_, _ = w.Write([]byte(`{"keys":`))
		w.(http.Flusher).Flush()
		<-hangs
	})
	mux.HandleFunc("/plain", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "http://"+r.Host+"/bundle", http.StatusFound)
	})
	mux.HandleFunc("/user", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, "https://me@"+r.Host+"/bundle", http.StatusFound)
	})
	mux.HandleFunc("/round", func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "/round", http.StatusFound) })
	stranger := httptest.NewTLSServer(&answers)
	defer stranger.Close()
	stranger.TLS.Certificates = []tls.Certificate{*selfSigned(t)}
	mux.HandleFunc("/stranger", func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, stranger.URL, http.StatusFound)
	})
	for path, want := range map[string]string{
		"/error": "500", "/huge": "bytes", "/hangs": "deadline", "/plain": "https only", "/user": "names a user",
		"/round": "redirects", "/stranger": "certificate", "/absent": "404",
	} {
		one.spec.URL = s.URL + path
		if err := f.once(t.Context(), one); err == nil || !strings.Contains(strings.ToLower(err.Error()), want) {
			t.Errorf("%s: %v; want %q", path, err, want)
		}
	}
	one.spec.URL = s.URL + "/bundle"
	for what, doc := range map[string]string{
		"a page":     "<html>",
		"no keys":    "{}",
		"an old one": document(t, openAuthority(t, partnerTD), 4),
	} {
		answers.set(doc)
		if err := f.once(t.Context(), one); err == nil {
			t.Errorf("%s: taken", what)
		}
	}
	if got := trusts(f); len(got) != 1 || !got[0].Equal(partner.Bundle()[0]) {
		t.Errorf("after all that, %d roots are trusted", len(got))
	}
	// Revoking all is no failure.
	answers.set(`{"keys":[],"spiffe_sequence":6}`)
	if err := f.once(t.Context(), one); err != nil || len(trusts(f)) != 0 {
		t.Errorf("an empty list: %v, %d roots", err, len(trusts(f)))
	}
}

func selfSigned(t *testing.T) *tls.Certificate {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{SerialNumber: big.NewInt(2), NotAfter: time.Now().Add(time.Hour), IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: [][]byte{der}, PrivateKey: key}
}

// TestRedirect: a redirect to another https URL is followed, and is forgotten.
func TestRedirect(t *testing.T) {
	partner := openAuthority(t, partnerTD)
	f := newFollower(t.TempDir())
	var answers shows
	answers.set(document(t, partner, 1))
	behind := onWeb(t, f, &answers)
	asked := 0
	first := onWeb(t, f, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		http.Redirect(w, r, behind.URL, http.StatusTemporaryRedirect)
	}))
	one := take(t, f, &mesh.Federation{TrustDomain: partnerTD, URL: first.URL})
	for range 2 {
		if err := f.once(t.Context(), one); err != nil || len(trusts(f)) != 1 {
			t.Fatal(err)
		}
	}
	if asked != 2 {
		t.Errorf("the endpoint was asked %d times, of 2", asked)
	}
}

// TestWebCertificate: with https_web the certificate must be of an authority that
// the machine trusts, and for the host in the URL.
func TestWebCertificate(t *testing.T) {
	var answers shows
	answers.set(document(t, openAuthority(t, partnerTD), 1))
	f := newFollower(t.TempDir())
	s := onWeb(t, f, &answers)
	elsewhere := strings.Replace(s.URL, "127.0.0.1", "localhost", 1) // not in the certificate
	for what, c := range map[string]struct {
		web *x509.CertPool
		url string
	}{"of nobody known": {x509.NewCertPool(), s.URL}, "for another host": {f.Web, elsewhere}} {
		f.Web = c.web
		one := take(t, f, &mesh.Federation{TrustDomain: partnerTD, URL: c.url})
		var wrong *tls.CertificateVerificationError
		if err := f.once(t.Context(), one); !errors.As(err, &wrong) {
			t.Errorf("%s: %v", what, err)
		}
	}
}

// spiffeEndpoint serves an authority's bundle with a certificate of signer for id.
func spiffeEndpoint(t *testing.T, signer *ca.Authority, id spiffeid.ID, h http.Handler) (url string) {
	t.Helper()
	cert, err := signer.ServerCertificate(id, time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan error, 1)
	go func() { done <- Serve(ctx, l, cert.GetCertificate, h, discard()) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return "https://" + l.Addr().String() + Path
}

func rotate(t *testing.T, a *ca.Authority, steps ...func() error) {
	t.Helper()
	for _, step := range steps {
		if err := step(); err != nil {
			t.Fatal(err)
		}
	}
}

// TestSPIFFEProfile: an endpoint is proven by the bundle in the document once,
// and from then on by what was fetched: over rotations by which nothing of the
// first is left, and over a restart.
func TestSPIFFEProfile(t *testing.T) {
	partner := openAuthority(t, partnerTD)
	var answers shows
	first := document(t, partner, 1)
	answers.set(first)
	id := ca.BundleEndpointID(partnerTD)
	dir := t.TempDir()
	f := newFollower(dir)
	spec := &mesh.Federation{TrustDomain: partnerTD, URL: spiffeEndpoint(t, partner, id, &answers), Endpoint: id, Bundle: []byte(first)}
	one := take(t, f, spec)
	if len(trusts(f)) != 1 {
		t.Error("the operator's own bundle is not trusted")
	}
	for n := uint64(2); n < 6; n += 2 {
		rotate(t, partner, partner.PrepareRoot)
		answers.set(document(t, partner, n))
		if err := f.once(t.Context(), one); err != nil || len(trusts(f)) != 2 {
			t.Fatalf("with the next root: %v, %d roots", err, len(trusts(f)))
		}
		rotate(t, partner, partner.SwitchRoot, partner.RetireRoots)
		answers.set(document(t, partner, n+1))
		if err := f.once(t.Context(), one); err != nil || len(trusts(f)) != 1 {
			t.Fatalf("with the former withdrawn: %v, %d roots", err, len(trusts(f)))
		}
	}
	// Started again, with the same document.
	f = newFollower(dir)
	one = take(t, f, spec)
	if got := trusts(f); len(got) != 1 || !got[0].Equal(partner.Bundle()[0]) {
		t.Error("the last good copy is not trusted after a restart")
	}
	if err := f.once(t.Context(), one); err != nil {
		t.Errorf("after a restart: %v", err)
	}
	// Without the copy, the operator's bundle proves it no longer.
	f = newFollower(t.TempDir())
	if err := f.once(t.Context(), take(t, f, spec)); err == nil {
		t.Error("the first root still proves the endpoint")
	}
}

// TestSPIFFEImpostors: who does not prove to be the endpoint is not believed.
func TestSPIFFEImpostors(t *testing.T) {
	partner, other := openAuthority(t, partnerTD), openAuthority(t, partnerTD)
	third := openAuthority(t, spiffeid.RequireTrustDomainFromString("third.test"))
	var answers shows
	answers.set(document(t, other, 9))
	f := newFollower(t.TempDir())
	first := document(t, partner, 1)
	id := ca.BundleEndpointID(partnerTD)
	redirects := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		http.Redirect(w, r, spiffeEndpoint(t, partner, ca.ControlID(partnerTD), &answers), http.StatusFound)
	})
	for what, url := range map[string]string{
		"another identity of the trust domain":  spiffeEndpoint(t, partner, ca.ControlID(partnerTD), &answers),
		"the name below another root":           spiffeEndpoint(t, other, id, &answers),
		"another trust domain":                  spiffeEndpoint(t, third, ca.BundleEndpointID(third.TrustDomain()), &answers),
		"a certificate of the web":              onWeb(t, f, &answers).URL,
		"a redirect that proves another's name": spiffeEndpoint(t, partner, id, redirects),
	} {
		one := take(t, f, &mesh.Federation{TrustDomain: partnerTD, URL: url, Endpoint: id, Bundle: []byte(first)})
		if err := f.once(t.Context(), one); err == nil {
			t.Errorf("%s: believed", what)
		}
		if got := trusts(f); len(got) != 1 || !got[0].Equal(partner.Bundle()[0]) {
			t.Errorf("%s: trust has changed", what)
		}
	}
}

// TestThirdParty: a bundle that another trust domain serves is proven by that
// one's bundle, and counts for the trust domain that the document names.
func TestThirdParty(t *testing.T) {
	partner, third := openAuthority(t, partnerTD), openAuthority(t, spiffeid.RequireTrustDomainFromString("third.test"))
	var answers, thirds shows
	answers.set(document(t, partner, 1))
	thirds.set(document(t, third, 1))
	f := newFollower(t.TempDir())
	id := ca.BundleEndpointID(third.TrustDomain())
	one := take(t, f, &mesh.Federation{TrustDomain: partnerTD, URL: spiffeEndpoint(t, third, id, &answers), Endpoint: id})
	if err := f.once(t.Context(), one); err == nil || !strings.Contains(err.Error(), "no Federation for that") {
		t.Errorf("without the third's bundle: %v", err)
	}
	take(t, f, &mesh.Federation{TrustDomain: third.TrustDomain(), URL: spiffeEndpoint(t, third, id, &thirds), Endpoint: id, Bundle: []byte(*thirds.Load())})
	if err := f.once(t.Context(), one); err != nil || len(trusts(f)) != 1 {
		t.Errorf("with it: %v", err)
	}
}

// TestRun: documents come, are edited and go; what is followed is asked again by
// itself, the mesh's own name is never followed, and one that is gone is nobody.
func TestRun(t *testing.T) {
	partner := openAuthority(t, partnerTD)
	var answers shows
	answers.set(document(t, partner, 1))
	f := newFollower(t.TempDir())
	s := onWeb(t, f, &answers)
	feed := &mesh.Feed{}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); f.Run(ctx, feed) }()
	defer func() { cancel(); <-done }()
	set := func(specs ...mesh.Federation) {
		feed.Set(&mesh.View{State: &mesh.State{TrustDomain: meshTD, Federations: specs}})
	}
	eventually := func(what string, good func() bool) {
		t.Helper()
		for end := time.Now().Add(10 * time.Second); !good(); time.Sleep(5 * time.Millisecond) {
			if time.Now().After(end) {
				t.Fatalf("waited for %s; %+v", what, f.Status())
			}
		}
	}
	spec := mesh.Federation{Name: "a", TrustDomain: partnerTD, URL: s.URL}
	set(spec, mesh.Federation{Name: "own", TrustDomain: meshTD, URL: s.URL})
	eventually("the first bundle", func() bool { return len(trusts(f)) == 1 })
	if all := f.Status(); len(all) != 1 || all[0].Sequence != 1 || all[0].FetchedAt.IsZero() || all[0].Roots != 1 || all[0].Error != "" {
		t.Errorf("%+v", all)
	}
	rotate(t, partner, partner.PrepareRoot)
	answers.set(document(t, partner, 2))
	_, changed := f.Bundles()
	eventually("the next, by itself", func() bool { return len(trusts(f)) == 2 })
	select {
	case <-changed:
	default:
		t.Error("who waits for a change was not told")
	}
	answers.set("{}")
	eventually("the failure to be told", func() bool { return f.Status()[0].Error != "" })
	// An edit that leads nowhere, with nothing to begin with: trust stays.
	moved := spec
	moved.URL += "/moved"
	lost := make(chan struct{})
	go func() {
		defer close(lost)
		for range 200 {
			if len(trusts(f)) != 2 {
				t.Error("trust was gone for a moment while the document was edited")
				return
			}
			time.Sleep(time.Millisecond)
		}
	}()
	set(moved)
	<-lost
	set()
	eventually("trust to end", func() bool { all, _ := f.Bundles(); return len(all) == 0 })
	answers.set("{}")
	set(spec)
	eventually("a failure", func() bool { all := f.Status(); return len(all) == 1 && all[0].Error != "" })
	if len(trusts(f)) != 0 {
		t.Error("a copy from before the end of a federation is trusted")
	}
}

// TestInterval: how often is asked is the other's to say, within bounds.
func TestInterval(t *testing.T) {
	for hint, want := range map[time.Duration]time.Duration{
		0: 5 * time.Minute, time.Second: time.Second, 10 * time.Minute: 10 * time.Minute,
		time.Millisecond: time.Second, 365 * 24 * time.Hour: time.Hour,
	} {
		if got := interval(&bundle.Bundle{RefreshHint: hint}); got != want {
			t.Errorf("hint %s: %s, want %s", hint, got, want)
		}
	}
	if got := interval(nil); got != 5*time.Minute {
		t.Errorf("without a bundle: %s", got)
	}
}

// TestCertificateFiles: a certificate that is replaced is served within seconds;
// one that makes no sense is not.
func TestCertificateFiles(t *testing.T) {
	dir := t.TempDir()
	cert, key := filepath.Join(dir, "tls.crt"), filepath.Join(dir, "tls.key")
	write := func(pair *tls.Certificate) {
		der, err := x509.MarshalPKCS8PrivateKey(pair.PrivateKey)
		if err != nil {
			t.Fatal(err)
		}
		for path, block := range map[string]*pem.Block{cert: {Type: "CERTIFICATE", Bytes: pair.Certificate[0]}, key: {Type: "PRIVATE KEY", Bytes: der}} {
			if err := os.WriteFile(path, pem.EncodeToMemory(block), 0o600); err != nil {
				t.Fatal(err)
			}
		}
	}
	if _, err := OpenCertificate(cert, key, discard()); err == nil {
		t.Error("files that are not there are taken")
	}
	one, two := selfSigned(t), selfSigned(t)
	write(one)
	files, err := OpenCertificate(cert, key, discard())
	if err != nil {
		t.Fatal(err)
	}
	serves := func(want *tls.Certificate) bool {
		files.looked = time.Time{}
		got, err := files.GetCertificate(nil)
		return err == nil && string(got.Certificate[0]) == string(want.Certificate[0])
	}
	if !serves(one) {
		t.Error("not the first")
	}
	if err := os.WriteFile(cert, []byte("nonsense"), 0o600); err != nil {
		t.Fatal(err)
	}
	if !serves(one) {
		t.Error("nonsense ends the service")
	}
	write(two)
	if !serves(two) {
		t.Error("the new one is not served")
	}
}
