package xds

import (
	accesslogv3 "github.com/envoyproxy/go-control-plane/envoy/config/accesslog/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	filev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/access_loggers/file/v3"
	"google.golang.org/protobuf/types/known/structpb"
)

// The kinds of audit lines. The agent reads them back; see agent/audit.
const (
	LineOutbound  = "out"       // a captured outbound connection ended
	LineTunnel    = "tunnel"    // a tunnelled one opened, or ended
	LineOriginate = "originate" // one left as mutual TLS with an application: opened, or ended
	LineInbound   = "in"        // a tunnelled one arrived: opened, ended or was refused
	LineHandshake = "handshake" // a connection to the tunnel port ended
	LinePlain     = "plain"     // one without a tunnel ended
	LineDirect    = "direct"    // one whose TLS was ended on the workload's own port: opened, ended or was refused
)

// lineFields are the fields of each kind beside the common ones.
var lineFields = map[string]map[string]string{
	LineOutbound: {
		"src":      "%DOWNSTREAM_REMOTE_ADDRESS%",
		"dst":      "%DOWNSTREAM_LOCAL_ADDRESS%",
		"upstream": "%UPSTREAM_HOST%",
		"cluster":  "%UPSTREAM_CLUSTER%",
		"failure":  "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
		"want":     "%UPSTREAM_METADATA(" + metadataKey + ":" + metaIdentity + ")%",
	},
	LineTunnel: {
		"conn":      "%FILTER_STATE(" + stateConn + ":PLAIN)%",
		"self":      "%UPSTREAM_LOCAL_URI_SAN%",
		"client":    "%FILTER_STATE(envoy.tls.certificate_mappers.on_demand_secret:PLAIN)%",
		"peer":      "%UPSTREAM_PEER_URI_SAN%",
		"cert":      "%UPSTREAM_PEER_CERT%",
		"local":     "%UPSTREAM_LOCAL_ADDRESS%",
		"want":      endpointMeta(metaIdentity),
		"endpoint":  endpointMeta(metaAuthority),
		"workload":  endpointMeta(metaWorkload),
		"tls":       "%UPSTREAM_TLS_VERSION%",
		"cipher":    "%UPSTREAM_TLS_CIPHER%",
		"group":     "%UPSTREAM_TLS_GROUP%",
		"failure":   "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
		"responded": "%FILTER_STATE(envoy.tcp_proxy.propagate_response_headers:TYPED)%",
	},
	LineOriginate: {
		"conn":     "%FILTER_STATE(" + stateConn + ":PLAIN)%",
		"client":   "%FILTER_STATE(envoy.tls.certificate_mappers.on_demand_secret:PLAIN)%",
		"peer":     "%UPSTREAM_PEER_URI_SAN%",
		"cert":     "%UPSTREAM_PEER_CERT%",
		"want":     endpointMeta(metaIdentity),
		"endpoint": endpointMeta(metaAuthority),
		"local":    "%UPSTREAM_LOCAL_ADDRESS%",
		"tls":      "%UPSTREAM_TLS_VERSION%",
		"cipher":   "%UPSTREAM_TLS_CIPHER%",
		"group":    "%UPSTREAM_TLS_GROUP%",
		"failure":  "%UPSTREAM_TRANSPORT_FAILURE_REASON%",
	},
	LineInbound: {
		"peer":      "%DOWNSTREAM_PEER_URI_SAN%",
		"peerDNS":   "%DOWNSTREAM_PEER_DNS_SAN%",
		"serial":    "%DOWNSTREAM_PEER_SERIAL%",
		"self":      "%DOWNSTREAM_LOCAL_URI_SAN%",
		"src":       "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
		"authority": "%REQ(:AUTHORITY)%",
		"local":     "%UPSTREAM_LOCAL_ADDRESS%",
		"dst":       "%UPSTREAM_HOST%",
		"code":      "%RESPONSE_CODE%",
		"details":   "%RESPONSE_CODE_DETAILS%",
		"policy":    "%DYNAMIC_METADATA(envoy.filters.http.rbac:enforced_effective_policy_id)%",
		"shadow":    "%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)%",
		"shadowed":  "%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_effective_policy_id)%",
		"revision":  routeMeta(metaRevision),
		"deny":      routeMeta(metaDeny),
		"tls":       "%DOWNSTREAM_TLS_VERSION%",
		"cipher":    "%DOWNSTREAM_TLS_CIPHER%",
		"group":     "%DOWNSTREAM_TLS_GROUP%",
	},
	LineHandshake: {
		"src":     "%DOWNSTREAM_DIRECT_REMOTE_ADDRESS%",
		"dst":     "%DOWNSTREAM_DIRECT_LOCAL_ADDRESS%",
		"peer":    "%DOWNSTREAM_PEER_URI_SAN%",
		"tls":     "%DOWNSTREAM_TLS_VERSION%",
		"failure": "%DOWNSTREAM_TRANSPORT_FAILURE_REASON%",
	},
	LineDirect: {
		"direct":    "%FILTER_STATE(" + stateDirect + ":PLAIN)%",
		"peer":      "%FILTER_STATE(" + statePeerURI + ":PLAIN)%",
		"peerDNS":   "%FILTER_STATE(" + statePeerDNS + ":PLAIN)%",
		"serial":    "%FILTER_STATE(" + statePeerSerial + ":PLAIN)%",
		"authority": "%REQ(:AUTHORITY)%",
		"local":     "%UPSTREAM_LOCAL_ADDRESS%",
		"dst":       "%UPSTREAM_HOST%",
		"code":      "%RESPONSE_CODE%",
		"details":   "%RESPONSE_CODE_DETAILS%",
		"policy":    "%DYNAMIC_METADATA(envoy.filters.http.rbac:enforced_effective_policy_id)%",
		"shadow":    "%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)%",
		"shadowed":  "%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_effective_policy_id)%",
		"revision":  routeMeta(metaRevision),
		"deny":      routeMeta(metaDeny),
	},
	LinePlain: {
		"src":   "%DOWNSTREAM_REMOTE_ADDRESS%",
		"dst":   "%DOWNSTREAM_LOCAL_ADDRESS%",
		"local": "%UPSTREAM_LOCAL_ADDRESS%",
	},
}

// accessLog writes lines of one kind to the audit spool. A file is used, not
// the gRPC log stream: the stream drops in silence when its receiver stalls or
// dies; the file is there after a crash of either side. extra are further
// keys and formats; what comes from documents is free of '%'.
func (b *builder) accessLog(kind string, extra ...string) []*accesslogv3.AccessLog {
	if b.opts.AccessLog == "" {
		return nil
	}
	fields := map[string]*structpb.Value{}
	put := func(k, v string) { fields[k] = structpb.NewStringValue(v) }
	put("kind", kind)
	put("type", "%ACCESS_LOG_TYPE%")
	put("id", "%STREAM_ID%")
	put("start", "%START_TIME(%s.%6f)%")
	put("ms", "%DURATION%")
	put("flags", "%RESPONSE_FLAGS%")
	put("sent", "%BYTES_RECEIVED%")
	put("received", "%BYTES_SENT%")
	for k, v := range lineFields[kind] {
		put(k, v)
	}
	for i := 0; i+1 < len(extra); i += 2 {
		put(extra[i], extra[i+1])
	}
	return []*accesslogv3.AccessLog{{
		Name: "audit",
		ConfigType: &accesslogv3.AccessLog_TypedConfig{TypedConfig: packed(&filev3.FileAccessLog{
			Path: b.opts.AccessLog,
			AccessLogFormat: &filev3.FileAccessLog_LogFormat{LogFormat: &corev3.SubstitutionFormatString{
				Format: &corev3.SubstitutionFormatString_JsonFormat{
					JsonFormat: &structpb.Struct{Fields: fields},
				},
				OmitEmptyValues: true,
			}},
		})},
	}}
}

// Keys of a route's metadata.
const (
	metaRevision = "revision" // the policy state that the route was built from
	metaDeny     = "deny"     // what a refusal says
)

func routeMeta(key string) string { return "%METADATA(ROUTE:" + metadataKey + ":" + key + ")%" }
