//go:build cgo

package pkcs11

import (
	"errors"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"sync"
	"time"

	p11 "github.com/miekg/pkcs11"

	"github.com/signet-mesh/signet/ca"
)

// token implements ca.RootKeys. Each call begins and ends its own session: the root
// signs a few times a month, meanwhile nobody is logged in, and a token that was
// away needs no care when it is back.
type token struct {
	Config
	log *slog.Logger

	turn   chan struct{} // holds one while a call is under way, however long it takes
	module *p11.Ctx      // guarded by turn; nil until the library is loaded

	mu    sync.Mutex
	hangs time.Time // guarded by mu; since when a call has been given up; zero: none has
}

// Open returns the keys in a token. The token is called when a key is used.
func Open(cfg Config) (ca.RootKeys, error) {
	if err := cfg.URI.CheckFiles(); err != nil {
		return nil, err
	}
	return open(cfg), nil
}

func open(cfg Config) *token {
	if cfg.signTime == 0 {
		cfg.signTime = defaultSignTime
	}
	if cfg.makeTime == 0 {
		cfg.makeTime = defaultMakeTime
	}
	if cfg.Log == nil {
		cfg.Log = slog.New(slog.DiscardHandler)
	}
	return &token{Config: cfg, log: cfg.Log, turn: make(chan struct{}, 1)}
}

func (t *token) String() string { return t.URI.String() }

// call runs f in a session, and gives up after limit. The library cannot be
// interrupted: what was given up keeps its turn until it comes back, and meanwhile
// others fail at once.
func call[T any](t *token, limit time.Duration, write bool, f func(*session) (T, error)) (out T, err error) {
	type result struct {
		value T
		err   error
	}
	if err := t.hanging(); err != nil {
		return out, err
	}
	timer := time.NewTimer(limit)
	defer timer.Stop()
	select {
	case t.turn <- struct{}{}:
	case <-timer.C:
		if err := t.hanging(); err != nil {
			return out, err
		}
		return out, fmt.Errorf("%w within %s: others are before this call", ErrHangs, limit)
	}
	done := make(chan result, 1)
	go func() {
		var r result
		r.err = t.session(write, func(s *session) (err error) { r.value, err = f(s); return err })
		t.mu.Lock()
		if !t.hangs.IsZero() {
			t.log.Warn("the token answers again", "after", time.Since(t.hangs).Round(time.Millisecond).String())
		}
		t.hangs = time.Time{}
		done <- r // before mu is given up: whoever gives up now sees it
		t.mu.Unlock()
		<-t.turn
	}()
	select {
	case r := <-done:
		return r.value, r.err
	case <-timer.C:
	}
	t.mu.Lock()
	defer t.mu.Unlock()
	select {
	case r := <-done:
		return r.value, r.err
	default:
	}
	t.hangs = time.Now()
	return out, fmt.Errorf("%w within %s", ErrHangs, limit)
}

func (t *token) hanging() error {
	t.mu.Lock()
	defer t.mu.Unlock()
	if t.hangs.IsZero() {
		return nil
	}
	return fmt.Errorf("%w: a call has been waiting since %s", ErrHangs, t.hangs.UTC().Format(time.RFC3339))
}

// session is one login to the token. It belongs to one goroutine.
type session struct {
	*p11.Ctx
	slot   uint
	handle p11.SessionHandle
}

// session logs in, runs f and logs out.
func (t *token) session(write bool, f func(*session) error) (err error) {
	if err := t.URI.CheckFiles(); err != nil {
		return err
	}
	pin, err := readPIN(t.URI.PINSource)
	if err != nil {
		return fmt.Errorf("pin-source: %w", err)
	}
	if t.module == nil {
		if t.module = p11.New(t.URI.ModulePath); t.module == nil {
			return fmt.Errorf("module-path: %s cannot be loaded as a PKCS#11 library", t.URI.ModulePath)
		}
	}
	s := &session{Ctx: t.module}
	if err := s.Initialize(); err != nil && err != p11.Error(p11.CKR_CRYPTOKI_ALREADY_INITIALIZED) {
		return fmt.Errorf("initialize %s: %w", t.URI.ModulePath, err)
	}
	defer func() { _ = s.Finalize() }() // an error has no remedy; the next call begins anew
	info, err := s.find(t.URI)
	if err != nil {
		return err
	}
	name := info.Label + " " + info.SerialNumber
	if err := checkFlags(info); err != nil {
		return err
	}
	if err := checkRefused(t.RefusedFile, name, t.URI.PINSource, pin); err != nil {
		return err
	}
	flags := uint(p11.CKF_SERIAL_SESSION)
	if write {
		flags |= p11.CKF_RW_SESSION
	}
	if s.handle, err = s.OpenSession(s.slot, flags); err != nil {
		return fmt.Errorf("open a session with the token %q: %w", info.Label, err)
	}
	defer func() { _ = s.CloseSession(s.handle) }()
	if err := s.Login(s.handle, p11.CKU_USER, pin); err != nil && err != p11.Error(p11.CKR_USER_ALREADY_LOGGED_IN) {
		return t.refused(err, name, pin)
	}
	if err := os.Remove(t.RefusedFile); err != nil && !errors.Is(err, os.ErrNotExist) {
		return err
	}
	defer func() { _ = s.Logout(s.handle) }()
	return f(s)
}

// refused explains why the token lets nobody in. A wrong PIN is remembered.
func (t *token) refused(err error, token, pin string) error {
	switch err {
	case p11.Error(p11.CKR_PIN_INCORRECT), p11.Error(p11.CKR_PIN_INVALID), p11.Error(p11.CKR_PIN_LEN_RANGE):
		out := fmt.Errorf("the token refuses the PIN in %s (%w); write the right one into it: a token locks itself after a few wrong ones (%w)", t.URI.PINSource, err, ca.ErrNoRetry)
		if err := noteRefused(t.RefusedFile, token, pin); err != nil {
			return errors.Join(out, fmt.Errorf("remember that: %w", err))
		}
		return out
	case p11.Error(p11.CKR_PIN_EXPIRED), p11.Error(p11.CKR_PIN_LOCKED), p11.Error(p11.CKR_USER_PIN_NOT_INITIALIZED):
		return fmt.Errorf("log in to the token: %w; have its security officer set a PIN (%w)", err, ca.ErrNoRetry)
	}
	return fmt.Errorf("log in to the token: %w", err)
}

// checkFlags leaves a token alone that a wrong PIN would lock, or has.
func checkFlags(info p11.TokenInfo) error {
	switch {
	case info.Flags&p11.CKF_USER_PIN_LOCKED != 0:
		return fmt.Errorf("the token %q is locked after wrong PINs; have its security officer set a PIN (%w)", info.Label, ca.ErrNoRetry)
	case info.Flags&p11.CKF_USER_PIN_FINAL_TRY != 0:
		return fmt.Errorf("the token %q locks itself at the next wrong PIN; log in by hand with the right one first, such as with pkcs11-tool --login --list-objects (%w)", info.Label, ca.ErrNoRetry)
	case info.Flags&p11.CKF_USER_PIN_INITIALIZED == 0:
		return fmt.Errorf("the token %q has no PIN for users yet; have its security officer set one (%w)", info.Label, ca.ErrNoRetry)
	}
	return nil
}

// find finds the one slot whose token is meant.
func (s *session) find(u URI) (found p11.TokenInfo, err error) {
	slots, err := s.GetSlotList(true)
	if err != nil {
		return found, fmt.Errorf("list the tokens: %w", err)
	}
	var others []string
	matches := 0
	for _, slot := range slots {
		info, err := s.GetTokenInfo(slot)
		if err != nil || info.Flags&p11.CKF_TOKEN_INITIALIZED == 0 {
			continue // one that is not for use; another may be the one that is meant
		}
		if !is(u.Token, info.Label) || !is(u.Serial, info.SerialNumber) || !is(u.Model, info.Model) || !is(u.Manufacturer, info.ManufacturerID) {
			others = append(others, fmt.Sprintf("%q (serial %s)", info.Label, info.SerialNumber))
			continue
		}
		matches++
		s.slot, found = slot, info
	}
	switch {
	case matches > 1:
		return found, fmt.Errorf("%d tokens match %s; add serial=", matches, u)
	case matches == 0 && len(others) > 0:
		return found, fmt.Errorf("no token matches %s; there are %s", u, strings.Join(others, ", "))
	case matches == 0:
		return found, fmt.Errorf("no token is there that matches %s", u)
	}
	return found, nil
}

// is compares a name that a token has, which blanks fill up, with a wanted one.
func is(want, have string) bool { return want == "" || want == strings.TrimRight(have, " \x00") }
