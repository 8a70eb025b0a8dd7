package caserver

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/x509check"
)

// TLSConfig returns the server's side of TLS: version 1.3 only, the control
// plane's own certificate, renewed by itself, and no session resumption. A
// client may come without a certificate, to join; one that is given must be an
// X509-SVID of the trust domain, verified against the newest bundle.
func (s *Server) TLSConfig() *tls.Config {
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		GetCertificate:         s.cert.GetCertificate,
		ClientAuth:             tls.RequestClientCert,
		SessionTicketsDisabled: true,
		NextProtos:             []string{"h2"},
		VerifyConnection: func(state tls.ConnectionState) error {
			if len(state.PeerCertificates) == 0 {
				return nil
			}
			_, _, err := s.proofs.verify(state.PeerCertificates, s.authority.TrustDomain(), s.authority.Bundle(), s.now())
			if err != nil {
				if leaf := state.PeerCertificates[0]; s.now().Before(leaf.NotBefore) {
					err = fmt.Errorf("%w; this machine's clock is behind, or was ahead when it issued the certificate: set it right", err)
				}
				s.log.Warn("refused a TLS client", "reason", err)
				s.refused(Refusal{Call: "TLS", Reason: ReasonCertificate, Message: err.Error()})
			}
			return err
		},
	}
}

// ClientConfig says how an agent connects to the control plane.
type ClientConfig struct {
	// TrustDomain is the agent's; required.
	TrustDomain spiffeid.TrustDomain
	// Bundle holds the roots to trust; required. It is asked at every
	// handshake. Before the first Join it comes from a file that the operator
	// placed on the node (x509bundle.Load); there is no trust on first use.
	Bundle x509bundle.Source
	// Certificate returns the node's certificate, and is asked at every
	// handshake. Nil, for Join only, presents none.
	Certificate func() (*tls.Certificate, error)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// ClientTLS returns the agent's side of TLS: version 1.3 only, and the server
// must prove that it is spiffe://<trust domain>/signet/control.
func ClientTLS(cfg ClientConfig) (*tls.Config, error) {
	if cfg.TrustDomain.IsZero() {
		return nil, errors.New("caserver: client: TrustDomain is missing")
	}
	if cfg.Bundle == nil {
		return nil, errors.New("caserver: client: Bundle is missing; load the trust bundle that the operator placed on the node")
	}
	now := cfg.Now
	if now == nil {
		now = time.Now
	}
	want := ca.ControlID(cfg.TrustDomain)
	out := &tls.Config{
		MinVersion: tls.VersionTLS13,
		NextProtos: []string{"h2"},
		// Go's own check is for DNS names; VerifyConnection replaces it.
		InsecureSkipVerify: true,
		VerifyConnection: func(state tls.ConnectionState) error {
			return verifyControl(state.PeerCertificates, cfg.Bundle, want, now())
		},
	}
	if cfg.Certificate != nil {
		out.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cfg.Certificate() }
	}
	return out, nil
}

func verifyControl(certs []*x509.Certificate, bundle x509bundle.Source, want spiffeid.ID, now time.Time) error {
	id, err := x509check.Verify(certs, bundle, now)
	if err != nil {
		if len(certs) > 0 && now.Before(certs[0].NotBefore) {
			return fmt.Errorf("control plane's certificate: %w; this node's clock may be behind, set it right", err)
		}
		return fmt.Errorf("control plane's certificate: %w", err)
	}
	if id != want {
		return fmt.Errorf("the server is %q, not the control plane %q", id, want)
	}
	return nil
}
