package ca

import (
	"fmt"
	"path/filepath"
	"time"
)

const (
	// renewalPatience is how long certificates wait for a new intermediate while
	// the present one would do. The root's key may be where nobody answers.
	renewalPatience = 2 * time.Second
	// retryRenewal is how soon a renewal that failed is tried again while the
	// present intermediate would do.
	retryRenewal = 30 * time.Second
)

// renewal is one try to have a new intermediate.
type renewal struct {
	began time.Time
	done  chan struct{}
	err   error // set before done is closed
}

// openIntermediate takes up the stored intermediate, or makes one.
func (a *Authority) openIntermediate() error {
	p, err := readPair(a.dir, intermediateName)
	if err != nil {
		return err
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.intermediate = a.roots.below; a.intermediate != nil {
		return nil
	}
	if p != nil {
		// The trust domain is checked apart from the rest: a foreign one is
		// an operator's mistake, an expired or stale one just gets replaced.
		if err := checkTrustDomain(a.td, p.cert, true); err != nil {
			return fmt.Errorf("%s: %w", filepath.Join(a.dir, intermediateName+".crt"), err)
		}
		if err := checkIntermediate(a.td, p, a.roots.signs, a.now()); err == nil {
			a.intermediate = p
			return nil
		} else {
			a.log.Warn("the stored intermediate is not usable and is replaced", "err", err)
		}
	}
	return a.renew(true)
}

// renew has a new intermediate made, once for all who ask meanwhile. Who must have
// it waits for it; others wait for a moment, and not at all after a failure. The
// caller holds mu, which is given up while waiting.
func (a *Authority) renew(must bool) error {
	r, failed := a.renewing, a.renewFailed
	if r == nil {
		if since := a.now().Sub(failed); !must && !failed.IsZero() && since >= 0 && since < retryRenewal {
			return nil
		}
		r = a.startRenewal()
	}
	if !must && !failed.IsZero() {
		return nil
	}
	a.mu.Unlock()
	defer a.mu.Lock()
	var patience <-chan time.Time // for ever
	if !must {
		timer := time.NewTimer(renewalPatience - time.Since(r.began))
		defer timer.Stop()
		patience = timer.C
	}
	select {
	case <-r.done:
		return r.err
	case <-patience:
		return nil
	}
}

// startRenewal makes an intermediate without holding mu. The caller holds mu.
func (a *Authority) startRenewal() *renewal {
	r := &renewal{began: time.Now(), done: make(chan struct{})}
	a.renewing = r
	root := a.roots.signs
	a.renewals.Go(func() {
		defer close(r.done)
		p, err := newIntermediate(a.td, root, a.now(), a.intermediateTTL)
		a.mu.Lock()
		defer a.mu.Unlock()
		a.renewing = nil
		switch {
		case err != nil:
			err = fmt.Errorf("make an intermediate: %w", err)
		case a.closed:
			err = errClosed
		case !root.cert.Equal(a.roots.signs.cert): // which made one of its own
		default:
			err = a.useIntermediate(p)
		}
		if r.err, a.renewErr = err, err; err == nil {
			a.renewFailed = time.Time{}
			return
		}
		a.renewFailed = a.now()
		if cur := a.intermediate; cur != nil {
			a.log.Error("the intermediate is past half its life and could not be renewed; it is tried again", "err", err, "not_after", stamp(cur.cert.NotAfter))
		}
	})
	return r
}

// Renewal says until when the present intermediate is good, and why a new one that
// is due could not be had; nil: none is due, or it is not known yet.
func (a *Authority) Renewal() (notAfter time.Time, failed error) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.intermediate.cert.NotAfter, a.renewErr
}

// useIntermediate stores a new intermediate and has it sign. The caller holds mu.
func (a *Authority) useIntermediate(p *pair) error {
	key, err := encodeKey(p.key)
	if err != nil {
		return err
	}
	if err := writePair(a.dir, intermediateName, map[string][]byte{".crt": encodeCerts(p.cert), ".key": key}); err != nil {
		return fmt.Errorf("store the intermediate: %w", err)
	}
	a.intermediate = p
	a.log.Info("made a new intermediate", "serial", formatSerial(p.cert.SerialNumber), "not_after", stamp(p.cert.NotAfter))
	return nil
}
