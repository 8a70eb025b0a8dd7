package caserver

import (
	"context"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

// named is a request that names a workload: every identity that a node asks
// for is asked for so.
type named interface {
	GetWorkload() string
	GetUid() string
}

// onBehalf decides whether a node may have an identity of the workload that it
// names: it must be on that node in the newest view, in a namespace that takes
// part, and be the pod of that UID. The error is a gRPC status, and logged.
func (s *Server) onBehalf(ctx context.Context, call, node string, req named) (*mesh.Workload, *mesh.View, error) {
	view, _ := s.feed.Get()
	if view == nil || view.State == nil {
		return nil, nil, s.refuseFor(ctx, call, node, req.GetWorkload(), ReasonStarting, "the control plane has not read its documents yet; try again")
	}
	// One answer for a workload elsewhere and one that does not exist: a node
	// learns nothing about others.
	w := view.State.Workload(req.GetWorkload())
	if w == nil || w.Node != node {
		return nil, nil, s.refuseFor(ctx, call, node, req.GetWorkload(), ReasonNode, "workload %s is not on node %q", quote(req.GetWorkload()), node)
	}
	// A pod that was replaced by another of its name gets nothing: the name
	// alone would let its node go on in the name of the next one.
	if w.UID != "" && req.GetUid() != w.UID {
		return nil, nil, s.refuseFor(ctx, call, node, w.Key(), ReasonPod, "uid: workload %s is not pod %s", quote(w.Key()), quote(req.GetUid()))
	}
	if view.State.Mode(w.Namespace) == mesh.ModeOff {
		return nil, nil, s.refuseFor(ctx, call, node, w.Key(), ReasonNamespace, "namespace %q of workload %q is off; annotate it with signet.dev/mesh: enforce or observe", w.Namespace, w.Key())
	}
	return w, view, nil
}

// IssueJWT signs a token for a workload, under the conditions of Issue. Tokens
// have a rate of their own: who asks for many must not keep certificates from
// being renewed.
func (s *Server) IssueJWT(ctx context.Context, req *nodev1.IssueJWTRequest) (*nodev1.IssueJWTResponse, error) {
	name, ok := NodeFromContext(ctx)
	if !ok {
		return nil, s.refuse(ctx, "IssueJWT", "", ReasonCertificate, "no node certificate")
	}
	if !s.node(name).tokens.AllowN(s.now(), 1) {
		return nil, s.refuseRate(ctx, "IssueJWT", name, req.GetWorkload())
	}
	w, view, err := s.onBehalf(ctx, "IssueJWT", name, req)
	if err != nil {
		return nil, err
	}
	// A certificate of a quarantined identity opens no connection; a token would
	// be taken by applications that know nothing of the quarantine.
	if quarantine, cut := view.Model.Quarantined(w.ID); cut {
		return nil, s.refuseFor(ctx, "IssueJWT", name, w.Key(), ReasonQuarantine, "%s is cut off by quarantine %q", w.ID, quarantine)
	}
	p, err := s.authority.PrepareJWT(ca.JWTRequest{ID: w.ID, Audience: req.GetAudience(), Node: name, Workload: w.Key()})
	if err != nil {
		return nil, s.refuseFor(ctx, "IssueJWT", name, w.Key(), ReasonRequest, "%v", err)
	}
	issued, err := s.authority.IssueJWT(p)
	if err != nil {
		s.log.ErrorContext(ctx, "issuing failed", "call", "IssueJWT", "node", name, "id", w.ID.String(), "err", err)
		return nil, status.Error(codes.Unavailable, "the token could not be issued; see the control plane's log")
	}
	s.log.InfoContext(ctx, "issued", "call", "IssueJWT", "node", name, "workload", w.Key(), "id", w.ID.String(),
		"serial", issued.Serial, "audience", req.GetAudience(), "kid", issued.KeyID, "not_after", issued.ExpiresAt)
	return &nodev1.IssueJWTResponse{Token: issued.Token}, nil
}
