package svid

import (
	"cmp"
	"context"
	"crypto"
	"crypto/sha256"
	"crypto/x509"
	"log/slog"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/time/rate"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/bundle"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Issuer asks the control plane for the certificate of a workload
// ("namespace/name") on this node. The chain is DER, leaf first, without the
// root. It is called from several goroutines at once and must return when ctx
// ends.
type Issuer interface {
	Issue(ctx context.Context, workload string, csr []byte) (chain [][]byte, err error)
}

// DefaultWorkers is how many certificates are asked for at the same time, in one call
// or each in its own.
const DefaultWorkers = collectMost

// Config configures a Manager.
type Config struct {
	// Issuer is asked for several certificates at once if it is a ManyIssuer.
	Issuer Issuer
	// JWTIssuer issues tokens. Nil means that there are none.
	JWTIssuer JWTIssuer
	// Dir keeps certificates and keys over a restart; it is made with mode
	// 0700. Empty keeps them in memory only.
	Dir string
	// Now is the wall clock. Nil means time.Now.
	Now func() time.Time
	// Log is required.
	Log *slog.Logger
	// Jitter returns numbers in [0,1) and may be called from several
	// goroutines. Nil means random ones.
	Jitter func() float64
	// Workers bounds the requests under way. 0 means DefaultWorkers.
	Workers int
}

// State is all that the manager works with, as the control plane last said.
type State struct {
	TrustDomain spiffeid.TrustDomain
	// Bundle is the full set of the trust domain's roots, the one that signs
	// first. Certificates of another are renewed soon.
	Bundle []*x509.Certificate
	// JWTKeys are the keys that verify the trust domain's JWT-SVIDs, by kid.
	JWTKeys map[string]crypto.PublicKey
	// Foreign are the bundles of other trust domains, sorted by name. Each speaks
	// for its own alone.
	Foreign []*bundle.Bundle
	// Distrusted are roots that may be in somebody else's hands: certificates
	// below them are renewed at once. SHA-256 of the certificates.
	Distrusted [][sha256.Size]byte
	// Revoked says by serial number which certificates are to be renewed at once,
	// and by jti which tokens are good for nothing. Nil: none.
	Revoked func(serial string) bool
	// Workloads are the node's enrolled workloads.
	Workloads []mesh.Workload
	// Quarantined names the quarantine that cuts an identity off. Nil: none is.
	Quarantined func(spiffeid.ID) (quarantine string, cut bool)
	// KeyType is the kind of key of certificates that are asked for from now on.
	KeyType mesh.KeyType
	// TTL is the lifetime the control plane now gives. Certificates that
	// would outlive it are renewed when it has changed. Zero: not looked at.
	TTL time.Duration
}

// Manager holds one SVID for each SPIFFE ID on the node. It is safe for
// concurrent use.
type Manager struct {
	issuer    Issuer
	collector *collector // the issuer; nil: it is asked one by one
	jwtIssuer JWTIssuer  // nil: no tokens
	now       func() time.Time
	jitter    func() float64
	log       *slog.Logger
	cache     *cache        // nil: memory only
	slots     chan struct{} // one for each request under way

	updated chan struct{} // holds one signal: Update was called
	sooner  chan struct{} // holds one signal: nextExpiry moved closer

	mu         sync.Mutex
	td         spiffeid.TrustDomain     // guarded by mu
	bundle     []*x509.Certificate      // guarded by mu; replaced whole, never edited
	jwtKeys    *jwtbundle.Bundle        // guarded by mu; replaced whole, never edited
	foreign    []*bundle.Bundle         // guarded by mu; replaced whole, never edited
	ttl        time.Duration            // guarded by mu
	keyType    mesh.KeyType             // guarded by mu
	revoked    func(serial string) bool // guarded by mu; nil: nothing is
	cutOff     cutOff                   // guarded by mu; nil: nobody is
	known      bool                     // guarded by mu; Update was called
	holders    map[spiffeid.ID]*holder  // guarded by mu
	nextExpiry time.Time                // guarded by mu; no certificate expires before; zero: none held
	changed    chan struct{}            // guarded by mu; closed and replaced on each change
}

// holder is one identity. All fields but wake and tokenRate are guarded by
// Manager.mu.
type holder struct {
	id        spiffeid.ID
	workloads []string // never empty; replaced whole
	current   *SVID    // nil: none, or expired
	attemptAt time.Time
	failures  int      // in a row
	lastErr   string   // of the newest attempt or the expiry; empty after a success
	request   *request // of its keeper alone: what is asked for and not answered yet; nil: nothing is

	tokens    map[string]*slot // by audiences; in memory only
	tokenRate *rate.Limiter    // of requests for tokens; safe for concurrent use

	wake chan struct{} // holds one signal: attemptAt moved closer
}

func newHolder(id spiffeid.ID, workloads []string, attemptAt time.Time) *holder {
	return &holder{
		id: id, workloads: workloads, attemptAt: attemptAt,
		tokenRate: rate.NewLimiter(tokenRate, tokenBurst), wake: make(chan struct{}, 1),
	}
}

func (h *holder) poke() { signal(h.wake) }

func signal(c chan struct{}) {
	select {
	case c <- struct{}{}:
	default:
	}
}

// New returns a manager that holds what the cache in Config.Dir kept and is
// still valid. Trouble with the cache is logged and does not stop it.
func New(c Config) *Manager {
	m := &Manager{
		issuer: c.Issuer, jwtIssuer: c.JWTIssuer, now: c.Now, jitter: c.Jitter, log: c.Log,
		jwtKeys: jwtbundle.New(spiffeid.TrustDomain{}),
		slots:   make(chan struct{}, cmp.Or(c.Workers, DefaultWorkers)),
		updated: make(chan struct{}, 1),
		sooner:  make(chan struct{}, 1),
		holders: map[spiffeid.ID]*holder{},
		changed: make(chan struct{}),
	}
	if m.now == nil {
		// Without the monotonic reading, by which instants would be compared
		// first: it stands still while the machine is suspended.
		m.now = func() time.Time { return time.Now().Round(0) }
	}
	if m.jitter == nil {
		m.jitter = rand.Float64
	}
	if many, ok := c.Issuer.(ManyIssuer); ok {
		m.collector = &collector{issuer: many, now: m.now}
		m.issuer = m.collector
	}
	if c.Dir != "" {
		m.cache = openCache(c.Dir, c.Log)
	}
	if m.cache != nil {
		m.restore()
	}
	return m
}

// restore takes over what the cache holds.
func (m *Manager) restore() {
	now := m.now()
	td, bundle, svids := m.cache.load(now)
	m.td, m.bundle = td, bundle
	for _, s := range svids {
		h := newHolder(s.ID, s.Workloads, s.RenewAt)
		h.current = s
		m.holders[s.ID] = h
		m.expiresAt(s.NotAfter)
	}
}

// Update replaces the state. Identities that are new are asked for, those
// that are gone are dropped at once. It does not block on the issuer, and may
// be called before and while Run runs.
func (m *Manager) Update(s State) {
	wanted := map[spiffeid.ID][]string{}
	for _, w := range s.Workloads {
		if w.ID.IsZero() || w.ID.TrustDomain() != s.TrustDomain {
			m.log.Error("a workload's identity is not of the trust domain; it is given none",
				"workload", w.Key(), "id", w.ID, "trust_domain", s.TrustDomain)
			continue
		}
		wanted[w.ID] = append(wanted[w.ID], w.Key())
	}
	now := m.now().Round(0)

	m.mu.Lock()
	defer m.mu.Unlock()
	sameRoots := slices.EqualFunc(m.bundle, s.Bundle, (*x509.Certificate).Equal)
	jwtKeys := jwtbundle.FromJWTAuthorities(s.TrustDomain, s.JWTKeys)
	changed := !m.known || !sameRoots || m.td != s.TrustDomain || !jwtKeys.Equal(m.jwtKeys) || !sameBundles(m.foreign, s.Foreign)
	newTTL := s.TTL > 0 && s.TTL != m.ttl
	m.known, m.td, m.bundle, m.ttl, m.jwtKeys = true, s.TrustDomain, slices.Clone(s.Bundle), s.TTL, jwtKeys
	m.cutOff, m.keyType, m.foreign, m.revoked = s.Quarantined, s.KeyType, slices.Clone(s.Foreign), s.Revoked

	for id := range m.holders {
		if _, ok := wanted[id]; !ok {
			delete(m.holders, id)
			changed = true
		}
	}
	for id, workloads := range wanted {
		slices.Sort(workloads)
		workloads = slices.Compact(workloads)
		h := m.holders[id]
		if h == nil {
			m.holders[id] = newHolder(id, workloads, now)
			continue // there is nothing to see before the certificate is there
		}
		if !slices.Equal(h.workloads, workloads) {
			h.workloads, h.current, changed = workloads, h.current.held(workloads), true
		}
		switch {
		case h.current == nil:
		case s.Revoked != nil && s.Revoked(h.current.Serial):
			h.attemptAt = now
		case newTTL && h.current.NotAfter.Sub(now) > s.TTL+s.TTL/10:
			h.attemptAt = now
		case !sameRoots:
			if _, err := check(h.id, h.current.Key.Public(), h.current.Chain, m.bundle, now); err != nil {
				h.attemptAt = now // peers with the new bundle refuse the one we have
			} else if _, err := check(h.id, h.current.Key.Public(), h.current.Chain, m.bundle[:1], now); err != nil {
				// Another root signs, and this one is to be retired soon.
				spread := min(h.current.NotAfter.Sub(h.current.NotBefore)/20, rotationSpread)
				if slices.ContainsFunc(m.bundle[1:], func(c *x509.Certificate) bool { return slices.Contains(s.Distrusted, sha256.Sum256(c.Raw)) }) {
					spread = 0
				}
				if at := now.Add(time.Duration(m.jitter() * float64(spread))); at.Before(h.attemptAt) {
					h.attemptAt = at
				}
			}
		}
		// A new state means that the control plane is there: what failed is
		// worth another try.
		if soon := now.Add(minBackoff); h.failures > 0 && h.attemptAt.After(soon) {
			h.attemptAt = soon
		}
		h.poke()
	}
	if changed {
		m.notify()
	}
	signal(m.updated)
}

// notify wakes everyone who waits for a change. The caller holds mu.
func (m *Manager) notify() {
	close(m.changed)
	m.changed = make(chan struct{})
}

// expiresAt notes when a certificate expires. The caller holds mu.
func (m *Manager) expiresAt(t time.Time) {
	if m.nextExpiry.IsZero() || t.Before(m.nextExpiry) {
		m.nextExpiry = t
		signal(m.sooner)
	}
}

// Get returns the certificate of an identity, and false when there is none
// that is valid now.
func (m *Manager) Get(id spiffeid.ID) (*SVID, bool) {
	now := m.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.holders[id]
	if h == nil || !h.current.fresh(now) {
		return nil, false
	}
	return h.current, true
}

// All returns every certificate that is valid now, sorted by identity.
func (m *Manager) All() []*SVID {
	now := m.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	out := make([]*SVID, 0, len(m.holders))
	for _, h := range m.holders {
		if h.current.fresh(now) {
			out = append(out, h.current)
		}
	}
	slices.SortFunc(out, func(a, b *SVID) int { return cmp.Compare(a.ID.String(), b.ID.String()) })
	return out
}

// Bundle returns the trust domain's roots, none before they are known. The
// slice is the caller's, the certificates are not.
func (m *Manager) Bundle() []*x509.Certificate {
	m.mu.Lock()
	defer m.mu.Unlock()
	return slices.Clone(m.bundle)
}

// Changed returns a channel that is closed at the next change of what Get,
// All, Bundle, JWTBundle and Foreign answer. Take it before reading them, so that no change is
// missed.
func (m *Manager) Changed() <-chan struct{} {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.changed
}

// Status describes every workload's certificate, sorted by holder. A workload
// that has none valid is listed with empty serial and times, and with the
// reason once an attempt has failed.
func (m *Manager) Status() []adminv1.Certificate {
	now := m.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	var out []adminv1.Certificate
	for _, id := range slices.SortedFunc(maps.Keys(m.holders), func(a, b spiffeid.ID) int { return cmp.Compare(a.String(), b.String()) }) {
		h := m.holders[id]
		for _, w := range h.workloads {
			c := adminv1.Certificate{Holder: w, ID: id.String(), RenewAt: h.attemptAt, LastError: h.lastErr}
			if s := h.current; s.fresh(now) {
				c.Serial, c.Issuer, c.NotBefore, c.NotAfter = s.Serial, s.Issuer, s.NotBefore, s.NotAfter
			}
			out = append(out, c)
		}
	}
	slices.SortStableFunc(out, func(a, b adminv1.Certificate) int { return cmp.Compare(a.Holder, b.Holder) })
	return out
}

// Missing says, by identity, why it has no valid certificate; "" if no attempt
// has failed yet.
func (m *Manager) Missing() map[spiffeid.ID]string {
	now := m.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	out := map[spiffeid.ID]string{}
	for id, h := range m.holders {
		if !h.current.fresh(now) {
			out[id] = h.lastErr
		}
	}
	return out
}
