package xds

import (
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	internallistenerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/bootstrap/internal_listener/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
)

// Bootstrap returns the proxy's start configuration as JSON: everything else
// comes over ADS from the agent's socket.
func Bootstrap(node, adsSocket, adminSocket string) ([]byte, error) {
	pipe := func(path string) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path, Mode: 0o600}}}
	}
	wild := &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		InitialFetchTimeout:   seconds(0),
	}
	return protojson.MarshalOptions{Indent: " "}.Marshal(&bootstrapv3.Bootstrap{
		Node:  &corev3.Node{Id: node, Cluster: "signet"},
		Admin: &bootstrapv3.Admin{Address: pipe(adminSocket)},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			AdsConfig: &corev3.ApiConfigSource{
				ApiType:             corev3.ApiConfigSource_DELTA_GRPC,
				TransportApiVersion: corev3.ApiVersion_V3,
				GrpcServices: []*corev3.GrpcService{{
					TargetSpecifier: &corev3.GrpcService_EnvoyGrpc_{EnvoyGrpc: &corev3.GrpcService_EnvoyGrpc{
						ClusterName: "agent",
						// The agent is on the same machine. By default the proxy
						// would wait up to 30 s before it tries again, and one that
						// starts before the agent is there refuses all that long.
						RetryPolicy: &corev3.RetryPolicy{RetryBackOff: &corev3.BackoffStrategy{
							BaseInterval: durationpb.New(50 * time.Millisecond),
							MaxInterval:  durationpb.New(500 * time.Millisecond),
						}},
					}},
				}},
			},
			CdsConfig: wild,
			LdsConfig: wild,
		},
		StaticResources: &bootstrapv3.Bootstrap_StaticResources{Clusters: []*clusterv3.Cluster{{
			Name:                 "agent",
			ClusterDiscoveryType: &clusterv3.Cluster_Type{Type: clusterv3.Cluster_STATIC},
			ConnectTimeout:       seconds(1),
			TypedExtensionProtocolOptions: map[string]*anypb.Any{
				"envoy.extensions.upstreams.http.v3.HttpProtocolOptions": packed(&httpv3.HttpProtocolOptions{
					UpstreamProtocolOptions: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_{
						ExplicitHttpConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig{
							ProtocolConfig: &httpv3.HttpProtocolOptions_ExplicitHttpConfig_Http2ProtocolOptions{
								Http2ProtocolOptions: &corev3.Http2ProtocolOptions{},
							},
						},
					},
				}),
			},
			LoadAssignment: &endpointv3.ClusterLoadAssignment{
				ClusterName: "agent",
				Endpoints: []*endpointv3.LocalityLbEndpoints{{LbEndpoints: []*endpointv3.LbEndpoint{{
					HostIdentifier: &endpointv3.LbEndpoint_Endpoint{Endpoint: &endpointv3.Endpoint{
						Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: adsSocket}}},
					}},
				}}}},
			},
		}}},
		BootstrapExtensions: []*corev3.TypedExtensionConfig{{
			Name:        "envoy.bootstrap.internal_listener",
			TypedConfig: packed(&internallistenerv3.InternalListener{}),
		}},
		LayeredRuntime: &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
			Name:           "signet",
			LayerSpecifier: &bootstrapv3.RuntimeLayer_StaticLayer{StaticLayer: runtime()},
		}}},
	})
}

// runtime: the peer of a tunnel is an authenticated node proxy, and the
// streams in it are the connections of applications, which may end in any
// way they like. Envoy's defence against rapid resets counts streams that
// were reset early and ends the whole tunnel, with the connections of
// neighbours in it. It is raised, not removed: a tunnel that carried a
// million streams of which half were reset within the second is ended.
func runtime() *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{
		// An application that closes normally after its answer must not look
		// like a reset to the caller, who would lose what it has not read.
		"envoy.reloadable_features.propagate_upstream_rst_through_tunneled_tcp_proxy": structpb.NewBoolValue(false),
		"overload.premature_reset_total_stream_count":                                 structpb.NewNumberValue(1e6),
		"overload.premature_reset_min_stream_lifetime_seconds":                        structpb.NewNumberValue(1),
	}}
}
