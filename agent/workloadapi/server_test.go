package workloadapi

import (
	"context"
	"crypto/ecdsa"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"io"
	"net"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"

	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/internal/mesh"
)

// go-spiffe's X509Source obtains the identity, and two of them in different
// programs speak mTLS with each other, each seeing the other's identity.
func TestMutualTLS(t *testing.T) {
	a := startAgent(t, nil)
	a.set(rule{"web", "web", self(t)}, rule{"db", "db", mesh.Attest{Path: a.program("db")}})
	addr := a.run("serve", a.dir+"/db")

	ctx := call(t)
	src, err := workloadapi.NewX509Source(ctx, a.option())
	if err != nil {
		t.Fatal(err)
	}
	defer src.Close()
	own, err := src.GetX509SVID()
	if err != nil || own.ID != sa("web") {
		t.Fatalf("own identity %v, %v; want %s", own, err, sa("web"))
	}
	dial := func(auth tlsconfig.Authorizer) error {
		c, err := tls.Dial("tcp", addr, tlsconfig.MTLSClientConfig(src, src, auth))
		if err != nil {
			return err
		}
		defer c.Close()
		if _, err := c.Write([]byte("ping")); err != nil {
			return err
		}
		buf := make([]byte, 4)
		if _, err := c.Read(buf); err != nil {
			return err
		}
		if string(buf) != "ping" {
			t.Errorf("echo %q", buf)
		}
		return nil
	}
	if err := dial(tlsconfig.AuthorizeID(sa("db"))); err != nil {
		t.Error(err)
	}
	if err := dial(tlsconfig.AuthorizeID(sa("mail"))); err == nil {
		t.Error("the server passed for another identity")
	}
}

// A watcher is handed each rotation, in time, as full state.
func TestRotation(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.issuer.ttl = 3 * time.Second }, rule{"web", "web", self(t)})
	c, err := workloadapi.New(call(t), workloadapi.WithAddr("unix://"+a.socket))
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	ctx, cancel := context.WithCancel(call(t))
	defer cancel()
	w := &watcher{t: t, want: 3, done: cancel}
	if err := c.WatchX509Context(ctx, w); ctx.Err() == nil {
		t.Fatal(err)
	}
	slices.Sort(w.serials)
	if got := slices.Compact(w.serials); len(got) < 3 {
		t.Errorf("serials %v, want 3 different ones", w.serials)
	}
}

type watcher struct {
	t       *testing.T
	want    int
	done    func()
	serials []string // used by the one goroutine that calls back
}

func (w *watcher) OnX509ContextUpdate(c *workloadapi.X509Context) {
	s := c.DefaultSVID()
	if s.ID != sa("web") || len(c.Bundles.Bundles()) != 1 {
		w.t.Errorf("%s with %d bundles", s.ID, len(c.Bundles.Bundles()))
	}
	if time.Now().After(s.Certificates[0].NotAfter) {
		w.t.Error("an expired certificate was sent")
	}
	w.serials = append(w.serials, s.Certificates[0].SerialNumber.String())
	if len(w.serials) >= w.want {
		w.done()
	}
}

func (w *watcher) OnX509ContextWatchError(err error) {
	if len(w.serials) < w.want {
		w.t.Error(err)
	}
}

// Another program, or another user, is a stranger: PermissionDenied, and the
// refusal does not tell the rules.
func TestStranger(t *testing.T) {
	a := startAgent(t, nil)
	a.set(rule{"web", "web", self(t)}, rule{"db", "db", mesh.Attest{UID: ptr(0), Path: a.program("db")}})
	other := a.program("other")
	if got, want := a.run("fetch", a.dir+"/db"), sa("db").String(); got != want {
		t.Errorf("the right program: %s, want %s", got, want)
	}
	if got := a.run("fetch", other); got != "PermissionDenied" {
		t.Errorf("another program: %s, want PermissionDenied", got)
	}
	if got := a.run("fetch", "setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", a.dir+"/db"); got != "PermissionDenied" {
		t.Errorf("another user: %s, want PermissionDenied", got)
	}
	if !strings.Contains(a.log.String(), "path: want") {
		t.Error("the log does not say what differed")
	}
	a.set(rule{"db", "db", mesh.Attest{Path: "/opt/secret"}})
	_, err := a.stream().Recv()
	ends(t, err, codes.PermissionDenied, "no identity issued")
	if strings.Contains(err.Error(), "/opt/secret") {
		t.Errorf("the refusal tells the rules: %v", err)
	}
	b, err := a.client().FetchX509Bundles(call(t), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = b.Recv()
	ends(t, err, codes.PermissionDenied, "no identity issued")
}

func ptr(n uint32) *uint32 { return &n }

// An identity that is taken away ends the streams that carry it; one that is
// given to a process with others is sent, and full state means that one that
// is taken is absent from the next message.
func TestEntitlement(t *testing.T) {
	web, db := rule{"web", "web", self(t)}, rule{"db", "db", self(t)}
	a := startAgent(t, nil, web)
	s := a.stream()
	if _, ids := recv(t, s); !slices.Equal(ids, []string{"web"}) {
		t.Fatalf("%v, want web", ids)
	}
	bundles, err := a.client().FetchX509Bundles(call(t), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := bundles.Recv(); err != nil {
		t.Fatal(err)
	}
	// Three workloads, two identities, sorted. The new one's certificate may
	// come in a message of its own.
	a.set(web, db, rule{"again", "web", self(t)})
	if _, ids := recv(t, s); !slices.Equal(ids, []string{"db", "web"}) {
		t.Fatalf("%v, want db and web", ids)
	}
	a.set(web)
	if _, ids := recv(t, s); !slices.Equal(ids, []string{"web"}) {
		t.Fatalf("%v, want web", ids)
	}
	a.set()
	_, err = s.Recv()
	ends(t, err, codes.PermissionDenied, "no identity issued")
	_, err = bundles.Recv()
	ends(t, err, codes.PermissionDenied, "no identity issued")
}

// The attest rules change while workloads and certificates stay: streams are
// attested anew.
func TestRulesChange(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	s := a.stream()
	recv(t, s)
	a.set(rule{"web", "web", mesh.Attest{UID: ptr(4321)}})
	_, err := s.Recv()
	ends(t, err, codes.PermissionDenied, "no identity issued")
}

// The message itself: what the specification says of each field.
func TestMessage(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	m, _ := recv(t, a.stream())
	x := m.Svids[0]
	leaf, err := x509.ParseCertificate(x.X509Svid)
	if err != nil {
		t.Fatal(err)
	}
	key, err := x509.ParsePKCS8PrivateKey(x.X509SvidKey)
	if err != nil {
		t.Fatal(err)
	}
	if !leaf.PublicKey.(*ecdsa.PublicKey).Equal(key.(*ecdsa.PrivateKey).Public()) {
		t.Error("key and certificate do not fit")
	}
	roots, err := x509.ParseCertificates(x.Bundle)
	if err != nil || len(roots) != 1 || !roots[0].Equal(a.issuer.root) {
		t.Errorf("bundle %v, %v", roots, err)
	}
	if x.Hint != "" || len(m.Crl)+len(m.FederatedBundles) != 0 {
		t.Errorf("hint %q, %d CRLs, %d federated bundles; want none", x.Hint, len(m.Crl), len(m.FederatedBundles))
	}
}

// Bundles: keyed by the trust domain's ID, sent again when they change, and
// not when only a certificate has.
func TestBundles(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	s, err := a.client().FetchX509Bundles(call(t), &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	m, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	if b := m.Bundles["spiffe://mesh.test"]; len(m.Bundles) != 1 || string(b) != string(a.issuer.root.Raw) {
		t.Errorf("bundles %v", m.Bundles)
	}
	next := newIssuer(t)
	w := mesh.Workload{Namespace: "default", Name: "web", ServiceAccount: "web", ID: sa("web")}
	a.svids.Update(svid.State{TrustDomain: td, Bundle: []*x509.Certificate{a.issuer.root, next.root}, Workloads: []mesh.Workload{w}})
	if m, err = s.Recv(); err != nil {
		t.Fatal(err)
	}
	if b := m.Bundles["spiffe://mesh.test"]; string(b) != string(a.issuer.root.Raw)+string(next.root.Raw) {
		t.Error("the new root is not in the bundle")
	}
}

// Defends rotations of the root: a stream that was not sent the newest roots is
// known to be behind. The caller here reads nothing, so that what it is sent
// fills what is buffered for it at last.
func TestBehind(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	ctx, cancel := context.WithCancel(call(t))
	defer cancel()
	s, err := a.client().FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := s.Recv(); err != nil {
		t.Fatal(err)
	}
	want := func(n int) bool {
		for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(5 * time.Millisecond) {
			if a.server.Behind() == n {
				return true
			}
		}
		return false
	}
	if !want(0) {
		t.Error("a stream that was sent everything is behind")
	}
	w := mesh.Workload{Namespace: "default", Name: "web", ServiceAccount: "web", ID: sa("web")}
	next := newIssuer(t).root
	for i := 1; a.server.Behind() == 0; i++ { // until the caller's window is full
		if i > 200 {
			t.Fatal("a stream that cannot be sent anything is not behind")
		}
		bundle := []*x509.Certificate{a.issuer.root}
		for range 20 * (1 + i%2) { // another bundle each time
			bundle = append(bundle, next)
		}
		a.svids.Update(svid.State{TrustDomain: td, Bundle: bundle, Workloads: []mesh.Workload{w}})
		time.Sleep(10 * time.Millisecond)
	}
	cancel()
	if !want(0) {
		t.Error("a stream that is gone holds everything up")
	}
}

// Without the header no call is answered, whatever it asks.
func TestHeader(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	c := a.client()
	ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
	defer cancel()
	for name, ctx := range map[string]context.Context{
		"missing":    ctx,
		"wrong case": metadata.AppendToOutgoingContext(ctx, header, "True"),
		"false":      metadata.AppendToOutgoingContext(ctx, header, "false"),
		"twice":      metadata.AppendToOutgoingContext(ctx, header, "true", header, "true"),
	} {
		t.Run(name, func(t *testing.T) {
			s, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
			if err == nil {
				_, err = s.Recv()
			}
			ends(t, err, codes.InvalidArgument, header)
			b, err := c.FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
			if err == nil {
				_, err = b.Recv()
			}
			ends(t, err, codes.InvalidArgument, header)
			_, err = c.FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{"x"}})
			ends(t, err, codes.InvalidArgument, header)
			_, err = c.ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: "x", Svid: "x"})
			ends(t, err, codes.InvalidArgument, header)
			j, err := c.FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
			if err == nil {
				_, err = j.Recv()
			}
			ends(t, err, codes.InvalidArgument, header)
		})
	}
}

// The optional profile that is not offered says so, so that clients do not
// retry for ever in the hope of better.
func TestUnimplemented(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	w, err := a.client().FetchWITSVID(call(t), &workload.WITSVIDRequest{})
	if err == nil {
		_, err = w.Recv()
	}
	ends(t, err, codes.Unimplemented, "")
}

// While the node's state is not known, callers are told to come back; that is
// another thing than having no identity.
func TestStarting(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.ready.Store(false) })
	_, err := a.stream().Recv()
	ends(t, err, codes.Unavailable, "starting")
	a.set(rule{"web", "web", self(t)})
	a.ready.Store(true)
	recv(t, a.stream())
}

// The certificate is late: a call waits for it a moment, and is then told to
// come back. It is never answered with an empty message.
func TestCertificateIsLate(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.issuer.refuse = errors.New("the control plane is away") }, rule{"web", "web", self(t)})
	begin := time.Now()
	_, err := a.stream().Recv()
	ends(t, err, codes.Unavailable, "not issued yet")
	if took := time.Since(begin); took < issueWait {
		t.Errorf("gave up after %v, want %v", took, issueWait)
	}
	s := a.stream()
	time.Sleep(issueWait / 4)
	a.issuer.set(func(i *issuer) { i.refuse = nil })
	a.set(rule{"web", "web", self(t)}) // retries at once
	recv(t, s)
}

// The control plane goes away and the certificate expires: the stream ends,
// and not with PermissionDenied, since the identity was not taken away.
func TestExpiry(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.issuer.ttl = 2 * time.Second }, rule{"web", "web", self(t)})
	s := a.stream()
	recv(t, s)
	a.issuer.set(func(i *issuer) { i.refuse = errors.New("the control plane is away") })
	for {
		if _, err := s.Recv(); err != nil {
			ends(t, err, codes.Unavailable, "expired")
			return
		}
	}
}

// The rotation of one workload is no business of another's: its streams stay
// silent.
func TestOthersRotation(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	s := a.stream()
	recv(t, s)
	a.issuer.set(func(i *issuer) { i.ttl = 2 * time.Second })
	a.set(rule{"web", "web", self(t)}, rule{"db", "db", mesh.Attest{UID: ptr(4321)}})
	got := make(chan error, 1)
	go func() { _, err := s.Recv(); got <- err }()
	select {
	case err := <-got:
		t.Errorf("a message or an end without reason: %v", err)
	case <-time.After(3 * time.Second):
		a.set() // ends the stream, and with it the goroutine
		<-got
	}
}

// One user id cannot take up the whole socket: calls beyond the bound are told
// to come back, and ending one makes room.
func TestBound(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.perUID = 3 }, rule{"web", "web", self(t)})
	c := a.client() // all on one connection
	var cancels []context.CancelFunc
	for range 3 {
		ctx, cancel := context.WithCancel(call(t))
		cancels = append(cancels, cancel)
		s, err := c.FetchX509SVID(ctx, &workload.X509SVIDRequest{})
		if err != nil {
			t.Fatal(err)
		}
		recv(t, s)
	}
	next := func() error {
		s, err := c.FetchX509SVID(call(t), &workload.X509SVIDRequest{})
		if err == nil {
			_, err = s.Recv()
		}
		return err
	}
	ends(t, next(), codes.Unavailable, "has 3 calls open")
	// Another user is not affected.
	if got := a.run("fetch", "setpriv", "--reuid=1234", "--regid=1234", "--clear-groups", a.program("other")); got != "PermissionDenied" {
		t.Errorf("another user: %s, want PermissionDenied", got)
	}
	cancels[0]()
	for range 200 {
		if err := next(); err == nil {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Error("ending a call made no room")
}

// Nor can it with connections: the one beyond the bound is closed.
func TestConnectionBound(t *testing.T) {
	a := startAgent(t, func(a *agent) { a.perUID = 3 })
	closed := func(c net.Conn) bool {
		if err := c.SetReadDeadline(time.Now().Add(200 * time.Millisecond)); err != nil {
			t.Fatal(err)
		}
		_, err := io.Copy(io.Discard, c) // settings frames, then silence or the end
		return !errors.Is(err, os.ErrDeadlineExceeded)
	}
	var conns []net.Conn
	for i := range 4 {
		c, err := net.Dial("unix", a.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if got, want := closed(c), i == 3; got != want {
			t.Errorf("connection %d: closed %v, want %v", i, got, want)
		}
		conns = append(conns, c)
	}
	conns[0].Close()
	for range 200 {
		c, err := net.Dial("unix", a.socket)
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if !closed(c) {
			return
		}
	}
	t.Error("closing a connection made no room")
}

// Stopping the agent ends open streams with Unavailable, at once, and waits
// for them.
func TestShutdown(t *testing.T) {
	a := startAgent(t, nil, rule{"web", "web", self(t)})
	s := a.stream()
	recv(t, s)
	begin := time.Now()
	a.stopServer()
	_, err := s.Recv()
	ends(t, err, codes.Unavailable, "shutting down")
	if err := <-a.served; err != nil {
		t.Error(err)
	}
	a.served <- nil // for the cleanup
	if took := time.Since(begin); took > drain {
		t.Errorf("took %v", took)
	}
}
