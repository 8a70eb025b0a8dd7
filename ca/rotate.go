package ca

import (
	"bytes"
	"crypto/sha256"
	"crypto/x509"
	"encoding/hex"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"slices"
	"time"

	"github.com/signet-mesh/signet/internal/wholefile"
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
}

// Fingerprint is the SHA-256 of a certificate.
type Fingerprint [sha256.Size]byte

// FingerprintOf returns a certificate's fingerprint.
func FingerprintOf(c *x509.Certificate) Fingerprint { return sha256.Sum256(c.Raw) }

// String is hexadecimal.
func (f Fingerprint) String() string { return hex.EncodeToString(f[:]) }

// Errors of steps that do not fit the state.
var (
	ErrNoNextRoot = errors.New("ca: there is no next root; prepare one first")
	ErrRootInUse  = errors.New("ca: a former root is still published; retire it first")
)

// Roots returns the bundle with the role of each root, the one that signs first.
func (a *Authority) Roots() []Root {
	a.mu.Lock()
	defer a.mu.Unlock()
	out := []Root{{RootSigns, a.root.cert}}
	if a.next != nil {
		out = append(out, Root{RootNext, a.next.cert})
	}
	for _, c := range a.further {
		out = append(out, Root{RootFormer, c})
	}
	return out
}

// PrepareRoot makes the next root and publishes it, unless there is one. It
// refuses while a former root is published: two rotations would mix.
func (a *Authority) PrepareRoot() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.closed:
		return errClosed
	case a.next != nil:
		return nil
	case len(a.further) > 0:
		return ErrRootInUse
	}
	next, err := newRoot(a.td, a.now(), a.rootTTL)
	if err != nil {
		return fmt.Errorf("ca: make the next root: %w", err)
	}
	key, err := encodeKey(next.key)
	if err != nil {
		return fmt.Errorf("ca: %w", err)
	}
	if err := writePair(a.dir, nextRootName, encodeCerts(next.cert), key); err != nil {
		return fmt.Errorf("ca: store the next root: %w", err)
	}
	a.next = next
	a.bundleChanged()
	a.log.Info("the next root is published", "fingerprint", FingerprintOf(next.cert).String(), "not_after", stamp(next.cert.NotAfter))
	return nil
}

// AbandonRoot withdraws the next root before it has signed anything. It does
// nothing when there is none.
func (a *Authority) AbandonRoot() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	if a.closed {
		return errClosed
	}
	if a.next == nil {
		return nil
	}
	if err := a.removeNext(); err != nil {
		return fmt.Errorf("ca: withdraw the next root: %w", err)
	}
	a.next = nil
	a.bundleChanged()
	a.log.Info("the next root was withdrawn")
	return nil
}

// SwitchRoot has the next root sign from now on. The old one stays published,
// and its key is removed: nothing can be signed with it any more.
func (a *Authority) SwitchRoot() error {
	a.mu.Lock()
	defer a.mu.Unlock()
	switch {
	case a.closed:
		return errClosed
	case a.next == nil:
		return ErrNoNextRoot
	}
	next, former := a.next, a.root
	now := a.now()
	intermediate, err := newIntermediate(a.td, next, now, a.intermediateTTL)
	if err != nil {
		return fmt.Errorf("ca: switch roots: %w", err)
	}
	rootKey, err := encodeKey(next.key)
	if err != nil {
		return fmt.Errorf("ca: switch roots: %w", err)
	}
	intermediateKey, err := encodeKey(intermediate.key)
	if err != nil {
		return fmt.Errorf("ca: switch roots: %w", err)
	}
	// In this order: a crash in between leaves the old root signing, or the new
	// one with the old one published.
	further := append([]*x509.Certificate{former.cert}, a.further...)
	if err := wholefile.Write(filepath.Join(a.dir, furtherRootsFile), encodeCerts(further...)); err != nil {
		return fmt.Errorf("ca: switch roots: %w", err)
	}
	if err := writePair(a.dir, rootName, encodeCerts(next.cert), rootKey); err != nil {
		return fmt.Errorf("ca: switch roots: %w", err)
	}
	a.root, a.next, a.further, a.intermediate = next, nil, further, intermediate
	a.bundleChanged()
	a.log.Info("another root signs", "fingerprint", FingerprintOf(next.cert).String(), "former", FingerprintOf(former.cert).String())
	// The rest is mended by the next start if it fails.
	if err := writePair(a.dir, intermediateName, encodeCerts(intermediate.cert), intermediateKey); err != nil {
		a.log.Error("the new intermediate could not be stored; the next start makes another", "err", err)
	}
	if err := a.removeNext(); err != nil {
		a.log.Error("a copy of the root's key could not be removed; the next start removes it", "err", err)
	}
	return nil
}

// RetireRoots withdraws all former roots.
func (a *Authority) RetireRoots() error { return a.PublishRoots(nil) }

// removeNext removes the next root's files. The caller holds mu.
func (a *Authority) removeNext() error {
	for _, ext := range []string{".key", ".crt"} {
		if err := os.Remove(filepath.Join(a.dir, nextRootName+ext)); err != nil && !errors.Is(err, fs.ErrNotExist) {
			return err
		}
	}
	return wholefile.SyncDir(a.dir)
}

// openNext takes up a rotation that was under way. A crash may have left its
// traces: what is the root already is not the next, and not a former one.
func (a *Authority) openNext() error {
	isRoot := func(c *x509.Certificate) bool { return bytes.Equal(c.Raw, a.root.cert.Raw) }
	a.further = slices.DeleteFunc(a.further, isRoot)
	if _, err := os.Stat(filepath.Join(a.dir, nextRootName+".crt")); errors.Is(err, fs.ErrNotExist) {
		return a.removeNext() // of a removal that was cut short, the certificate may be left
	}
	next, err := readPair(a.dir, nextRootName)
	if err != nil {
		return err
	}
	if isRoot(next.cert) {
		return a.removeNext()
	}
	if err := checkRoot(a.td, next.cert, a.now()); err != nil {
		return fmt.Errorf("%s: %w", filepath.Join(a.dir, nextRootName+".crt"), err)
	}
	a.next = next
	return nil
}

// bundleChanged wakes who follows the bundle. The caller holds mu.
func (a *Authority) bundleChanged() {
	close(a.changed)
	a.changed = make(chan struct{})
}

// RootDue says when the root should be replaced: when two thirds of its life are
// over.
func (a *Authority) RootDue() time.Time {
	a.mu.Lock()
	defer a.mu.Unlock()
	c := a.root.cert
	return c.NotBefore.Add(c.NotAfter.Sub(c.NotBefore) / 3 * 2)
}
