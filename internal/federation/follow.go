package federation

import (
	"cmp"
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/bundle"
	"github.com/signet-mesh/signet/internal/mesh"
)

// firstRetry is how soon a first fetch that failed is tried again; it doubles,
// up to how often is asked anyway.
const firstRetry = time.Second

// Status is how the following of one trust domain goes.
type Status struct {
	Name        string
	TrustDomain spiffeid.TrustDomain
	// FetchedAt is when the bundle was last fetched; zero: never, and what is
	// trusted is what the document began with.
	FetchedAt time.Time
	Sequence  uint64
	Roots     int
	JWTKeys   int
	NextAt    time.Time
	// Error is why the newest attempt failed; empty: it did not.
	Error string
	// Ignored says which entries of the bundle were not taken, and why.
	Ignored []string
}

// Follower keeps the newest bundle of each trust domain that the mesh is
// federated with. What it has, it has until a newer one is proven: a fetch that
// fails takes nothing away.
type Follower struct {
	// The fields are set before Run, and not after. Store says where the last
	// good copy of a trust domain's bundle is kept.
	Own   spiffeid.TrustDomain
	Store func(spiffeid.TrustDomain) Store
	// Web are the authorities that https_web is judged by; nil: the machine's.
	Web *x509.CertPool
	// Timeout bounds one fetch; 0: 15 s.
	Timeout time.Duration
	Log     *slog.Logger

	mu      sync.Mutex
	follows map[spiffeid.TrustDomain]*followed // guarded by mu; replaced whole, by set alone
	changed chan struct{}                      // guarded by mu; closed and replaced with each change of a bundle
}

// followed is one trust domain. The fields but spec, cancel and done are guarded
// by Follower.mu.
type followed struct {
	spec   mesh.Federation
	digest string // of spec
	cancel context.CancelFunc
	done   chan struct{}

	current *bundle.Bundle // nil: nothing is trusted yet
	learned bool           // current was fetched by this spec, and proves the endpoint
	status  Status
}

// kept is the last good copy of a bundle.
type kept struct {
	// Spec is the digest of the Federation by which it was fetched: an operator
	// who edits that begins anew.
	Spec      string          `json:"spec"`
	FetchedAt time.Time       `json:"fetchedAt"`
	Document  json.RawMessage `json:"document"`
}

// Run follows what views name, until ctx ends.
func (f *Follower) Run(ctx context.Context, feed *mesh.Feed) {
	for {
		view, changed := feed.Get()
		if view != nil {
			f.set(ctx, view.State.Federations)
		}
		select {
		case <-changed:
		case <-ctx.Done():
			f.set(ctx, nil) // waits for all
			return
		}
	}
}

// set replaces what is followed. What is no longer is forgotten: nobody of it is
// believed any more. Of one whose document was edited the former bundle counts
// until its successor is there.
func (f *Follower) set(ctx context.Context, specs []mesh.Federation) {
	f.mu.Lock()
	former := f.follows
	f.mu.Unlock()
	next := map[spiffeid.TrustDomain]*followed{}
	for i := range specs {
		one := former[specs[i].TrustDomain]
		if one != nil && one.digest == digestOf(&specs[i]) && ctx.Err() == nil {
			next[specs[i].TrustDomain] = one
			f.mu.Lock()
			one.status.Name = specs[i].Name
			f.mu.Unlock()
		}
	}
	for td, one := range former {
		if next[td] == nil {
			one.cancel()
			<-one.done
		}
	}
	if ctx.Err() != nil {
		return
	}
	for td := range former {
		if !slices.ContainsFunc(specs, func(s mesh.Federation) bool { return s.TrustDomain == td }) {
			f.forget(ctx, td)
		}
	}
	var begun []*followed
	for i := range specs {
		td := specs[i].TrustDomain
		if next[td] == nil && td != f.Own { // ParseFederation refuses its own, too
			next[td] = f.begin(ctx, &specs[i])
			begun = append(begun, next[td])
		}
	}
	f.mu.Lock()
	f.follows = next
	if len(begun) > 0 || len(next) != len(former) {
		f.notify()
	}
	f.mu.Unlock()
	for _, one := range begun {
		var each context.Context
		each, one.cancel = context.WithCancel(ctx)
		go func() { defer close(one.done); f.follow(each, one) }()
	}
}

// forget removes the copy of a trust domain that is no longer followed: should it
// be again, that begins as the document says.
func (f *Follower) forget(ctx context.Context, td spiffeid.TrustDomain) {
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	store := f.Store(td)
	_, version, err := store.Load(ctx)
	if err == nil && version != "" {
		err = store.Save(ctx, nil, version)
	}
	if err != nil && !errors.Is(err, ErrChanged) {
		f.Log.Error("the copy of a bundle that is no longer followed cannot be removed", "trust_domain", td, "error", err)
	}
}

// digestOf names what an operator says of a federation, but for its name.
func digestOf(s *mesh.Federation) string {
	h := sha256.New()
	fmt.Fprintf(h, "%q %q %q %q", s.TrustDomain, s.URL, s.Endpoint, s.Bundle)
	return hex.EncodeToString(h.Sum(nil)[:16])
}

// begin takes up the last good copy, or what the document begins with.
func (f *Follower) begin(ctx context.Context, spec *mesh.Federation) *followed {
	one := &followed{spec: *spec, digest: digestOf(spec), done: make(chan struct{})}
	one.status = Status{Name: spec.Name, TrustDomain: spec.TrustDomain}
	if spec.Bundle != nil {
		first, err := bundle.Parse(spec.TrustDomain, spec.Bundle)
		if err != nil { // it was read before
			f.Log.Error("a Federation's bundle cannot be read", "trust_domain", spec.TrustDomain, "error", err)
		}
		one.current = first
	}
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	data, _, err := f.Store(spec.TrustDomain).Load(ctx)
	var copied kept
	if err == nil && len(data) > 0 {
		err = json.Unmarshal(data, &copied)
	}
	if err == nil && len(copied.Document) > 0 {
		var b *bundle.Bundle
		if b, err = bundle.Parse(spec.TrustDomain, copied.Document); err == nil {
			switch {
			case copied.Spec == one.digest:
				one.current, one.learned, one.status.FetchedAt = b, true, copied.FetchedAt
			case one.current == nil:
				// Where to ask has changed; who is trusted changes with the answer.
				one.current = b
			}
		}
	}
	if err != nil {
		f.Log.Error("the last good copy of another trust domain's bundle cannot be read; it is fetched anew", "trust_domain", spec.TrustDomain, "error", err)
	}
	one.count()
	return one
}

// count brings the status up to date with the bundle.
func (o *followed) count() {
	if b := o.current; b != nil {
		o.status.Sequence, o.status.Roots, o.status.JWTKeys, o.status.Ignored = b.Sequence, len(b.Roots), len(b.JWTKeys), b.Ignored
	}
}

// follow asks again and again until ctx ends.
func (f *Follower) follow(ctx context.Context, one *followed) {
	wait := time.Duration(0)
	for failures := 0; ; {
		timer := time.NewTimer(wait)
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		err := f.once(ctx, one)
		if ctx.Err() != nil {
			return
		}
		f.mu.Lock()
		wait = interval(one.current)
		if err != nil {
			failures++
			if !one.learned && failures < 16 {
				wait = min(wait, firstRetry<<(failures-1))
			}
		} else {
			failures = 0
		}
		wait -= rand.N(wait/10 + 1) // not all at once
		one.status.Error, one.status.NextAt = "", time.Now().Add(wait)
		if err != nil {
			one.status.Error = err.Error()
		}
		f.mu.Unlock()
		if failures == 1 {
			f.Log.Warn("another trust domain's bundle cannot be fetched; what is trusted stays so", "trust_domain", one.spec.TrustDomain, "url", one.spec.URL, "retry", wait, "error", err)
		}
	}
}

// interval is how often is asked: as the bundle says, within bounds. One that
// asks for a year would keep a stolen key trusted for as long.
func interval(b *bundle.Bundle) time.Duration {
	if b == nil || b.RefreshHint == 0 {
		return DefaultRefreshHint
	}
	return min(max(b.RefreshHint, MinRefreshHint), MaxRefreshHint)
}

// once fetches and takes a bundle.
func (f *Follower) once(ctx context.Context, one *followed) error {
	next, err := fetch(ctx, &one.spec, endpointTrust{f, one}, f.Web, cmp.Or(f.Timeout, fetchTime))
	if err != nil {
		return err
	}
	f.mu.Lock()
	former, learned := one.current, one.learned
	f.mu.Unlock()
	if learned && next.Sequence > 0 && next.Sequence < former.Sequence {
		return fmt.Errorf("the endpoint shows the bundle %d, and showed %d before: an old copy", next.Sequence, former.Sequence)
	}
	now := time.Now().UTC()
	if !learned || next.Digest() != former.Digest() || next.Sequence != former.Sequence || next.RefreshHint != former.RefreshHint {
		if err := f.keep(ctx, one, next, now); err != nil {
			return err
		}
	}
	f.mu.Lock()
	defer f.mu.Unlock()
	one.current, one.learned, one.status.FetchedAt = next, true, now
	one.count()
	if former == nil || former.Digest() != next.Digest() {
		f.Log.Info("another trust domain's bundle has changed", "trust_domain", next.TrustDomain, "sequence", next.Sequence, "roots", len(next.Roots), "jwt_keys", len(next.JWTKeys), "ignored", next.Ignored)
		f.notify()
	}
	return nil
}

// keep makes a bundle durable before it counts: after a restart the endpoint is
// proven by keys that the document may no longer have.
func (f *Follower) keep(ctx context.Context, one *followed, b *bundle.Bundle, now time.Time) error {
	doc, err := b.Marshal()
	if err != nil {
		return err
	}
	data, err := json.Marshal(kept{Spec: one.digest, FetchedAt: now, Document: doc})
	if err != nil {
		return err
	}
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	store := f.Store(b.TrustDomain)
	_, version, err := store.Load(ctx)
	if err == nil {
		err = store.Save(ctx, data, version)
	}
	if errors.Is(err, ErrChanged) {
		return nil // another replica has fetched it too
	}
	if err != nil {
		return fmt.Errorf("keep the bundle: %w", err)
	}
	return nil
}

// notify wakes who waits. mu is held.
func (f *Follower) notify() {
	if f.changed != nil {
		close(f.changed)
		f.changed = nil
	}
}

// Bundles returns the bundles that are trusted, sorted by trust domain, and a
// channel that is closed when they are no longer current.
func (f *Follower) Bundles() ([]*bundle.Bundle, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	if f.changed == nil {
		f.changed = make(chan struct{})
	}
	var out []*bundle.Bundle
	for _, one := range f.follows {
		if one.current != nil {
			out = append(out, one.current)
		}
	}
	slices.SortFunc(out, func(a, b *bundle.Bundle) int { return a.TrustDomain.Compare(b.TrustDomain) })
	return out, f.changed
}

// Status returns how it goes with each, sorted by trust domain.
func (f *Follower) Status() []Status {
	f.mu.Lock()
	defer f.mu.Unlock()
	out := make([]Status, 0, len(f.follows))
	for _, one := range f.follows {
		s := one.status
		s.Ignored = slices.Clone(s.Ignored)
		out = append(out, s)
	}
	slices.SortFunc(out, func(a, b Status) int { return cmp.Compare(a.TrustDomain.Name(), b.TrustDomain.Name()) })
	return out
}

// endpointTrust is what an endpoint's certificate is judged by: the newest bundle
// of its own trust domain that came by the present document, or the one in that.
type endpointTrust struct {
	f   *Follower
	one *followed
}

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (e endpointTrust) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	e.f.mu.Lock()
	defer e.f.mu.Unlock()
	if td != e.one.spec.TrustDomain { // served by a third, which is followed itself
		if other := e.f.follows[td]; other != nil && other.current != nil {
			return other.current.GetX509BundleForTrustDomain(td)
		}
		return nil, fmt.Errorf("the endpoint is of trust domain %s, and there is no Federation for that", td)
	}
	if !e.one.learned {
		first, err := bundle.Parse(td, e.one.spec.Bundle)
		if err != nil {
			return nil, err
		}
		return first.GetX509BundleForTrustDomain(td)
	}
	return e.one.current.GetX509BundleForTrustDomain(td)
}
