package xds

import (
	configrbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	setstatev3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/set_filter_state/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
)

// Filter state with what the caller's certificate says. Verdicts are reached by
// it, and not by the connection's TLS: that of a connection without a tunnel has
// ended by then.
const (
	statePeerURI = "signet.peer.uri"
	statePeerDNS = "signet.peer.dns"
	// its serial number
	statePeerSerial = "signet.peer.serial"
)

// peerNames and oneIdentity refuse a caller whose certificate could stand for
// more than one identity: an SVID has exactly one URI name. No
// authority of a mesh signs anything else; this holds when another one does
// that has the same root.
func peerNames() *hcmv3.HttpFilter {
	return &hcmv3.HttpFilter{
		Name: "peer",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&setstatev3.Config{
			OnRequestHeaders: append(peerState(sfsv3.FilterStateValue_NONE), peerUntil()),
		})},
	}
}

// peerState is what the caller's certificate says.
func peerState(shared sfsv3.FilterStateValue_SharedWithUpstream) []*sfsv3.FilterStateValue {
	value := func(key, format string) *sfsv3.FilterStateValue {
		return stateValue(key, format, "envoy.string", shared)
	}
	return []*sfsv3.FilterStateValue{
		value(statePeerURI, "%DOWNSTREAM_PEER_URI_SAN%"), // several are joined by commas
		value(statePeerDNS, "%DOWNSTREAM_PEER_DNS_SAN%"),
		value(statePeerSerial, "%DOWNSTREAM_PEER_SERIAL%"),
	}
}

func oneIdentity() *hcmv3.HttpFilter {
	contains := func(key, part string) *configrbacv3.Principal {
		return byState(key, &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Contains{Contains: part}})
	}
	return &hcmv3.HttpFilter{
		Name: "identity",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&rbacv3.RBAC{
			Rules: &configrbacv3.RBAC{Action: configrbacv3.RBAC_DENY, Policies: map[string]*configrbacv3.Policy{
				"several": {
					Permissions: []*configrbacv3.Permission{{Rule: &configrbacv3.Permission_Any{Any: true}}},
					Principals:  []*configrbacv3.Principal{contains(statePeerURI, ","), contains(statePeerDNS, ":")},
				},
			}},
		})},
	}
}

// byState matches callers by a value of filter state.
func byState(key string, m *matcherv3.StringMatcher) *configrbacv3.Principal {
	return &configrbacv3.Principal{Identifier: &configrbacv3.Principal_FilterState{FilterState: &matcherv3.FilterStateMatcher{
		Key: key, Matcher: &matcherv3.FilterStateMatcher_StringMatch{StringMatch: m},
	}}}
}
