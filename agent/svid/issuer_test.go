package svid

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"fmt"
	"log/slog"
	"math/big"
	"net/url"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/signet-mesh/signet/internal/mesh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var td = spiffeid.RequireTrustDomainFromString("mesh.test")

// authority signs with real keys: a root and an intermediate.
type authority struct {
	root, inter       *x509.Certificate
	rootKey, interKey crypto.Signer
}

func newAuthority(t testing.TB, now time.Time) *authority {
	t.Helper()
	a := &authority{rootKey: newKey(t), interKey: newKey(t)}
	tmpl := func(n int64, name string) *x509.Certificate {
		return &x509.Certificate{
			SerialNumber: big.NewInt(n), Subject: pkix.Name{CommonName: name},
			NotBefore: now.Add(-time.Hour), NotAfter: now.Add(1000 * time.Hour),
			IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
		}
	}
	a.root = sign(t, tmpl(1, "root"), nil, a.rootKey.Public(), a.rootKey)
	a.inter = sign(t, tmpl(2, "intermediate"), a.root, a.interKey.Public(), a.rootKey)
	return a
}

func newKey(t testing.TB) crypto.Signer {
	k, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	return k
}

func sign(t testing.TB, tmpl, parent *x509.Certificate, pub crypto.PublicKey, key crypto.Signer) *x509.Certificate {
	t.Helper()
	if parent == nil {
		parent = tmpl
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, parent, pub, key)
	if err != nil {
		t.Fatal(err)
	}
	c, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

// issuer is the control plane as the manager sees it.
type issuer struct {
	*authority
	now func() time.Time

	mu     sync.Mutex
	ttl    time.Duration
	ids    map[string]spiffeid.ID                    // by workload
	edit   func(leaf *x509.Certificate)              // spoils what is signed
	spoil  func(*issuer, [][]byte) [][]byte          // changes the chain
	before func(ctx context.Context, w string) error // runs before each answer
	asked  []string                                  // workloads, in order
	keys   []string                                  // that certificates were asked for, in order
	at     []time.Time
	active int
	peak   int
	serial int64
}

func (i *issuer) Issue(ctx context.Context, w string, csr []byte) ([][]byte, error) {
	i.mu.Lock()
	i.asked = append(i.asked, w)
	i.at = append(i.at, i.now())
	if req, err := x509.ParseCertificateRequest(csr); err == nil {
		i.keys = append(i.keys, string(req.RawSubjectPublicKeyInfo))
	}
	i.active++
	i.peak = max(i.peak, i.active)
	before := i.before
	i.mu.Unlock()
	defer func() { i.mu.Lock(); i.active--; i.mu.Unlock() }()
	if before != nil {
		if err := before(ctx, w); err != nil {
			return nil, err
		}
	}
	i.mu.Lock()
	defer i.mu.Unlock()
	chain, err := i.issue(w, csr)
	if err == nil && i.spoil != nil {
		chain = i.spoil(i, chain)
	}
	return chain, err
}

// issue signs; the caller holds mu.
func (i *issuer) issue(w string, csr []byte) ([][]byte, error) {
	i.serial++
	serial, ttl, id, edit := i.serial, i.ttl, i.ids[w], i.edit
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, err
	}
	if err := req.CheckSignature(); err != nil {
		return nil, err
	}
	if id.IsZero() {
		return nil, fmt.Errorf("workload %s is not on this node", w)
	}
	if len(req.Extensions) != 1 || len(req.URIs) != 1 || req.URIs[0].String() != id.String() {
		return nil, fmt.Errorf("the request names %v and not %s alone", req.URIs, id)
	}
	now := i.now()
	leaf := &x509.Certificate{
		SerialNumber: big.NewInt(serial), URIs: []*url.URL{id.URL()},
		NotBefore: now.Add(-10 * time.Second), NotAfter: now.Add(ttl),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}
	if edit != nil {
		edit(leaf)
	}
	der, err := x509.CreateCertificate(rand.Reader, leaf, i.inter, req.PublicKey, i.interKey)
	return [][]byte{der, i.inter.Raw}, err
}

// set changes the issuer while it may be in use.
func (i *issuer) set(f func(*issuer)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f(i)
}

func (i *issuer) count() int {
	i.mu.Lock()
	defer i.mu.Unlock()
	return len(i.asked)
}

// node is a running manager with its issuer.
type node struct {
	*Manager
	t      testing.TB
	issuer *issuer
	state  State
	cancel context.CancelFunc
	done   chan error
	log    *lines
}

// lines collects the log.
type lines struct {
	mu   sync.Mutex
	text strings.Builder
}

func (l *lines) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.Write(b)
}

func (l *lines) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.text.String()
}

func sa(name string) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "ns", "default", "sa", name)
}

func newIssuer(t testing.TB, ttl time.Duration) *issuer {
	return &issuer{
		authority: newAuthority(t, time.Now()), now: time.Now, ttl: ttl,
		ids: map[string]spiffeid.ID{},
	}
}

// workloads declares "name" or "name=serviceaccount".
func (i *issuer) workloads(specs ...string) []mesh.Workload {
	var out []mesh.Workload
	for _, s := range specs {
		name, account, ok := strings.Cut(s, "=")
		if !ok {
			account = name
		}
		w := mesh.Workload{Namespace: "default", Name: name, ServiceAccount: account, ID: sa(account)}
		out = append(out, w)
		i.set(func(i *issuer) { i.ids[w.Key()] = w.ID })
	}
	return out
}

func start(t testing.TB, is *issuer, c Config, specs ...string) *node {
	t.Helper()
	n := prepare(t, is, c)
	n.state = State{TrustDomain: td, Bundle: []*x509.Certificate{is.root}, Workloads: is.workloads(specs...), TTL: is.ttl}
	n.Update(n.state)
	n.run()
	return n
}

// prepare makes a manager that does not run yet.
func prepare(t testing.TB, is *issuer, c Config) *node {
	n := &node{t: t, issuer: is, log: &lines{}}
	c.Issuer = is
	c.Log = slog.New(slog.NewTextHandler(n.log, &slog.HandlerOptions{Level: slog.LevelDebug}))
	if c.Jitter == nil {
		c.Jitter = func() float64 { return 0.5 } // the middle: half life exactly
	}
	n.Manager = New(c)
	return n
}

func (n *node) run() {
	ctx, cancel := context.WithCancel(n.t.Context())
	n.cancel = cancel
	n.done = make(chan error, 1)
	go func() { n.done <- n.Run(ctx) }()
}

func (n *node) stop() {
	n.t.Helper()
	n.cancel()
	if err := <-n.done; err != nil {
		n.t.Errorf("Run = %v", err)
	}
}

func (n *node) must(name string) *SVID {
	n.t.Helper()
	s, ok := n.Get(sa(name))
	if !ok {
		n.t.Fatalf("no certificate for %s; log:\n%s", name, n.log)
	}
	return s
}
