package caserver

import (
	"context"
	"fmt"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

// Watch streams the calling node's part of the newest view: at once, and
// whenever the view or a bundle changed in a way that this node can see. Of
// a change elsewhere it hears the revision, within revisionDelay.
// It sends nothing before the first view. A node that reads slowly skips to
// the newest state.
func (s *Server) Watch(req *nodev1.WatchRequest, stream grpc.ServerStreamingServer[nodev1.NodeState]) error {
	ctx := stream.Context()
	name, ok := NodeFromContext(ctx)
	if !ok {
		return s.refuse(ctx, "Watch", "", ReasonCertificate, "no node certificate")
	}
	if len(req.GetRevision()) > 256 {
		return s.refuse(ctx, "Watch", name, ReasonRequest, "revision: %d bytes; at most 256", len(req.GetRevision()))
	}
	s.connected(name, req.GetRevision())
	defer s.disconnected(name)
	s.log.InfoContext(ctx, "node connected", "node", name, "revision", req.GetRevision())
	defer s.log.InfoContext(ctx, "node disconnected", "node", name)

	var last *nodev1.NodeState
	var late <-chan time.Time // when a new revision alone is told; nil: none waits
	overdue := false          // it is told now
	var err error
	for {
		view, viewChanged := s.feed.Get()
		bundle, bundleChanged := s.authority.BundleUpdates()
		jwtKeys, jwtKeysChanged := s.authority.JWTKeys()
		foreign, foreignChanged := s.foreign()
		revoked, revokedChanged, next := s.authority.Revoked()
		var lapse <-chan time.Time
		if !next.IsZero() {
			lapse = time.After(max(next.Sub(s.now()), time.Millisecond))
		}
		if view != nil && view.State != nil {
			state := nodeState(view, name, bundle)
			for _, f := range s.authority.Distrusted() {
				state.Distrusted = append(state.Distrusted, f[:])
			}
			for _, r := range revoked {
				state.Revoked = append(state.Revoked, &nodev1.Revoked{Serial: r.Serial, Reason: r.Reason, Refused: r.Refused(s.now())})
			}
			if state.JwtKeys, err = jwtKeyMessages(jwtKeys); err != nil {
				s.log.ErrorContext(ctx, "a JWT key cannot be encoded", "err", err)
				return status.Error(codes.Internal, "a JWT key cannot be encoded; see the control plane's log")
			}
			if state.ForeignBundles, err = foreignMessages(state.TrustDomain, foreign); err != nil {
				s.log.ErrorContext(ctx, "a key of another trust domain cannot be encoded", "err", err)
				return status.Error(codes.Internal, "a key of another trust domain cannot be encoded; see the control plane's log")
			}
			if s.xdsVersion != nil {
				state.XdsVersion = s.xdsVersion(view, name)
			}
			news := last == nil || !sameState(last, state)
			send := news || overdue
			s.sending(name, view.Revision, news, send)
			switch {
			case send:
				if err := stream.Send(state); err != nil {
					return err
				}
				last, late, overdue = state, nil, false
			case last.Revision != state.Revision && late == nil:
				late = time.After(revisionDelay)
			}
		}
		select {
		case <-viewChanged:
		case <-bundleChanged:
		case <-jwtKeysChanged:
		case <-foreignChanged:
		case <-revokedChanged:
		case <-lapse:
		case <-late:
			late, overdue = nil, true
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// revisionDelay is how long a change that is none for a node is kept from it:
// of the many changes in a large mesh it hears once in a while.
const revisionDelay = time.Second

// sameState compares all but the revision: a change elsewhere in the mesh is
// none for this node.
func sameState(a, b *nodev1.NodeState) bool {
	revision := b.Revision
	b.Revision = a.Revision
	same := proto.Equal(a, b)
	b.Revision = revision
	return same
}

// Bounds of a report.
const (
	maxReported = 4096 // workloads
	maxProblem  = 1024 // bytes of one problem
	maxRoots    = 16
)

// Report notes how far the calling node's proxy is, and how its workloads are.
// What it says about pods of other nodes is not kept. The answer is the same,
// since a node learns nothing about others; the log has it.
func (s *Server) Report(ctx context.Context, req *nodev1.ReportRequest) (*nodev1.ReportResponse, error) {
	name, ok := NodeFromContext(ctx)
	if !ok {
		return nil, s.refuse(ctx, "Report", "", ReasonCertificate, "no node certificate")
	}
	if len(req.GetRevision()) > 256 {
		return nil, s.refuse(ctx, "Report", name, ReasonRequest, "revision: %d bytes; at most 256", len(req.GetRevision()))
	}
	if len(req.GetWorkloads()) > maxReported {
		return nil, s.refuse(ctx, "Report", name, ReasonRequest, "workloads: %d; at most %d", len(req.GetWorkloads()), maxReported)
	}
	for _, w := range req.GetWorkloads() {
		if len(w.GetWorkload()) > 512 || len(w.GetUid()) > 128 || len(w.GetProblem()) > maxProblem {
			return nil, s.refuse(ctx, "Report", name, ReasonRequest, "workloads: an entry is too long; a problem may have %d bytes", maxProblem)
		}
	}
	roots := req.GetRoots()
	if len(roots.GetTrusted()) > maxRoots || len(roots.GetUsed()) > maxRoots || len(roots.GetWaits()) > maxProblem {
		return nil, s.refuse(ctx, "Report", name, ReasonRequest, "roots: at most %d of each kind, and %d bytes of what waits", maxRoots, maxProblem)
	}
	if root, ok := ctx.Value(rootKey{}).(ca.Fingerprint); ok && roots != nil {
		// This connection ends with the root that its certificate ends at.
		roots = proto.CloneOf(roots)
		roots.Used = append(roots.Used, root[:])
	}
	own := s.ownReports(ctx, name, req.GetWorkloads())
	off := s.clockOf(req)
	s.mu.Lock()
	n := s.nodeLocked(name)
	was := n.clock
	n.revision, n.report, n.reported, n.clock, n.roots = req.GetRevision(), own, s.now(), off, roots
	s.mu.Unlock()
	switch {
	case was == 0 && off != 0:
		s.log.WarnContext(ctx, "a node's clock and the control plane's differ; certificates are valid late or too short until the wrong one is set right", "node", name, "node_is_ahead", off)
	case was != 0 && off == 0:
		s.log.InfoContext(ctx, "a node's clock agrees with the control plane's again", "node", name)
	}
	return &nodev1.ReportResponse{}, nil
}

// clockTolerance is how far clocks may differ. A certificate is valid from a
// little before it is made, which is for nodes that are behind.
const clockTolerance = 10 * time.Second

// clockOf returns how far a node's clock is ahead; zero within the tolerance.
func (s *Server) clockOf(req *nodev1.ReportRequest) time.Duration {
	if req.GetClock() == 0 {
		return 0
	}
	off := time.Unix(req.GetClock(), 0).Sub(s.now().Truncate(time.Second))
	if off.Abs() <= clockTolerance {
		return 0
	}
	return off
}

// ownReports leaves out what is about a pod that runs on another node. A pod
// never changes its node, so no honest agent speaks of one; about one that is
// gone it may, and that is nobody's.
func (s *Server) ownReports(ctx context.Context, name string, all []*nodev1.WorkloadReport) []*nodev1.WorkloadReport {
	view, _ := s.feed.Get()
	if view == nil || view.State == nil {
		return all
	}
	others := func(r *nodev1.WorkloadReport) bool {
		w := view.State.Workload(r.GetWorkload())
		return w != nil && w.Node != name && w.UID != "" && w.UID == r.GetUid()
	}
	first := slices.IndexFunc(all, others)
	if first < 0 {
		return all
	}
	s.note(ctx, codes.PermissionDenied, Refusal{Call: "Report", Node: name, Workload: all[first].GetWorkload(), Reason: ReasonNode,
		Message: fmt.Sprintf("workloads: %s is not on node %q; what is said of it is not kept", quote(all[first].GetWorkload()), name)})
	return slices.DeleteFunc(slices.Clone(all), others)
}
