// Package sdk lets a Go program take part in a Signet mesh by itself, without a
// proxy: it dials and listens with mutual TLS, by the identity that its node's
// agent attests it to have. The mesh's allow policies and quarantines decide
// about its connections, with the mesh's own evaluator and in its own words, and
// every connection, let through or refused, is in the node's audit.
//
//	m, err := sdk.Open(ctx)
//	l, err := m.Listen("tcp", ":8443")                     // a server
//	c, err := m.Dial(ctx, "tcp", "ledger:8443", ledgerID)  // a client
//
// What cannot be decided is refused. See docs/sdk.md.
package sdk

import (
	"context"
	"crypto/rand"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"strings"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/backoff"
	"google.golang.org/grpc/credentials/insecure"

	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
)

const (
	// DefaultSocket is the agent's socket where SPIFFE_ENDPOINT_SOCKET is not set.
	DefaultSocket = "unix:///run/signet/api/agent.sock"
	socketEnv     = "SPIFFE_ENDPOINT_SOCKET"

	openWait         = 20 * time.Second // for the identity and the rules
	handshakeTimeout = 5 * time.Second
	flushWait        = 2 * time.Second // for the last audit events
)

// ErrClosed is returned after Close.
var ErrClosed = errors.New("sdk: the Mesh is closed")

// RefusedError says that policies or quarantines refuse a connection.
type RefusedError struct {
	// Reason is in the words of the mesh, as in the audit.
	Reason string
}

// Error implements error.
func (e *RefusedError) Error() string { return "sdk: refused: " + e.Reason }

// Option configures Open.
type Option func(*config)

type config struct {
	socket string
	id     spiffeid.ID
	dial   func(ctx context.Context, network, address string) (net.Conn, error)
	log    *slog.Logger
}

// WithSocket is the agent's socket, such as "unix:///run/signet/api/agent.sock",
// instead of what SPIFFE_ENDPOINT_SOCKET says.
func WithSocket(address string) Option { return func(c *config) { c.socket = address } }

// WithIdentity chooses one of several identities that the process has. Without
// it, the first is taken.
func WithIdentity(id spiffeid.ID) Option { return func(c *config) { c.id = id } }

// WithDialer opens the connections of Dial, in place of a net.Dialer.
func WithDialer(dial func(ctx context.Context, network, address string) (net.Conn, error)) Option {
	return func(c *config) { c.dial = dial }
}

// WithLogger says what goes wrong with the agent. Without it, nothing is logged.
func WithLogger(log *slog.Logger) Option { return func(c *config) { c.log = log } }

// Mesh is a process's part in the mesh. It is safe for concurrent use.
type Mesh struct {
	id      spiffeid.ID
	source  *workloadapi.X509Source
	agent   *grpc.ClientConn
	client  sdkv1.ConnectionsClient
	session []byte
	dial    func(ctx context.Context, network, address string) (net.Conn, error)
	log     *slog.Logger
	reports *reporter
	first   chan struct{} // closed with the first rules
	cancel  context.CancelFunc
	wg      sync.WaitGroup

	mu     sync.Mutex
	picked spiffeid.ID    // guarded by mu; whom certificates are taken of; zero: the first
	rules  *rules         // guarded by mu; nil: refuse everything
	why    string         // guarded by mu; why there are no rules
	open   map[*Conn]bool // guarded by mu
	last   uint64         // guarded by mu; the number of the newest connection
	closed bool           // guarded by mu
}

// Open gets the process's identity and its rules from the agent, and keeps both
// up to date until Close. It waits for them as long as ctx lasts, 20 s at most,
// and then says what is missing.
func Open(ctx context.Context, options ...Option) (*Mesh, error) {
	c := config{dial: new(net.Dialer).DialContext, log: slog.New(slog.DiscardHandler)}
	for _, o := range options {
		o(&c)
	}
	if c.socket == "" {
		if c.socket = os.Getenv(socketEnv); c.socket == "" {
			c.socket = DefaultSocket
		}
	}
	if path, ok := strings.CutPrefix(c.socket, "unix:"); !ok || strings.TrimPrefix(path, "//") == "" {
		return nil, fmt.Errorf("sdk: %s is %q; the agent only knows who calls on a unix socket, such as %s", socketEnv, c.socket, DefaultSocket)
	}
	ctx, cancel := context.WithTimeout(ctx, openWait)
	defer cancel()
	m := &Mesh{picked: c.id, dial: c.dial, log: c.log, session: make([]byte, 16), first: make(chan struct{}), open: map[*Conn]bool{}}
	m.why = "default deny: no policy is in force yet"
	_, _ = rand.Read(m.session) // never fails
	var err error
	if m.source, err = workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(c.socket)),
		workloadapi.WithDefaultX509SVIDPicker(m.pick)); err != nil {
		return nil, fmt.Errorf("sdk: no identity from the agent at %s: %w", c.socket, err)
	}
	svid, err := m.source.GetX509SVID()
	if err != nil {
		m.source.Close()
		return nil, fmt.Errorf("sdk: the agent at %s does not say that this process is %s: %w", c.socket, c.id, err)
	}
	m.id = svid.ID
	if m.agent, err = grpc.NewClient(c.socket, grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithConnectParams(grpc.ConnectParams{
			Backoff:           backoff.Config{BaseDelay: 50 * time.Millisecond, Multiplier: 1.6, Jitter: 0.2, MaxDelay: time.Second},
			MinConnectTimeout: time.Second,
		}), grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(16<<20))); err != nil {
		m.source.Close()
		return nil, fmt.Errorf("sdk: %w", err)
	}
	m.client = sdkv1.NewConnectionsClient(m.agent)
	m.reports = newReporter(m)
	running, stop := context.WithCancel(context.WithoutCancel(ctx))
	m.cancel = stop
	m.wg.Go(func() { m.follow(running) })
	m.wg.Go(func() { m.reports.run(running) })
	select {
	case <-m.first:
		return m, nil
	case <-ctx.Done():
		m.mu.Lock()
		why := m.why
		m.mu.Unlock()
		m.Close()
		return nil, fmt.Errorf("sdk: no policies from the agent at %s: %s: %w", c.socket, why, ctx.Err())
	}
}

// pick chooses the process's identity, always the same.
func (m *Mesh) pick(svids []*x509svid.SVID) *x509svid.SVID {
	m.mu.Lock()
	defer m.mu.Unlock()
	for _, s := range svids {
		if m.picked.IsZero() {
			m.picked = s.ID
		}
		if s.ID == m.picked {
			return s
		}
	}
	return nil
}

// ID is the identity of this process.
func (m *Mesh) ID() spiffeid.ID { return m.id }

// Close ends every open connection, hands the last audit events to the agent
// (for 2 s at most), and waits for all that Open started. Close listeners first.
func (m *Mesh) Close() error {
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		return nil
	}
	m.closed = true
	open := m.conns()
	m.mu.Unlock()
	for _, c := range open {
		_ = c.Close()
	}
	m.reports.flush(flushWait)
	m.cancel()
	m.wg.Wait()
	return errors.Join(m.agent.Close(), m.source.Close())
}

// conns returns the open connections. mu is held.
func (m *Mesh) conns() []*Conn {
	out := make([]*Conn, 0, len(m.open))
	for c := range m.open {
		out = append(out, c)
	}
	return out
}
