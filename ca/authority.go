// Package ca is the certificate authority of one trust domain: a root, an
// intermediate that renews itself, and SVIDs that are checked, then recorded,
// then signed.
package ca

import (
	"bytes"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Defaults of Options.
const (
	DefaultRootTTL         = 10 * 365 * 24 * time.Hour
	DefaultIntermediateTTL = 7 * 24 * time.Hour
)

// Options say which authority to open.
type Options struct {
	// Dir holds keys, certificates and the issuance log. It is made when it
	// is missing, mode 0700. An operator may place root.crt and root.key
	// there beforehand.
	Dir string
	// TrustDomain is the only trust domain that is signed for.
	TrustDomain spiffeid.TrustDomain
	// RootTTL and IntermediateTTL are the lifetimes of what is made here.
	// Zero means the default.
	RootTTL, IntermediateTTL time.Duration
	// Profile shapes the certificates that are issued.
	Profile Profile
	// RootStore keeps the roots where replicas share them. Nil means files in Dir.
	RootStore RootStore
	// RootKeys keeps the keys of the roots that are made, and of those whose names
	// are in root.key-uri and next-root.key-uri. Nil means beside the roots.
	RootKeys RootKeys
	// Above says that roots are those of an authority above, which an Enrolment
	// puts into RootStore: none is made here.
	Above bool
	// Leaves signs workloads' certificates in place of the intermediate, which goes on
	// to sign those of nodes and of the control plane. It needs Above: both are below
	// the same root. Nil: the intermediate signs all.
	Leaves LeafSigner
	// JWTKeyLife is how long a key signs JWT-SVIDs before the next one does.
	// Zero means DefaultJWTKeyLife.
	JWTKeyLife time.Duration
	// JWTIssuer is the iss of tokens; empty: they have none.
	JWTIssuer string
	// JWTKeyStore keeps those keys where replicas share them; while it is away
	// certificates are issued all the same. Nil means a file in Dir.
	JWTKeyStore JWTKeyStore
	// Now is the clock; nil means time.Now.
	Now func() time.Time
	// Log receives what an operator should know; nil discards it.
	Log *slog.Logger
}

// Authority signs SVIDs for one trust domain. It is safe for concurrent use.
type Authority struct {
	dir             string
	td              spiffeid.TrustDomain
	intermediateTTL time.Duration
	profile         Profile
	jwtKeyLife      time.Duration
	jwtIssuer       string
	jwtStore        JWTKeyStore
	rootStore       RootStore
	rootKeys        RootKeys   // nil: keys are in rootStore
	isBelow         bool       // Options.Above
	rootsMu         sync.Mutex // held while the stored roots are changed; taken before mu
	rootVersion     string     // guarded by rootsMu; of the stored roots that are in force
	now             func() time.Time
	log             *slog.Logger
	rootTTL         time.Duration
	issuance        *Log
	leaves          *leaves
	lock            *os.File

	mu           sync.Mutex
	closed       bool          // guarded by mu
	roots        rootSet       // guarded by mu; replaced whole
	intermediate *pair         // guarded by mu; replaced whole
	changed      chan struct{} // guarded by mu; closed and replaced when the bundle changes
	renewing     *renewal      // guarded by mu; nil: none is under way
	renewFailed  time.Time     // guarded by mu; when the last renewal failed; zero: it did not
	renewErr     error         // guarded by mu; how

	renewals sync.WaitGroup

	believed atomic.Pointer[believed] // the last chain that was verified whole; replaced whole

	revoked revocations

	jwtMu      sync.Mutex    // apart, since a new intermediate is made under mu
	jwtKeys    ring          // guarded by jwtMu; replaced whole
	jwtChanged chan struct{} // guarded by jwtMu; closed and replaced when jwtKeys changes
}

// Open loads the authority in opts.Dir, making what is missing. It refuses a
// directory that another authority has open, one that belongs to another
// trust domain, and keys that others than their owner can read.
// The caller closes the authority.
func Open(opts Options) (*Authority, error) {
	a := &Authority{
		dir:             opts.Dir,
		td:              opts.TrustDomain,
		intermediateTTL: opts.IntermediateTTL,
		profile:         opts.Profile,
		jwtKeyLife:      opts.JWTKeyLife,
		jwtIssuer:       opts.JWTIssuer,
		jwtStore:        opts.JWTKeyStore,
		rootStore:       opts.RootStore,
		rootKeys:        opts.RootKeys,
		isBelow:         opts.Above,
		leaves:          newLeaves(opts.Leaves),
		now:             opts.Now,
		log:             opts.Log,
		changed:         make(chan struct{}),
		jwtChanged:      make(chan struct{}),
	}
	if a.intermediateTTL == 0 {
		a.intermediateTTL = DefaultIntermediateTTL
	}
	if a.rootStore == nil {
		if a.isBelow {
			return nil, errors.New("ca: options: Above needs a RootStore")
		}
		a.rootStore = dirRoots(a.dir)
	}
	if a.rootTTL = opts.RootTTL; a.rootTTL == 0 {
		a.rootTTL = DefaultRootTTL
	}
	if a.profile.TTL == 0 {
		a.profile.TTL = DefaultTTL
	}
	if a.jwtKeyLife == 0 {
		a.jwtKeyLife = DefaultJWTKeyLife
	}
	if a.now == nil {
		// Without the monotonic reading, by which instants would be compared
		// first: it stands still while the machine is suspended.
		a.now = func() time.Time { return time.Now().Round(0) }
	}
	if a.log == nil {
		a.log = slog.New(slog.DiscardHandler)
	}
	switch {
	case opts.Dir == "":
		return nil, errors.New("ca: options: Dir is empty; name a directory for keys and the issuance log")
	case a.td.IsZero():
		return nil, errors.New("ca: options: TrustDomain is empty")
	case opts.Leaves != nil && !a.isBelow:
		return nil, errors.New("ca: options: Leaves needs Above")
	case a.rootTTL < 0 || a.intermediateTTL < 0 || a.intermediateTTL > a.rootTTL:
		return nil, fmt.Errorf("ca: options: IntermediateTTL %s must be positive and not above RootTTL %s", a.intermediateTTL, a.rootTTL)
	}
	if err := checkTTL(a.profile.TTL); err != nil {
		return nil, fmt.Errorf("ca: options: Profile.TTL: %w", err)
	}
	if err := CheckJWTKeyLife(a.jwtKeyLife); err != nil {
		return nil, fmt.Errorf("ca: options: JWTKeyLife: %w", err)
	}
	if err := a.open(); err != nil {
		a.Close()
		return nil, fmt.Errorf("ca: %w", err)
	}
	return a, nil
}

func (a *Authority) open() error {
	if err := secureDir(a.dir); err != nil {
		return err
	}
	var err error
	if a.lock, err = lockDir(a.dir); err != nil {
		return err
	}
	if err := removeLeftovers(a.dir); err != nil {
		return fmt.Errorf("remove what a crash left behind: %w", err)
	}
	for _, name := range []string{rootName, nextRootName, intermediateName} {
		if err := finishPair(a.dir, name); err != nil {
			return fmt.Errorf("finish the interrupted replacement of the %s: %w", name, err)
		}
	}
	if err := a.openRoots(context.Background()); err != nil {
		return err
	}
	if a.issuance, err = openLog(filepath.Join(a.dir, logFile), a.log); err != nil {
		return fmt.Errorf("open the issuance log: %w", err)
	}
	if err := a.openRevoked(); err != nil {
		return fmt.Errorf("read the revocations in the issuance log: %w", err)
	}
	if err := a.openIntermediate(); err != nil {
		return err
	}
	return a.openJWTKeys()
}

// openJWTKeys takes up the stored keys. A store elsewhere may be away for now.
func (a *Authority) openJWTKeys() error {
	elsewhere := a.jwtStore != nil
	if !elsewhere {
		a.jwtStore = newJWTKeyFile(a.dir)
	}
	err := a.turnJWTKeys(context.Background())
	if err != nil && elsewhere {
		a.log.Error("no JWT-SVID can be issued until the JWT keys can be read", "err", err)
		return nil
	}
	return err
}

// openRoots takes up the stored roots, and makes a root where there is none.
func (a *Authority) openRoots(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, rootStoreTime)
	defer cancel()
	for {
		files, version, err := a.rootStore.Load(ctx)
		if err != nil {
			return err
		}
		var set rootSet
		if len(files[rootName+".crt"])+len(files[rootName+".key"])+len(files[rootName+keyNameExt]) > 0 {
			if set, err = parseRoots(a.td, a.rootStore, a.rootKeys, files, a.now()); err == nil {
				err = a.proveRoots(set)
			}
		} else if a.isBelow {
			err = fmt.Errorf("%s holds no root of the authority above yet", a.rootStore)
		} else if err = a.refuseOrphans(); err == nil {
			if set.signs, err = a.makeRoot(); err != nil {
				err = fmt.Errorf("make the root: %w", err)
			}
		}
		if err == nil && set.below != nil && !a.isBelow {
			err = errRootAbove
		}
		if err != nil {
			return err
		}
		want, err := set.files()
		if err != nil {
			return err
		}
		if len(want) != len(files) { // a new root, or what a crash left behind
			err := a.rootStore.Save(ctx, want, version)
			if errors.Is(err, ErrRootsChanged) {
				continue // another replica was first
			}
			if err != nil {
				return fmt.Errorf("store the root: %w", err)
			}
			if len(files) == 0 {
				a.log.Info("made a new root", "trust_domain", a.td.Name(), "not_after", stamp(set.signs.cert.NotAfter))
			}
		}
		a.mu.Lock()
		a.roots = set
		a.mu.Unlock()
		a.destroyUnused(want)
		return nil
	}
}

// refuseOrphans keeps a lost root from being replaced in silence by another,
// which no node would trust.
func (a *Authority) refuseOrphans() error {
	path := filepath.Join(a.dir, intermediateName+".crt")
	if _, err := os.Stat(path); err == nil {
		return fmt.Errorf("%s exists but root.crt and root.key do not; restore them, or empty %s to start a new trust domain", path, a.dir)
	}
	return nil
}

// Close ends the authority; it is idempotent. What was issued stays valid.
func (a *Authority) Close() error {
	a.mu.Lock()
	closed := a.closed
	a.closed = true
	a.mu.Unlock()
	if closed {
		return nil
	}
	a.renewals.Wait()
	var errs []error
	if a.issuance != nil {
		errs = append(errs, a.issuance.close())
	}
	if a.lock != nil {
		errs = append(errs, a.lock.Close())
	}
	return errors.Join(errs...)
}

// TrustDomain returns the trust domain that is signed for.
func (a *Authority) TrustDomain() spiffeid.TrustDomain { return a.td }

// IssuanceLog returns the record of everything that was issued.
func (a *Authority) IssuanceLog() *Log { return a.issuance }

// Bundle returns the roots of the trust domain, the authority's own first.
// The certificates are shared: callers must not edit them.
func (a *Authority) Bundle() []*x509.Certificate {
	roots, _ := a.BundleUpdates()
	return roots
}

// BundleUpdates returns Bundle and a channel that is closed when it is no
// longer current.
func (a *Authority) BundleUpdates() ([]*x509.Certificate, <-chan struct{}) {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.roots.bundle(), a.changed
}

// PublishRoots replaces the roots that nodes trust besides those of the
// authority's own: the former one until its last certificate has expired. The set
// is durable before PublishRoots returns.
func (a *Authority) PublishRoots(further []*x509.Certificate) error {
	return a.changeRoots("publish roots", func(s rootSet) (rootSet, error) {
		s.further = nil
		for _, c := range further {
			if err := checkFurtherRoot(a.td, c); err != nil {
				return s, fmt.Errorf("%q: %w", c.Subject, err)
			}
			if !bytes.Equal(c.Raw, s.signs.cert.Raw) {
				s.further = append(s.further, c)
			}
		}
		return s, nil
	})
}

func checkFurtherRoot(td spiffeid.TrustDomain, c *x509.Certificate) error {
	if !c.IsCA || !c.BasicConstraintsValid {
		return errors.New("is not a CA certificate; only roots can be published")
	}
	return checkTrustDomain(td, c, false)
}

var errClosed = errors.New("ca: the authority is closed")
