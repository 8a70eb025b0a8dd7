package xds

import (
	"fmt"

	configrbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"

	"github.com/signet-mesh/signet/internal/mesh"
)

// applicationPort refuses an authority whose port is one of the mesh's own, or
// is not spelled as this project spells it. The policies pin the address; where
// they leave the port open, the proxy would dial itself, and would take a
// spelling ("+80") that the agent does not follow when it revokes.
func applicationPort() *hcmv3.HttpFilter {
	authority := func(m *matcherv3.StringMatcher, invert bool) *configrbacv3.Permission {
		return &configrbacv3.Permission{Rule: &configrbacv3.Permission_Header{Header: &routev3.HeaderMatcher{
			Name:                 ":authority",
			InvertMatch:          invert,
			HeaderMatchSpecifier: &routev3.HeaderMatcher_StringMatch{StringMatch: m},
		}}}
	}
	permissions := []*configrbacv3.Permission{
		authority(&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{
			SafeRegex: &matcherv3.RegexMatcher{Regex: `.*:[1-9][0-9]{0,4}`}, // all of the authority
		}}, true),
	}
	for _, port := range []int{mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel} {
		permissions = append(permissions, authority(&matcherv3.StringMatcher{
			MatchPattern: &matcherv3.StringMatcher_Suffix{Suffix: fmt.Sprintf(":%d", port)},
		}, false))
	}
	return &hcmv3.HttpFilter{
		Name: "authority",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&rbacv3.RBAC{
			Rules: &configrbacv3.RBAC{Action: configrbacv3.RBAC_DENY, Policies: map[string]*configrbacv3.Policy{
				"port": {
					Permissions: permissions,
					Principals:  []*configrbacv3.Principal{{Identifier: &configrbacv3.Principal_Any{Any: true}}},
				},
			}},
		})},
	}
}
