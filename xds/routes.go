package xds

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	configrbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"google.golang.org/protobuf/types/known/anypb"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// workloadRoutes adds one route configuration per captured workload. The
// policy lives here and not in the listener, so that an edit takes effect on
// the next stream of every tunnel that is already open.
func (b *builder) workloadRoutes() {
	for _, w := range b.captured() {
		b.add(RouteName(&w), b.route(&w))
	}
}

func (b *builder) route(w *mesh.Workload) *routev3.RouteConfiguration {
	target := authz.Target{Namespace: w.Namespace, ServiceAccount: w.ServiceAccount}
	return &routev3.RouteConfiguration{
		Name: RouteName(w),
		VirtualHosts: []*routev3.VirtualHost{{
			Name:    "workload",
			Domains: []string{"*"},
			Routes: []*routev3.Route{{
				Match: &routev3.RouteMatch{PathSpecifier: &routev3.RouteMatch_ConnectMatcher_{ConnectMatcher: &routev3.RouteMatch_ConnectMatcher{}}},
				Metadata: &corev3.Metadata{FilterMetadata: map[string]*structpb.Struct{metadataKey: {
					Fields: map[string]*structpb.Value{
						metaRevision: structpb.NewStringValue(b.view.Model.Version(target)),
						metaDeny:     structpb.NewStringValue(b.view.Model.DenyReason(target)),
					},
				}}},
				// The caller's proxy records which policy admitted it, and whom it
				// reached: what it knows of an address may be of a pod before.
				ResponseHeadersToAdd: []*corev3.HeaderValueOption{
					{Header: &corev3.HeaderValue{Key: HeaderPolicy, Value: "%DYNAMIC_METADATA(envoy.filters.http.rbac:enforced_effective_policy_id)%"}},
					{Header: &corev3.HeaderValue{Key: HeaderShadow, Value: "%DYNAMIC_METADATA(envoy.filters.http.rbac:shadow_engine_result)%"}},
					{Header: &corev3.HeaderValue{Key: HeaderRevision, Value: b.view.Model.Version(target)}},
					{Header: &corev3.HeaderValue{Key: HeaderWorkload, Value: w.Key()}},
				},
				Action: &routev3.Route_Route{Route: &routev3.RouteAction{
					ClusterSpecifier: &routev3.RouteAction_Cluster{Cluster: clusterLocal},
					Timeout:          seconds(0),
					UpgradeConfigs: []*routev3.RouteAction_UpgradeConfig{{
						UpgradeType:   "CONNECT",
						ConnectConfig: &routev3.RouteAction_UpgradeConfig_ConnectConfig{},
					}},
				}},
				TypedPerFilterConfig: b.perRoute(w, target),
			}},
		}},
	}
}

func (b *builder) perRoute(w *mesh.Workload, target authz.Target) map[string]*anypb.Any {
	out := map[string]*anypb.Any{
		rbacFilter: packed(&rbacv3.RBACPerRoute{Rbac: b.rbac(w, target)}),
	}
	if rules := b.quarantines(); len(rules.GetPolicies()) > 0 {
		out[quarantineFilter] = packed(&rbacv3.RBACPerRoute{Rbac: &rbacv3.RBAC{Rules: rules}})
	}
	return out
}

// PolicyQuarantine begins the name of the rule that refuses a quarantine's
// identities.
const PolicyQuarantine = "quarantine/"

// quarantines refuses callers that are cut off, and certificates that are revoked,
// in both modes and before any policy is looked at.
func (b *builder) quarantines() *configrbacv3.RBAC {
	rules := &configrbacv3.RBAC{Action: configrbacv3.RBAC_DENY, Policies: map[string]*configrbacv3.Policy{}}
	for _, q := range b.view.Model.Quarantines() {
		if principals := b.principals(q.Identities); len(principals) > 0 {
			rules.Policies[PolicyQuarantine+q.Name] = &configrbacv3.Policy{
				Permissions: []*configrbacv3.Permission{{Rule: &configrbacv3.Permission_Any{Any: true}}},
				Principals:  principals,
			}
		}
	}
	if len(b.view.Refused) > 0 {
		rules.Policies[PolicyRevoked] = revokedSerials(b.view.Refused)
	}
	return rules
}

// PolicyRevoked is the name of the rule that refuses revoked certificates.
const PolicyRevoked = "revoked"

// revokedSerials matches callers by the serial numbers of their certificates.
func revokedSerials(serials []string) *configrbacv3.Policy {
	out := &configrbacv3.Policy{Permissions: []*configrbacv3.Permission{{Rule: &configrbacv3.Permission_Any{Any: true}}}}
	for _, s := range serials {
		out.Principals = append(out.Principals, byState(statePeerSerial, exactly(s)))
	}
	return out
}

// PolicyObserve is the policy that lets everything through in observe mode.
const PolicyObserve = "signet/observe"

// rbac compiles a target's grants. In both modes the CONNECT authority must be
// one of the workload's own addresses: the proxy dials it from inside the
// workload's network namespace, and must not become a way to other places.
func (b *builder) rbac(w *mesh.Workload, target authz.Target) *rbacv3.RBAC {
	rules := &configrbacv3.RBAC{Action: configrbacv3.RBAC_ALLOW, Policies: map[string]*configrbacv3.Policy{}}
	for _, g := range b.view.Model.Grants(target) {
		principals := b.principals(g.From)
		permissions := authorities(w.Capture.Addrs, g.Ports)
		if len(principals) == 0 || len(permissions) == 0 {
			continue // names nobody who exists, or the pod has no address yet; Envoy takes no empty list
		}
		rules.Policies[g.Policy] = &configrbacv3.Policy{Permissions: permissions, Principals: principals}
	}
	_, cut := b.view.Model.QuarantinedTarget(target)
	if cut || b.view.State.Mode(w.Namespace) != mesh.ModeObserve {
		return &rbacv3.RBAC{Rules: rules}
	}
	observe := &configrbacv3.RBAC{Action: configrbacv3.RBAC_ALLOW, Policies: map[string]*configrbacv3.Policy{}}
	if permissions := authorities(w.Capture.Addrs, nil); len(permissions) > 0 {
		observe.Policies[PolicyObserve] = &configrbacv3.Policy{
			Permissions: permissions,
			Principals:  []*configrbacv3.Principal{{Identifier: &configrbacv3.Principal_Any{Any: true}}},
		}
	}
	return &rbacv3.RBAC{Rules: observe, ShadowRules: rules}
}

// principals translates patterns to comparisons of whole strings. A SPIFFE ID
// has one spelling, so equal strings are equal identities. A wildcard in the
// last segment is a comparison up to the last slash; one elsewhere is
// expanded over the identities that exist.
func (b *builder) principals(patterns []authz.Pattern) []*configrbacv3.Principal {
	var out []*configrbacv3.Principal
	add := func(m *matcherv3.StringMatcher) { out = append(out, byState(statePeerURI, m)) }
	for _, p := range patterns {
		if id, ok := p.Exact(); ok {
			add(exactly(id.String()))
			continue
		}
		if prefix, ok := p.Prefix(); ok && serviceAccounts(prefix) {
			add(startsWith(prefix))
			continue
		}
		var ids []string
		for _, id := range b.view.Identities {
			if p.Matches(id) {
				ids = append(ids, id.String())
			}
		}
		slices.Sort(ids)
		for _, id := range slices.Compact(ids) {
			add(exactly(id))
		}
	}
	return out
}

// serviceAccounts reports whether a prefix ends in /ns/<namespace>/sa/. The
// authority issues no identity with further segments behind that, and the proxy
// takes none (see validation), so there a comparison up to the last slash is the
// same as one of segments. Elsewhere it would admit deeper identities than the
// pattern does.
func serviceAccounts(prefix string) bool {
	rest, ok := strings.CutPrefix(prefix, "spiffe://")
	if !ok {
		return false
	}
	seg := strings.Split(rest, "/")
	return len(seg) == 5 && seg[1] == "ns" && seg[2] != "*" && seg[3] == "sa" && seg[4] == ""
}

// authorities permits CONNECT to the given ports (none given: every port) of
// the given addresses.
func authorities(addrs []netip.Addr, ports []uint16) []*configrbacv3.Permission {
	var out []*configrbacv3.Permission
	add := func(m *matcherv3.StringMatcher) {
		out = append(out, &configrbacv3.Permission{Rule: &configrbacv3.Permission_Header{Header: &routev3.HeaderMatcher{
			Name:                 ":authority",
			HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: m},
		}}})
	}
	for _, a := range addrs {
		if len(ports) == 0 {
			host := a.String()
			if a.Is6() {
				host = "[" + host + "]"
			}
			add(startsWith(host + ":"))
			continue
		}
		for _, p := range ports {
			add(exactly(fmt.Sprint(netip.AddrPortFrom(a, p))))
		}
	}
	return out
}

func exactly(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Exact{Exact: s}}
}

func startsWith(s string) *matcherv3.StringMatcher {
	return &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_Prefix{Prefix: s}}
}
