package svid

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/rsa"
	"crypto/x509"
	"fmt"
	"math/bits"
	"net/url"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/mesh"
)

// lookAround is how often the wall clock is compared with what is due. Timers
// stand still while a machine is suspended; the wall clock does not.
const lookAround = 2 * time.Second

// Run obtains and renews certificates until ctx ends, and then returns nil
// once all that it started has ended. Call it once.
func (m *Manager) Run(ctx context.Context) error {
	var wg sync.WaitGroup
	defer func() {
		wg.Wait()
		if m.collector != nil {
			m.collector.calls.Wait() // nobody waits for them any more, so they end
		}
	}()
	ctx, cancel := context.WithCancel(ctx)
	defer cancel()

	keepers := map[spiffeid.ID]*keeper{} // owned by this goroutine
	m.reconcile(ctx, &wg, keepers)
	for {
		timer := time.NewTimer(m.sweep())
		select {
		case <-ctx.Done():
			timer.Stop()
			return nil
		case <-m.updated:
			m.reconcile(ctx, &wg, keepers)
		case <-m.sooner:
		case <-timer.C:
		}
		timer.Stop()
	}
}

// keeper is the goroutine that renews one holder.
type keeper struct {
	holder *holder
	cancel context.CancelFunc
	done   chan struct{}
}

// reconcile makes the set of running keepers that of the holders, and the
// cache that of both.
func (m *Manager) reconcile(ctx context.Context, wg *sync.WaitGroup, keepers map[spiffeid.ID]*keeper) {
	m.mu.Lock()
	holders := make(map[spiffeid.ID]*holder, len(m.holders))
	for id, h := range m.holders {
		holders[id] = h
	}
	known, td, bundle := m.known, m.td, m.bundle
	m.mu.Unlock()

	var stopped []*keeper
	for id, k := range keepers {
		if holders[id] != k.holder {
			k.cancel()
			stopped = append(stopped, k)
			delete(keepers, id)
		}
	}
	for _, k := range stopped {
		<-k.done // it may be writing to the cache
	}
	if known && m.cache != nil {
		m.cache.keepOnly(holders)
		m.cache.putBundle(td, bundle)
	}
	for id, h := range holders {
		if keepers[id] != nil {
			continue
		}
		kctx, cancel := context.WithCancel(ctx)
		k := &keeper{holder: h, cancel: cancel, done: make(chan struct{})}
		keepers[id] = k
		wg.Go(func() {
			defer close(k.done)
			defer cancel()
			m.keep(kctx, h)
		})
	}
}

// sweep withdraws what has expired, wakes what is overdue, and returns how
// long to wait until it is called again.
func (m *Manager) sweep() time.Duration {
	now := m.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	var (
		next    time.Time
		changed bool
	)
	for _, h := range m.holders {
		if now.After(h.attemptAt) {
			h.poke()
		}
		s := h.current
		switch {
		case s == nil:
		case !s.fresh(now):
			h.current, changed = nil, true
			why := "no renewal was answered"
			if h.lastErr != "" {
				why = h.lastErr
			}
			h.lastErr = fmt.Sprintf("expired at %s: %s", s.NotAfter.UTC().Format(time.RFC3339), why)
			m.log.Error("a certificate expired before it could be renewed; it is withdrawn",
				"id", h.id, "serial", s.Serial, "not_after", s.NotAfter, "error", why)
		case next.IsZero() || s.NotAfter.Before(next):
			next = s.NotAfter
		}
	}
	m.nextExpiry = next
	if changed {
		m.notify()
	}
	if next.IsZero() {
		return lookAround
	}
	return max(0, min(lookAround, next.Sub(now)))
}

// keep renews one holder until ctx ends.
func (m *Manager) keep(ctx context.Context, h *holder) {
	for {
		m.mu.Lock()
		wait := h.attemptAt.Sub(m.now())
		m.mu.Unlock()
		if wait > 0 {
			timer := time.NewTimer(wait)
			select {
			case <-ctx.Done():
			case <-h.wake:
			case <-timer.C:
			}
			timer.Stop()
			if ctx.Err() != nil {
				return
			}
			continue
		}
		select {
		case <-ctx.Done():
			return
		case m.slots <- struct{}{}:
		}
		s, err := m.obtain(ctx, h)
		if ctx.Err() == nil {
			m.settle(h, s, err)
		}
		if err == nil && ctx.Err() == nil && m.cache != nil {
			m.cache.put(s)
		}
		<-m.slots
	}
}

// obtain makes a key, asks for its certificate and checks the answer.
func (m *Manager) obtain(ctx context.Context, h *holder) (*SVID, error) {
	m.mu.Lock()
	workloads := h.workloads
	// After a failure the next workload with the same identity is named, so
	// that one which the control plane no longer knows does not block the
	// others.
	workload := workloads[h.failures%len(workloads)]
	var remaining time.Duration
	if h.current != nil {
		remaining = h.current.NotAfter.Sub(m.now())
	}
	keyType := m.keyType
	m.mu.Unlock()

	if h.request == nil || h.request.kind != keyType {
		var err error
		if h.request, err = newRequest(keyType, h.id); err != nil {
			return nil, err
		}
	}
	key := h.request.key
	ctx, cancel := context.WithTimeout(ctx, attemptTimeout(remaining))
	defer cancel()
	chain, err := m.issuer.Issue(ctx, workload, h.request.csr)
	if err != nil {
		return nil, fmt.Errorf("ask for the certificate of %s: %w", workload, err)
	}
	h.request = nil // each certificate has a key of its own
	m.mu.Lock()
	roots := m.bundle
	m.mu.Unlock()
	now := m.now()
	leaf, err := check(h.id, key.Public(), chain, roots, now)
	if err != nil {
		return nil, fmt.Errorf("the issuer's answer for %s is refused: %w", workload, err)
	}
	return newSVID(h.id, leaf, chain, key, renewAt(now, leaf.NotAfter, m.jitter())).held(workloads), nil
}

// settle records the outcome of an attempt. A failure leaves the certificate
// that is held as it is.
func (m *Manager) settle(h *holder, s *SVID, err error) {
	now := m.now().Round(0)
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.holders[h.id] != h {
		return // dropped while the answer was under way
	}
	if err != nil {
		h.failures++
		h.lastErr = err.Error()
		var remaining time.Duration
		if h.current != nil {
			remaining = h.current.NotAfter.Sub(now)
		}
		wait := backoff(h.failures, remaining, m.jitter())
		h.attemptAt = now.Add(wait)
		if bits.OnesCount(uint(h.failures)) == 1 { // 1, 2, 4, 8 ... so that an outage does not fill the log
			m.log.Warn("renewing a certificate failed", "id", h.id, "failures", h.failures, "retry_in", wait, "remaining", remaining, "error", err)
		}
		return
	}
	h.failures, h.lastErr = 0, ""
	h.current, h.attemptAt = s.held(h.workloads), s.RenewAt
	m.expiresAt(s.NotAfter)
	m.log.Debug("obtained a certificate", "id", h.id, "serial", s.Serial, "not_after", s.NotAfter, "renew_at", s.RenewAt)
	m.notify()
}

// makeKey makes a key of a kind. One of RSA costs up to seconds of a processor.
func makeKey(kind mesh.KeyType) (crypto.Signer, error) {
	switch kind {
	case mesh.KeyECP256:
		return ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	case mesh.KeyECP384:
		return ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	case mesh.KeyRSA2048:
		return rsa.GenerateKey(rand.Reader, 2048)
	case mesh.KeyRSA4096:
		return rsa.GenerateKey(rand.Reader, 4096)
	}
	return nil, fmt.Errorf("unknown kind %d", kind)
}

// request is a key and what asks for its certificate. It is asked with again until
// there is an answer: an authority that takes long knows the same request by its key.
type request struct {
	kind mesh.KeyType
	key  crypto.Signer
	csr  []byte // PKCS#10 in DER
}

// newRequest makes a key and a PKCS#10 request for it, which names the identity: an
// authority behind the control plane's may certify what the key's holder has signed
// and nothing else.
func newRequest(kind mesh.KeyType, id spiffeid.ID) (*request, error) {
	key, err := makeKey(kind)
	if err != nil {
		return nil, fmt.Errorf("make a key: %w", err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}}, key)
	if err != nil {
		return nil, fmt.Errorf("make a certificate request: %w", err)
	}
	return &request{kind: kind, key: key, csr: csr}, nil
}
