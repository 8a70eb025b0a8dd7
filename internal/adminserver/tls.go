package adminserver

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/net/netutil"

	"github.com/signet-mesh/signet/internal/x509check"
)

// TLS says who serves and who may ask.
type TLS struct {
	// Certificate returns the server's certificate, and is asked at every
	// handshake.
	Certificate func() (*tls.Certificate, error)
	// Bundle holds the roots to trust, and is asked at every handshake and
	// request.
	Bundle x509bundle.Source
	// Client is the only identity that may ask.
	Client spiffeid.ID
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log is told of those who are refused; nil: nobody is.
	Log *slog.Logger
}

// maxConns bounds the connections that are open at once. Anybody may open one;
// there is only one client that may ask.
const maxConns = 64

func (t *TLS) check() error {
	switch {
	case t.Certificate == nil:
		return errors.New("adminserver: TLS: Certificate is missing")
	case t.Bundle == nil:
		return errors.New("adminserver: TLS: Bundle is missing")
	case t.Client.IsZero():
		return errors.New("adminserver: TLS: Client is missing; without it, nobody may ask")
	}
	return nil
}

// verify refuses every peer but the one that may ask.
func (t *TLS) verify(certs []*x509.Certificate) error {
	now := time.Now
	if t.Now != nil {
		now = t.Now
	}
	id, err := x509check.Verify(certs, t.Bundle, now())
	if err != nil {
		return fmt.Errorf("the client's certificate: %w", err)
	}
	if id != t.Client {
		return fmt.Errorf("the client is %q; only %q may ask", id, t.Client)
	}
	return nil
}

// Config returns the server's side of TLS: version 1.3 only, and the client
// must prove that it is t.Client.
func (t *TLS) Config() (*tls.Config, error) {
	if err := t.check(); err != nil {
		return nil, err
	}
	return &tls.Config{
		MinVersion:             tls.VersionTLS13,
		NextProtos:             []string{"http/1.1"},
		SessionTicketsDisabled: true,
		GetCertificate:         func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return t.Certificate() },
		// Go's own check knows nothing of SPIFFE; VerifyConnection replaces it.
		ClientAuth:       tls.RequireAnyClientCert,
		VerifyConnection: func(s tls.ConnectionState) error { return t.verify(s.PeerCertificates) },
	}, nil
}

// ServeTLS serves h on l until ctx ends, to the holder of t.Client alone, whose
// certificate is looked at again at every request. It closes l.
func ServeTLS(ctx context.Context, l net.Listener, h http.Handler, t TLS) error {
	cfg, err := t.Config()
	if err != nil {
		return errors.Join(err, l.Close())
	}
	still := http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if r.TLS == nil || t.verify(r.TLS.PeerCertificates) != nil {
			w.Header().Set("Connection", "close")
			fail(w, http.StatusForbidden, errors.New("the client's certificate is no longer good"))
			return
		}
		h.ServeHTTP(w, r)
	})
	log := t.Log
	if log == nil {
		log = slog.New(slog.DiscardHandler)
	}
	return serve(ctx, tls.NewListener(netutil.LimitListener(l, maxConns), cfg), still, log)
}
