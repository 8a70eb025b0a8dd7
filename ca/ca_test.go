package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"log/slog"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

var testDomain = spiffeid.RequireTrustDomainFromString("mesh.example")

// clock is a clock that tests move.
type clock struct {
	mu sync.Mutex
	t  time.Time // guarded by mu
}

func newClock() *clock { return &clock{t: time.Now().Truncate(time.Second).UTC()} }

func (c *clock) now() time.Time {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.t
}

func (c *clock) advance(d time.Duration) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.t = c.t.Add(d)
}

// testLog writes slog output to the test's log.
func testLog(t testing.TB) *slog.Logger {
	return slog.New(slog.NewTextHandler(logWriter{t}, &slog.HandlerOptions{Level: slog.LevelWarn}))
}

type logWriter struct{ t testing.TB }

func (w logWriter) Write(p []byte) (int, error) {
	w.t.Logf("%s", strings.TrimSpace(string(p)))
	return len(p), nil
}

// openTest opens an authority that is closed when the test ends.
func openTest(t testing.TB, dir string, edit func(*Options)) *Authority {
	t.Helper()
	a, err := tryOpen(t, dir, edit)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

func tryOpen(t testing.TB, dir string, edit func(*Options)) (*Authority, error) {
	t.Helper()
	// A test's own directory has the mode that the umask gave it.
	opts := Options{Dir: dir + "/ca", TrustDomain: testDomain, Log: testLog(t)}
	if edit != nil {
		edit(&opts)
	}
	a, err := Open(opts)
	if err != nil {
		return nil, err
	}
	t.Cleanup(func() {
		if err := a.Close(); err != nil {
			t.Error(err)
		}
	})
	return a, nil
}

func newCSR(t testing.TB) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return der
}

func prepare(t testing.TB, a *Authority, ttl time.Duration) *Prepared {
	t.Helper()
	p, err := a.Prepare(Request{ID: corpusID, CSR: newCSR(t), TTL: ttl, Node: "one", Workload: "shop/web-1"})
	if err != nil {
		t.Fatal(err)
	}
	return p
}

func issue(t testing.TB, a *Authority, ttl time.Duration) *Issued {
	t.Helper()
	issued, err := a.Issue(prepare(t, a, ttl))
	if err != nil {
		t.Fatal(err)
	}
	return issued
}

func parse(t testing.TB, der []byte) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func wantError(t testing.TB, err error, want string) {
	t.Helper()
	if err == nil {
		t.Fatalf("no error; want one that says %q", want)
	}
	if !strings.Contains(err.Error(), want) {
		t.Fatalf("error %q; want %q in it", err, want)
	}
}
