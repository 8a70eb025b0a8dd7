// Package federation shows the mesh's bundle to other trust domains, and follows
// theirs, as SPIFFE Federation has it. To verifiers that know nothing of SPIFFE
// it shows the keys of tokens as OpenID Connect Discovery has it.
package federation

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/hex"
	"encoding/json"
	"errors"
	"fmt"
	"log/slog"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/bundle"
)

// Store keeps one small document. Replicas of a control plane share it.
type Store interface {
	// Load returns what was last saved and a version of it; both are zero when
	// nothing was.
	Load(ctx context.Context) (data []byte, version string, err error)
	// Save replaces what Load returned with that version. It is durable when Save
	// returns. When something else is stored meanwhile, Save returns ErrChanged
	// and changes nothing.
	Save(ctx context.Context, data []byte, version string) error
}

// ErrChanged is returned by Store.Save when another replica was first.
var ErrChanged = errors.New("federation: the stored document was changed meanwhile")

// Bounds of how often other trust domains are told to ask.
const (
	DefaultRefreshHint = 5 * time.Minute
	MinRefreshHint     = time.Second
	MaxRefreshHint     = time.Hour
)

// CheckRefreshHint refuses what cannot be Publisher's RefreshHint. Keys of tokens
// are published a quarter of their life before they sign, so whoever asks as
// often as told must have had three chances by then.
func CheckRefreshHint(hint, jwtKeyLife time.Duration) error {
	if hint < MinRefreshHint || hint > MaxRefreshHint || hint%time.Second != 0 {
		return fmt.Errorf("%s; must be whole seconds, from %s to %s", hint, MinRefreshHint, MaxRefreshHint)
	}
	if ahead := jwtKeyLife / 4; 3*hint > ahead {
		return fmt.Errorf("%s; keys of tokens that live for %s are published %s before they sign, so at most %s", hint, jwtKeyLife, ahead, (ahead / 3).Truncate(time.Second))
	}
	return nil
}

// Authority is whose bundle is shown; *ca.Authority implements it.
type Authority interface {
	BundleUpdates() ([]*x509.Certificate, <-chan struct{})
	JWTKeys() ([]ca.JWTKey, <-chan struct{})
}

const (
	// retryPublish is how soon a store that failed is tried again.
	retryPublish = 5 * time.Second
	// settleTime is how long content that was shown before may stand against what
	// is stored: a replica that is behind has caught up by then, and it is a
	// return to former keys if it has not.
	settleTime = 5 * time.Second
	// lookAtStore is how often it is looked what other replicas have stored.
	lookAtStore = time.Second

	maxHistory = 16 // digests that are remembered
	storeTime  = 10 * time.Second
)

// published is the stored form: what every replica shows.
type published struct {
	Sequence uint64          `json:"sequence"`
	Digest   string          `json:"digest"`
	Since    time.Time       `json:"since"`
	History  []string        `json:"history,omitempty"` // digests that were shown before
	Document json.RawMessage `json:"document"`
}

// Publisher keeps the document that is shown: its number rises exactly when the
// keys change, over restarts and for all replicas together, which show one and
// the same.
type Publisher struct {
	// Authority, Store, RefreshHint and Log are set before Run, and not after.
	Authority   Authority
	TrustDomain spiffeid.TrustDomain
	Store       Store
	RefreshHint time.Duration
	Log         *slog.Logger

	mu      sync.Mutex
	current *published // guarded by mu; nil: nothing is shown yet
	differs time.Time  // guarded by mu; since when former content stands against what is stored
}

// Run keeps the document until ctx ends.
func (p *Publisher) Run(ctx context.Context) {
	failing := false
	for {
		roots, rootsChanged := p.Authority.BundleUpdates()
		keys, keysChanged := p.Authority.JWTKeys()
		wait := lookAtStore
		if err := p.look(ctx, roots, keys, time.Now()); err != nil {
			if ctx.Err() != nil {
				return
			}
			if !failing {
				p.Log.Error("the bundle that other trust domains see cannot be brought up to date; it is tried again", "error", err)
			}
			failing, wait = true, retryPublish
		} else {
			failing = false
		}
		timer := time.NewTimer(wait)
		select {
		case <-rootsChanged:
		case <-keysChanged:
		case <-timer.C:
		case <-ctx.Done():
			timer.Stop()
			return
		}
		timer.Stop()
	}
}

// look compares the authority's keys with what is stored, and stores them with
// the next number if they are new.
func (p *Publisher) look(ctx context.Context, roots []*x509.Certificate, keys []ca.JWTKey, now time.Time) error {
	b, err := own(p.TrustDomain, roots, keys)
	if err != nil {
		return err
	}
	b.RefreshHint = p.RefreshHint
	ctx, cancel := context.WithTimeout(ctx, storeTime)
	defer cancel()
	sum := b.Digest()
	digest := hex.EncodeToString(sum[:])
	for {
		data, version, err := p.Store.Load(ctx)
		if err != nil {
			return err
		}
		var stored published
		if len(data) > 0 {
			if err := json.Unmarshal(data, &stored); err != nil {
				return fmt.Errorf("the stored document cannot be read; restore it, or remove it, and other trust domains will have to be told to begin anew: %w", err)
			}
		}
		if stored.Digest == digest || p.behind(&stored, digest, now) {
			p.show(&stored, stored.Digest == digest)
			return nil
		}
		next := published{Sequence: stored.Sequence + 1, Digest: digest, Since: now.UTC()}
		if stored.Digest != "" {
			next.History = append(stored.History, stored.Digest)
			next.History = next.History[max(0, len(next.History)-maxHistory):]
		}
		b.Sequence = next.Sequence
		if next.Document, err = b.Marshal(); err != nil {
			return err
		}
		out, err := json.Marshal(next)
		if err != nil {
			return err
		}
		switch err := p.Store.Save(ctx, out, version); {
		case errors.Is(err, ErrChanged):
			continue // another replica was first
		case err != nil:
			return err
		}
		p.Log.Info("the bundle that other trust domains see has changed", "sequence", next.Sequence, "roots", len(b.Roots), "jwt_keys", len(b.JWTKeys))
		p.show(&next, true)
		return nil
	}
}

// own is the bundle of an authority.
func own(td spiffeid.TrustDomain, roots []*x509.Certificate, keys []ca.JWTKey) (*bundle.Bundle, error) {
	if len(roots) == 0 || len(keys) == 0 {
		return nil, errors.New("the authority's keys are not known yet") // to show none is to have everybody distrusted
	}
	b := &bundle.Bundle{TrustDomain: td, Roots: roots, JWTKeys: map[string]crypto.PublicKey{}}
	for _, k := range keys {
		b.JWTKeys[k.ID] = k.Key
	}
	return b, nil
}

// Unnumbered is the document of an authority whose bundle nobody is shown, for who
// carries it over by hand: it has no number, and no hint of when to ask.
func Unnumbered(td spiffeid.TrustDomain, authority Authority) ([]byte, error) {
	roots, _ := authority.BundleUpdates()
	keys, _ := authority.JWTKeys()
	b, err := own(td, roots, keys)
	if err != nil {
		return nil, err
	}
	return b.Marshal()
}

// behind reports whether this replica has yet to hear of what another stored.
func (p *Publisher) behind(stored *published, digest string, now time.Time) bool {
	if !slices.Contains(stored.History, digest) {
		return false
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.differs.IsZero() {
		p.differs = now
	}
	return now.Sub(p.differs) < settleTime
}

func (p *Publisher) show(doc *published, agrees bool) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.current = doc
	if agrees {
		p.differs = time.Time{}
	}
}

// Document returns what is shown and its number; nil: nothing is yet.
func (p *Publisher) Document() (doc []byte, sequence uint64) {
	p.mu.Lock()
	defer p.mu.Unlock()
	if p.current == nil {
		return nil, 0
	}
	return p.current.Document, p.current.Sequence
}

// Known reports from when on other trust domains that ask as often as they are
// told have the given roots, and false when they are not all shown. Three
// chances are theirs, of which they may miss two.
func (p *Publisher) Known(roots []*x509.Certificate) (from time.Time, shown bool) {
	p.mu.Lock()
	doc := p.current
	p.mu.Unlock()
	if doc == nil {
		return time.Time{}, false
	}
	b, err := bundle.Parse(p.TrustDomain, doc.Document)
	if err != nil {
		return time.Time{}, false
	}
	for _, root := range roots {
		if !slices.ContainsFunc(b.Roots, root.Equal) {
			return time.Time{}, false
		}
	}
	return doc.Since.Add(3 * p.RefreshHint), true
}
