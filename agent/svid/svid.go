// Package svid holds the node's SVIDs: it makes the keys, asks for the
// certificates, renews them in time, and keeps a copy on disk so that a
// restart of the agent needs no control plane. Keys never leave the node.
// JWT-SVIDs are asked for when they are wanted, and kept in memory.
package svid

import (
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/pem"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// SVID is one certificate with its key. It is immutable: a renewal makes a
// new one. It may be shared between goroutines.
type SVID struct {
	ID spiffeid.ID
	// Workloads are the local workloads ("namespace/name", sorted) that have
	// this identity.
	Workloads []string
	// Chain is DER, leaf first, without the root.
	Chain [][]byte
	Key   crypto.Signer
	// Serial is the leaf's serial number in lower-case hexadecimal.
	Serial string
	// Issuer is the key id of the issuing certificate in lower-case
	// hexadecimal.
	Issuer              string
	NotBefore, NotAfter time.Time
	// RenewAt is when the manager asks for the next one.
	RenewAt time.Time
}

// PKCS8 returns the private key as unencrypted PKCS#8 in DER.
func (s *SVID) PKCS8() ([]byte, error) {
	der, err := x509.MarshalPKCS8PrivateKey(s.Key)
	if err != nil {
		return nil, fmt.Errorf("svid: encode the key of %s: %w", s.ID, err)
	}
	return der, nil
}

// KeyPEM returns the private key as PKCS#8 in PEM.
func (s *SVID) KeyPEM() ([]byte, error) {
	der, err := s.PKCS8()
	if err != nil {
		return nil, err
	}
	return pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: der}), nil
}

// fresh says whether the certificate may be presented at the instant now.
func (s *SVID) fresh(now time.Time) bool { return s != nil && now.Before(s.NotAfter) }

// held returns the same certificate for another set of workloads.
func (s *SVID) held(workloads []string) *SVID {
	if s == nil || slices.Equal(s.Workloads, workloads) {
		return s
	}
	c := *s
	c.Workloads = workloads
	return &c
}

// newSVID describes a checked chain; leaf is chain[0].
func newSVID(id spiffeid.ID, leaf *x509.Certificate, chain [][]byte, key crypto.Signer, renewAt time.Time) *SVID {
	return &SVID{
		ID: id, Chain: chain, Key: key,
		Serial:    hex.EncodeToString(leaf.SerialNumber.Bytes()), // as the proxy and the issuance log write it
		Issuer:    hex.EncodeToString(leaf.AuthorityKeyId),
		NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter, RenewAt: renewAt,
	}
}
