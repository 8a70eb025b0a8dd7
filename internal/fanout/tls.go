package fanout

import (
	"crypto/tls"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/x509check"
)

// Identity is what the control plane shows and trusts when it asks a node.
type Identity struct {
	// Certificate returns the control plane's own, and is asked at every
	// handshake.
	Certificate func() (*tls.Certificate, error)
	// Bundle holds the roots to trust.
	Bundle x509bundle.Source
	// Node returns the ID that a node's agent has; ca.NodeID does.
	Node func(name string) (spiffeid.ID, error)
	// Now is the clock; nil means time.Now.
	Now func() time.Time
}

// NodeTLS returns a Config.TLS: version 1.3 only, and the server must prove that
// it is the agent of the very node that is asked, since one node's answer must
// never stand for another's.
func NodeTLS(id Identity) (func(node string) (*tls.Config, error), error) {
	if id.Certificate == nil || id.Bundle == nil || id.Node == nil {
		return nil, errors.New("fanout: Certificate, Bundle and Node are all needed")
	}
	now := id.Now
	if now == nil {
		now = time.Now
	}
	return func(node string) (*tls.Config, error) {
		want, err := id.Node(node)
		if err != nil {
			return nil, err
		}
		return &tls.Config{
			MinVersion:           tls.VersionTLS13,
			NextProtos:           []string{"http/1.1"},
			GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return id.Certificate() },
			// Go's own check is for DNS names; VerifyConnection replaces it.
			InsecureSkipVerify: true,
			VerifyConnection: func(s tls.ConnectionState) error {
				got, err := x509check.Verify(s.PeerCertificates, id.Bundle, now())
				if err != nil {
					return fmt.Errorf("the node's certificate: %w", err)
				}
				if got != want {
					return fmt.Errorf("the server is %q, not %q", got, want)
				}
				return nil
			},
		}, nil
	}, nil
}
