package svid

import (
	"context"
	"errors"
	"fmt"
	"math/bits"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/internal/jwtcheck"
)

// JWTIssuer asks the control plane for a JWT-SVID of a workload
// ("namespace/name") on this node. It is called from several goroutines at once
// and must return when ctx ends.
type JWTIssuer interface {
	IssueJWT(ctx context.Context, workload string, audience []string) (token string, err error)
}

// Errors of Manager.JWT. Any other is the issuer's, or about its answer.
var (
	// ErrNotHeld: the identity is not one of this node's workloads.
	ErrNotHeld = errors.New("svid: no workload on this node has the identity")
	// ErrQuarantined: the identity is cut off.
	ErrQuarantined = errors.New("svid: the identity is quarantined")
	// ErrTooMany: the identity asks for more tokens than it may.
	ErrTooMany = errors.New("svid: the identity asks for too many tokens")
)

// Bounds of what one identity may take up.
const (
	maxTokens  = 256 // kept
	tokenRate  = 20  // asked for, in a second
	tokenBurst = 200
)

// tokenAttempt bounds one request for a token: somebody waits for it.
const tokenAttempt = 5 * time.Second

// JWT is one JWT-SVID. It is immutable.
type JWT struct {
	ID       spiffeid.ID
	Audience []string
	// Token is a JWS in compact serialization. Whoever holds it can use it.
	Token     string
	KeyID     string
	Number    string // its jti; empty: it has none
	ExpiresAt time.Time
	// RenewAt is from when on the next one is asked for.
	RenewAt time.Time
}

// slot is the token of one identity for one list of audiences. The fields but
// turn are guarded by Manager.mu.
type slot struct {
	turn     chan struct{} // holds one: whoever asks the issuer
	token    *JWT          // nil: none yet
	used     time.Time
	retryAt  time.Time // no attempt before; zero: at once
	failures int       // in a row
}

// JWT returns a token of an identity for the audiences, in this order. One that
// is less than half through its life is given again; after that the next one is
// asked for, and while that fails the present one is given until it expires.
func (m *Manager) JWT(ctx context.Context, id spiffeid.ID, audience []string) (*JWT, error) {
	token, s, h, err := m.heldToken(id, audience)
	if err != nil || s == nil {
		return token, err
	}
	if token != nil { // good for now: nobody has to wait behind another
		select {
		case s.turn <- struct{}{}:
		default:
			return token, nil
		}
	} else {
		select {
		case s.turn <- struct{}{}:
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
	defer func() { <-s.turn }()
	// Another caller may have had its turn meanwhile.
	m.mu.Lock()
	now := m.now()
	if current := m.usable(s, now); current != nil && now.Before(current.RenewAt) {
		m.mu.Unlock()
		return current, nil
	}
	m.mu.Unlock()
	if !h.tokenRate.AllowN(now, 1) {
		err = ErrTooMany
	} else {
		var next *JWT
		if next, err = m.obtainToken(ctx, h, audience); err == nil {
			m.settleToken(h, s, next, nil)
			return next, nil
		}
	}
	if ctx.Err() == nil {
		m.settleToken(h, s, nil, err)
	}
	if token != nil && m.now().Before(token.ExpiresAt) {
		return token, nil
	}
	return nil, err
}

// heldToken returns the token that is held, if it is good, and a nil slot when
// the issuer need not be asked.
func (m *Manager) heldToken(id spiffeid.ID, audience []string) (*JWT, *slot, *holder, error) {
	now := m.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	h := m.holders[id]
	switch {
	case h == nil:
		return nil, nil, nil, ErrNotHeld
	case m.cutOff.has(id):
		return nil, nil, nil, ErrQuarantined
	case m.jwtIssuer == nil:
		return nil, nil, nil, errors.New("svid: tokens are not issued here")
	}
	s := h.slot(audience, now)
	token := m.usable(s, now)
	if token != nil && (now.Before(token.RenewAt) || now.Before(s.retryAt)) {
		return token, nil, nil, nil
	}
	return token, s, h, nil
}

// usable returns the token of a slot unless it has expired, its key has been
// withdrawn, or it is revoked. The caller holds mu.
func (m *Manager) usable(s *slot, now time.Time) *JWT {
	t := s.token
	if t == nil || !now.Before(t.ExpiresAt) || !m.jwtKeys.HasJWTAuthority(t.KeyID) {
		return nil
	}
	if m.revoked != nil && m.revoked(t.Number) {
		return nil
	}
	return t
}

// slot returns the slot for audiences, making room where there is none. The
// caller holds Manager.mu.
func (h *holder) slot(audience []string, now time.Time) *slot {
	var key strings.Builder
	for _, a := range audience {
		key.WriteString(strconv.Quote(a))
	}
	s := h.tokens[key.String()]
	if s == nil {
		if len(h.tokens) >= maxTokens {
			h.dropToken(now)
		}
		if h.tokens == nil {
			h.tokens = map[string]*slot{}
		}
		s = &slot{turn: make(chan struct{}, 1)}
		h.tokens[key.String()] = s
	}
	s.used = now
	return s
}

// dropToken forgets what has expired, and otherwise what was not used for
// longest. Whoever is about to fill it gets its token all the same.
func (h *holder) dropToken(now time.Time) {
	oldest := ""
	for key, s := range h.tokens {
		if s.token == nil || !now.Before(s.token.ExpiresAt) {
			oldest = key
			break
		}
		if oldest == "" || s.used.Before(h.tokens[oldest].used) {
			oldest = key
		}
	}
	delete(h.tokens, oldest)
}

// obtainToken asks for a token and checks the answer.
func (m *Manager) obtainToken(ctx context.Context, h *holder, audience []string) (*JWT, error) {
	m.mu.Lock()
	workloads := h.workloads
	m.mu.Unlock()
	ctx, cancel := context.WithTimeout(ctx, tokenAttempt)
	defer cancel()
	var token string
	var err error
	// Of several workloads with the identity one may be gone already.
	for _, workload := range workloads[:min(len(workloads), 3)] {
		if token, err = m.jwtIssuer.IssueJWT(ctx, workload, audience); status.Code(err) != codes.PermissionDenied {
			break
		}
	}
	if err != nil {
		return nil, fmt.Errorf("ask for a token of %s: %w", h.id, err)
	}
	checked, err := jwtcheck.Validate(token, audience[0], m.JWTBundle())
	switch {
	case err != nil:
		return nil, fmt.Errorf("the issuer's answer for %s is refused: %w", h.id, err)
	case checked.ID != h.id:
		return nil, fmt.Errorf("the issuer's answer for %s is refused: the token is of %s", h.id, checked.ID)
	case !slices.Equal(checked.Audience, audience):
		return nil, fmt.Errorf("the issuer's answer for %s is refused: the token is for %q, asked for was %q", h.id, checked.Audience, audience)
	}
	now := m.now()
	number, _ := checked.Claims["jti"].(string)
	return &JWT{
		ID: h.id, Audience: checked.Audience, Token: token, KeyID: checked.KeyID, Number: number,
		ExpiresAt: checked.ExpiresAt, RenewAt: renewAt(now, checked.ExpiresAt, m.jitter()),
	}, nil
}

// settleToken records the outcome of an attempt.
func (m *Manager) settleToken(h *holder, s *slot, next *JWT, err error) {
	now := m.now()
	m.mu.Lock()
	defer m.mu.Unlock()
	if err == nil {
		s.token, s.failures, s.retryAt = next, 0, time.Time{}
		return
	}
	s.failures++
	var remaining time.Duration
	if s.token != nil {
		remaining = s.token.ExpiresAt.Sub(now)
	}
	s.retryAt = now.Add(backoff(s.failures, remaining, m.jitter()))
	if bits.OnesCount(uint(s.failures)) == 1 {
		m.log.Warn("obtaining a token failed", "id", h.id, "failures", s.failures, "remaining", remaining, "error", err)
	}
}

// cutOff is State.Quarantined.
type cutOff func(spiffeid.ID) (string, bool)

func (f cutOff) has(id spiffeid.ID) bool {
	if f == nil {
		return false
	}
	_, cut := f(id)
	return cut
}

// Quarantined reports whether an identity, of this node or another, is cut off.
func (m *Manager) Quarantined(id spiffeid.ID) bool {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.cutOff.has(id)
}

// RevokedToken reports whether the claims of a token say that it is one that is
// revoked.
func (m *Manager) RevokedToken(claims map[string]any) bool {
	number, ok := claims["jti"].(string)
	m.mu.Lock()
	defer m.mu.Unlock()
	return ok && m.revoked != nil && m.revoked(number)
}

// JWTBundle returns the keys that verify the trust domain's tokens. It is
// shared and must not be edited.
func (m *Manager) JWTBundle() *jwtbundle.Bundle {
	m.mu.Lock()
	defer m.mu.Unlock()
	return m.jwtKeys
}
