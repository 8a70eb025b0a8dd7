package workloadapi

import (
	"context"
	"fmt"
	"path"
	"strings"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/refusal"
)

// header is the metadata key without which a call is refused: a program that
// can be made to send requests somewhere (SSRF) can seldom be made to send
// this.
const header = "workload.spiffe.io"

func (s *Server) unary(ctx context.Context, req any, info *grpc.UnaryServerInfo, next grpc.UnaryHandler) (any, error) {
	done, err := s.admit(ctx, info.FullMethod)
	if err != nil {
		return nil, err
	}
	defer done()
	return next(ctx, req)
}

func (s *Server) stream(srv any, ss grpc.ServerStream, info *grpc.StreamServerInfo, next grpc.StreamHandler) error {
	done, err := s.admit(ss.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	defer done()
	return next(srv, ss)
}

// admit checks the header and counts the call; done ends the count. It holds
// for every service on the socket, except that reflection needs no header.
func (s *Server) admit(ctx context.Context, method string) (done func(), err error) {
	if !strings.HasPrefix(method, "/grpc.reflection.") {
		md, _ := metadata.FromIncomingContext(ctx)
		if v := md.Get(header); len(v) != 1 || v[0] != "true" {
			p, _ := process(ctx) // nobody, if it cannot be told
			s.refused(refusal.Refusal{Kind: refusal.Header, Call: path.Base(method), Caller: refusal.Of(p), Reason: "the metadata " + header + " is missing: this is no Workload API client, or one that is made to call"})
			return nil, status.Errorf(codes.InvalidArgument, "the metadata %q is missing or not \"true\"; a Workload API client must send it", header)
		}
	}
	p, err := process(ctx)
	if err != nil { // the connection was written down
		return nil, status.Error(codes.PermissionDenied, "the calling process cannot be identified: "+err.Error())
	}
	if !s.calls.add(p.UID, s.perUID) {
		if s.refusals.Allow() {
			s.log.Warn("a user id has too many calls to the Workload API open; refusing another", "uid", p.UID, "pid", p.PID, "limit", s.perUID)
		}
		s.refused(refusal.Refusal{Kind: refusal.Limit, Call: path.Base(method), Caller: refusal.Of(p), Reason: fmt.Sprintf("its user id has %d calls open", s.perUID)})
		return nil, unavailable("uid %d has %d calls open; close some", p.UID, s.perUID)
	}
	return func() { s.calls.done(p.UID) }, nil
}
