package ca

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"time"
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
	now := a.now()
	if err := a.redeem(p, now); err != nil {
		return nil, err
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
	out := make([]Result, 1)
	in, err := a.intend(p, now)
	if err != nil {
		return nil, err
	}
	in.result = &out[0]
	a.issueHere([]*intended{in}, now)
	return out[0].Issued, out[0].Err
}

// Result is what became of one of several requests.
type Result struct {
	Issued *Issued
	Err    error
}

// IssueMany issues each of several requests as IssueContext does, and returns their
// results in order. All intents are durable, by one write and one sync, before the
// key is used for the first. What the authority above certifies is refused here with
// ErrSingly: one that takes long would keep the others waiting.
func (a *Authority) IssueMany(list []*Prepared) []Result {
	now := a.now()
	out := make([]Result, len(list))
	var ready []*intended
	for i, p := range list {
		if out[i].Err = a.redeem(p, now); out[i].Err != nil {
			continue
		}
		if a.leaves.certifies(p.req.ID) && a.LeavesAbove() {
			out[i].Err = ErrSingly
			continue
		}
		in, err := a.intend(p, now)
		if err != nil {
			out[i].Err = err
			continue
		}
		in.result = &out[i]
		ready = append(ready, in)
	}
	a.issueHere(ready, now)
	return out
}

// ErrSingly is returned for a request that has to be issued by itself.
var ErrSingly = errors.New("ca: issue: the authority above certifies it; ask for it by itself")

// LeavesAbove reports whether the authority above certifies workloads now, so that
// they cannot be issued with others.
func (a *Authority) LeavesAbove() bool {
	if a.leaves.signer == nil {
		return false
	}
	root, _ := a.below()
	return root != nil
}

// redeem lets a Prepared be issued once, soon, and here.
func (a *Authority) redeem(p *Prepared, now time.Time) error {
	if p == nil || p.authority != a {
		return errors.New("ca: issue: the request was not prepared by this authority")
	}
	if !p.used.CompareAndSwap(false, true) {
		return ErrUsed
	}
	if age := now.Sub(p.at); age > preparedFor || age < -preparedFor {
		return fmt.Errorf("ca: issue: the request was prepared %s ago; prepare it again", age)
	}
	return nil
}

// intended is a certificate that is about to be recorded and signed.
type intended struct {
	p      *Prepared
	tmpl   *x509.Certificate
	trial  *trial
	signer *pair
	root   *x509.Certificate
	result *Result
}

// intend settles who signs and until when, and has looked at exactly what will be
// signed when it returns.
func (a *Authority) intend(p *Prepared, now time.Time) (*intended, error) {
	signer, root, err := a.signer(p, now)
	if err != nil {
		return nil, fmt.Errorf("ca: issue: %w", err)
	}
	tmpl := *p.tmpl
	end := signer.ends(root)
	if tmpl.NotAfter.After(end) {
		tmpl.NotAfter = end
	}
	if !tmpl.NotAfter.After(now) {
		return nil, fmt.Errorf("ca: issue: the authority's own certificate ends at %s, nothing can be issued; replace the root, or have the authority above issue again", stamp(end))
	}
	if now.Before(tmpl.NotBefore) {
		return nil, errors.New("ca: issue: the clock was set back since the request was prepared; prepare it again")
	}
	in := &intended{p: p, tmpl: &tmpl, trial: p.trial, signer: signer, root: root}
	if !p.trial.isOf(&tmpl, signer) {
		if in.trial, err = p.try(&tmpl, signer, now); err != nil {
			return nil, fmt.Errorf("ca: issue: %w", err)
		}
	}
	return in, nil
}

// issueHere records all intents, signs, records all outcomes, and sets the results.
func (a *Authority) issueHere(list []*intended, now time.Time) {
	if len(list) == 0 {
		return
	}
	fail := func(what string, err error) {
		for _, in := range list {
			in.result.Issued, in.result.Err = nil, fmt.Errorf("ca: issue: %s: %w", what, errors.Join(err, in.result.Err))
		}
	}
	intents := make([]line, len(list))
	for i, in := range list {
		keyHash := sha256.Sum256(in.p.spki)
		intents[i] = line{
			Time: now, Serial: formatSerial(in.tmpl.SerialNumber), ID: in.p.req.ID.String(), Node: in.p.req.Node, Workload: in.p.req.Workload,
			NotBefore: in.tmpl.NotBefore, NotAfter: in.tmpl.NotAfter,
			Issuer: hex.EncodeToString(in.signer.cert.SubjectKeyId), KeySHA256: hex.EncodeToString(keyHash[:]),
		}
	}
	if err := a.issuance.intent(intents...); err != nil {
		fail("record the intent", err)
		return
	}
	outcomes := make([]line, len(list))
	for i, in := range list {
		outcomes[i].Serial = intents[i].Serial
		der, err := a.sign(in, now)
		outcomes[i].Time = a.now()
		if err != nil {
			outcomes[i].Error = err.Error()
			in.result.Err = fmt.Errorf("ca: issue: %w", err)
			continue
		}
		sum := sha256.Sum256(der)
		outcomes[i].CertSHA256 = hex.EncodeToString(sum[:])
		in.result.Issued = &Issued{
			Chain: append([][]byte{der}, in.signer.raw()...), Serial: intents[i].Serial,
			NotBefore: in.trial.cert.NotBefore, NotAfter: in.trial.cert.NotAfter,
		}
	}
	if err := a.issuance.outcome(outcomes...); err != nil {
		fail("record the outcome", err)
	}
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
