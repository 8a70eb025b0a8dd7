package caserver

import (
	"context"
	"crypto/x509"
	"errors"
	"strings"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

type (
	nodeKey struct{} // the calling node's name
	rootKey struct{} // the root that its certificate ends at
)

// NodeRevoked is in the refusal of a certificate that is revoked. An agent in a
// cluster looks for it.
const NodeRevoked = "it is revoked; join again with a new token"

// NodeFromContext returns the name of the node that makes the current call,
// as its verified certificate states it, and false when there is none. It
// works in every service of a gRPC server made with ServerOptions.
func NodeFromContext(ctx context.Context) (string, bool) {
	name, ok := ctx.Value(nodeKey{}).(string)
	return name, ok
}

// ServerOptions returns all that a gRPC server needs to serve nodes: TLS, the
// interceptors that require a node certificate for every call of every
// service but Join, and limits. Other services, such as xDS, may be registered
// on the same server and are guarded alike.
//
// A connection is closed, after a notice that lets calls in flight end, well
// before the certificate that opened it expires, so that nodes come back with
// their renewed one. Streams have to be opened again by the node then.
func (s *Server) ServerOptions() []grpc.ServerOption {
	return []grpc.ServerOption{
		grpc.Creds(credentials.NewTLS(s.TLSConfig())),
		grpc.ChainUnaryInterceptor(s.UnaryInterceptor),
		grpc.ChainStreamInterceptor(s.StreamInterceptor),
		grpc.ConnectionTimeout(10 * time.Second),
		grpc.MaxConcurrentStreams(1000),
		grpc.KeepaliveParams(keepalive.ServerParameters{
			// Nodes renew at half life: an age of a third, with grpc's jitter
			// of a tenth, and the grace of a tenth end before that is over.
			MaxConnectionAge:      s.nodeTTL / 3,
			MaxConnectionAgeGrace: s.nodeTTL / 10,
			Time:                  30 * time.Second,
			Timeout:               10 * time.Second,
		}),
		grpc.KeepaliveEnforcementPolicy(keepalive.EnforcementPolicy{MinTime: 5 * time.Second, PermitWithoutStream: true}),
	}
}

// UnaryInterceptor requires a valid node certificate for every call but Join
// and puts the node's name into the context.
func (s *Server) UnaryInterceptor(ctx context.Context, req any, info *grpc.UnaryServerInfo, handler grpc.UnaryHandler) (any, error) {
	if info.FullMethod == nodev1.Node_Join_FullMethodName {
		return handler(ctx, req)
	}
	name, c, err := s.authenticate(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	ctx = context.WithValue(ctx, rootKey{}, ca.FingerprintOf(c.root))
	return handler(context.WithValue(ctx, nodeKey{}, name), req)
}

// StreamInterceptor does the same for streams, and ends a stream when the
// certificate that opened it expires or its node is quarantined.
func (s *Server) StreamInterceptor(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	if strings.HasPrefix(info.FullMethod, "/"+nodev1.Replica_ServiceDesc.ServiceName+"/") {
		return s.toReplica(srv, stream, info, handler)
	}
	name, c, err := s.authenticate(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	ctx, cancel := s.whileValid(context.WithValue(stream.Context(), nodeKey{}, name), c.leaf)
	defer cancel()
	var cut atomic.Pointer[string] // the quarantine that ended the stream
	watched := make(chan struct{})
	go func() {
		defer close(watched)
		if quarantine, ok := s.awaitQuarantine(ctx, name); ok {
			cut.Store(&quarantine)
			cancel()
		}
	}()
	revoked := make(chan bool, 1)
	go func() {
		is := s.awaitRevoked(ctx, c.leaf)
		revoked <- is
		cancel()
	}()
	err = handler(srv, &nodeStream{stream, ctx})
	cancel()
	<-watched
	if <-revoked && stream.Context().Err() == nil {
		return s.refuse(ctx, info.FullMethod, name, ReasonRevoked, "the node certificate of this connection: "+NodeRevoked)
	}
	if quarantine := cut.Load(); quarantine != nil {
		return s.refuseQuarantined(ctx, info.FullMethod, name, *quarantine)
	}
	if errors.Is(context.Cause(ctx), errExpired) && stream.Context().Err() == nil {
		return s.refuse(ctx, info.FullMethod, name, ReasonCertificate, "the node certificate of this connection has expired; connect again with a renewed one")
	}
	s.logOthers(ctx, info.FullMethod, name, err)
	return err
}

// lookAtClock is how often the wall clock is compared with the end of the
// certificates that streams were opened with. Timers stand still while a machine
// is suspended; the wall clock does not.
const lookAtClock = 2 * time.Second

// errExpired is why a stream's context ends.
var errExpired = errors.New("the certificate has expired")

// whileValid returns a context that ends, because of errExpired, when a
// certificate's time is over: as the wall clock says, or as long from now as was
// left of it, whichever is first.
func (s *Server) whileValid(ctx context.Context, leaf *x509.Certificate) (context.Context, context.CancelFunc) {
	ctx, stop := context.WithTimeoutCause(ctx, leaf.NotAfter.Sub(s.now()), errExpired)
	ctx, cancel := context.WithCancelCause(ctx)
	done := make(chan struct{})
	go func() {
		defer close(done)
		for {
			left := leaf.NotAfter.Sub(s.now())
			if left <= 0 {
				cancel(errExpired)
				return
			}
			timer := time.NewTimer(min(left, lookAtClock))
			select {
			case <-ctx.Done():
				timer.Stop()
				return
			case <-timer.C:
			}
		}
	}()
	return ctx, func() {
		cancel(nil)
		stop()
		<-done
	}
}

// logOthers logs what another service on this server, which does not know the
// calling node's name, refused it for what it asked. The Node service logs its
// own refusals.
func (s *Server) logOthers(ctx context.Context, call, node string, err error) {
	if strings.HasPrefix(call, "/"+nodev1.Node_ServiceDesc.ServiceName+"/") {
		return
	}
	switch code := status.Code(err); code {
	case codes.InvalidArgument, codes.PermissionDenied, codes.Unimplemented:
		s.note(ctx, code, Refusal{Call: call, Node: node, Reason: ReasonRequest, Message: status.Convert(err).Message()})
	}
}

// nodeStream is a stream whose context names the node.
type nodeStream struct {
	grpc.ServerStream
	ctx context.Context
}

// Context implements grpc.ServerStream.
func (s *nodeStream) Context() context.Context { return s.ctx }

// authenticate returns the calling node. It looks at the certificate anew at
// every call, whatever the TLS layer did: connections outlive certificates
// and roots. Only the signatures below the same roots are not verified again.
func (s *Server) authenticate(ctx context.Context, call string) (string, *caller, error) {
	c, err := s.caller(ctx, call)
	if err != nil {
		return "", nil, err
	}
	name, ok := ca.NodeName(c.id)
	if !ok {
		return "", nil, s.refuse(ctx, call, "", ReasonCaller, "the certificate is for %q, which is not a node; only nodes may call", c.id)
	}
	if quarantine, cut := s.quarantined(name); cut {
		return "", nil, s.refuseQuarantined(ctx, call, name, quarantine)
	}
	return name, c, nil
}

// caller is who calls, with a certificate that is good now.
type caller struct {
	id         spiffeid.ID
	leaf, root *x509.Certificate
}

// caller returns who calls, as its certificate of this instant says.
func (s *Server) caller(ctx context.Context, call string) (*caller, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, s.refuse(ctx, call, "", ReasonCertificate, "no peer")
	}
	info, ok := p.AuthInfo.(credentials.TLSInfo)
	if !ok {
		return nil, s.refuse(ctx, call, "", ReasonCertificate, "not a TLS connection; connect with a node certificate")
	}
	certs := info.State.PeerCertificates
	if len(certs) == 0 {
		return nil, s.refuse(ctx, call, "", ReasonCertificate, "no client certificate; only Join may be called without one, connect with the node's certificate")
	}
	id, root, err := s.proofs.verify(certs, s.authority.TrustDomain(), s.authority.Bundle(), s.now())
	if err != nil {
		return nil, s.refuse(ctx, call, "", ReasonCertificate, "client certificate: %v", err)
	}
	if s.authority.IsRevoked(certs[0].SerialNumber.Bytes()) {
		name, _ := ca.NodeName(id) // empty: it is no node's
		return nil, s.refuse(ctx, call, name, ReasonRevoked, "client certificate: "+NodeRevoked)
	}
	return &caller{id, certs[0], root}, nil
}

// quarantined names the quarantine that cuts a node off in the newest view.
func (s *Server) quarantined(node string) (quarantine string, cut bool) {
	view, _ := s.feed.Get()
	if view == nil {
		return "", false
	}
	return view.Model.QuarantinedNode(node)
}

// awaitQuarantine waits until a node is cut off; false when ctx ended first.
func (s *Server) awaitQuarantine(ctx context.Context, node string) (quarantine string, cut bool) {
	for {
		view, changed := s.feed.Get()
		if view != nil {
			if quarantine, cut := view.Model.QuarantinedNode(node); cut {
				return quarantine, true
			}
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return "", false
		}
	}
}

// awaitRevoked waits until a certificate is revoked; false when ctx ended first.
func (s *Server) awaitRevoked(ctx context.Context, leaf *x509.Certificate) bool {
	for {
		_, changed, _ := s.authority.Revoked()
		if s.authority.IsRevoked(leaf.SerialNumber.Bytes()) {
			return true
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return false
		}
	}
}

func (s *Server) refuseQuarantined(ctx context.Context, call, node, quarantine string) error {
	return s.refuse(ctx, call, node, ReasonQuarantine, "node %q is cut off by quarantine %q", node, quarantine)
}
