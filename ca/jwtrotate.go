package ca

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"slices"
	"time"
)

// JWTKey is a public key that verifies JWT-SVIDs.
type JWTKey struct {
	// ID is the kid of the tokens.
	ID  string
	Key crypto.PublicKey // *ecdsa.PublicKey, P-256
}

// How often the store is looked at.
const (
	maxJWTPoll   = time.Minute // others may have stored a key
	minJWTPoll   = 200 * time.Millisecond
	jwtStoreTime = 10 * time.Second // for one access
)

// JWTKeys returns the keys that verify JWT-SVIDs, also those that do not sign
// yet or any more, and a channel that is closed when they are no longer
// current. There are none before the store of the keys could be read.
func (a *Authority) JWTKeys() ([]JWTKey, <-chan struct{}) {
	a.jwtMu.Lock()
	defer a.jwtMu.Unlock()
	out := make([]JWTKey, len(a.jwtKeys))
	for i, k := range a.jwtKeys {
		out[i] = JWTKey{ID: k.id, Key: &k.key.PublicKey}
	}
	return out, a.jwtChanged
}

// KeepJWTKeys rotates the keys that sign JWT-SVIDs, and takes up what other
// replicas have stored, until ctx ends. Each key is published a quarter of its
// life before it signs, and stays until no token of it can be valid. While the
// store is away the present keys stay in use.
func (a *Authority) KeepJWTKeys(ctx context.Context) {
	failures := 0
	for {
		now := a.now()
		a.jwtMu.Lock()
		wait := a.jwtKeys.due(now, a.jwtKeyLife).Sub(now)
		a.jwtMu.Unlock()
		wait = min(wait, maxJWTPoll, publishAhead(a.jwtKeyLife)/4)
		if failures > 0 {
			wait = min(wait, time.Second<<min(failures-1, 5))
		}
		timer := time.NewTimer(max(wait, minJWTPoll))
		select {
		case <-ctx.Done():
			timer.Stop()
			return
		case <-timer.C:
		}
		err := a.turnJWTKeys(ctx)
		switch {
		case ctx.Err() != nil:
			return
		case err != nil:
			failures++
			a.log.Error("the JWT keys cannot be looked after; those in use stay, and it is tried again", "err", err, "failures", failures)
		default:
			failures = 0
		}
	}
}

// turnJWTKeys reads the stored keys, adds and removes what is due, and takes
// the result into use once it is stored.
func (a *Authority) turnJWTKeys(ctx context.Context) error {
	ctx, cancel := context.WithTimeout(ctx, jwtStoreTime)
	defer cancel()
	for {
		data, version, err := a.jwtStore.Load(ctx)
		if err != nil {
			return fmt.Errorf("load the JWT keys: %w", err)
		}
		var stored ring
		if len(data) > 0 {
			if stored, err = decodeRing(data, a.td); err != nil {
				return fmt.Errorf("the stored JWT keys: %w", err)
			}
		} else {
			// At first there are none. Later somebody took them away, and the
			// tokens of those in use are still good.
			a.jwtMu.Lock()
			stored = a.jwtKeys
			a.jwtMu.Unlock()
		}
		next, err := stored.turn(a.now(), a.jwtKeyLife)
		if err != nil {
			return err
		}
		if len(data) == 0 || !slices.Equal(next, stored) {
			if data, err = next.encode(a.td); err != nil {
				return err
			}
			err = a.jwtStore.Save(ctx, data, version)
			if errors.Is(err, ErrJWTKeysChanged) {
				continue // another replica's keys are as good
			}
			if err != nil {
				return fmt.Errorf("store the JWT keys: %w", err)
			}
		}
		a.useJWTKeys(next)
		return nil
	}
}

// useJWTKeys takes keys that are stored into use.
func (a *Authority) useJWTKeys(next ring) {
	a.jwtMu.Lock()
	defer a.jwtMu.Unlock()
	same := func(x, y *jwtKey) bool { return x.id == y.id && x.from.Equal(y.from) && x.notAfter.Equal(y.notAfter) }
	if slices.EqualFunc(a.jwtKeys, next, same) {
		return
	}
	for _, k := range next {
		if !slices.ContainsFunc(a.jwtKeys, func(o *jwtKey) bool { return o.id == k.id }) {
			a.log.Info("a JWT key is published", "kid", k.id, "signs_from", stamp(k.from))
		}
	}
	for _, k := range a.jwtKeys {
		if !slices.ContainsFunc(next, func(o *jwtKey) bool { return o.id == k.id }) {
			a.log.Info("a JWT key is retired", "kid", k.id)
		}
	}
	a.jwtKeys = next
	close(a.jwtChanged)
	a.jwtChanged = make(chan struct{})
}
