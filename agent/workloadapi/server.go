// Package workloadapi serves the SPIFFE Workload API on a unix socket: SVIDs and
// bundles, X.509 and JWT, for the workloads that the calling process is attested
// to be. The optional WIT profile answers Unimplemented.
package workloadapi

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"golang.org/x/time/rate"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/reflection"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Bounds of what callers may take up.
const (
	// DefaultPerUID is how many connections, and how many calls, one user id
	// may have open.
	DefaultPerUID = 512

	maxRequest       = 64 << 10 // bytes
	streamsPerConn   = 100
	idleConn         = 5 * time.Minute
	handshakeTimeout = 5 * time.Second
	// drain is how long calls may take to end after the server was stopped.
	drain = 5 * time.Second
	// issueWait is how long a call waits for a certificate that is not there,
	// so that a workload which starts together with the agent need not come
	// back later.
	issueWait = time.Second
)

// Attestor tells which workloads a process is; *attest.Attestor implements it.
type Attestor interface {
	Attest(ctx context.Context, p *attest.Process) ([]mesh.Workload, error)
	// Changed returns a channel that is closed when the answer may have
	// become another.
	Changed() <-chan struct{}
}

// Config configures a Server.
type Config struct {
	SVIDs    *svid.Manager
	Attestor Attestor
	// Ready says whether the node's state is known. Until it does, callers
	// are told to come back. Nil means always.
	Ready func() bool
	// Refused hears of every refusal, and must not block. Nil: nobody does.
	Refused func(refusal.Refusal)
	Log     *slog.Logger
	// PerUID bounds the open connections, and the open calls, of one user id.
	// 0 means DefaultPerUID.
	PerUID int
	// Beside registers what else is served on the socket, to the same callers
	// within the same bounds. Nil: nothing.
	Beside func(grpc.ServiceRegistrar)
}

// Server is the Workload API of one node.
type Server struct {
	workload.UnimplementedSpiffeWorkloadAPIServer

	svids    *svid.Manager
	attestor Attestor
	ready    func() bool
	refused  func(refusal.Refusal)
	log      *slog.Logger
	perUID   int
	beside   func(grpc.ServiceRegistrar)
	stopping chan struct{} // closed when Serve is told to end
	calls    counter
	refusals *rate.Limiter // of log lines, which strangers cause

	mu      sync.Mutex
	streams map[*follower]bool // guarded by mu; those that have got an answer
}

// follower is a stream that is kept up to date.
type follower struct {
	changed <-chan struct{} // closed when there may be more than what it was sent
}

// Behind returns how many open streams may not have been sent the newest
// certificates and roots yet.
func (s *Server) Behind() (n int) {
	s.mu.Lock()
	defer s.mu.Unlock()
	for f := range s.streams {
		select {
		case <-f.changed:
			n++
		default:
		}
	}
	return n
}

// sent notes that a stream has been sent all that there was before changed is
// closed.
func (s *Server) sent(f *follower, changed <-chan struct{}) {
	s.mu.Lock()
	defer s.mu.Unlock()
	f.changed = changed
	s.streams[f] = true
}

func (s *Server) ended(f *follower) {
	s.mu.Lock()
	defer s.mu.Unlock()
	delete(s.streams, f)
}

// New returns a Server.
func New(c Config) *Server {
	s := &Server{
		svids: c.SVIDs, attestor: c.Attestor, ready: c.Ready, refused: c.Refused, log: c.Log,
		perUID:   cmp.Or(c.PerUID, DefaultPerUID),
		beside:   c.Beside,
		stopping: make(chan struct{}), streams: map[*follower]bool{},
		refusals: rate.NewLimiter(10, 50),
	}
	if s.refused == nil {
		s.refused = func(refusal.Refusal) {}
	}
	if s.ready == nil {
		s.ready = func() bool { return true }
	}
	return s
}

// Serve answers calls on ln, a unix stream listener that every local process
// may connect to, until ctx ends. Then open streams are ended with
// Unavailable, and Serve returns nil once all calls have ended. It closes ln.
// Call it once.
func (s *Server) Serve(ctx context.Context, ln net.Listener) error {
	srv := grpc.NewServer(
		grpc.Creds(&peerCreds{conns: &counter{}, perUID: s.perUID, refused: s.refused, log: s.log, refusals: s.refusals}),
		grpc.ChainUnaryInterceptor(s.unary),
		grpc.ChainStreamInterceptor(s.stream),
		grpc.MaxRecvMsgSize(maxRequest),
		grpc.MaxConcurrentStreams(streamsPerConn),
		grpc.ConnectionTimeout(handshakeTimeout),
		grpc.KeepaliveParams(keepalive.ServerParameters{MaxConnectionIdle: idleConn}),
		grpc.WaitForHandlers(true),
	)
	workload.RegisterSpiffeWorkloadAPIServer(srv, s)
	if s.beside != nil {
		s.beside(srv)
	}
	reflection.Register(srv)

	var wg sync.WaitGroup
	defer wg.Wait()
	ended := make(chan struct{})
	defer close(ended)
	wg.Go(func() {
		select {
		case <-ctx.Done():
		case <-ended:
		}
		close(s.stopping)
		hurry := time.AfterFunc(drain, srv.Stop)
		defer hurry.Stop()
		srv.GracefulStop()
	})
	if err := srv.Serve(ln); err != nil && !errors.Is(err, grpc.ErrServerStopped) && ctx.Err() == nil {
		return fmt.Errorf("workload api: %w", err)
	}
	return nil
}

// unavailable tells the caller to come back; every Workload API client does.
func unavailable(format string, args ...any) error {
	return status.Errorf(codes.Unavailable, format, args...)
}
