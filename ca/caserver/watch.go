package caserver

import (
	"cmp"
	"context"
	"crypto/x509"
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Watch streams the calling node's part of the newest view: at once, and
// whenever the view or the bundle changed in a way that this node can see.
// It sends nothing before the first view. A node that reads slowly skips to
// the newest state.
func (s *Server) Watch(req *nodev1.WatchRequest, stream grpc.ServerStreamingServer[nodev1.NodeState]) error {
	ctx := stream.Context()
	name, ok := NodeFromContext(ctx)
	if !ok {
		return s.refuse(ctx, "Watch", "", codes.Unauthenticated, "no node certificate")
	}
	if len(req.GetRevision()) > 256 {
		return s.refuse(ctx, "Watch", name, codes.InvalidArgument, "revision: %d bytes; at most 256", len(req.GetRevision()))
	}
	s.connected(name, req.GetRevision())
	defer s.disconnected(name)
	s.log.InfoContext(ctx, "node connected", "node", name, "revision", req.GetRevision())
	defer s.log.InfoContext(ctx, "node disconnected", "node", name)

	var last *nodev1.NodeState
	for {
		view, viewChanged := s.feed.Get()
		bundle, bundleChanged := s.authority.BundleUpdates()
		if view != nil && view.State != nil {
			state := nodeState(view, name, bundle)
			if s.xdsVersion != nil {
				state.XdsVersion = s.xdsVersion(view, name)
			}
			if last == nil || !proto.Equal(last, state) {
				if err := stream.Send(state); err != nil {
					return err
				}
				last = state
			}
		}
		select {
		case <-viewChanged:
		case <-bundleChanged:
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		}
	}
}

// nodeState is all that one node may see of a view, in an order that depends
// on nothing but its content.
func nodeState(view *mesh.View, name string, bundle []*x509.Certificate) *nodev1.NodeState {
	ttl := view.State.SVIDTTL
	if ttl == 0 {
		ttl = ca.DefaultTTL
	}
	out := &nodev1.NodeState{
		Revision:       view.Revision,
		TrustDomain:    view.State.TrustDomain.Name(),
		Bundle:         rawCerts(bundle),
		SvidTtlSeconds: int64(ttl / time.Second),
	}
	local := view.State.OnNode(name)
	slices.SortFunc(local, func(a, b mesh.Workload) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	targets := make(map[authz.Target]bool)
	namespaces := make(map[string]bool)
	for i := range local {
		w := &local[i]
		targets[authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}] = true
		namespaces[w.Namespace] = true
		out.Workloads = append(out.Workloads, workloadMessage(w, view.State.Mode(w.Namespace)))
	}
	if view.Model == nil {
		return out
	}
	for _, p := range view.Model.Policies() {
		protects := namespaces[p.Namespace]
		if p.TargetServiceAccount != "" {
			protects = targets[authz.Target{Namespace: p.Namespace, ServiceAccount: p.TargetServiceAccount}]
		}
		if protects {
			out.Policies = append(out.Policies, policyMessage(&p))
		}
	}
	slices.SortFunc(out.Policies, func(a, b *nodev1.Policy) int {
		return cmp.Or(cmp.Compare(a.Namespace, b.Namespace), cmp.Compare(a.Name, b.Name))
	})
	return out
}

func workloadMessage(w *mesh.Workload, mode mesh.Mode) *nodev1.Workload {
	out := &nodev1.Workload{
		Namespace:      w.Namespace,
		Name:           w.Name,
		ServiceAccount: w.ServiceAccount,
		SpiffeId:       w.ID.String(),
		Mode:           mode.String(),
	}
	if a := w.Attest; a != nil {
		out.Attest = &nodev1.Attest{Path: a.Path, Sha256: a.SHA256, SystemdUnit: a.SystemdUnit, Cgroup: a.Cgroup}
		if a.UID != nil {
			out.Attest.Uid = proto.Uint32(*a.UID)
		}
	}
	if c := w.Capture; c != nil {
		out.Capture = &nodev1.Capture{Netns: c.NetNS}
		for _, addr := range c.Addrs {
			out.Capture.Addresses = append(out.Capture.Addresses, addr.String())
		}
	}
	return out
}

func policyMessage(p *authz.Policy) *nodev1.Policy {
	out := &nodev1.Policy{Namespace: p.Namespace, Name: p.Name, TargetServiceAccount: p.TargetServiceAccount}
	for _, port := range p.Ports {
		out.Ports = append(out.Ports, uint32(port))
	}
	for _, from := range p.From {
		out.From = append(out.From, from.String())
	}
	return out
}

// Report notes how far the calling node's proxy is.
func (s *Server) Report(ctx context.Context, req *nodev1.ReportRequest) (*nodev1.ReportResponse, error) {
	name, ok := NodeFromContext(ctx)
	if !ok {
		return nil, s.refuse(ctx, "Report", "", codes.Unauthenticated, "no node certificate")
	}
	if len(req.GetRevision()) > 256 {
		return nil, s.refuse(ctx, "Report", name, codes.InvalidArgument, "revision: %d bytes; at most 256", len(req.GetRevision()))
	}
	s.Acked(name, req.GetRevision())
	return &nodev1.ReportResponse{}, nil
}
