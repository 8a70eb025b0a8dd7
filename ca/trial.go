package ca

import (
	"bytes"
	"crypto"
	"crypto/rand"
	"crypto/x509"
	"encoding/asn1"
	"errors"
	"fmt"
	"io"
	"math/big"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// trial is a leaf that was looked at before anything was signed: the bytes that the
// signature will be of, to the last one.
type trial struct {
	signer   *pair             // whom it names as its issuer
	notAfter time.Time         // as the template said
	cert     *x509.Certificate // whose signature is none
	of       tbsAndAlgorithm
}

// tbsAndAlgorithm is a certificate but for its signature.
type tbsAndAlgorithm struct{ tbs, algorithm []byte }

// isOf reports whether this is the trial of a template by a signer, where all but its
// end is as it was.
func (t *trial) isOf(tmpl *x509.Certificate, signer *pair) bool {
	return t != nil && t.signer == signer && t.notAfter.Equal(tmpl.NotAfter)
}

// certificate is the outermost form of one.
type certificate struct {
	TBS, Algorithm asn1.RawValue
	Signature      asn1.BitString
}

// noKey has the public key of a signer and not its private one: it keeps what it is
// to sign, and does not.
type noKey struct {
	crypto.PublicKey
	message []byte
}

var errNoKey = errors.New("there is no key to sign with")

// Public implements crypto.Signer.
func (k *noKey) Public() crypto.PublicKey { return k.PublicKey }

// Sign implements crypto.Signer.
func (k *noKey) Sign(io.Reader, []byte, crypto.SignerOpts) ([]byte, error) { return nil, errNoKey }

// SignMessage implements crypto.MessageSigner.
func (k *noKey) SignMessage(_ io.Reader, message []byte, _ crypto.SignerOpts) ([]byte, error) {
	k.message = bytes.Clone(message)
	return nil, errNoKey
}

// try builds what signer would sign for p, without its key, and looks at all of it:
// that it is an SVID of the profile, and that it says what was prepared.
func (p *Prepared) try(tmpl *x509.Certificate, signer *pair, now time.Time) (*trial, error) {
	k := &noKey{PublicKey: signer.cert.PublicKey}
	if _, err := x509.CreateCertificate(rand.Reader, tmpl, signer.cert, p.pub, k); !errors.Is(err, errNoKey) {
		return nil, fmt.Errorf("build what would be signed: %w", err)
	}
	var head struct {
		Version   int `asn1:"explicit,tag:0"`
		Serial    *big.Int
		Algorithm asn1.RawValue
	} // what follows is not read here
	if _, err := asn1.Unmarshal(k.message, &head); err != nil {
		return nil, fmt.Errorf("read what would be signed: %w", err)
	}
	of := tbsAndAlgorithm{k.message, head.Algorithm.FullBytes}
	der, err := asn1.Marshal(certificate{asn1.RawValue{FullBytes: of.tbs}, asn1.RawValue{FullBytes: of.algorithm}, asn1.BitString{Bytes: []byte{0}, BitLength: 8}})
	if err != nil {
		return nil, fmt.Errorf("encode what would be signed: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse what would be signed: %w", err)
	}
	if err := Lint(cert); err != nil {
		return nil, err
	}
	switch {
	case cert.URIs[0].String() != p.req.ID.String():
		return nil, fmt.Errorf("certificate names %q instead of %q", cert.URIs[0], p.req.ID)
	case !bytes.Equal(cert.RawSubjectPublicKeyInfo, p.spki):
		return nil, errors.New("certificate is for another key than the request's")
	case !bytes.Equal(cert.RawIssuer, signer.cert.RawSubject) || !bytes.Equal(cert.AuthorityKeyId, signer.cert.SubjectKeyId):
		return nil, fmt.Errorf("certificate names the issuer %.256q instead of %.256q", cert.Issuer, signer.cert.Subject)
	case now.Before(cert.NotBefore) || now.After(cert.NotAfter):
		return nil, fmt.Errorf("certificate is valid from %s to %s and not at %s", stamp(cert.NotBefore), stamp(cert.NotAfter), stamp(now))
	}
	return &trial{signer: signer, notAfter: tmpl.NotAfter, cert: cert, of: of}, nil
}

// sign makes the certificate. CreateCertificate verifies the signature; the rest must
// be what was looked at, byte by byte.
func (a *Authority) sign(in *intended, now time.Time) ([]byte, error) {
	der, err := x509.CreateCertificate(rand.Reader, in.tmpl, in.signer.cert, in.p.pub, in.signer.key)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	var c certificate
	if rest, err := asn1.Unmarshal(der, &c); err != nil || len(rest) != 0 {
		return nil, errors.New("what was signed cannot be read")
	}
	if !bytes.Equal(c.TBS.FullBytes, in.trial.of.tbs) || !bytes.Equal(c.Algorithm.FullBytes, in.trial.of.algorithm) {
		return nil, fmt.Errorf("what was signed is not what was prepared for %q", in.p.req.ID)
	}
	return der, a.believe(der, in, now)
}

// believeAgain is how often a chain is verified whole that does not change.
const believeAgain = time.Minute

// believed is a chain above leaves below which one was believed.
type believed struct {
	signer     *pair
	root       *x509.Certificate
	from, till time.Time // when the others are, too
}

// believe verifies a certificate as peers do, from its leaf to the root: the first
// below a signer, and one each minute. The others differ from that one in nothing
// that such a verification reads but in their signature and their times, at which
// CreateCertificate and try have looked.
func (a *Authority) believe(der []byte, in *intended, now time.Time) error {
	if b := a.believed.Load(); b != nil && b.signer == in.signer && b.root == in.root && !now.Before(b.from) && !now.After(b.till) {
		return nil
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return fmt.Errorf("parse what was signed: %w", err)
	}
	if err := a.verify(append([]*x509.Certificate{leaf}, in.signer.chain()...), in.root, now); err != nil {
		return err
	}
	till := now.Add(believeAgain)
	if end := in.signer.ends(in.root); end.Before(till) {
		till = end
	}
	a.believed.Store(&believed{in.signer, in.root, now, till})
	return nil
}

// verify reports whether peers that trust a root believe a chain.
func (a *Authority) verify(chain []*x509.Certificate, root *x509.Certificate, now time.Time) error {
	_, _, err := x509svid.Verify(chain, a.bundleOf(root), x509svid.WithTime(now))
	return err
}

// bundleOf is the source that holds one root of the authority's only.
func (a *Authority) bundleOf(root *x509.Certificate) bundleFunc {
	return func(td spiffeid.TrustDomain) ([]*x509.Certificate, error) {
		if td != a.td {
			return nil, fmt.Errorf("no bundle for trust domain %q", td)
		}
		return []*x509.Certificate{root}, nil
	}
}
