package workloadapi

import (
	"bytes"
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
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

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

var td = spiffeid.RequireTrustDomainFromString("mesh.test")

func sa(name string) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "ns", "default", "sa", name)
}

// issuer signs with a root's key.
type issuer struct {
	root *x509.Certificate
	key  crypto.Signer

	mu     sync.Mutex
	ttl    time.Duration
	ids    map[string]spiffeid.ID
	refuse error
	serial int64
	tokens *ca.Authority
	noKeys bool   // the bundle has none
	before func() // called once, before the next token
}

func newIssuer(t testing.TB) *issuer {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(time.Now().UnixNano()), Subject: pkix.Name{CommonName: "root"},
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	tokens, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { tokens.Close() })
	return &issuer{root: root, key: key, ttl: time.Hour, ids: map[string]spiffeid.ID{}, tokens: tokens}
}

// IssueJWT refuses as the control plane does.
func (i *issuer) IssueJWT(_ context.Context, w string, audience []string) (string, error) {
	i.mu.Lock()
	id, tokens, refuse, before := i.ids[w], i.tokens, i.refuse, i.before
	i.before = nil
	i.mu.Unlock()
	if before != nil {
		before()
	}
	if refuse != nil {
		return "", refuse
	}
	p, err := tokens.PrepareJWT(ca.JWTRequest{ID: id, Audience: audience})
	if err != nil {
		return "", status.Error(codes.InvalidArgument, err.Error())
	}
	issued, err := tokens.IssueJWT(p)
	if err != nil {
		return "", err
	}
	return issued.Token, nil
}

// jwtKeys is the JWT bundle.
func (i *issuer) jwtKeys() map[string]crypto.PublicKey {
	i.mu.Lock()
	defer i.mu.Unlock()
	out := map[string]crypto.PublicKey{}
	if i.noKeys {
		return out
	}
	keys, _ := i.tokens.JWTKeys()
	for _, k := range keys {
		out[k.ID] = k.Key
	}
	return out
}

func (i *issuer) Issue(_ context.Context, w string, csr []byte) ([][]byte, error) {
	i.mu.Lock()
	defer i.mu.Unlock()
	if i.refuse != nil {
		return nil, i.refuse
	}
	req, err := x509.ParseCertificateRequest(csr)
	if err != nil {
		return nil, err
	}
	id, ok := i.ids[w]
	if !ok {
		return nil, fmt.Errorf("no workload %s", w)
	}
	i.serial++
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: big.NewInt(i.serial), URIs: []*url.URL{id.URL()},
		NotBefore: time.Now().Add(-10 * time.Second), NotAfter: time.Now().Add(i.ttl),
		KeyUsage:    x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
	}, i.root, req.PublicKey, i.key)
	return [][]byte{der}, err
}

// slow has f called while the next token is asked for.
func (i *issuer) slow(f func()) { i.set(func(i *issuer) { i.before = f }) }

func (i *issuer) set(f func(*issuer)) {
	i.mu.Lock()
	defer i.mu.Unlock()
	f(i)
}

// agent is a Workload API on a socket, with everything behind it.
type agent struct {
	t        *testing.T
	dir      string
	socket   string
	issuer   *issuer
	svids    *svid.Manager
	attestor *attest.Attestor
	server   *Server
	ready    atomic.Bool
	perUID   int
	cutOff   spiffeid.ID // quarantined
	revoked  string      // jti
	log      *logText
	refused  refusals

	stopServer context.CancelFunc
	served     chan error
}

type logText struct {
	mu  sync.Mutex
	buf bytes.Buffer
}

func (l *logText) Write(b []byte) (int, error) {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.Write(b)
}

func (l *logText) String() string {
	l.mu.Lock()
	defer l.mu.Unlock()
	return l.buf.String()
}

// rule is a workload: its name, its service account, and whom it attests.
type rule struct {
	name, account string
	attest        mesh.Attest
}

// self is the test's own process.
func self(t *testing.T) mesh.Attest {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	uid := uint32(os.Getuid())
	return mesh.Attest{UID: &uid, Path: exe}
}

func startAgent(t *testing.T, edit func(*agent), rules ...rule) *agent {
	t.Helper()
	dir, err := os.MkdirTemp("", "wlapi") // short, for the socket; open to other users
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	a := &agent{
		t: t, dir: dir, socket: filepath.Join(dir, "s"), issuer: newIssuer(t),
		attestor: attest.New(), log: &logText{}, served: make(chan error, 1),
	}
	a.ready.Store(true)
	if edit != nil {
		edit(a)
	}
	log := slog.New(slog.NewTextHandler(a.log, nil))
	a.svids = svid.New(svid.Config{Issuer: a.issuer, JWTIssuer: a.issuer, Log: log})
	a.set(rules...)
	ln, err := net.Listen("unix", a.socket)
	if err != nil {
		t.Fatal(err)
	}
	if err := errors.Join(os.Chmod(dir, 0o755), os.Chmod(a.socket, 0o777)); err != nil {
		t.Fatal(err)
	}
	a.server = New(Config{SVIDs: a.svids, Attestor: a.attestor, Ready: a.ready.Load, Refused: a.refused.add, Log: log, PerUID: a.perUID})
	ctx, cancel := context.WithCancel(context.Background())
	a.stopServer = cancel
	go func() { a.served <- a.server.Serve(ctx, ln) }()
	mctx, mcancel := context.WithCancel(context.Background())
	managed := make(chan error, 1)
	go func() { managed <- a.svids.Run(mctx) }()
	t.Cleanup(func() {
		cancel()
		if err := <-a.served; err != nil {
			t.Errorf("Serve = %v", err)
		}
		mcancel()
		if err := <-managed; err != nil {
			t.Errorf("Run = %v", err)
		}
		if t.Failed() {
			t.Logf("the agent's log:\n%s", a.log)
		}
	})
	return a
}

// set replaces the node's workloads.
func (a *agent) set(rules ...rule) { a.t.Helper(); a.setHinted(nil, rules...) }

// setHinted is set, with hints by workload.
func (a *agent) setHinted(hints map[string]string, rules ...rule) {
	var ws []mesh.Workload
	for i := range rules {
		r := &rules[i]
		w := mesh.Workload{Namespace: "default", Name: r.name, ServiceAccount: r.account, ID: sa(r.account), Attest: &r.attest, Hint: hints[r.name]}
		ws = append(ws, w)
		a.issuer.set(func(i *issuer) { i.ids[w.Key()] = w.ID })
	}
	a.attestor.SetWorkloads(ws)
	a.svids.Update(svid.State{TrustDomain: td, Bundle: []*x509.Certificate{a.issuer.root}, JWTKeys: a.issuer.jwtKeys(), Workloads: ws,
		Revoked:     func(serial string) bool { return a.revoked != "" && serial == a.revoked },
		Quarantined: func(id spiffeid.ID) (string, bool) { return "cut", !a.cutOff.IsZero() && id == a.cutOff }})
}

func (a *agent) option() workloadapi.SourceOption {
	return workloadapi.WithClientOptions(workloadapi.WithAddr("unix://" + a.socket))
}

// client returns a bare client, for what go-spiffe's hides.
func (a *agent) client() workload.SpiffeWorkloadAPIClient {
	return workload.NewSpiffeWorkloadAPIClient(a.dial())
}

func (a *agent) dial() *grpc.ClientConn {
	a.t.Helper()
	cc, err := grpc.NewClient("unix://"+a.socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		a.t.Fatal(err)
	}
	a.t.Cleanup(func() { cc.Close() })
	return cc
}

// call is the context of a proper call; it ends with the test.
func call(t *testing.T) context.Context {
	ctx, cancel := context.WithTimeout(context.Background(), 20*time.Second)
	t.Cleanup(cancel)
	return metadata.AppendToOutgoingContext(ctx, header, "true")
}

// svids opens a stream of SVIDs.
func (a *agent) stream() grpc.ServerStreamingClient[workload.X509SVIDResponse] {
	a.t.Helper()
	s, err := a.client().FetchX509SVID(call(a.t), &workload.X509SVIDRequest{})
	if err != nil {
		a.t.Fatal(err)
	}
	return s
}

// recv returns the identities of the next message.
func recv(t *testing.T, s grpc.ServerStreamingClient[workload.X509SVIDResponse]) (*workload.X509SVIDResponse, []string) {
	t.Helper()
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	var ids []string
	for _, x := range m.Svids {
		ids = append(ids, strings.TrimPrefix(x.SpiffeId, "spiffe://mesh.test/ns/default/sa/"))
	}
	return m, ids
}

// ends wants the stream to end with a code.
func ends(t *testing.T, err error, want codes.Code, say string) {
	t.Helper()
	if status.Code(err) != want || !strings.Contains(status.Convert(err).Message(), say) {
		t.Errorf("ends with %v, want %v saying %q", err, want, say)
	}
}
