package caserver

import (
	"context"
	"errors"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

// MaxMany is how many certificates one call of IssueMany asks for at most.
const MaxMany = 50

// Issue signs a certificate for a workload that the newest view puts on the
// calling node, in a namespace that takes part.
func (s *Server) Issue(ctx context.Context, req *nodev1.IssueRequest) (*nodev1.IssueResponse, error) {
	name, ok := NodeFromContext(ctx)
	if !ok {
		return nil, s.refuse(ctx, "Issue", "", ReasonCertificate, "no node certificate")
	}
	wanted, err := s.admit(ctx, name, req)
	if err != nil {
		return nil, err
	}
	chain, err := s.issue(ctx, "Issue", wanted)
	if err != nil {
		return nil, err
	}
	return &nodev1.IssueResponse{Chain: chain}, nil
}

// IssueMany does for each request what Issue does for one, so that a batch gets a
// node nothing that it would not get by itself: each counts against the node's rate,
// is decided by itself, and is refused in the same words and told as the same call.
// Only the issuance log is synced once, before the first is signed.
func (s *Server) IssueMany(ctx context.Context, req *nodev1.IssueManyRequest) (*nodev1.IssueManyResponse, error) {
	name, ok := NodeFromContext(ctx)
	if !ok {
		return nil, s.refuse(ctx, "IssueMany", "", ReasonCertificate, "no node certificate")
	}
	if n := len(req.GetRequests()); n < 1 || n > MaxMany {
		if !s.node(name).limiter.AllowN(s.now(), 1) {
			return nil, s.refuseRate(ctx, "IssueMany", name, "")
		}
		return nil, s.refuse(ctx, "IssueMany", name, ReasonRequest, "requests: %d; ask for 1 to %d certificates in a call", n, MaxMany)
	}
	if s.authority.LeavesAbove() {
		return nil, status.Error(codes.Unimplemented, "each workload is certified by the authority above; ask for each certificate by Issue")
	}
	var (
		out      nodev1.IssueManyResponse
		wanted   []ca.Request
		prepared []*ca.Prepared
		results  []*nodev1.IssueResult // of those that are prepared
	)
	for _, one := range req.GetRequests() {
		if err := ctx.Err(); err != nil {
			return nil, status.FromContextError(err).Err()
		}
		result := new(nodev1.IssueResult)
		out.Results = append(out.Results, result)
		want, err := s.admit(ctx, name, one)
		if err != nil {
			answer(result, nil, err)
			continue
		}
		p, err := s.prepare(ctx, "Issue", want)
		if err != nil {
			answer(result, nil, err)
			continue
		}
		wanted, prepared, results = append(wanted, want), append(prepared, p), append(results, result)
	}
	for i, r := range s.authority.IssueMany(prepared) {
		chain, err := s.conclude(ctx, "IssueMany", wanted[i], r.Issued, r.Err)
		answer(results[i], chain, err)
	}
	return &out, nil
}

// answer writes what Issue would have returned.
func answer(r *nodev1.IssueResult, chain [][]byte, err error) {
	if err != nil {
		said := status.Convert(err)
		r.Code, r.Message = uint32(said.Code()), said.Message()
		return
	}
	r.Chain = chain
}

// admit decides whether a node may have the certificate that it asks for, and says
// what is to be certified.
func (s *Server) admit(ctx context.Context, node string, req *nodev1.IssueRequest) (ca.Request, error) {
	if !s.node(node).limiter.AllowN(s.now(), 1) {
		return ca.Request{}, s.refuseRate(ctx, "Issue", node, req.GetWorkload())
	}
	w, view, err := s.onBehalf(ctx, "Issue", node, req)
	if err != nil {
		return ca.Request{}, err
	}
	return ca.Request{ID: w.ID, CSR: req.GetCsr(), TTL: view.State.SVIDTTL, Node: node, Workload: w.Key()}, nil
}

// issue prepares and signs.
func (s *Server) issue(ctx context.Context, call string, req ca.Request) ([][]byte, error) {
	p, err := s.prepare(ctx, call, req)
	if err != nil {
		return nil, err
	}
	issued, err := s.authority.IssueContext(ctx, p)
	return s.conclude(ctx, call, req, issued, err)
}

// prepare checks a request, with errors as gRPC statuses: what the caller sent is its
// own affair to read about.
func (s *Server) prepare(ctx context.Context, call string, req ca.Request) (*ca.Prepared, error) {
	p, err := s.authority.Prepare(req)
	if err != nil {
		return nil, s.refuseFor(ctx, call, req.Node, req.Workload, ReasonRequest, "%v", err)
	}
	return p, nil
}

// conclude logs what became of a request, and returns it with errors as gRPC
// statuses: what failed here goes to the log.
func (s *Server) conclude(ctx context.Context, call string, req ca.Request, issued *ca.Issued, err error) ([][]byte, error) {
	if errors.Is(err, ca.ErrSingly) {
		return nil, status.Error(codes.Unimplemented, "ask for this certificate by Issue")
	}
	if no := (*ca.UpstreamError)(nil); errors.As(err, &no) {
		if no.Final() {
			return nil, s.refuseFor(ctx, call, req.Node, req.Workload, ReasonAbove, "%s", no.Message)
		}
		s.log.WarnContext(ctx, "not issued yet", "call", call, "node", req.Node, "id", req.ID.String(), "reason", string(no.Reason), "message", no.Message)
		return nil, status.Error(codes.Unavailable, no.Message)
	}
	if err != nil {
		s.log.ErrorContext(ctx, "issuing failed", "call", call, "node", req.Node, "id", req.ID.String(), "err", err)
		return nil, status.Error(codes.Unavailable, "the certificate could not be issued; see the control plane's log")
	}
	s.log.InfoContext(ctx, "issued", "call", call, "node", req.Node, "workload", req.Workload,
		"id", req.ID.String(), "serial", issued.Serial, "not_after", issued.NotAfter)
	return issued.Chain, nil
}
