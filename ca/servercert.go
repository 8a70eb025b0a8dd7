package ca

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ServerCertificate is a certificate that the authority issues to its own
// process, with a fresh key at every renewal. It is safe for concurrent use.
type ServerCertificate struct {
	authority *Authority
	id        spiffeid.ID
	ttl       time.Duration

	mu      sync.Mutex
	cert    *tls.Certificate  // guarded by mu; replaced whole
	root    *x509.Certificate // guarded by mu; the root that signed when cert was made
	renewAt time.Time         // guarded by mu
}

// ServerCertificate returns a certificate for id that renews itself when it
// is used past half its life, or when another root signs. A ttl of zero means
// the profile's. The first certificate is issued at once, so that a
// misconfiguration shows early.
func (a *Authority) ServerCertificate(id spiffeid.ID, ttl time.Duration) (*ServerCertificate, error) {
	s := &ServerCertificate{authority: a, id: id, ttl: ttl}
	if _, err := s.Get(); err != nil {
		return nil, err
	}
	return s, nil
}

// GetCertificate has the form that tls.Config wants.
func (s *ServerCertificate) GetCertificate(*tls.ClientHelloInfo) (*tls.Certificate, error) {
	return s.Get()
}

// Get returns the current certificate, renewed if that is due. When renewal
// fails the old one is returned while it is valid. The result is shared:
// callers must not edit it.
func (s *ServerCertificate) Get() (*tls.Certificate, error) {
	s.mu.Lock()
	defer s.mu.Unlock()
	now := s.authority.now()
	root := s.authority.Bundle()[0] // before the certificate is made
	if s.cert != nil && root.Equal(s.root) && now.Before(s.renewAt) && !now.Before(s.cert.Leaf.NotBefore) {
		return s.cert, nil
	}
	cert, renewAt, err := s.renew(now)
	if err != nil {
		if s.cert != nil && now.Before(s.cert.Leaf.NotAfter) {
			s.authority.log.Error("renewing the control plane's own certificate failed", "id", s.id.String(), "err", err, "not_after", stamp(s.cert.Leaf.NotAfter))
			return s.cert, nil
		}
		return nil, err
	}
	s.cert, s.root, s.renewAt = cert, root, renewAt
	return cert, nil
}

func (s *ServerCertificate) renew(now time.Time) (*tls.Certificate, time.Time, error) {
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, time.Time{}, err
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, time.Time{}, err
	}
	p, err := s.authority.Prepare(Request{ID: s.id, CSR: csr, TTL: s.ttl})
	if err != nil {
		return nil, time.Time{}, err
	}
	issued, err := s.authority.Issue(p)
	if err != nil {
		return nil, time.Time{}, err
	}
	leaf, err := x509.ParseCertificate(issued.Chain[0])
	if err != nil {
		return nil, time.Time{}, fmt.Errorf("ca: %w", err)
	}
	cert := &tls.Certificate{Certificate: issued.Chain, PrivateKey: key, Leaf: leaf}
	return cert, now.Add(issued.NotAfter.Sub(now) / 2), nil
}
