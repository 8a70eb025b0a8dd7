package agent

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"log/slog"
	"maps"
	"net"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/wholefile"
)

// nodeIdentity is the agent's own certificate: joined once with a token, then
// renewed with itself.
type nodeIdentity struct {
	dir    string // keeps node.pem, 0600
	bundle *x509bundle.Bundle
	target string
	token  string // file with a join token
	log    *slog.Logger
	renew  chan struct{} // holds one signal: the roots were set
	// issued is told of each certificate before it is used. Nil: nobody is.
	issued func(context.Context, *x509.Certificate)

	mu        sync.Mutex
	conns     map[net.Conn]bool // guarded by mu; open to the control plane, with a certificate of this node's
	cert      *tls.Certificate  // guarded by mu; Leaf is set; replaced whole
	lastError string            // guarded by mu; why the latest renewal failed
}

// openNode loads the identity that an earlier run left, if it is still valid,
// and the roots: those the earlier run knew, or else the bootstrap file's.
func openNode(cfg Config) (*nodeIdentity, error) {
	td, err := spiffeid.TrustDomainFromString(cfg.TrustDomain)
	if err != nil {
		return nil, fmt.Errorf("trust domain: %w", err)
	}
	n := &nodeIdentity{dir: cfg.StateDir, target: cfg.Control, token: cfg.JoinToken, log: cfg.Log, renew: make(chan struct{}, 1), conns: map[net.Conn]bool{}}
	n.bundle, err = x509bundle.Load(td, n.bundleFile())
	if errors.Is(err, os.ErrNotExist) || err == nil && len(n.bundle.X509Authorities()) == 0 {
		n.bundle, err = x509bundle.Load(td, cfg.Bundle)
	}
	if err != nil {
		return nil, fmt.Errorf("trust bundle: %w", err)
	}
	if cert, err := tls.LoadX509KeyPair(n.file(), n.file()); err == nil && time.Now().Before(cert.Leaf.NotAfter) {
		n.cert = &cert
	}
	return n, nil
}

func (n *nodeIdentity) file() string       { return filepath.Join(n.dir, "node.pem") }
func (n *nodeIdentity) bundleFile() string { return bundleFile(n.dir) }

func bundleFile(state string) string { return filepath.Join(state, "bundle.pem") }

// KnowsRoots reports whether an earlier run of this node left the roots that it
// trusted, so that Config.Bundle is not needed.
func KnowsRoots(state string) bool {
	info, err := os.Stat(bundleFile(state))
	return err == nil && info.Size() > 0
}

// certificate returns the current certificate for a handshake.
func (n *nodeIdentity) certificate() (*tls.Certificate, error) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cert == nil {
		return nil, errors.New("this node has not joined yet")
	}
	return n.cert, nil
}

// dial connects to the control plane, with the node's certificate or, to
// join, without.
func (n *nodeIdentity) dial(joined bool) (*grpc.ClientConn, error) {
	cfg := caserver.ClientConfig{TrustDomain: n.bundle.TrustDomain(), Bundle: n.bundle}
	if joined {
		cfg.Certificate = n.certificate
	}
	tlsConfig, err := caserver.ClientTLS(cfg)
	if err != nil {
		return nil, err
	}
	options := []grpc.DialOption{
		grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)),
		// The default would wait up to two minutes after a long absence of the
		// control plane; edits and renewals wait with it.
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 100 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: 2 * time.Second},
			MinConnectTimeout: 5 * time.Second,
		}),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(64 << 20)),
	}
	if joined {
		options = append(options, grpc.WithContextDialer(n.connect))
	}
	return grpc.NewClient(n.target, options...)
}

// connect opens a connection that is closed when another root signs: the control
// plane knows this node by the certificate that the connection began with.
func (n *nodeIdentity) connect(ctx context.Context, address string) (net.Conn, error) {
	network := "tcp"
	if path, ok := strings.CutPrefix(address, "unix:"); ok {
		network, address = "unix", strings.TrimPrefix(path, "//")
	}
	raw, err := new(net.Dialer).DialContext(ctx, network, address)
	if err != nil {
		return nil, err
	}
	c := &controlConn{raw, n}
	n.mu.Lock()
	defer n.mu.Unlock()
	n.conns[c] = true
	return c, nil
}

// controlConn is a connection to the control plane.
type controlConn struct {
	net.Conn
	node *nodeIdentity
}

// Close implements net.Conn.
func (c *controlConn) Close() error {
	c.node.mu.Lock()
	delete(c.node.conns, c)
	c.node.mu.Unlock()
	return c.Conn.Close()
}

// reconnect closes the open connections; calls under way fail and are made again.
func (n *nodeIdentity) reconnect() {
	n.mu.Lock()
	conns := slices.Collect(maps.Keys(n.conns))
	n.mu.Unlock()
	for _, c := range conns {
		_ = c.Close() // gRPC opens another
	}
}

// join gets the first certificate and reports whether it has. It tries until
// ctx ends: the control plane may start later than the node.
func (n *nodeIdentity) join(ctx context.Context) bool {
	for wait := 50 * time.Millisecond; ; wait = min(2*wait, 2*time.Second) {
		if _, err := n.certificate(); err == nil {
			return true
		}
		err := n.tryJoin(ctx)
		if err == nil {
			return true
		}
		n.log.Warn("joining the mesh", "error", err, "retry", wait)
		select {
		case <-ctx.Done():
			return false
		case <-time.After(wait):
		}
	}
}

func (n *nodeIdentity) tryJoin(ctx context.Context) error {
	token, err := os.ReadFile(n.token)
	if err != nil {
		return fmt.Errorf("join token: %w", err)
	}
	conn, err := n.dial(false)
	if err != nil {
		return err
	}
	defer conn.Close()
	return n.obtain(ctx, func(ctx context.Context, csr []byte) (*nodev1.NodeSVID, error) {
		return nodev1.NewNodeClient(conn).Join(ctx, &nodev1.JoinRequest{Token: strings.TrimSpace(string(token)), Csr: csr})
	})
}

// lookAtClock is how often the wall clock is compared with what is due. Timers
// stand still while a machine is suspended; the wall clock does not.
const lookAtClock = 2 * time.Second

// keep renews at half of the certificate's life, or as soon as another root
// signs, until ctx ends. A failed renewal keeps the certificate that is still
// valid.
func (n *nodeIdentity) keep(ctx context.Context, client nodev1.NodeClient) {
	for {
		cert, err := n.certificate()
		if err != nil { // it is joining again
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Second):
			}
			continue
		}
		leaf := cert.Leaf
		wait := max(time.Until(leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore)/2)), time.Second)
		if root, ok := rootOf(cert.Certificate, n.bundle.X509Authorities()); !ok || !root.Equal(n.bundle.X509Authorities()[0]) {
			wait = min(wait, time.Second) // the next try, if this is one
		}
		select {
		case <-ctx.Done():
			return
		case <-n.renew:
			continue
		case <-time.After(min(wait, lookAtClock)):
		}
		if wait > lookAtClock {
			continue
		}
		err = n.obtain(ctx, func(ctx context.Context, csr []byte) (*nodev1.NodeSVID, error) {
			return client.Renew(ctx, &nodev1.RenewRequest{Csr: csr})
		})
		if err != nil && time.Now().After(leaf.NotAfter) {
			// Nothing is left to renew with.
			err = errors.Join(err, n.tryJoin(ctx))
		}
		n.mu.Lock()
		n.lastError = ""
		if err != nil {
			n.lastError = err.Error()
		}
		n.mu.Unlock()
		if err != nil {
			n.log.Error("renewing the node's certificate; the present one stays", "error", err, "notAfter", leaf.NotAfter)
		}
	}
}

// obtain makes a key, has it certified, and takes the result once it is on disk.
func (n *nodeIdentity) obtain(ctx context.Context, ask func(context.Context, []byte) (*nodev1.NodeSVID, error)) error {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	svid, err := ask(ctx, csr)
	if err != nil {
		return err
	}
	cert := &tls.Certificate{Certificate: svid.GetChain(), PrivateKey: key}
	if len(cert.Certificate) == 0 {
		return errors.New("the control plane answered without a certificate")
	}
	if cert.Leaf, err = x509.ParseCertificate(cert.Certificate[0]); err != nil {
		return err
	}
	if pub, ok := cert.Leaf.PublicKey.(*ecdsa.PublicKey); !ok || !pub.Equal(key.Public()) {
		return errors.New("the control plane certified another key")
	}
	if n.issued != nil {
		n.issued(ctx, cert.Leaf)
	}
	der, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return err
	}
	var text []byte
	for _, c := range cert.Certificate {
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: c})...)
	}
	text = append(text, pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der})...)
	if err := wholefile.Write(n.file(), text); err != nil {
		return err
	}
	n.mu.Lock()
	was := n.cert
	n.cert = cert
	n.mu.Unlock()
	if err := n.setBundle(svid.GetBundle()); err != nil {
		return err
	}
	if was == nil {
		return nil
	}
	if !time.Now().Before(was.Leaf.NotAfter) || !bytes.Equal(was.Certificate[len(was.Certificate)-1], cert.Certificate[len(cert.Certificate)-1]) {
		// The control plane refuses all calls on a connection that began with a
		// certificate that has expired, and watches for another issuer.
		n.reconnect()
	}
	return nil
}

// setBundle replaces the roots. An empty set is ignored: it would cut the
// node off for good.
func (n *nodeIdentity) setBundle(ders [][]byte) error {
	var roots []*x509.Certificate
	var text []byte
	for _, der := range ders {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return fmt.Errorf("trust bundle: %w", err)
		}
		roots = append(roots, c)
		text = append(text, pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})...)
	}
	if len(roots) == 0 {
		return nil
	}
	n.bundle.SetX509Authorities(roots)
	select {
	case n.renew <- struct{}{}:
	default:
	}
	return wholefile.Write(n.bundleFile(), text)
}

// status describes the node's certificate.
func (n *nodeIdentity) status() (adminv1.Certificate, bool) {
	n.mu.Lock()
	defer n.mu.Unlock()
	if n.cert == nil {
		return adminv1.Certificate{}, false
	}
	leaf := n.cert.Leaf
	c := adminv1.Certificate{
		Holder: "node", Serial: fmt.Sprintf("%x", leaf.SerialNumber.Bytes()),
		NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter,
		RenewAt: leaf.NotBefore.Add(leaf.NotAfter.Sub(leaf.NotBefore) / 2),
		Issuer:  fmt.Sprintf("%x", leaf.AuthorityKeyId), LastError: n.lastError,
	}
	if len(leaf.URIs) == 1 {
		c.ID = leaf.URIs[0].String()
	}
	return c, true
}
