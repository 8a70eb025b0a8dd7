package caserver

import (
	"context"
	"net"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"
	"google.golang.org/grpc/status"
)

// Reason is why a call was refused, in one word.
type Reason string

// The reasons.
const (
	ReasonCertificate Reason = "certificate" // none, or not a good one
	ReasonRevoked     Reason = "revoked"     // the certificate is
	ReasonCaller      Reason = "caller"      // a good certificate of somebody who may not call
	ReasonToken       Reason = "token"       // a join token that is not good
	ReasonQuarantine  Reason = "quarantine"  // of the node, or of the identity
	ReasonNode        Reason = "node"        // the workload is not on the calling node, or nowhere
	ReasonPod         Reason = "pod"         // another pod has the workload's name
	ReasonNamespace   Reason = "namespace"   // it takes no part in the mesh
	ReasonRate        Reason = "rate"        // the node asks too often
	ReasonRequest     Reason = "request"     // what was asked is wrong in itself
	ReasonStarting    Reason = "starting"    // there is no state yet
	ReasonAbove       Reason = "above"       // the authority above has said no
)

// Reasons are all of them.
var Reasons = []Reason{
	ReasonCertificate, ReasonRevoked, ReasonCaller, ReasonToken, ReasonQuarantine, ReasonNode, ReasonPod, ReasonNamespace,
	ReasonRate, ReasonRequest, ReasonStarting, ReasonAbove,
}

// code is what the caller is told by.
func (r Reason) code() codes.Code {
	switch r {
	case ReasonCertificate, ReasonRevoked:
		return codes.Unauthenticated
	case ReasonRate:
		return codes.ResourceExhausted
	case ReasonRequest:
		return codes.InvalidArgument
	case ReasonAbove:
		return codes.FailedPrecondition
	case ReasonStarting:
		return codes.Unavailable
	}
	return codes.PermissionDenied
}

// Refusal is a call that was refused.
type Refusal struct {
	Call string
	// Node is who called, as its certificate proved; empty: nobody proved to be
	// one.
	Node string
	// Workload is which workload the call named, in the caller's words; empty:
	// none.
	Workload string
	// From is the caller's address without the port; empty on a unix socket.
	From    string
	Reason  Reason
	Message string // what the caller was told
}

// refuse logs and tells a refusal, and returns it as a gRPC status.
func (s *Server) refuse(ctx context.Context, call, node string, reason Reason, format string, args ...any) error {
	return s.refuseFor(ctx, call, node, "", reason, format, args...)
}

// refuseFor is refuse for a call that names a workload.
func (s *Server) refuseFor(ctx context.Context, call, node, workload string, reason Reason, format string, args ...any) error {
	err := status.Errorf(reason.code(), format, args...)
	s.note(ctx, reason.code(), Refusal{Call: call, Node: node, Workload: workload, Reason: reason, Message: status.Convert(err).Message()})
	return err
}

// note logs and tells a refusal.
func (s *Server) note(ctx context.Context, code codes.Code, r Refusal) {
	if p, ok := peer.FromContext(ctx); ok && p.Addr != nil {
		if host, _, err := net.SplitHostPort(p.Addr.String()); err == nil {
			r.From = host
		}
	}
	log := s.log
	if r.From != "" {
		log = log.With("from", r.From)
	}
	log.WarnContext(ctx, "refused", "call", r.Call, "node", r.Node, "code", code.String(), "reason", r.Message, "why", string(r.Reason))
	s.refused(r)
}
