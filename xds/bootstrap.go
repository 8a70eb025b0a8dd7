package xds

import (
	"time"

	bootstrapv3 "github.com/envoyproxy/go-control-plane/envoy/config/bootstrap/v3"
	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	endpointv3 "github.com/envoyproxy/go-control-plane/envoy/config/endpoint/v3"
	overloadv3 "github.com/envoyproxy/go-control-plane/envoy/config/overload/v3"
	internallistenerv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/bootstrap/internal_listener/v3"
	injectedv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/resource_monitors/injected_resource/v3"
	httpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/upstreams/http/v3"
	"google.golang.org/protobuf/encoding/protojson"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/durationpb"
	"google.golang.org/protobuf/types/known/structpb"
)

// AuditPipe is the file that proxies write their audit lines to, to be given as
// Options.AccessLog: a pipe in the working directory of each.
const AuditPipe = "audit.pipe"

// HeaderProxy is metadata of a proxy's stream to the agent: which instance of
// the node's proxies it is.
const HeaderProxy = "x-signet-proxy"

// Proxy is what one proxy has of its own. Everything else comes over ADS.
type Proxy struct {
	Node     string
	Instance string // tells the proxies of a node apart
	ADS      string // the agent's socket
	Admin    string // the proxy's own admin socket
	// Haste is a file in a directory of its own. It holds "0", and is replaced
	// by one that holds "1" when tunnels that idle are to be told to go.
	Haste string
}

// Bootstrap returns a proxy's start configuration as JSON.
func Bootstrap(p Proxy) ([]byte, error) {
	pipe := func(path string) *corev3.Address {
		return &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: path, Mode: 0o600}}}
	}
	wild := &corev3.ConfigSource{
		ResourceApiVersion:    corev3.ApiVersion_V3,
		ConfigSourceSpecifier: &corev3.ConfigSource_Ads{Ads: &corev3.AggregatedConfigSource{}},
		InitialFetchTimeout:   seconds(0),
	}
	return protojson.MarshalOptions{Indent: " "}.Marshal(&bootstrapv3.Bootstrap{
		Node:  &corev3.Node{Id: p.Node, Cluster: "signet"},
		Admin: &bootstrapv3.Admin{Address: pipe(p.Admin)},
		DynamicResources: &bootstrapv3.Bootstrap_DynamicResources{
			AdsConfig: &corev3.ApiConfigSource{
				ApiType:             corev3.ApiConfigSource_DELTA_GRPC,
				TransportApiVersion: corev3.ApiVersion_V3,
				GrpcServices: []*corev3.GrpcService{{
					InitialMetadata: []*corev3.HeaderValue{{Key: HeaderProxy, Value: p.Instance}},
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
						Address: &corev3.Address{Address: &corev3.Address_Pipe{Pipe: &corev3.Pipe{Path: p.ADS}}},
					}},
				}}}},
			},
		}}},
		BootstrapExtensions: []*corev3.TypedExtensionConfig{{
			Name:        "envoy.bootstrap.internal_listener",
			TypedConfig: packed(&internallistenerv3.InternalListener{}),
		}},
		OverloadManager: hasty(p.Haste),
		LayeredRuntime: &bootstrapv3.LayeredRuntime{Layers: []*bootstrapv3.RuntimeLayer{{
			Name:           "signet",
			LayerSpecifier: &bootstrapv3.RuntimeLayer_StaticLayer{StaticLayer: runtime()},
		}}},
	})
}

// hasty has the proxy shorten the time that a tunnel may idle, ordinarily an
// hour, to a second when a file says so. Its caller is then told to use another,
// and only after that it is closed: a tunnel that is closed without a word can
// take a new connection with it, which is on its way.
func hasty(file string) *overloadv3.OverloadManager {
	const haste = "envoy.resource_monitors.injected_resource"
	return &overloadv3.OverloadManager{
		RefreshInterval: durationpb.New(250 * time.Millisecond),
		ResourceMonitors: []*overloadv3.ResourceMonitor{{
			Name:       haste,
			ConfigType: &overloadv3.ResourceMonitor_TypedConfig{TypedConfig: packed(&injectedv3.InjectedResourceConfig{Filename: file})},
		}},
		Actions: []*overloadv3.OverloadAction{{
			Name: "envoy.overload_actions.reduce_timeouts",
			Triggers: []*overloadv3.Trigger{{
				Name:         haste,
				TriggerOneof: &overloadv3.Trigger_Threshold{Threshold: &overloadv3.ThresholdTrigger{Value: 1}},
			}},
			TypedConfig: packed(&overloadv3.ScaleTimersOverloadActionConfig{
				TimerScaleFactors: []*overloadv3.ScaleTimersOverloadActionConfig_ScaleTimer{{
					Timer:          overloadv3.ScaleTimersOverloadActionConfig_HTTP_DOWNSTREAM_CONNECTION_IDLE,
					OverloadAdjust: &overloadv3.ScaleTimersOverloadActionConfig_ScaleTimer_MinTimeout{MinTimeout: seconds(1)},
				}},
			}),
		}},
	}
}

// runtime: the peer of a tunnel is an authenticated node proxy, and the
// streams in it are the connections of applications, which may end in any
// way they like. Envoy's defence against rapid resets counts streams that
// were reset early and ends the whole tunnel, with the connections of
// neighbours in it. It is raised, not removed: a tunnel that carried a
// million streams of which half were reset within the second is ended.
func runtime() *structpb.Struct {
	return &structpb.Struct{Fields: map[string]*structpb.Value{
		// A proxy that is told to accept no more keeps what it has: its parent
		// knows how long. Otherwise Envoy, from 1.40 on, ends open tunnels with
		// all connections in them in the last third of --drain-time-s.
		"envoy.reloadable_features.non_graceful_drain_notifies_connections": structpb.NewBoolValue(false),
		// An application that closes normally after its answer must not look
		// like a reset to the caller, who would lose what it has not read.
		"envoy.reloadable_features.propagate_upstream_rst_through_tunneled_tcp_proxy": structpb.NewBoolValue(false),
		"overload.premature_reset_total_stream_count":                                 structpb.NewNumberValue(1e6),
		"overload.premature_reset_min_stream_lifetime_seconds":                        structpb.NewNumberValue(1),
	}}
}
