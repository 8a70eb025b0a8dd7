package xds

import (
	"errors"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/wrapperspb"

	"github.com/signet-mesh/signet/internal/mesh"
)

// Options are the settings of the node proxy that do not follow from the mesh.
type Options struct {
	// AccessLog is the file that the proxy appends audit lines to. Empty
	// turns audit off, which exists for measuring what it costs.
	AccessLog string
	// IPv6 says that the node's kernel has IPv6. On one that has not, the
	// proxy refuses everything with an IPv6 address in it.
	IPv6 bool
	// Tunnels is when the proxy was last told to open new tunnels; zero: never.
	// Another instant makes it do so: those from before take no new connections,
	// and end with the last that they carry.
	Tunnels time.Time
}

// Local returns what the proxy of a node needs to serve the node's own
// workloads: the shared clusters, its listeners and their routes. It looks at
// nothing in the view but the node's own workloads, their namespaces and the
// policies and identities that concern them, so the node's agent builds it, by
// itself if it must.
func Local(v *mesh.View, node string, o Options) (Set, error) {
	return build(v, node, o, (*builder).sharedClusters, (*builder).tunnelListener, (*builder).foreignTunnels, (*builder).originators, (*builder).workloadListeners, (*builder).workloadRoutes)
}

// Destinations returns the clusters of what the node's workloads are allowed to
// reach, which are pushed ahead. Other destinations are built on demand by
// Destination.
func Destinations(v *mesh.View, node string) (Set, error) {
	return build(v, node, Options{}, (*builder).allowedDestinations)
}

func build(v *mesh.View, node string, o Options, stages ...func(*builder)) (Set, error) {
	if v == nil || v.State == nil {
		return nil, errors.New("xds: no state")
	}
	b := &builder{view: v, node: node, opts: o, set: Set{}}
	for _, stage := range stages {
		stage(b)
	}
	return b.set, b.err
}

// builder carries one Build through its stages.
type builder struct {
	view *mesh.View
	node string
	opts Options
	set  Set
	err  error // the first failure
}

func (b *builder) add(name string, m proto.Message) {
	if err := b.set.Add(name, m); err != nil && b.err == nil {
		b.err = err
	}
}

// captured returns the node's workloads that have listeners: those whose
// network namespace is known.
func (b *builder) captured() []mesh.Workload {
	var out []mesh.Workload
	for _, w := range b.view.State.OnNode(b.node) {
		if w.Capture != nil && w.Capture.NetNS != "" {
			out = append(out, w)
		}
	}
	return out
}

// packed wraps a message built here; marshalling it cannot fail, since every
// string in it has been validated as UTF-8 at the edge.
func packed(m proto.Message) *anypb.Any {
	value, err := proto.MarshalOptions{Deterministic: true}.Marshal(m)
	if err != nil {
		return nil // Envoy refuses a resource with an empty extension
	}
	return &anypb.Any{
		TypeUrl: "type.googleapis.com/" + string(m.ProtoReflect().Descriptor().FullName()),
		Value:   value,
	}
}

func ads() *corev3.ConfigSource {
	return &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
	}
}

func u32(n uint32) *wrapperspb.UInt32Value { return wrapperspb.UInt32(n) }

func seconds(n int64) *durationpb.Duration { return &durationpb.Duration{Seconds: n} }
