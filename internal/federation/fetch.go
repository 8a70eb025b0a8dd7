package federation

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/bundle"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/x509check"
)

// Bounds of one fetch.
const (
	fetchTime       = 15 * time.Second
	dialTime        = 5 * time.Second
	maxRedirects    = 3
	maxResponseHead = 64 << 10
)

// fetch asks a bundle endpoint once, on a connection of its own: each answer is
// proven anew. With https_spiffe the endpoint is judged by known, which speaks
// for the endpoint's trust domain; with https_web by the authorities web, nil
// being the machine's.
func fetch(ctx context.Context, f *mesh.Federation, known x509bundle.Source, web *x509.CertPool, limit time.Duration) (*bundle.Bundle, error) {
	ctx, cancel := context.WithTimeout(ctx, limit)
	defer cancel()
	config := &tls.Config{MinVersion: tls.VersionTLS12, RootCAs: web}
	if !f.Endpoint.IsZero() {
		config = spiffeConfig(f.Endpoint, known)
	}
	transport := &http.Transport{
		Proxy:                  http.ProxyFromEnvironment,
		DialContext:            (&net.Dialer{Timeout: dialTime}).DialContext,
		TLSClientConfig:        config,
		TLSHandshakeTimeout:    dialTime,
		DisableKeepAlives:      true,
		DisableCompression:     true,
		MaxResponseHeaderBytes: maxResponseHead,
		ForceAttemptHTTP2:      true,
	}
	defer transport.CloseIdleConnections()
	client := &http.Client{Transport: transport, CheckRedirect: checkRedirect}
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, f.URL, http.NoBody)
	if err != nil {
		return nil, err
	}
	req.Header.Set("Accept", "application/json")
	resp, err := client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return nil, fmt.Errorf("the endpoint answers %s", resp.Status)
	}
	data, err := io.ReadAll(io.LimitReader(resp.Body, bundle.MaxDocument+1))
	if err != nil {
		return nil, err
	}
	return bundle.Parse(f.TrustDomain, data)
}

// checkRedirect holds every further URL to what the first is held to. The
// transport proves the endpoint behind each in the same way.
func checkRedirect(req *http.Request, via []*http.Request) error {
	if len(via) > maxRedirects {
		return fmt.Errorf("%d redirects; at most %d are followed", len(via), maxRedirects)
	}
	if err := mesh.CheckBundleURL(req.URL.String()); err != nil {
		return fmt.Errorf("a redirect whose URL %w", err)
	}
	return nil
}

// spiffeConfig takes an endpoint that proves an identity, whatever its address
// is called.
func spiffeConfig(endpoint spiffeid.ID, known x509bundle.Source) *tls.Config {
	return &tls.Config{
		MinVersion: tls.VersionTLS12,
		// The name in the URL says nothing; VerifyConnection looks at the chain.
		InsecureSkipVerify: true, //nolint:gosec // see above
		VerifyConnection: func(s tls.ConnectionState) error {
			if len(s.PeerCertificates) == 0 {
				return errors.New("the endpoint shows no certificate")
			}
			id, err := x509check.Verify(s.PeerCertificates, known, time.Now())
			switch {
			case err != nil:
				return fmt.Errorf("the endpoint does not prove that it is %s: %w", endpoint, err)
			case id != endpoint:
				return fmt.Errorf("the endpoint is %s, and not %s", id, endpoint)
			}
			return nil
		},
	}
}
