package caserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	healthv1 "google.golang.org/grpc/health/grpc_health_v1"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

var (
	testDomain = spiffeid.RequireTrustDomainFromString("mesh.example")
	webID      = spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/web")
)

// clock is a clock that tests move.
type clock struct {
	mu sync.Mutex
	t  time.Time // guarded by mu
}

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

// world is a control plane that serves on a unix socket.
type world struct {
	t         *testing.T
	clock     *clock
	authority *ca.Authority
	feed      *mesh.Feed
	tokens    *TokenStore
	server    *Server
	socket    string
	logged    *logBuffer
}

// logBuffer keeps what was logged.
type logBuffer struct {
	mu sync.Mutex
	b  strings.Builder // guarded by mu
}

func (l *logBuffer) Write(p []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.Write(p)
}

func (l *logBuffer) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.b.String()
}

func newWorld(t *testing.T, edit func(*Config)) *world {
	t.Helper()
	w := &world{t: t, clock: &clock{t: time.Now()}, feed: new(mesh.Feed), logged: new(logBuffer)}
	dir := t.TempDir()
	log := slog.New(slog.NewTextHandler(w.logged, nil))
	var err error
	w.authority, err = ca.Open(ca.Options{Dir: filepath.Join(dir, "ca"), TrustDomain: testDomain, Now: w.clock.now, Log: log})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.authority.Close() })
	if w.tokens, err = OpenTokens(filepath.Join(dir, "tokens")); err != nil {
		t.Fatal(err)
	}
	w.tokens.now = w.clock.now
	cfg := Config{Authority: w.authority, Feed: w.feed, Tokens: w.tokens, Log: log, Now: w.clock.now}
	if edit != nil {
		edit(&cfg)
	}
	if w.server, err = New(cfg); err != nil {
		t.Fatal(err)
	}
	w.socket = filepath.Join(dir, "control.sock")
	listener, err := net.Listen("unix", w.socket)
	if err != nil {
		t.Fatal(err)
	}
	server := grpc.NewServer(w.server.ServerOptions()...)
	nodev1.RegisterNodeServer(server, w.server)
	nodev1.RegisterReplicaServer(server, w.server.Replicas(nil))
	healthv1.RegisterHealthServer(server, healthv1.UnimplementedHealthServer{}) // stands for any other service
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
	w.feed.Set(testView())
	return w
}

// testView has shop/web-1 on node one, shop/db-1 on node two, bank/vault-1 on
// node two and dark/x-1, whose namespace is off, on node one.
func testView() *mesh.View {
	workload := func(ns, name, sa, node string) mesh.Workload {
		return mesh.Workload{
			Namespace: ns, Name: name, ServiceAccount: sa, Node: node,
			ID: spiffeid.RequireFromSegments(testDomain, "ns", ns, "sa", sa),
		}
	}
	uid := uint32(0)
	web := workload("shop", "web-1", "web", "one")
	web.Attest = &mesh.Attest{UID: &uid, Path: "/bin/web"}
	anyone := mustPattern("spiffe://mesh.example/ns/*/sa/web")
	policy := func(ns, name, sa string, ports ...uint16) authz.Policy {
		return authz.Policy{Namespace: ns, Name: name, TargetServiceAccount: sa, Ports: ports, From: []authz.Pattern{anyone}}
	}
	return &mesh.View{
		Revision: "r1",
		State: &mesh.State{
			TrustDomain: testDomain,
			SVIDTTL:     10 * time.Minute,
			Namespaces:  map[string]mesh.Mode{"shop": mesh.ModeEnforce, "bank": mesh.ModeObserve},
			Workloads: []mesh.Workload{
				workload("bank", "vault-1", "vault", "two"),
				workload("dark", "x-1", "x", "one"),
				workload("shop", "db-1", "db", "two"),
				web,
			},
		},
		Model: authz.NewModel([]authz.Policy{
			policy("shop", "web-http", "web", 80, 8080), policy("shop", "all", ""), policy("shop", "db", "db"),
			policy("bank", "all", ""), policy("dark", "x", "x"),
		}),
	}
}

func mustPattern(s string) authz.Pattern {
	p, err := authz.ParsePattern(s)
	if err != nil {
		panic(err)
	}
	return p
}

func newKey(t testing.TB) (crypto.Signer, []byte) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	return key, csr
}

// certFor issues a certificate straight from an authority.
func certFor(t testing.TB, a *ca.Authority, id spiffeid.ID, ttl time.Duration) *tls.Certificate {
	t.Helper()
	key, csr := newKey(t)
	p, err := a.Prepare(ca.Request{ID: id, CSR: csr, TTL: ttl})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := a.Issue(p)
	if err != nil {
		t.Fatal(err)
	}
	return &tls.Certificate{Certificate: issued.Chain, PrivateKey: key}
}

func nodeID(name string) spiffeid.ID {
	return spiffeid.RequireFromSegments(testDomain, "signet", "node", name)
}

// dial connects with a certificate, or with none when cert is nil.
func (w *world) dial(cert *tls.Certificate) nodev1.NodeClient {
	w.t.Helper()
	return nodev1.NewNodeClient(w.conn(w.authority, cert))
}

func (w *world) conn(bundle x509bundle.Source, cert *tls.Certificate) *grpc.ClientConn {
	w.t.Helper()
	cfg := ClientConfig{TrustDomain: testDomain, Bundle: bundle, Now: w.clock.now}
	if cert != nil {
		cfg.Certificate = func() (*tls.Certificate, error) { return cert, nil }
	}
	tlsConfig, err := ClientTLS(cfg)
	if err != nil {
		w.t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+w.socket, grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)))
	if err != nil {
		w.t.Fatal(err)
	}
	w.t.Cleanup(func() { conn.Close() })
	return conn
}

// asNode connects as a node that has joined.
func (w *world) asNode(name string) nodev1.NodeClient {
	w.t.Helper()
	return w.dial(certFor(w.t, w.authority, nodeID(name), time.Hour))
}

func testContext(t testing.TB) context.Context {
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	t.Cleanup(cancel)
	return ctx
}

func wantCode(t testing.TB, err error, code codes.Code, text string) {
	t.Helper()
	if got := status.Code(err); got != code {
		t.Fatalf("got %v: %v; want %v", got, err, code)
	}
	if !strings.Contains(status.Convert(err).Message(), text) {
		t.Fatalf("message %q; want %q in it", status.Convert(err).Message(), text)
	}
}

// leaf returns the first certificate of a chain of two.
func leaf(t testing.TB, chain [][]byte) *x509.Certificate {
	t.Helper()
	if len(chain) != 2 {
		t.Fatalf("chain of %d; want leaf and intermediate", len(chain))
	}
	c, err := x509.ParseCertificate(chain[0])
	if err != nil {
		t.Fatal(err)
	}
	return c
}
