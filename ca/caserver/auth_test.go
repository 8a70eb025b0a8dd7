package caserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"net"
	"path/filepath"
	"strings"
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
	"github.com/signet-mesh/signet/ca"
)

// tryAll makes every call that needs a certificate and returns the errors.
func tryAll(ctx context.Context, c nodev1.NodeClient, csr []byte) map[string]error {
	out := make(map[string]error)
	_, out["Renew"] = c.Renew(ctx, &nodev1.RenewRequest{Csr: csr})
	_, out["Issue"] = c.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Csr: csr})
	_, out["IssueMany"] = c.IssueMany(ctx, &nodev1.IssueManyRequest{Requests: []*nodev1.IssueRequest{{Workload: "shop/web-1", Csr: csr}}})
	_, out["IssueJWT"] = c.IssueJWT(ctx, &nodev1.IssueJWTRequest{Workload: "shop/web-1", Audience: []string{"x"}})
	stream, err := c.Watch(ctx, &nodev1.WatchRequest{})
	if err == nil {
		_, err = stream.Recv()
	}
	out["Watch"] = err
	return out
}

// foreignAuthority has the same trust domain but another root.
func foreignAuthority(t *testing.T) *ca.Authority {
	t.Helper()
	a, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: testDomain})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// Without a certificate only Join can be called.
func TestNoCertificate(t *testing.T) {
	w := newWorld(t, nil)
	_, csr := newKey(t)
	for call, err := range tryAll(testContext(t), w.dial(nil), csr) {
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v; want Unauthenticated", call, err)
		}
	}
}

// Only nodes may call: a workload's certificate, or the control plane's own,
// is refused although it is valid.
func TestNotANode(t *testing.T) {
	w := newWorld(t, nil)
	_, csr := newKey(t)
	for _, id := range []spiffeid.ID{webID, ca.ControlID(testDomain)} {
		client := w.dial(certFor(t, w.authority, id, time.Hour))
		for call, err := range tryAll(testContext(t), client, csr) {
			if status.Code(err) != codes.PermissionDenied {
				t.Errorf("%s as %s: %v; want PermissionDenied", call, id, err)
			}
		}
	}
}

// A certificate of another root, of the same trust domain and for a node that
// exists, gets no connection; nor does a self-signed or an expired one, not
// even for Join.
func TestBadClientCertificates(t *testing.T) {
	w := newWorld(t, nil)
	_, csr := newKey(t)
	short := certFor(t, w.authority, nodeID("one"), time.Minute)
	early := certFor(t, w.authority, nodeID("one"), time.Hour)
	w.clock.advance(2 * time.Minute)
	noChain := certFor(t, w.authority, nodeID("one"), time.Hour)
	noChain.Certificate = noChain.Certificate[:1]
	wrongKey := certFor(t, w.authority, nodeID("one"), time.Hour)
	wrongKey.PrivateKey, _ = newKey(t)
	for name, cert := range map[string]*tls.Certificate{
		"foreign root": certFor(t, foreignAuthority(t), nodeID("one"), time.Hour),
		"expired":      short,
		"no chain":     noChain,
		"wrong key":    wrongKey,
	} {
		client := w.dial(cert)
		errs := tryAll(testContext(t), client, csr)
		_, errs["Join"] = client.Join(testContext(t), &nodev1.JoinRequest{Token: "x", Csr: csr})
		for call, err := range errs {
			if code := status.Code(err); code != codes.Unavailable {
				t.Errorf("%s, %s: %v; want the handshake to fail", name, call, err)
			}
		}
	}
	if _, err := w.dial(early).Renew(testContext(t), &nodev1.RenewRequest{Csr: csr}); err != nil {
		t.Errorf("a good certificate: %v", err)
	}
}

// A connection does not outlive the right to it: after the certificate that
// opened it expired, calls on it are refused.
func TestExpiryOnOpenConnection(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	_, csr := newKey(t)
	client := w.dial(certFor(t, w.authority, nodeID("one"), time.Minute))
	if _, err := client.Renew(ctx, &nodev1.RenewRequest{Csr: csr}); err != nil {
		t.Fatal(err)
	}
	w.clock.advance(2 * time.Minute)
	_, err := client.Renew(ctx, &nodev1.RenewRequest{Csr: csr})
	wantCode(t, err, codes.Unauthenticated, "expired")
}

// An open stream ends when its certificate does.
func TestExpiryEndsStream(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	stream, err := w.dial(certFor(t, w.authority, nodeID("one"), 3*time.Second)).Watch(ctx, &nodev1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantCode(t, err, codes.Unauthenticated, "expired")
}

// A node's certificate that is revoked is refused on open connections, and its open
// streams end; another one of the same node is as good as before.
func TestRevokedNodeCertificate(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	_, csr := newKey(t)
	stolen := certFor(t, w.authority, nodeID("one"), time.Hour)
	client, other := w.dial(stolen), w.dial(certFor(t, w.authority, nodeID("one"), time.Hour))
	stream, err := client.Watch(ctx, &nodev1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	if _, err := w.authority.Revoke(leaf(t, stolen.Certificate).SerialNumber.Text(16), "stolen"); err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv() // it may hear of the revocation first
	}
	wantCode(t, err, codes.Unauthenticated, "revoked")
	_, err = client.Renew(ctx, &nodev1.RenewRequest{Csr: csr})
	wantCode(t, err, codes.Unauthenticated, "revoked")
	if _, err := other.Renew(ctx, &nodev1.RenewRequest{Csr: csr}); err != nil {
		t.Errorf("another certificate of the node: %v", err)
	}
}

// An open stream ends within seconds when the wall clock says that its
// certificate has expired, while no timer of an hour has run down: so it is after
// the machine was suspended.
func TestSuspendEndsStream(t *testing.T) {
	w := newWorld(t, nil)
	stream, err := w.dial(certFor(t, w.authority, nodeID("one"), time.Hour)).Watch(testContext(t), &nodev1.WatchRequest{})
	if err != nil {
		t.Fatal(err)
	}
	if _, err := stream.Recv(); err != nil {
		t.Fatal(err)
	}
	w.clock.advance(2 * time.Hour)
	_, err = stream.Recv()
	wantCode(t, err, codes.Unauthenticated, "expired")
}

// A root that is withdrawn stops working on connections that are open.
func TestWithdrawnRoot(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	other := foreignAuthority(t)
	if err := w.authority.PublishRoots(other.Bundle()); err != nil {
		t.Fatal(err)
	}
	_, csr := newKey(t)
	client := w.dial(certFor(t, other, nodeID("one"), time.Hour))
	if _, err := client.Renew(ctx, &nodev1.RenewRequest{Csr: csr}); err != nil {
		t.Fatal(err)
	}
	if err := w.authority.PublishRoots(nil); err != nil {
		t.Fatal(err)
	}
	_, err := client.Renew(ctx, &nodev1.RenewRequest{Csr: csr})
	wantCode(t, err, codes.Unauthenticated, "client certificate")
}

// The interceptors do not believe a TLS layer that verified nothing: a server
// put together without TLSConfig refuses foreign certificates all the same.
func TestInterceptorsVerifyThemselves(t *testing.T) {
	w := newWorld(t, nil)
	config := w.server.TLSConfig()
	config.VerifyConnection = nil
	other := foreignAuthority(t)
	cert := certFor(t, other, nodeID("one"), time.Hour)
	serveRaw(t, w, config)
	_, csr := newKey(t)
	for call, err := range tryAll(testContext(t), w.dial(cert), csr) {
		if status.Code(err) != codes.Unauthenticated {
			t.Errorf("%s: %v; want Unauthenticated", call, err)
		}
	}
}

// The agent talks to the control plane of its trust domain and to nobody else:
// not to a node, not to a workload, not to another root's control plane.
func TestClientVerifiesServer(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	join := func(conn *grpc.ClientConn) error {
		_, err := nodev1.NewNodeClient(conn).Join(ctx, &nodev1.JoinRequest{Token: "x"})
		return err
	}
	// The bootstrap bundle comes from a file.
	file := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: w.authority.Bundle()[0].Raw})
	bundle, err := x509bundle.Parse(testDomain, file)
	if err != nil {
		t.Fatal(err)
	}
	if err := join(w.conn(bundle, nil)); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("the real control plane: %v; want its refusal of the token", err)
	}
	if err := join(w.conn(foreignAuthority(t), nil)); status.Code(err) != codes.Unavailable {
		t.Errorf("a control plane of another root: %v", err)
	}
	if err := join(w.conn(x509bundle.New(testDomain), nil)); status.Code(err) != codes.Unavailable {
		t.Errorf("an empty bundle: %v", err)
	}
	for _, id := range []spiffeid.ID{nodeID("one"), webID} {
		cert := certFor(t, w.authority, id, time.Hour)
		serveRaw(t, w, &tls.Config{MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, Certificates: []tls.Certificate{*cert}})
		if err := join(w.conn(bundle, nil)); status.Code(err) != codes.Unavailable {
			t.Errorf("a server that is %s: %v", id, err)
		}
	}
}

// Older TLS and session resumption are not offered.
func TestTLSFloor(t *testing.T) {
	w := newWorld(t, nil)
	for range 2 {
		conn, err := tls.Dial("unix", w.socket, &tls.Config{InsecureSkipVerify: true, MaxVersion: tls.VersionTLS12})
		if err == nil {
			conn.Close()
			t.Fatal("TLS 1.2 was accepted")
		}
	}
	cache := tls.NewLRUClientSessionCache(4)
	for range 2 {
		conn, err := tls.Dial("unix", w.socket, &tls.Config{InsecureSkipVerify: true, ServerName: "x", ClientSessionCache: cache, NextProtos: []string{"h2"}})
		if err != nil {
			t.Fatal(err)
		}
		conn.SetReadDeadline(time.Now().Add(5 * time.Second))
		conn.Read(make([]byte, 16)) // a ticket would come with the first bytes
		state := conn.ConnectionState()
		if state.DidResume {
			t.Error("a session was resumed")
		}
		if state.CurveID != tls.X25519MLKEM768 {
			t.Errorf("key exchange %v; want X25519MLKEM768", state.CurveID)
		}
		conn.Close()
	}
}

// The server's certificate is the control plane's.
func TestServerIdentity(t *testing.T) {
	w := newWorld(t, nil)
	cert, err := w.server.cert.Get()
	if err != nil {
		t.Fatal(err)
	}
	parsed, err := x509.ParseCertificate(cert.Certificate[0])
	if err != nil {
		t.Fatal(err)
	}
	if got, want := parsed.URIs[0].String(), "spiffe://mesh.example/signet/control"; got != want {
		t.Errorf("server is %s; want %s", got, want)
	}
}

// serveRaw serves the node API with another TLS configuration and points the
// world's clients at it.
func serveRaw(t *testing.T, w *world, config *tls.Config) {
	t.Helper()
	listener, err := net.Listen("unix", filepath.Join(t.TempDir(), "s"))
	if err != nil {
		t.Fatal(err)
	}
	w.socket = listener.Addr().String()
	options := append(w.server.ServerOptions(), grpc.Creds(credentials.NewTLS(config)))
	server := grpc.NewServer(options...)
	nodev1.RegisterNodeServer(server, w.server)
	done := make(chan struct{})
	go func() {
		defer close(done)
		server.Serve(listener)
	}()
	t.Cleanup(func() {
		server.Stop()
		<-done
	})
}

// Defends the log of who asked for what: a refusal by another service of the
// same server, which does not know the node, is logged with its name.
func TestRefusalsOfOtherServicesAreLogged(t *testing.T) {
	w := newWorld(t, nil)
	conn := w.conn(w.authority, certFor(t, w.authority, nodeID("one"), time.Hour))
	stream, err := healthv1.NewHealthClient(conn).Watch(testContext(t), &healthv1.HealthCheckRequest{})
	if err != nil {
		t.Fatal(err)
	}
	_, err = stream.Recv()
	wantCode(t, err, codes.Unimplemented, "")
	if want := "msg=refused call=/grpc.health.v1.Health/Watch node=one code=Unimplemented"; !strings.Contains(w.logged.String(), want) {
		t.Errorf("%q is not in the log: %s", want, w.logged)
	}
}

// Defends who looks for the reason of a mesh that does not connect: whoever finds
// the other's certificate not valid yet names the clock.
func TestClockThatIsBehindIsNamed(t *testing.T) {
	w := newWorld(t, nil)
	_, csr := newKey(t)
	cert := certFor(t, w.authority, nodeID("one"), time.Hour)
	right := w.clock.now()
	renew := func(now time.Time) error {
		c, err := ClientTLS(ClientConfig{
			TrustDomain: testDomain, Bundle: w.authority, Now: func() time.Time { return now },
			Certificate: func() (*tls.Certificate, error) { return cert, nil },
		})
		if err != nil {
			t.Fatal(err)
		}
		conn, err := grpc.NewClient("unix:"+w.socket, grpc.WithTransportCredentials(credentials.NewTLS(c)))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		_, err = nodev1.NewNodeClient(conn).Renew(testContext(t), &nodev1.RenewRequest{Csr: csr})
		return err
	}
	if err := renew(right); err != nil {
		t.Fatal(err)
	}
	wantCode(t, renew(right.Add(-10*time.Minute)), codes.Unavailable, "this node's clock may be behind, set it right")
	w.clock.advance(-10 * time.Minute)
	wantCode(t, renew(right), codes.Unavailable, "")
	if want := "this machine's clock is behind, or was ahead when it issued the certificate"; !strings.Contains(w.logged.String(), want) {
		t.Errorf("%q is not in the log: %s", want, w.logged)
	}
}
