package xds

import (
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	configrbacv3 "github.com/envoyproxy/go-control-plane/envoy/config/rbac/v3"
	sfsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/common/set_filter_state/v3"
	rbacv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/http/rbac/v3"
	hcmv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/http_connection_manager/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	exprv1 "google.golang.org/genproto/googleapis/api/expr/v1alpha1"
)

// TunnelLife is how long a tunnel takes new connections at most, by the timers of
// the caller's proxy, where certificates live for ttl. A holder replaces its
// certificate at 55 hundredths of its life at the latest; so no tunnel outlives the
// certificate that it was opened with by more than the connections in it.
func TunnelLife(ttl time.Duration) time.Duration { return ttl * 2 / 5 }

func (b *builder) tunnelLife() time.Duration { return TunnelLife(b.view.State.SVIDTTL) }

// toldToGo is when the proxy that a tunnel leads to tells the caller's to use another.
// It comes first, for if both ended a tunnel at once, what they say would meet a
// socket that is closed, and the audit have a connection that broke.
func (b *builder) toldToGo() time.Duration { return b.tunnelLife() * 7 / 8 }

// Names of the rules that refuse connections by expired certificates.
const (
	PolicyExpired = "expired"
	PolicyUndated = "undated" // when it expires is not known
)

// statePeerUntil is the last instant at which the caller's certificate is valid.
const (
	statePeerUntil = "signet.peer.until"
	untilFormat    = "%DOWNSTREAM_PEER_CERT_V_END(%Y-%m-%dT%H:%M:%SZ)%"
	untilPattern   = `[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z`
)

func peerUntil() *sfsv3.FilterStateValue {
	return stateValue(statePeerUntil, untilFormat, "envoy.string", sfsv3.FilterStateValue_NONE)
}

// unexpired refuses the connections that are asked for in a tunnel after the
// certificate that it was opened with has expired, by the wall clock. A tunnel
// ends by timers, which stand still while a machine is suspended.
func unexpired() *hcmv3.HttpFilter {
	every := []*configrbacv3.Permission{{Rule: &configrbacv3.Permission_Any{Any: true}}}
	return &hcmv3.HttpFilter{
		Name: "expiry",
		ConfigType: &hcmv3.HttpFilter_TypedConfig{TypedConfig: packed(&rbacv3.RBAC{
			Rules: &configrbacv3.RBAC{Action: configrbacv3.RBAC_DENY, Policies: map[string]*configrbacv3.Policy{
				PolicyExpired: {
					Permissions: every,
					Principals:  []*configrbacv3.Principal{{Identifier: &configrbacv3.Principal_Any{Any: true}}},
					Condition:   hasExpired(),
					CelConfig:   &corev3.CelExpressionConfig{EnableStringConversion: true},
				},
				// A condition that cannot be evaluated refuses nobody.
				PolicyUndated: {
					Permissions: every,
					Principals: []*configrbacv3.Principal{{Identifier: &configrbacv3.Principal_NotId{NotId: byState(statePeerUntil,
						&matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{SafeRegex: &matcherv3.RegexMatcher{Regex: untilPattern}}})}}},
				},
			}},
		})},
	}
}

// hasExpired is timestamp(string(filter_state[statePeerUntil])) < request.time.
func hasExpired() *exprv1.Expr {
	e := &expression{}
	until := e.call("timestamp", e.call("string", e.call("_[_]", e.name("filter_state"), e.text(statePeerUntil))))
	return e.call("_<_", until, e.field(e.name("request"), "time"))
}

// expression numbers the parts of an expression of CEL.
type expression struct{ last int64 }

func (e *expression) part(x *exprv1.Expr) *exprv1.Expr {
	e.last++
	x.Id = e.last
	return x
}

func (e *expression) name(s string) *exprv1.Expr {
	return e.part(&exprv1.Expr{ExprKind: &exprv1.Expr_IdentExpr{IdentExpr: &exprv1.Expr_Ident{Name: s}}})
}

func (e *expression) text(s string) *exprv1.Expr {
	return e.part(&exprv1.Expr{ExprKind: &exprv1.Expr_ConstExpr{ConstExpr: &exprv1.Constant{ConstantKind: &exprv1.Constant_StringValue{StringValue: s}}}})
}

func (e *expression) field(of *exprv1.Expr, name string) *exprv1.Expr {
	return e.part(&exprv1.Expr{ExprKind: &exprv1.Expr_SelectExpr{SelectExpr: &exprv1.Expr_Select{Operand: of, Field: name}}})
}

func (e *expression) call(function string, args ...*exprv1.Expr) *exprv1.Expr {
	return e.part(&exprv1.Expr{ExprKind: &exprv1.Expr_CallExpr{CallExpr: &exprv1.Expr_Call{Function: function, Args: args}}})
}
