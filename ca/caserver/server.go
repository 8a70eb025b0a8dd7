// Package caserver serves the node API: it lets nodes join, signs on behalf
// of the workloads that a node runs, and streams each node its own view.
package caserver

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"strconv"
	"sync"
	"time"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/bundle"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Defaults of Config.
const (
	DefaultNodeTTL = 24 * time.Hour
	DefaultRate    = 200
	DefaultBurst   = 2000
)

// Config says what a Server works with.
type Config struct {
	Authority *ca.Authority // required
	Feed      *mesh.Feed    // required
	Tokens    Joiner        // required
	// NodeTTL is the lifetime of node certificates. It is longer than a
	// workload's because a node whose certificate has expired has to join
	// again. Zero means DefaultNodeTTL.
	NodeTTL time.Duration
	// Rate is how many certificates a second each node may ask for, Burst how
	// many at once, and how many tokens beside. Zero means the default.
	Rate  float64
	Burst int
	// XDSVersion returns the content hash of a node's resources in a view, by
	// which the node knows when its proxy is up to date. Nil: not said.
	XDSVersion func(view *mesh.View, node string) string
	// Foreign returns the bundles of the trust domains that the mesh is federated
	// with, and a channel that is closed when they are no longer current. Nil: it
	// is federated with none.
	Foreign func() ([]*bundle.Bundle, <-chan struct{})
	// Refused hears of every call that is refused, and must not block. Nil: nobody
	// does.
	Refused func(Refusal)
	// Log receives what was issued and what was refused; nil discards it.
	Log *slog.Logger
	// Now is the clock; nil means time.Now. It should be the authority's.
	Now func() time.Time
}

// Joiner says which node a join token stands for.
type Joiner interface {
	// Redeem spends a token and returns the name of the node. Of any number
	// of callers with one token at most one succeeds. A token that is not
	// good, or no longer, is ErrToken or wraps it; any other error means that
	// tokens cannot be redeemed now. It is safe for concurrent use.
	Redeem(ctx context.Context, token string) (node string, err error)
}

// Server implements the node API. It is safe for concurrent use.
type Server struct {
	nodev1.UnimplementedNodeServer

	authority  *ca.Authority
	feed       *mesh.Feed
	tokens     Joiner
	nodeTTL    time.Duration
	xdsVersion func(*mesh.View, string) string
	foreign    func() ([]*bundle.Bundle, <-chan struct{})
	rate       rate.Limit
	burst      int
	refused    func(Refusal)
	log        *slog.Logger
	now        func() time.Time
	cert       *ca.ServerCertificate
	proofs     proofs

	mu    sync.Mutex
	nodes map[string]*node // guarded by mu; by name, nodes that have proven it
}

// New returns a Server, or an error when the configuration is not complete or
// the control plane's own certificate cannot be issued.
func New(cfg Config) (*Server, error) {
	s := &Server{
		authority: cfg.Authority, feed: cfg.Feed, tokens: cfg.Tokens,
		nodeTTL: cfg.NodeTTL, xdsVersion: cfg.XDSVersion, foreign: cfg.Foreign, rate: rate.Limit(cfg.Rate), burst: cfg.Burst,
		refused: cfg.Refused, log: cfg.Log, now: cfg.Now,
		nodes: make(map[string]*node),
	}
	if s.nodeTTL == 0 {
		s.nodeTTL = DefaultNodeTTL
	}
	if s.rate == 0 {
		s.rate = DefaultRate
	}
	if s.burst == 0 {
		s.burst = DefaultBurst
	}
	if s.foreign == nil {
		s.foreign = func() ([]*bundle.Bundle, <-chan struct{}) { return nil, nil }
	}
	if s.refused == nil {
		s.refused = func(Refusal) {}
	}
	if s.log == nil {
		s.log = slog.New(slog.DiscardHandler)
	}
	if s.now == nil {
		s.now = time.Now
	}
	switch {
	case s.authority == nil:
		return nil, errors.New("caserver: config: Authority is missing")
	case s.feed == nil:
		return nil, errors.New("caserver: config: Feed is missing")
	case s.tokens == nil:
		return nil, errors.New("caserver: config: Tokens is missing")
	case s.nodeTTL < ca.MinTTL || s.nodeTTL > ca.MaxTTL:
		return nil, fmt.Errorf("caserver: config: NodeTTL %s must be from %s to %s", s.nodeTTL, ca.MinTTL, ca.MaxTTL)
	case s.rate < 0 || s.burst < 0:
		return nil, errors.New("caserver: config: Rate and Burst must not be negative")
	}
	cert, err := s.authority.ServerCertificate(ca.ControlID(s.authority.TrustDomain()), s.nodeTTL)
	if err != nil {
		return nil, fmt.Errorf("caserver: issue the control plane's own certificate: %w", err)
	}
	s.cert = cert
	return s, nil
}

// Join trades a one-use join token for a node certificate. The token is spent
// even when the request that came with it is bad.
func (s *Server) Join(ctx context.Context, req *nodev1.JoinRequest) (*nodev1.NodeSVID, error) {
	name, err := s.tokens.Redeem(ctx, req.GetToken())
	switch {
	case errors.Is(err, ErrToken):
		if err != ErrToken { // the bare sentinel has nothing to add
			s.log.WarnContext(ctx, "join token refused", "reason", err)
		}
		return nil, s.refuse(ctx, "Join", "", ReasonToken, "join token is unknown, used or expired; create a new one on the control plane")
	case err != nil:
		s.log.ErrorContext(ctx, "redeeming a join token failed", "err", err)
		return nil, status.Error(codes.Unavailable, "join tokens cannot be redeemed now; see the control plane's log")
	}
	if quarantine, cut := s.quarantined(name); cut {
		return nil, s.refuseQuarantined(ctx, "Join", name, quarantine)
	}
	return s.issueNode(ctx, "Join", name, req.GetCsr())
}

// Renew gives the calling node a new certificate.
func (s *Server) Renew(ctx context.Context, req *nodev1.RenewRequest) (*nodev1.NodeSVID, error) {
	name, ok := NodeFromContext(ctx)
	if !ok {
		return nil, s.refuse(ctx, "Renew", "", ReasonCertificate, "no node certificate")
	}
	if !s.node(name).limiter.AllowN(s.now(), 1) {
		return nil, s.refuseRate(ctx, "Renew", name, "")
	}
	return s.issueNode(ctx, "Renew", name, req.GetCsr())
}

func (s *Server) issueNode(ctx context.Context, call, name string, csr []byte) (*nodev1.NodeSVID, error) {
	id, err := ca.NodeID(s.authority.TrustDomain(), name)
	if err != nil {
		return nil, s.refuse(ctx, call, name, ReasonRequest, "%v", err)
	}
	chain, err := s.issue(ctx, call, ca.Request{ID: id, CSR: csr, TTL: s.nodeTTL, Node: name})
	if err != nil {
		return nil, err
	}
	return &nodev1.NodeSVID{Chain: chain, Bundle: rawCerts(s.authority.Bundle())}, nil
}

func (s *Server) refuseRate(ctx context.Context, call, name, workload string) error {
	return s.refuseFor(ctx, call, name, workload, ReasonRate, "node %q makes more than %g of these calls a second; wait and try again", name, float64(s.rate))
}

func rawCerts(certs []*x509.Certificate) [][]byte {
	out := make([][]byte, len(certs))
	for i, c := range certs {
		out[i] = c.Raw
	}
	return out
}

// quote makes a caller's string fit for a message.
func quote(s string) string {
	const most = 256
	if len(s) > most {
		return strconv.Quote(s[:most]) + "..."
	}
	return strconv.Quote(s)
}
