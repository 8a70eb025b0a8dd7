package xds

import (
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"
	matcherv3 "github.com/envoyproxy/go-control-plane/envoy/type/matcher/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Trust is the roots of one trust domain.
type Trust struct {
	Domain spiffeid.TrustDomain
	PEM    []byte // not empty
}

// InboundTrust is what callers' certificates are verified by, to be merged with
// the listener's own validation: the roots of the mesh and, each for its own
// names only, those of the trust domains that it is federated with.
//
// With other trust domains the proxy's SPIFFE validator is used, since the usual
// one has a single pool of roots, in which any could vouch for any name. That
// validator does not heed the peer that a connection expects, so it is not for
// tunnels that leave: those to each trust domain have a cluster of their own; see
// foreignTunnels and docs/decisions.md.
func InboundTrust(own Trust, foreign []Trust) *tlsv3.CertificateValidationContext {
	if len(foreign) == 0 {
		return &tlsv3.CertificateValidationContext{TrustedCa: inlineBytes(own.PEM)}
	}
	out := &tlsv3.CertificateValidationContext{}
	config := &tlsv3.SPIFFECertValidatorConfig{}
	for _, t := range append([]Trust{own}, foreign...) {
		config.TrustDomains = append(config.TrustDomains, &tlsv3.SPIFFECertValidatorConfig_TrustDomain{
			Name: t.Domain.Name(), TrustBundle: inlineBytes(t.PEM),
		})
	}
	out.CustomValidatorConfig = &corev3.TypedExtensionConfig{Name: "envoy.tls.cert_validator.spiffe", TypedConfig: packed(config)}
	for _, t := range foreign { // the listener itself has the mesh's
		out.MatchTypedSubjectAltNames = append(out.MatchTypedSubjectAltNames, workloadName(t.Domain))
	}
	return out
}

// workloadName matches the name of a workload of a trust domain.
func workloadName(td spiffeid.TrustDomain) *tlsv3.SubjectAltNameMatcher {
	return &tlsv3.SubjectAltNameMatcher{
		SanType: tlsv3.SubjectAltNameMatcher_URI,
		Matcher: &matcherv3.StringMatcher{MatchPattern: &matcherv3.StringMatcher_SafeRegex{
			SafeRegex: &matcherv3.RegexMatcher{Regex: idPattern(td)},
		}},
	}
}

func inlineBytes(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}
