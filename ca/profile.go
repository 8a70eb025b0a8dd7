package ca

import (
	"crypto"
	"crypto/x509"
	"fmt"
	"net/url"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of leaf lifetimes.
const (
	DefaultTTL = time.Hour
	MinTTL     = time.Second
	MaxTTL     = 24 * time.Hour
)

// preparedFor is how long a Prepared may wait to be issued.
const preparedFor = time.Minute

// Profile shapes the leaf certificates of an authority.
type Profile struct {
	// TTL is the lifetime of a leaf whose request names none. Zero means
	// DefaultTTL.
	TTL time.Duration
}

// Request asks for one certificate. The caller has already decided that
// whoever holds the key of the CSR may have the ID.
type Request struct {
	// ID is the identity to certify: a workload, a node, or the control plane,
	// of the authority's trust domain.
	ID spiffeid.ID
	// CSR is PKCS#10 in DER. Only its public key is used, but where an authority above
	// certifies workloads, who is given all of it.
	CSR []byte
	// TTL is from now to NotAfter, from MinTTL to MaxTTL. Zero means the
	// profile's.
	TTL time.Duration
	// Node and Workload (namespace/name) say on whose behalf the certificate
	// is asked for; they go into the issuance log and nowhere else.
	Node, Workload string
}

// Prepared is a request that was found good. It can be issued once, within a
// minute, by the authority that prepared it.
type Prepared struct {
	authority *Authority
	req       Request
	tmpl      *x509.Certificate
	trial     *trial // of tmpl, by who signed when it was prepared
	pub       crypto.PublicKey
	spki      []byte // pub, PKIX in DER
	at        time.Time
	used      atomic.Bool
}

// Prepare checks a request and builds the exact certificate that Issue would
// sign. It touches no trusted key, writes nothing, and may be called with
// hostile input. The error names the field that is wrong.
func (a *Authority) Prepare(req Request) (*Prepared, error) {
	if err := checkID(a.td, req.ID); err != nil {
		return nil, fmt.Errorf("ca: prepare: %w", err)
	}
	if req.TTL == 0 {
		req.TTL = a.profile.TTL
	}
	if err := checkTTL(req.TTL); err != nil {
		return nil, fmt.Errorf("ca: prepare: ttl: %w", err)
	}
	pub, err := readCSR(req.CSR, req.ID)
	if err != nil {
		return nil, fmt.Errorf("ca: prepare: %w", err)
	}
	if a.leaves.certifies(req.ID) {
		if err := checkWhole(req.CSR); err != nil {
			return nil, fmt.Errorf("ca: prepare: csr: %w", err)
		}
	}
	serial, err := newSerial()
	if err != nil {
		return nil, fmt.Errorf("ca: prepare: %w", err)
	}
	now := a.now()
	tmpl := &x509.Certificate{
		SerialNumber:          serial,
		NotBefore:             now.Add(-backdate),
		NotAfter:              now.Add(req.TTL),
		URIs:                  []*url.URL{req.ID.URL()},
		KeyUsage:              x509.KeyUsageDigitalSignature,
		ExtKeyUsage:           []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth},
		BasicConstraintsValid: true,
	}
	p := &Prepared{authority: a, req: req, tmpl: tmpl, pub: pub, at: now}
	if p.spki, err = x509.MarshalPKIXPublicKey(pub); err != nil {
		return nil, fmt.Errorf("ca: prepare: %w", err)
	}
	a.mu.Lock()
	signer := a.intermediate
	a.mu.Unlock()
	if p.trial, err = p.try(tmpl, signer, now); err != nil {
		return nil, fmt.Errorf("ca: prepare: %w", err)
	}
	return p, nil
}

func checkTTL(ttl time.Duration) error {
	if ttl < MinTTL || ttl > MaxTTL {
		return fmt.Errorf("%s; must be from %s to %s", ttl, MinTTL, MaxTTL)
	}
	return nil
}
