package ca

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"slices"
	"time"
)

// A root is replaced in steps, and each is durable before it returns:
//
//	PrepareRoot   the next root is made and published; the old one signs
//	SwitchRoot    the next one signs; the old one is still published, its key is gone
//	RetireRoots   the old one is no longer published
//
// Whoever takes the steps waits before SwitchRoot until everybody trusts the
// next root, and before RetireRoots until nobody uses a certificate of the old one.

// RootRole is what a root in the bundle is there for.
type RootRole string

// The roles.
const (
	RootSigns  RootRole = "signs"
	RootNext   RootRole = "next"   // trusted already, to sign soon
	RootFormer RootRole = "former" // trusted still, signs no more
)

// Root is one root of the bundle. The certificate is shared: callers must not
// edit it.
type Root struct {
	Role        RootRole
	Certificate *x509.Certificate
	Fingerprint Fingerprint // of the certificate
	// Key is the name of its key where RootKeys keeps it; empty: it is in a file,
	// or is gone.
	Key string
}

// Fingerprint is the SHA-256 of a certificate.
type Fingerprint [sha256.Size]byte

// FingerprintOf returns a certificate's fingerprint.
func FingerprintOf(c *x509.Certificate) Fingerprint { return sha256.Sum256(c.Raw) }

// String is hexadecimal.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// Errors of steps that do not fit the state.
var (
	ErrNoNextRoot = errors.New("there is no next root; prepare one first")
	ErrRootInUse  = errors.New("a former root is still published; retire it first")
)

// Roots returns the bundle with the role of each root, the one that signs first.
func (a *Authority) Roots() []Root {
	a.mu.Lock()
	defer a.mu.Unlock()
	var out []Root
	add := func(role RootRole, p *pair) {
		root := Root{Role: role, Certificate: p.cert, Fingerprint: FingerprintOf(p.cert)}
		if held, ok := p.key.(*heldKey); ok {
			root.Key = held.name
		}
		out = append(out, root)
	}
	add(RootSigns, a.roots.signs)
	if a.roots.next != nil {
		add(RootNext, a.roots.next)
	}
	for _, c := range a.roots.further {
		add(RootFormer, &pair{cert: c})
	}
	return out
}

// PrepareRoot makes the next root and publishes it, unless there is one. It
// refuses while a former root is published: two rotations would mix.
func (a *Authority) PrepareRoot() error {
	return a.changeRoots("prepare the next root", func(s rootSet) (_ rootSet, err error) {
		switch {
		case a.isBelow:
			return s, errRootAbove
		case s.next != nil:
			return s, nil
		case len(s.further) > 0:
			return s, ErrRootInUse
		}
		s.next, err = a.makeRoot()
		return s, err
	})
}

// AbandonRoot withdraws the next root before it has signed anything. It does
// nothing when there is none.
func (a *Authority) AbandonRoot() error {
	return a.changeRoots("withdraw the next root", func(s rootSet) (rootSet, error) {
		s.next, s.nextBelow = nil, nil
		return s, nil
	})
}

// SwitchRoot has the next root sign from now on. The old one stays published,
// and its key is removed: nothing can be signed with it any more.
func (a *Authority) SwitchRoot() error {
	return a.changeRoots("switch roots", func(s rootSet) (rootSet, error) {
		if s.next == nil {
			return s, ErrNoNextRoot
		}
		if s.nextBelow != nil && !a.isBelow {
			return s, errRootAbove
		}
		s.below, s.nextBelow = s.nextBelow, nil
		s.signs, s.next, s.further = s.next, nil, append([]*x509.Certificate{s.signs.cert}, s.further...)
		return s, nil
	})
}

// DistrustRoot says that every root there is may be in somebody else's hands, also
// one that was to be the next, and makes another to be that. Who takes the steps
// of the rotation hurries then. It does nothing while the root that signs is
// distrusted already.
func (a *Authority) DistrustRoot() error {
	return a.changeRoots("distrust the root", func(s rootSet) (_ rootSet, err error) {
		if slices.Contains(s.distrusted, FingerprintOf(s.signs.cert)) {
			return s, nil
		}
		for _, c := range s.bundle() {
			if a.isBelow && s.next != nil && c.Equal(s.next.cert) {
				continue // the authority above has replaced its root already
			}
			if f := FingerprintOf(c); !slices.Contains(s.distrusted, f) {
				s.distrusted = append(slices.Clone(s.distrusted), f)
			}
		}
		if !a.isBelow { // else an Enrolment asks for another
			s.next, err = a.makeRoot()
		}
		return s, err
	})
}

// Distrusted returns the roots that were ever distrusted; withdrawn ones too. The
// slice is shared: callers must not edit it. It changes with the bundle.
func (a *Authority) Distrusted() []Fingerprint {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.roots.distrusted
}

// RetireRoots withdraws all former roots.
func (a *Authority) RetireRoots() error { return a.PublishRoots(nil) }

// changeRoots takes one step: what is stored now, which another replica may have
// changed, is changed, stored, and put into force.
func (a *Authority) changeRoots(what string, change func(rootSet) (rootSet, error)) error {
	ctx, cancel := context.WithTimeout(context.Background(), rootStoreTime)
	defer cancel()
	a.rootsMu.Lock()
	defer a.rootsMu.Unlock()
	if err := a.tryChangeRoots(ctx, change); err != nil {
		return fmt.Errorf("ca: %s: %w", what, err)
	}
	return nil
}

func (a *Authority) tryChangeRoots(ctx context.Context, change func(rootSet) (rootSet, error)) error {
	a.mu.Lock()
	closed := a.closed
	a.mu.Unlock()
	if closed {
		return errClosed
	}
	files, version, err := a.rootStore.Load(ctx)
	if err != nil {
		return err
	}
	was, err := parseRoots(a.td, a.rootStore, a.rootKeys, files, a.now())
	if err != nil {
		return err
	}
	next, err := change(was)
	if err != nil {
		return err
	}
	if files, err = next.files(); err != nil {
		return err
	}
	below, err := a.intermediateBelow(next) // before it counts: the next root's key may be away
	if err != nil {
		return err
	}
	if err := a.rootStore.Save(ctx, files, version); err != nil {
		return err
	}
	a.useRoots(next, below)
	a.destroyUnused(files)
	return nil
}

// intermediateBelow makes the intermediate that roots need before they are put into
// force; nil: the present one stays. The caller holds rootsMu, so the present roots
// stay too.
func (a *Authority) intermediateBelow(next rootSet) (*pair, error) {
	a.mu.Lock()
	was := a.roots.signs.cert
	a.mu.Unlock()
	if next.signs.cert.Equal(was) || next.below != nil {
		return nil, nil
	}
	return newIntermediate(a.td, next.signs, a.now(), a.intermediateTTL)
}

// useRoots puts stored roots into force, with what intermediateBelow made for them.
func (a *Authority) useRoots(next rootSet, below *pair) {
	a.mu.Lock()
	defer a.mu.Unlock()
	was := a.roots
	if next.below != nil {
		a.useBelow(next.below)
	}
	if slices.EqualFunc(was.bundle(), next.bundle(), (*x509.Certificate).Equal) && slices.Equal(was.distrusted, next.distrusted) {
		a.roots = next
		return
	}
	if signs := next.signs.cert; !signs.Equal(was.signs.cert) {
		a.log.Info("another root signs", "fingerprint", FingerprintOf(signs).String(), "former", FingerprintOf(was.signs.cert).String())
	}
	if below != nil {
		if err := a.useIntermediate(below); err != nil {
			a.log.Error("the new intermediate could not be stored; the next start makes another", "err", err)
		}
		a.intermediate, a.renewFailed, a.renewErr = below, time.Time{}, nil
	}
	if next.next != nil && (was.next == nil || !next.next.cert.Equal(was.next.cert)) {
		a.log.Info("the next root is published", "fingerprint", FingerprintOf(next.next.cert).String(), "not_after", stamp(next.next.cert.NotAfter))
	}
	if len(next.further) < len(was.further) || was.next != nil && next.next == nil && next.signs.cert.Equal(was.signs.cert) {
		a.log.Info("a root was withdrawn", "roots", len(next.bundle()))
	}
	for _, f := range next.distrusted {
		if !slices.Contains(was.distrusted, f) {
			a.log.Warn("a root is distrusted", "fingerprint", f.String())
		}
	}
	a.roots = next
	close(a.changed)
	a.changed = make(chan struct{})
}

// FollowRoots puts into force what other replicas store, until ctx ends. While
// the store is away, the present roots stay.
func (a *Authority) FollowRoots(ctx context.Context) {
	failing := false
	for tick := time.NewTicker(rootPoll); ; {
		select {
		case <-ctx.Done():
			tick.Stop()
			return
		case <-tick.C:
		}
		err := a.followRoots(ctx)
		if err != nil && !failing && ctx.Err() == nil {
			a.log.Error("the stored roots cannot be read; those in force stay, and it is tried again", "err", err)
		}
		failing = err != nil
	}
}

func (a *Authority) followRoots(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rootStoreTime)
	defer cancel()
	a.rootsMu.Lock()
	defer a.rootsMu.Unlock()
	files, version, err := a.rootStore.Load(ctx)
	if err != nil || version != "" && version == a.rootVersion {
		return err
	}
	next, err := parseRoots(a.td, a.rootStore, a.rootKeys, files, a.now())
	if err != nil {
		return err
	}
	below, err := a.intermediateBelow(next)
	if err != nil {
		return err
	}
	a.useRoots(next, below)
	a.rootVersion = version
	return nil
}

// RootMade says when the root that signs was made, to the second.
func (a *Authority) RootMade() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	made := a.roots.signs.cert.NotBefore
	if a.roots.below == nil {
		made = made.Add(backdate)
	}
	return made
}

// RootDue says when the root should be replaced: when two thirds of its life are
// over. ok is false for a root that an operator has placed, which is the
// operator's to replace: others may trust it.
func (a *Authority) RootDue() (due time.Time, ok bool) {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.roots.signs.cert
	return c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 3 * 2), c.Subject.CommonName == rootCN && !a.isBelow
}
