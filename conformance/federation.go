package conformance

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"mime"
	"net"
	"net/http"
	"net/url"
	"time"
)

var bundleEndpointChecks = []check{
	{Check{"federation-url", docFederation, "5.2.1.1, 5.2.2.1", Must, "the URL of a bundle endpoint is https, and names no user"}, checkURL},
	{Check{"federation-open", docFederation, "5.2.1.3, 5.2.2.3", Must, "GET is answered with the bundle, to clients that authenticate themselves in no way"}, checkFetch},
	{Check{"federation-certificate", docFederation, "5.2.1.3, 5.2.2.3", Must, "the server's certificate is for the host of a trusted authority, or the X509-SVID that is said"}, checkServerCertificate},
	{Check{"federation-tls", docFederation, "5", Must, "nothing older than TLS 1.2 is spoken"}, checkOldTLS},
	{Check{"federation-content-type", docFederation, "5.2.1.3, 5.2.2.3", Should, "Content-Type is application/json"}, checkContentType},
}

// fetched is what a bundle endpoint answered, twice.
type fetched struct {
	chain       []*x509.Certificate
	contentType string
	body, again []byte
}

// maxBundle bounds a bundle, in bytes.
const maxBundle = 4 << 20

// fetch asks the endpoint, whoever it is; that is judged by itself.
func (s *session) fetch(ctx context.Context) (*fetched, error) {
	if s.Federation == nil {
		return nil, skip("no bundle endpoint is given")
	}
	if _, err := checkURL(ctx, s); err != nil {
		return nil, skip("the URL is not one of a bundle endpoint; see federation-url")
	}
	return s.fetched.get(func() (*fetched, error) {
		f := &fetched{}
		for _, into := range []*[]byte{&f.body, &f.again} {
			if err := s.getBundle(ctx, f, into); err != nil {
				return nil, err
			}
		}
		return f, nil
	})
}

func (s *session) getBundle(ctx context.Context, f *fetched, into *[]byte) error {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	transport := &http.Transport{DisableKeepAlives: true, ForceAttemptHTTP2: true, TLSClientConfig: &tls.Config{
		MinVersion:         tls.VersionTLS12,
		InsecureSkipVerify: true, //nolint:gosec // who answers is a check of its own
	}}
	defer transport.CloseIdleConnections()
	req, err := http.NewRequestWithContext(ctx, http.MethodGet, s.Federation.URL, http.NoBody)
	if err != nil {
		return err
	}
	resp, err := (&http.Client{Transport: transport}).Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("GET is answered with %s", resp.Status)
	}
	f.chain, f.contentType = resp.TLS.PeerCertificates, resp.Header.Get("Content-Type")
	*into, err = io.ReadAll(io.LimitReader(resp.Body, maxBundle))
	return err
}

// answered is fetch for checks that are about the answer.
func (s *session) answered(ctx context.Context) (*fetched, error) {
	f, err := s.fetch(ctx)
	var no *skipped
	if err != nil && !errors.As(err, &no) {
		return nil, skip("the bundle endpoint does not answer; see federation-open")
	}
	return f, err
}

func checkURL(_ context.Context, s *session) (string, error) {
	if s.Federation == nil {
		return "", skip("no bundle endpoint is given")
	}
	u, err := url.Parse(s.Federation.URL)
	switch {
	case err != nil:
		return "", err
	case u.Scheme != "https":
		return "", fmt.Errorf("its scheme is %q", u.Scheme)
	case u.User != nil:
		return "", errors.New("it names a user")
	case u.Hostname() == "":
		return "", errors.New("it names no host")
	}
	return s.Federation.URL, nil
}

func checkFetch(ctx context.Context, s *session) (string, error) {
	f, err := s.fetch(ctx)
	if err != nil {
		return "", err
	}
	return fmt.Sprintf("%d bytes", len(f.body)), nil
}

func checkServerCertificate(ctx context.Context, s *session) (string, error) {
	f, err := s.answered(ctx)
	if err != nil {
		return "", err
	}
	o := x509.VerifyOptions{Intermediates: x509.NewCertPool(), KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}, CurrentTime: time.Now()}
	for _, c := range f.chain[1:] {
		o.Intermediates.AddCert(c)
	}
	roots := s.Federation.Roots
	if s.Federation.SPIFFEID == "" {
		u, err := url.Parse(s.Federation.URL)
		if err != nil {
			return "", err
		}
		o.DNSName = u.Hostname()
	} else {
		l := leaf{certs: f.chain}
		for _, ask := range []func(leaf) error{checkOneURI, checkIDForm, checkIDPath, checkLeafCA, checkKeyUsage, checkLeafUsage, checkPurposes} {
			var no *skipped
			if err := ask(l); err != nil && !errors.As(err, &no) {
				return "", err
			}
		}
		if name, err := l.id(); err != nil || name != s.Federation.SPIFFEID {
			return "", fmt.Errorf("it is %s, and not %s", name, s.Federation.SPIFFEID)
		}
		if roots == nil {
			if roots, err = s.endpointRoots(ctx); err != nil {
				return "", err
			}
		}
	}
	if roots != nil {
		o.Roots = x509.NewCertPool()
		for _, c := range roots {
			o.Roots.AddCert(c)
		}
	}
	if _, err := f.chain[0].Verify(o); err != nil {
		return "", err
	}
	if s.Federation.SPIFFEID != "" {
		return s.Federation.SPIFFEID, nil
	}
	return o.DNSName, nil
}

// endpointRoots are those that the Workload API has of the endpoint's trust domain.
func (s *session) endpointRoots(ctx context.Context) ([]*x509.Certificate, error) {
	if err := s.hasEndpoint(); err != nil {
		return nil, skip("no roots are given that prove the endpoint")
	}
	m, err := s.fetchBundles(ctx)
	if err != nil {
		return nil, skip("no bundles were served; see x509-bundles-own")
	}
	id, err := parseID(s.Federation.SPIFFEID)
	if err != nil {
		return nil, err
	}
	roots, err := x509.ParseCertificates(m.GetBundles()["spiffe://"+id.domain])
	if err != nil || len(roots) == 0 {
		return nil, skip("the Workload API has no roots of spiffe://%s", id.domain)
	}
	return roots, nil
}

func checkOldTLS(ctx context.Context, s *session) (string, error) {
	if _, err := s.answered(ctx); err != nil {
		return "", err
	}
	u, err := url.Parse(s.Federation.URL)
	if err != nil {
		return "", err
	}
	port := u.Port()
	if port == "" {
		port = "443"
	}
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	defer cancel()
	var suites []uint16
	for _, c := range append(tls.CipherSuites(), tls.InsecureCipherSuites()...) {
		suites = append(suites, c.ID)
	}
	dialer := &tls.Dialer{Config: &tls.Config{
		ServerName: u.Hostname(), CipherSuites: suites, MinVersion: tls.VersionTLS10, MaxVersion: tls.VersionTLS11, //nolint:gosec // it has to be refused
		InsecureSkipVerify: true, //nolint:gosec // as above
	}}
	conn, err := dialer.DialContext(ctx, "tcp", net.JoinHostPort(u.Hostname(), port))
	if err == nil {
		conn.Close()
		return "", errors.New("TLS 1.1 is spoken")
	}
	return "TLS 1.0 and 1.1 are refused", nil
}

func checkContentType(ctx context.Context, s *session) (string, error) {
	f, err := s.answered(ctx)
	if err != nil {
		return "", err
	}
	if kind, _, err := mime.ParseMediaType(f.contentType); err != nil || kind != "application/json" {
		return "", fmt.Errorf("it is %q", f.contentType)
	}
	return f.contentType, nil
}
