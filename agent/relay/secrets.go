package relay

import (
	"bytes"
	"context"
	"crypto/x509"
	"encoding/pem"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	tlsv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/transport_sockets/tls/v3"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/internal/bundle"
	"github.com/signet-mesh/signet/xds"
)

// Keys is where the node's certificates come from; *svid.Manager implements it.
type Keys interface {
	All() []*svid.SVID
	Bundle() []*x509.Certificate
	Foreign() []*bundle.Bundle
	TrustDomain() spiffeid.TrustDomain
	Changed() <-chan struct{}
}

// FollowKeys hands every change of the node's certificates to the proxy until
// ctx ends.
func (r *Relay) FollowKeys(ctx context.Context) {
	for {
		changed := r.keys.Changed()
		r.readKeys()
		select {
		case <-ctx.Done():
			return
		case <-changed:
		}
	}
}

// Held is what the proxies get of the node's certificates. It is shared: callers
// must not edit it.
type Held struct {
	Bundle []*x509.Certificate
	SVIDs  []*svid.SVID
}

// Held returns what the proxies get of the node's certificates, and whether all
// that are connected have taken it.
func (r *Relay) Held() (held Held, taken bool) {
	r.mu.Lock()
	defer r.mu.Unlock()
	taken = true
	for p := range r.proxies {
		taken = taken && r.hasAll(p)
	}
	return r.held, taken
}

// readKeys rebuilds the secrets from the certificates that are held now.
func (r *Relay) readKeys() {
	set := xds.Set{}
	held := Held{Bundle: r.keys.Bundle(), SVIDs: r.keys.All()}
	if roots := held.Bundle; len(roots) > 0 {
		own := xds.Trust{Domain: r.keys.TrustDomain(), PEM: pemChain(rawCerts(roots))}
		r.secret(set, xds.BundleSecret, &tlsv3.Secret{
			Name: xds.BundleSecret,
			Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(own.PEM)}},
		})
		foreign := foreignTrust(own.Domain, r.keys.Foreign())
		r.secret(set, xds.InboundSecret, &tlsv3.Secret{
			Name: xds.InboundSecret,
			Type: &tlsv3.Secret_ValidationContext{ValidationContext: xds.InboundTrust(own, foreign)},
		})
		for _, t := range foreign {
			name := xds.ForeignSecret(t.Domain)
			r.secret(set, name, &tlsv3.Secret{
				Name: name,
				Type: &tlsv3.Secret_ValidationContext{ValidationContext: &tlsv3.CertificateValidationContext{TrustedCa: inline(t.PEM)}},
			})
		}
	}
	for _, s := range held.SVIDs {
		key, err := s.KeyPEM()
		if err != nil {
			r.log.Error("a certificate's key cannot be given to the proxy", "id", s.ID, "error", err)
			continue
		}
		for _, name := range []string{xds.ClientSecret(s.ID), xds.ServerSecret(s.ID)} {
			r.secret(set, name, &tlsv3.Secret{
				Name: name,
				Type: &tlsv3.Secret_TlsCertificate{TlsCertificate: &tlsv3.TlsCertificate{
					CertificateChain: inline(pemChain(s.Chain)),
					PrivateKey:       inline(key),
				}},
			})
		}
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	r.secrets, r.held = set[xds.TypeSecret], held
	r.publish()
}

// foreignTrust is the other trust domains that have roots. One of the mesh's own
// name would be a second answer to which roots are its own.
func foreignTrust(own spiffeid.TrustDomain, bundles []*bundle.Bundle) []xds.Trust {
	var out []xds.Trust
	for _, b := range bundles {
		if len(b.Roots) > 0 && b.TrustDomain != own {
			out = append(out, xds.Trust{Domain: b.TrustDomain, PEM: pemChain(rawCerts(b.Roots))})
		}
	}
	return out
}

func (r *Relay) secret(set xds.Set, name string, s *tlsv3.Secret) {
	if err := set.Add(name, s); err != nil {
		r.log.Error("packing a secret", "name", name, "error", err)
	}
}

func inline(b []byte) *corev3.DataSource {
	return &corev3.DataSource{Specifier: &corev3.DataSource_InlineBytes{InlineBytes: b}}
}

func rawCerts(certs []*x509.Certificate) [][]byte {
	out := make([][]byte, len(certs))
	for i, c := range certs {
		out[i] = c.Raw
	}
	return out
}

func pemChain(ders [][]byte) []byte {
	var b bytes.Buffer
	for _, der := range ders {
		_ = pem.Encode(&b, &pem.Block{Type: "CERTIFICATE", Bytes: der}) // a buffer does not fail
	}
	return b.Bytes()
}
