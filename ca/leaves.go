package ca

import (
	"bytes"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Limits of what an authority above is asked for.
const (
	leavesAtOnce = 8                // requests under way
	leafWait     = 20 * time.Second // for one of them
	leafHoldOff  = time.Minute      // after a no, before the same identity is asked for again
	leafLate     = time.Minute      // an authority above may count a lifetime from so much later
	leafEarly    = 5 * time.Second  // it is waited for a certificate that begins in so much
	leafTrouble  = 15 * time.Second // that no certificate comes is told after so long
)

// LeafSigner is an authority above that certifies workloads itself. It is safe for
// concurrent use.
type LeafSigner interface {
	// CertifyLeaf asks, and waits until it is decided or ctx ends. A request is known
	// by its key and its identity: who asks again finds the one that waits. What is
	// certified is forgotten there. An error is best an *UpstreamError.
	CertifyLeaf(ctx context.Context, req LeafRequest) (*UpstreamAnswer, error)
}

// LeafRequest asks for a workload's certificate.
type LeafRequest struct {
	ID  spiffeid.ID
	CSR []byte        // PKCS#10 in DER; it names the ID, and nothing else
	TTL time.Duration // the lifetime that is wanted
	// Record is called before a request is made, and not for one that is there. When
	// it fails, none is made.
	Record func() error
}

// leaves is what is known of certificates from an authority above.
type leaves struct {
	signer LeafSigner // nil: none is
	slots  chan struct{}

	mu      sync.Mutex
	refused map[spiffeid.ID]heldOff // guarded by mu
	since   time.Time               // guarded by mu; when the first failed after the last that came; zero: none did
	err     UpstreamError           // guarded by mu; of the last
	moved   *x509.Certificate       // guarded by mu; the root that signed here when one came from below another; nil: none did
}

type heldOff struct {
	until time.Time
	err   *UpstreamError
}

func newLeaves(signer LeafSigner) *leaves {
	return &leaves{signer: signer, slots: make(chan struct{}, leavesAtOnce), refused: map[spiffeid.ID]heldOff{}}
}

// certifies reports whether an ID is certified above.
func (l *leaves) certifies(id spiffeid.ID) bool {
	s := segments(id)
	return l.signer != nil && len(s) == 4 && s[0] == "ns"
}

// Leaves says why workloads' certificates do not come from the authority above; zero:
// nothing is known that keeps them.
func (a *Authority) Leaves() UpstreamError {
	a.leaves.mu.Lock()
	defer a.leaves.mu.Unlock()
	if a.leaves.since.IsZero() || a.now().Sub(a.leaves.since) < leafTrouble {
		return UpstreamError{}
	}
	return a.leaves.err
}

// LeavesElsewhere says that the authority above certifies workloads below another
// root than the given one, that signs here; empty: it does not.
func (a *Authority) LeavesElsewhere(root *x509.Certificate) string {
	a.leaves.mu.Lock()
	defer a.leaves.mu.Unlock()
	if a.leaves.moved == nil || !a.leaves.moved.Equal(root) {
		return ""
	}
	return "workloads are certified below another root"
}

// heldOff returns the last no for an ID, while it is not to be asked for again.
func (l *leaves) heldOff(id spiffeid.ID, now time.Time) *UpstreamError {
	l.mu.Lock()
	defer l.mu.Unlock()
	for one, h := range l.refused {
		if !now.Before(h.until) || h.until.Sub(now) > leafHoldOff { // the clock may be set back
			delete(l.refused, one)
		}
	}
	return l.refused[id].err
}

// ended notes what became of a request.
func (l *leaves) ended(id spiffeid.ID, err error, now time.Time) {
	l.mu.Lock()
	defer l.mu.Unlock()
	if err == nil {
		l.since, l.err, l.moved = time.Time{}, UpstreamError{}, nil
		return
	}
	no := asUpstreamError(err)
	if no.Reason.final() {
		l.refused[id] = heldOff{until: now.Add(leafHoldOff), err: no}
	}
	if l.since.IsZero() || now.Before(l.since) {
		l.since = now
	}
	l.err = *no
}

// below returns the root that authorities above sign with here, and what stands
// between it and who signs; a nil root: the mesh's own root signs until it is replaced.
func (a *Authority) below() (root *x509.Certificate, above []*x509.Certificate) {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.roots.below == nil {
		return nil, nil
	}
	return a.roots.signs.cert, a.roots.below.above
}

// issueLeaf has what was prepared certified by the authority above. The request is
// in the issuance log before it is made, and the certificate before it is handed out.
func (a *Authority) issueLeaf(ctx context.Context, p *Prepared, root *x509.Certificate, above []*x509.Certificate, now time.Time) (_ *Issued, err error) {
	if no := a.leaves.heldOff(p.req.ID, now); no != nil {
		return nil, no
	}
	wait := leafWait
	if at, ok := ctx.Deadline(); ok { // who asks is to hear why none came
		wait = min(wait, time.Until(at)*9/10)
	}
	ctx, cancel := context.WithTimeout(ctx, wait)
	defer cancel()
	select {
	case a.leaves.slots <- struct{}{}:
		defer func() { <-a.leaves.slots }()
	case <-ctx.Done():
		return nil, &UpstreamError{UpstreamPending, fmt.Sprintf("%d other certificates are waited for; it is asked for again by itself", leavesAtOnce)}
	}
	defer func() { a.leaves.ended(p.req.ID, err, a.now()) }()

	ttl := p.req.TTL
	if left := (&pair{cert: root, above: above}).ends(root).Sub(now) - leafLate; ttl > left {
		ttl = left
	}
	if ttl < MinTTL {
		return nil, &UpstreamError{UpstreamFailed, "the authority above ends within a minute; replace its certificate"}
	}
	keyHash := sha256.Sum256(p.spki)
	number := sha256.Sum256(fmt.Appendf(nil, "%x %s", keyHash, p.req.ID))
	intent := line{
		Time: now, Kind: KindRequest, Serial: hex.EncodeToString(number[:16]), ID: p.req.ID.String(), Node: p.req.Node, Workload: p.req.Workload,
		NotBefore: now, NotAfter: now.Add(ttl), KeySHA256: hex.EncodeToString(keyHash[:]),
	}
	asked := intent.Serial
	answer, err := a.leaves.signer.CertifyLeaf(ctx, LeafRequest{ID: p.req.ID, CSR: p.req.CSR, TTL: ttl, Record: func() error {
		if err := a.issuance.intent(intent); err != nil {
			return fmt.Errorf("record the intent: %w", err)
		}
		return nil
	}})
	var chain []*x509.Certificate
	if err == nil {
		chain, err = a.judgeLeaf(ctx, p, answer, root, ttl)
	}
	if err != nil {
		no := asUpstreamError(err)
		if no.Reason.final() { // else it may be certified yet, and its outcome is not known
			if logErr := a.issuance.outcome(line{Time: a.now(), Serial: asked, Error: no.Message}); logErr != nil {
				return nil, fmt.Errorf("record the outcome: %w", errors.Join(logErr, err))
			}
		}
		return nil, no
	}
	leaf := chain[0]
	intent.Kind, intent.Was, intent.Time, intent.Serial = "", asked, a.now(), formatSerial(leaf.SerialNumber)
	intent.NotBefore, intent.NotAfter, intent.Issuer = leaf.NotBefore, leaf.NotAfter, hex.EncodeToString(leaf.AuthorityKeyId)
	if err := a.issuance.intent(intent); err != nil {
		return nil, fmt.Errorf("record the certificate: %w", err)
	}
	sum := sha256.Sum256(leaf.Raw)
	if err := a.issuance.outcome(line{Time: a.now(), Serial: intent.Serial, CertSHA256: hex.EncodeToString(sum[:])}); err != nil {
		return nil, fmt.Errorf("record the outcome: %w", err)
	}
	return &Issued{Chain: (&pair{cert: leaf, above: chain[1:]}).raw(), Serial: intent.Serial, NotBefore: leaf.NotBefore, NotAfter: leaf.NotAfter}, nil
}

// judgeLeaf returns the chain of an answer, without its root, if it is what this
// authority would have signed, but for the serial number and the instants, and if
// all peers believe it.
func (a *Authority) judgeLeaf(ctx context.Context, p *Prepared, answer *UpstreamAnswer, root *x509.Certificate, ttl time.Duration) ([]*x509.Certificate, error) {
	unusable := func(err error) error {
		return &UpstreamError{UpstreamUnusable, fmt.Sprintf("the certificate that came for %s is refused: %v", p.req.ID, err)}
	}
	if answer == nil || len(answer.Chain) == 0 {
		return nil, unusable(errors.New("there is none"))
	}
	if n := len(answer.Chain) + len(answer.Roots); n > 4*maxAbove {
		return nil, unusable(fmt.Errorf("%d certificates came", n))
	}
	leaf := answer.Chain[0]
	if err := lintAbove(leaf); err != nil {
		return nil, unusable(err)
	}
	if !bytes.Equal(leaf.RawSubjectPublicKeyInfo, p.spki) {
		return nil, unusable(errors.New("it is for another key"))
	}
	if got := leaf.URIs[0].String(); got != p.req.ID.String() {
		return nil, unusable(fmt.Errorf("it names %.256q", got))
	}
	now := a.now()
	if early := leaf.NotBefore.Sub(now); early > 0 && early <= leafEarly { // clocks differ
		select {
		case <-time.After(early):
		case <-ctx.Done():
		}
		now = a.now()
	}
	if most := now.Add(ttl + leafLate); leaf.NotAfter.After(most) {
		return nil, unusable(fmt.Errorf("it lives until %s, and %s was asked for; have the issuer honour spec.duration", stamp(leaf.NotAfter), ttl))
	}
	chain, err := a.leafChain(answer, leaf, root, now)
	if err != nil {
		return nil, unusable(err)
	}
	if end := (&pair{cert: leaf, above: chain[1:]}).ends(root); leaf.NotAfter.After(end) {
		return nil, unusable(fmt.Errorf("it outlives its authority, which ends at %s", stamp(end)))
	}
	return chain, nil
}

// leafChain verifies a leaf under the root that signs, and returns the certificates
// that prove it.
func (a *Authority) leafChain(answer *UpstreamAnswer, leaf, root *x509.Certificate, now time.Time) ([]*x509.Certificate, error) {
	verify := func(root *x509.Certificate) ([][]*x509.Certificate, error) {
		roots, between := x509.NewCertPool(), x509.NewCertPool()
		roots.AddCert(root)
		for _, c := range append(answer.Chain[1:len(answer.Chain):len(answer.Chain)], answer.Roots...) {
			between.AddCert(c)
		}
		return leaf.Verify(x509.VerifyOptions{Roots: roots, Intermediates: between, CurrentTime: now, KeyUsages: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth}})
	}
	chains, err := verify(root)
	if err != nil {
		for _, other := range answer.Roots {
			if _, elsewhere := verify(other); elsewhere == nil && !other.Equal(root) && other.CheckSignatureFrom(other) == nil {
				a.leaves.mu.Lock()
				a.leaves.moved = root
				a.leaves.mu.Unlock()
				return nil, fmt.Errorf("it is from below the root %s, and nodes trust %s; an intermediate from below the new root is asked for, which replaces the old one everywhere first", FingerprintOf(other), FingerprintOf(root))
			}
		}
		return nil, err
	}
	chain := chains[0][:len(chains[0])-1]
	if len(chain) > maxAbove+1 {
		return nil, fmt.Errorf("%d authorities stand between it and the root; at most %d may", len(chain)-1, maxAbove)
	}
	for _, c := range chain[1:] {
		if err := checkAuthority(a.td, c); err != nil {
			return nil, fmt.Errorf("%.256q stands above it: %w", c.Subject, err)
		}
	}
	return chain, a.verify(chain, root, now)
}
