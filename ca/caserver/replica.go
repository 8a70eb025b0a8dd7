package caserver

import (
	"slices"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

// Other replicas are told of a namespace's next step within tellSteps, and of
// what else has changed every tellReports of these.
const (
	tellSteps   = 100 * time.Millisecond
	tellReports = 5
)

// Step is how far a replica of the control plane has taken a namespace into the
// mesh.
type Step struct {
	Namespace string
	Number    int  // from 0, which is outside, to 3, which is as annotated
	Taken     bool // the nodes that are connected to the replica act by it
}

// toReplica lets the control plane's own certificate in, and nobody else, until
// that certificate expires. A node learns nothing about others.
func (s *Server) toReplica(srv any, stream grpc.ServerStream, info *grpc.StreamServerInfo, handler grpc.StreamHandler) error {
	c, err := s.caller(stream.Context(), info.FullMethod)
	if err != nil {
		return err
	}
	if want := ca.ControlID(s.authority.TrustDomain()); c.id != want {
		return s.refuse(stream.Context(), info.FullMethod, "", ReasonCaller, "the certificate is for %q; only %q may call", c.id, want)
	}
	ctx, cancel := s.whileValid(stream.Context(), c.leaf)
	defer cancel()
	return handler(srv, &nodeStream{stream, ctx})
}

// replicas serves the other replicas of the control plane.
type replicas struct {
	nodev1.UnimplementedReplicaServer
	server *Server
	steps  func() []Step
}

// Replicas returns the service by which other replicas of the control plane
// learn what this one's nodes report, and which steps it has taken; nil: none.
// It is to be registered on a gRPC server made with ServerOptions.
func (s *Server) Replicas(steps func() []Step) nodev1.ReplicaServer {
	if steps == nil {
		steps = func() []Step { return nil }
	}
	return &replicas{server: s, steps: steps}
}

// Nodes implements nodev1.ReplicaServer.
func (r *replicas) Nodes(_ *nodev1.NodesRequest, stream grpc.ServerStreamingServer[nodev1.NodesResponse]) error {
	tick := time.NewTicker(tellSteps)
	defer tick.Stop()
	var told *nodev1.NodesResponse
	var toldSteps []Step
	for n := 0; ; n++ {
		if steps := r.steps(); n%tellReports == 0 || !slices.Equal(steps, toldSteps) {
			toldSteps = steps
			if now := toldOf(r.server.Reports(), steps); told == nil || !proto.Equal(told, now) {
				if err := stream.Send(now); err != nil {
					return err
				}
				told = now
			}
		}
		select {
		case <-tick.C:
		case <-stream.Context().Done():
			return stream.Context().Err()
		}
	}
}

func toldOf(reports []NodeReport, steps []Step) *nodev1.NodesResponse {
	out := &nodev1.NodesResponse{Nodes: make([]*nodev1.NodeReport, 0, len(reports))}
	for _, n := range reports {
		out.Nodes = append(out.Nodes, &nodev1.NodeReport{
			Node: n.Node, Connected: n.Connected, Revision: n.Revision, Workloads: n.Workloads,
			At: nanos(n.At), Clock: int64(n.Clock), Since: nanos(n.Since), Roots: n.Roots,
		})
	}
	for _, s := range steps {
		out.Namespaces = append(out.Namespaces, &nodev1.NamespaceStep{Namespace: s.Namespace, Step: uint32(s.Number), Taken: s.Taken})
	}
	return out
}

// StepsOf reads which steps a replica has told of.
func StepsOf(m *nodev1.NodesResponse) []Step {
	out := make([]Step, 0, len(m.GetNamespaces()))
	for _, s := range m.GetNamespaces() {
		out = append(out, Step{Namespace: s.GetNamespace(), Number: int(s.GetStep()), Taken: s.GetTaken()})
	}
	return out
}

// ReportsOf reads what a replica has told of its nodes.
func ReportsOf(m *nodev1.NodesResponse) []NodeReport {
	out := make([]NodeReport, 0, len(m.GetNodes()))
	for _, n := range m.GetNodes() {
		out = append(out, NodeReport{
			Node: n.GetNode(), Connected: n.GetConnected(), Revision: n.GetRevision(), Workloads: n.GetWorkloads(),
			At: instant(n.GetAt()), Clock: time.Duration(n.GetClock()), Since: instant(n.GetSince()), Roots: n.GetRoots(),
		})
	}
	return out
}

// nanos and instant carry the zero time as zero.
func nanos(t time.Time) int64 {
	if t.IsZero() {
		return 0
	}
	return t.UnixNano()
}

func instant(nanos int64) time.Time {
	if nanos == 0 {
		return time.Time{}
	}
	return time.Unix(0, nanos)
}
