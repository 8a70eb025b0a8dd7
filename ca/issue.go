package ca

import (
	"bytes"
	"context"
	"crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// ErrUsed is returned when a Prepared is issued a second time.
var ErrUsed = errors.New("ca: issue: this request was issued already; prepare it again")

// Issued is a signed certificate.
type Issued struct {
	// Chain is DER: the leaf, the intermediate, and what stands above that but the root.
	Chain [][]byte
	// Serial of the leaf in lower-case hexadecimal, two digits a byte, as
	// proxies write it.
	Serial              string
	NotBefore, NotAfter time.Time
}

// Issue is IssueContext for who has no context.
func (a *Authority) Issue(p *Prepared) (*Issued, error) {
	return a.IssueContext(context.Background(), p)
}

// IssueContext signs what was prepared, or has the authority above sign it, which ctx
// bounds; what comes of that is an *UpstreamError if it is an error. The intent is durable in the issuance log
// before the key is used; when that fails, nothing is signed. NotAfter may be
// earlier than asked for when the intermediate ends earlier, but by more than
// half only when the root itself is about to end.
func (a *Authority) IssueContext(ctx context.Context, p *Prepared) (*Issued, error) {
	if p == nil || p.authority != a {
		return nil, errors.New("ca: issue: the request was not prepared by this authority")
	}
	if !p.used.CompareAndSwap(false, true) {
		return nil, ErrUsed
	}
	now := a.now()
	if age := now.Sub(p.at); age > preparedFor || age < -preparedFor {
		return nil, fmt.Errorf("ca: issue: the request was prepared %s ago; prepare it again", age)
	}
	if a.leaves.certifies(p.req.ID) {
		if root, above := a.below(); root != nil {
			issued, err := a.issueLeaf(ctx, p, root, above, now)
			if err != nil {
				return nil, fmt.Errorf("ca: issue: %w", err)
			}
			return issued, nil
		}
	}
	signer, root, err := a.signer(p, now)
	if err != nil {
		return nil, fmt.Errorf("ca: issue: %w", err)
	}
	tmpl := *p.tmpl
	if end := signer.ends(root); tmpl.NotAfter.After(end) {
		tmpl.NotAfter = end
	}
	if !tmpl.NotAfter.After(now) {
		return nil, fmt.Errorf("ca: issue: the authority's own certificate ends at %s, nothing can be issued; replace the root, or have the authority above issue again", stamp(signer.ends(root)))
	}

	serial := formatSerial(tmpl.SerialNumber)
	spki, err := x509.MarshalPKIXPublicKey(p.pub)
	if err != nil {
		return nil, fmt.Errorf("ca: issue: %w", err)
	}
	keyHash := sha256.Sum256(spki)
	if err := a.issuance.intent(line{
		Time: now, Serial: serial, ID: p.req.ID.String(), Node: p.req.Node, Workload: p.req.Workload,
		NotBefore: tmpl.NotBefore, NotAfter: tmpl.NotAfter,
		Issuer: hex.EncodeToString(signer.cert.SubjectKeyId), KeySHA256: hex.EncodeToString(keyHash[:]),
	}); err != nil {
		return nil, fmt.Errorf("ca: issue: record the intent: %w", err)
	}

	cert, err := a.sign(&tmpl, p, signer, root, spki, now)
	outcome := line{Time: a.now(), Serial: serial}
	if err != nil {
		outcome.Error = err.Error()
	} else {
		sum := sha256.Sum256(cert.Raw)
		outcome.CertSHA256 = hex.EncodeToString(sum[:])
	}
	if logErr := a.issuance.outcome(outcome); logErr != nil {
		return nil, fmt.Errorf("ca: issue: record the outcome: %w", errors.Join(logErr, err))
	}
	if err != nil {
		return nil, fmt.Errorf("ca: issue: %w", err)
	}
	return &Issued{
		Chain:     append([][]byte{cert.Raw}, signer.raw()...),
		Serial:    serial,
		NotBefore: cert.NotBefore,
		NotAfter:  cert.NotAfter,
	}, nil
}

// sign makes the certificate and looks at it once more before it leaves.
func (a *Authority) sign(tmpl *x509.Certificate, p *Prepared, signer *pair, root *x509.Certificate, spki []byte, now time.Time) (*x509.Certificate, error) {
	der, err := x509.CreateCertificate(rand.Reader, tmpl, signer.cert, p.pub, signer.key)
	if err != nil {
		return nil, fmt.Errorf("sign: %w", err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		return nil, fmt.Errorf("parse what was signed: %w", err)
	}
	if err := Lint(cert); err != nil {
		return nil, err
	}
	id, _, err := x509svid.Verify(append([]*x509.Certificate{cert}, signer.chain()...), a.bundleOf(root), x509svid.WithTime(now))
	if err != nil {
		return nil, err
	}
	if id != p.req.ID || id.TrustDomain() != a.td || !bytes.Equal(cert.RawSubjectPublicKeyInfo, spki) {
		return nil, fmt.Errorf("what was signed is not what was prepared for %q", p.req.ID)
	}
	return cert, nil
}

// believed reports whether peers that trust a root believe a chain.
func (a *Authority) believed(chain []*x509.Certificate, root *x509.Certificate, now time.Time) error {
	_, _, err := x509svid.Verify(chain, a.bundleOf(root), x509svid.WithTime(now))
	return err
}

// signer returns the intermediate to sign p with, and its root, after renewing the
// intermediate when it is past half its life or would cut p's lifetime by more than
// half.
func (a *Authority) signer(p *Prepared, now time.Time) (intermediate *pair, root *x509.Certificate, err error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return nil, nil, errClosed
	}
	if a.roots.below != nil {
		return a.intermediate, a.roots.signs.cert, nil // an Enrolment renews it
	}
	cur := a.intermediate.cert
	left := cur.NotAfter.Sub(now)
	past := left < cur.NotAfter.Sub(cur.NotBefore)/2 || now.Before(cur.NotBefore)
	short := left < p.req.TTL/2
	// A new one helps only if it would end later, which near the end of the
	// root it would not.
	next := now.Add(a.intermediateTTL)
	if next.After(a.roots.signs.cert.NotAfter) {
		next = a.roots.signs.cert.NotAfter
	}
	if (past || short) && next.After(cur.NotAfter.Add(time.Second)) || now.Before(cur.NotBefore) {
		must := short || now.Before(cur.NotBefore)
		if err := a.renew(must); err != nil && must {
			return nil, nil, err
		}
	}
	return a.intermediate, a.roots.signs.cert, nil
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
