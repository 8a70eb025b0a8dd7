package ca

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"errors"
	"fmt"
	"log/slog"
	"net/url"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Timing of an Enrolment.
const (
	againUpstream = 50 * time.Millisecond // after something was stored
	lookUpstream  = time.Second           // how often it is looked whether one is due, and what became of a request
	slowUpstream  = 10 * time.Second      // the same, once a request has waited long
	askSlowly     = time.Minute           // after which it has
	forgetAsked   = time.Minute           // replicas may learn at different times that one is wanted
	firstRetry    = time.Minute           // after an answer that is no; it doubles each time
	lastRetry     = time.Hour
	leastValidity = 10 * time.Second // an intermediate that ends sooner is of no use
)

// EnrolmentConfig says what an Enrolment works with.
type EnrolmentConfig struct {
	TrustDomain spiffeid.TrustDomain
	Store       RootStore // required
	Upstream    Upstream  // required
	// TTL is the lifetime that is asked for; zero: DefaultIntermediateTTL.
	TTL time.Duration
	// Roots are the only ones that are taken; nil: whatever the authority above
	// says that its chains end at.
	Roots []*x509.Certificate
	// Due says why another intermediate is wanted before the time of the one that
	// signs, whose root it is given; empty: it is not. Nil: never.
	Due func(root *x509.Certificate) string
	Now func() time.Time // nil: time.Now
	Log *slog.Logger     // nil discards
}

// Enrolment keeps an intermediate of an authority above in a RootStore, from which
// an Authority takes it, and renews it. Replicas ask with one key and so once. An
// intermediate below another root does not sign: it is stored, with its root, as
// what a rotation publishes first, while the present one goes on. One that is valid
// is never given up for a renewal that fails.
type Enrolment struct {
	cfg EnrolmentConfig

	mu      sync.Mutex
	status  UpstreamStatus // guarded by mu
	changed chan struct{}  // guarded by mu; closed and replaced when status changes
	due     func(*x509.Certificate) string
	leaves  func() UpstreamError // guarded by mu; nil: the intermediate signs all

	// Of the loop alone.
	idle    time.Time // since when nothing is wanted; zero: something is
	since   time.Time // when the request that is under way was first looked at
	retryAt time.Time // not before
	refused int       // answers that were no, one after the other
	told    string    // what was logged last
}

// NewEnrolment returns an Enrolment that does nothing until it runs.
func NewEnrolment(cfg EnrolmentConfig) (*Enrolment, error) {
	switch {
	case cfg.Store == nil || cfg.Upstream == nil || cfg.TrustDomain.IsZero():
		return nil, errors.New("ca: enrolment: Store, Upstream and TrustDomain are needed")
	case cfg.TTL < 0:
		return nil, fmt.Errorf("ca: enrolment: TTL %s must not be negative", cfg.TTL)
	case cfg.TTL == 0:
		cfg.TTL = DefaultIntermediateTTL
	}
	if cfg.Now == nil {
		cfg.Now = func() time.Time { return time.Now().Round(0) }
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &Enrolment{
		cfg: cfg, changed: make(chan struct{}), due: cfg.Due,
		status: UpstreamStatus{Upstream: cfg.Upstream.String(), Reason: UpstreamPending},
	}, nil
}

// Status says how it stands, with a channel that is closed when that changes.
func (e *Enrolment) Status() (UpstreamStatus, <-chan struct{}) {
	e.mu.Lock()
	defer e.mu.Unlock()
	return e.status, e.changed
}

// SetDue replaces EnrolmentConfig.Due.
func (e *Enrolment) SetDue(due func(root *x509.Certificate) string) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.due = due
}

// SetLeaves has the status say, too, why workloads' certificates do not come.
func (e *Enrolment) SetLeaves(leaves func() UpstreamError) {
	e.mu.Lock()
	defer e.mu.Unlock()
	e.leaves = leaves
}

// Ready waits until an intermediate can sign.
func (e *Enrolment) Ready(ctx context.Context) error {
	for {
		s, changed := e.Status()
		if s.Signs(e.cfg.Now()) {
			return nil
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
}

// Run asks when it is time, until ctx ends.
func (e *Enrolment) Run(ctx context.Context) {
	for {
		wait := e.step(ctx)
		select {
		case <-time.After(wait):
		case <-ctx.Done():
			return
		}
	}
}

// step looks once, and says when to look again.
func (e *Enrolment) step(parent context.Context) time.Duration {
	ctx, cancel := context.WithTimeout(parent, 3*rootStoreTime)
	defer cancel()
	now := e.cfg.Now()
	e.mu.Lock()
	leaves := e.leaves
	e.mu.Unlock()
	if leaves != nil {
		e.tell(func(s *UpstreamStatus) { s.Leaves = leaves() })
	}
	set, version, err := e.load(ctx)
	if err != nil {
		e.tell(func(s *UpstreamStatus) { s.Reason, s.Message = UpstreamUnreachable, err.Error() })
		return lookUpstream
	}
	if set.below != nil && set.nextBelow != nil && !now.Before(set.below.ends(set.signs.cert)) {
		// Whoever still waits for the next root has nothing to wait with.
		if set, err = place(set, set.next.cert, set.nextBelow, now); err == nil {
			err = e.save(ctx, set, version)
		}
		if err == nil {
			e.cfg.Log.Warn("the intermediate has ended before every node trusted the next root, which signs now; nodes that are behind are cut off")
		}
		return againUpstream
	}
	why := e.wants(set, now)
	e.tell(func(s *UpstreamStatus) {
		s.Wanted, s.RetryAt = why, e.retryAt
		s.NotAfter, s.RenewAt = time.Time{}, time.Time{}
		if p, root := set.signer(); p != nil {
			s.NotAfter, s.RenewAt = p.ends(root), renewAt(p, root)
		}
		if why == "" {
			s.Reason, s.Message = UpstreamReady, fmt.Sprintf("the intermediate is of %s and valid until %s", e.cfg.Upstream, stamp(s.NotAfter))
			if set.below == nil {
				s.Message = fmt.Sprintf("the root of %s is published; the mesh's own signs until every node trusts it", e.cfg.Upstream)
			} else if set.next != nil {
				s.Message += "; another root is published, and signs when every node trusts it"
			}
		}
	})
	if why == "" {
		e.since, e.retryAt, e.refused = time.Time{}, time.Time{}, 0
		if e.idle.IsZero() {
			e.idle = now
		}
		if set.asked != nil && now.Sub(e.idle) > forgetAsked { // nobody wants it any more
			set.asked = nil
			_ = e.save(ctx, set, version)
		}
		return lookUpstream
	}
	e.idle = time.Time{}
	if now.Before(e.retryAt) {
		return min(lookUpstream, e.retryAt.Sub(now))
	}
	if set.asked == nil {
		if set.asked, err = ecdsa.GenerateKey(elliptic.P256(), rand.Reader); err == nil {
			err = e.save(ctx, set, version) // first: no answer is lost with its key
		}
		if err != nil {
			if !errors.Is(err, ErrRootsChanged) {
				e.tell(func(s *UpstreamStatus) { s.Reason, s.Message = UpstreamUnreachable, err.Error() })
			}
			return lookUpstream
		}
		e.cfg.Log.Info("an intermediate is asked for", "of", e.cfg.Upstream.String(), "reason", why)
	}
	if e.since.IsZero() {
		e.since = now
	}
	err = e.ask(ctx, set.asked, now)
	switch {
	case err == nil || errors.Is(err, ErrRootsChanged):
		return againUpstream
	case parent.Err() != nil:
		return lookUpstream
	}
	no := asUpstreamError(err)
	if no.Reason.final() {
		e.giveUp(ctx, set.asked, now)
	}
	e.tell(func(s *UpstreamStatus) { s.Reason, s.Message, s.RetryAt = no.Reason, no.Message, e.retryAt })
	if now.Sub(e.since) > askSlowly {
		return slowUpstream
	}
	return lookUpstream
}

// signer returns the intermediate of an authority above that signs, or would.
func (s rootSet) signer() (p *pair, root *x509.Certificate) {
	switch {
	case s.below != nil:
		return s.below, s.signs.cert
	case s.signs != nil && s.signs.key != nil: // until the roots are switched
		return &pair{cert: s.signs.cert}, s.signs.cert
	}
	return nil, nil
}

// renewAt is when another intermediate is asked for: at half of the life of this
// one, and up to a tenth of it later, so that meshes that were made at once do not
// ask at once. All replicas have the same instant.
func renewAt(p *pair, root *x509.Certificate) time.Time {
	life := p.ends(root).Sub(p.cert.NotBefore)
	jitter := time.Duration(FingerprintOf(p.cert)[0]) * (life / 10) / 255
	return p.cert.NotBefore.Add(life/2 + jitter)
}

// wants says why an intermediate is to be asked for; empty: it is not.
func (e *Enrolment) wants(s rootSet, now time.Time) string {
	e.mu.Lock()
	due := e.due
	e.mu.Unlock()
	switch {
	case s.signs == nil:
		return "there is none yet"
	case s.next != nil && s.nextBelow != nil:
		// The authority above has gone on to another root: what can be renewed is
		// what that will sign with.
		if !now.Before(renewAt(s.nextBelow, s.next.cert)) {
			return "the life of the intermediate that is to sign is half over"
		}
		return ""
	case s.below == nil:
		return "the mesh has a root of its own"
	case !now.Before(renewAt(s.below, s.signs.cert)):
		return "its life is half over"
	case slices.Contains(s.distrusted, FingerprintOf(s.signs.cert)):
		return "its root is distrusted"
	case due != nil:
		return due(s.signs.cert)
	}
	return ""
}

// load reads the store; it may be empty.
func (e *Enrolment) load(ctx context.Context) (set rootSet, version string, err error) {
	files, version, err := e.cfg.Store.Load(ctx)
	if err != nil {
		return set, "", err
	}
	if len(files[rootName+".crt"])+len(files[rootName+".key"])+len(files[rootName+keyNameExt]) > 0 {
		set, err = parseRoots(e.cfg.TrustDomain, e.cfg.Store, nil, files, e.cfg.Now())
		return set, version, err
	}
	if text := files[askedFile]; text != nil {
		set.asked, err = parseKey(askedFile, text)
	}
	return set, version, err
}

func (e *Enrolment) save(ctx context.Context, set rootSet, version string) error {
	files, err := set.files()
	if err != nil {
		return err
	}
	return e.cfg.Store.Save(ctx, files, version)
}

// ask looks what became of the request for a key, and stores what is good.
func (e *Enrolment) ask(ctx context.Context, key crypto.Signer, now time.Time) error {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "signet intermediate"},
		URIs:    []*url.URL{e.cfg.TrustDomain.ID().URL()},
	}, key)
	if err != nil {
		return err
	}
	answer, err := e.cfg.Upstream.Ask(ctx, UpstreamRequest{CSR: csr, TTL: e.cfg.TTL})
	if err != nil {
		return err
	}
	p, root, err := e.check(answer, key, now)
	if err != nil {
		return &UpstreamError{UpstreamUnusable, fmt.Sprintf("%s issued what cannot be used: %v", e.cfg.Upstream, err)}
	}
	set, version, err := e.load(ctx)
	switch {
	case err != nil:
		return err
	case !sameKey(set.asked, key):
		return ErrRootsChanged // another replica has stored it, or has given up
	}
	if set, err = place(set, root, p, now); err != nil {
		return &UpstreamError{UpstreamUnusable, fmt.Sprintf("%s: %v", e.cfg.Upstream, err)}
	}
	set.asked = nil
	if err := e.save(ctx, set, version); err != nil {
		return err
	}
	if e.since = (time.Time{}); e.wants(set, now) != "" { // it is as it was before
		e.backOff(now)
		return &UpstreamError{UpstreamPending, fmt.Sprintf("%s still signs below the root %s; replace the issuer's certificate and key", e.cfg.Upstream, FingerprintOf(root))}
	}
	e.cfg.Log.Info("an intermediate was certified", "by", e.cfg.Upstream.String(), "serial", formatSerial(p.cert.SerialNumber),
		"root", FingerprintOf(root).String(), "not_after", stamp(p.ends(root)), "signs", set.signs.cert.Equal(root))
	return nil
}

func sameKey(a, b crypto.Signer) bool {
	if a == nil || b == nil {
		return false
	}
	pub, ok := a.Public().(interface{ Equal(crypto.PublicKey) bool })
	return ok && pub.Equal(b.Public())
}

// backOff waits longer each time.
func (e *Enrolment) backOff(now time.Time) {
	e.retryAt = now.Add(min(lastRetry, firstRetry<<min(e.refused, 10)))
	e.refused++
}

// giveUp ends a request that was decided.
func (e *Enrolment) giveUp(ctx context.Context, key crypto.Signer, now time.Time) {
	e.backOff(now)
	e.since = time.Time{}
	set, version, err := e.load(ctx)
	if err != nil || !sameKey(set.asked, key) {
		return
	}
	set.asked = nil
	if err := e.save(ctx, set, version); err != nil && !errors.Is(err, ErrRootsChanged) {
		e.cfg.Log.Warn("a request that was refused stays stored", "err", err)
	}
}

// tell changes the status, and logs what is new and not good.
func (e *Enrolment) tell(change func(*UpstreamStatus)) {
	e.mu.Lock()
	defer e.mu.Unlock()
	was := e.status
	change(&e.status)
	if e.status == was {
		return
	}
	close(e.changed)
	e.changed = make(chan struct{})
	if line := string(e.status.Reason) + e.status.Message; line != e.told && e.status.Message != "" && e.status.Reason != UpstreamReady {
		e.cfg.Log.Warn("no intermediate yet", "of", e.status.Upstream, "reason", string(e.status.Reason), "message", e.status.Message, "signs_until", e.status.NotAfter)
	}
	e.told = string(e.status.Reason) + e.status.Message
}
