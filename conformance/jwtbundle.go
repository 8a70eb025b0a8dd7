package conformance

import (
	"context"
	"crypto"
	"errors"
	"fmt"
	"maps"
	"slices"
)

var jwtBundleChecks = []check{
	{Check{"jwt-bundles-own", docAPI, "6.2.2", Must, "FetchJWTBundles has the bundle of the server's trust domain"}, checkOwnKeys},
	{Check{"jwt-bundles-names", docAPI, "6.2.2", Must, "bundles are under the SPIFFE ID of their trust domain"}, checkKeyNames},
	{Check{"jwt-bundles-form", docAPI, "6.2.2", Must, "a bundle is a JWK set of public keys"}, checkKeySets},
	{Check{"jwt-bundles-use", docAPI, "6.2.2", Must, "there is no key with another use than JWT-SVIDs"}, eachKey(checkKeyUse)},
	{Check{"jwt-bundles-kid", docJWT, "6.1", Must, "each key has a kid, of its own"}, checkKids},
}

// keysOf returns those of a trust domain, by kid.
func (s *session) keysOf(ctx context.Context, domain string) (map[string]crypto.PublicKey, error) {
	m, err := s.fetchKeys(ctx)
	if err != nil {
		return nil, skip("no JWT bundles were served; see jwt-bundles-own")
	}
	raw, ok := m.GetBundles()["spiffe://"+domain]
	if !ok {
		return nil, skip("there is no JWT bundle of spiffe://%s; see jwt-bundles-own", domain)
	}
	_, list, err := parseSet(raw)
	if err != nil {
		return nil, skip("the JWT bundle cannot be read; see jwt-bundles-form")
	}
	out := map[string]crypto.PublicKey{}
	for _, k := range list {
		key, err := k.public()
		if err != nil {
			return nil, skip("a key of the JWT bundle cannot be read; see jwt-bundles-form")
		}
		if k.text("kid") == "" {
			return nil, skip("a key of the JWT bundle has no kid; see jwt-bundles-kid")
		}
		out[k.text("kid")] = key
	}
	return out, nil
}

func checkOwnKeys(ctx context.Context, s *session) (string, error) {
	if err := s.hasJWT(); err != nil {
		return "", err
	}
	if err := s.open(ctx); err != nil {
		return "", err
	}
	domain, err := s.domain(ctx)
	if err != nil {
		return "", err
	}
	m, err := s.fetchKeys(ctx)
	if err != nil {
		return "", fmt.Errorf("FetchJWTBundles ends with %s", describe(err))
	}
	if _, ok := m.GetBundles()["spiffe://"+domain]; ok {
		return fmt.Sprintf("%d bundles", len(m.GetBundles())), nil
	}
	if _, err := domainNames(slices.Collect(maps.Keys(m.GetBundles()))); err != nil {
		return "", skip("bundles have other names than they should; see jwt-bundles-names")
	}
	return "", fmt.Errorf("it has bundles of %q, and none of spiffe://%s", slices.Sorted(maps.Keys(m.GetBundles())), domain)
}

// keySets returns the bundles, at least one.
func (s *session) keySets(ctx context.Context) (map[string][]byte, error) {
	m, err := s.fetchKeys(ctx)
	var no *skipped
	switch {
	case errors.As(err, &no):
		return nil, err
	case err != nil || len(m.GetBundles()) == 0:
		return nil, skip("no JWT bundles were served; see jwt-bundles-own")
	}
	return m.GetBundles(), nil
}

func checkKeyNames(ctx context.Context, s *session) (string, error) {
	sets, err := s.keySets(ctx)
	if err != nil {
		return "", err
	}
	return domainNames(slices.Sorted(maps.Keys(sets)))
}

func checkKeySets(ctx context.Context, s *session) (string, error) {
	sets, err := s.keySets(ctx)
	if err != nil {
		return "", err
	}
	n := 0
	for name, raw := range sets {
		_, keys, err := parseSet(raw)
		if err != nil {
			return "", fmt.Errorf("%s: %w", name, err)
		}
		for i, k := range keys {
			if secret := k.secret(); secret != "" {
				return "", fmt.Errorf("%s: key %d has %s, which is not public", name, i+1, secret)
			}
			if _, err := k.public(); err != nil {
				return "", fmt.Errorf("%s: key %d: %w", name, i+1, err)
			}
			n++
		}
	}
	return fmt.Sprintf("%d keys", n), nil
}

// eachKey makes a check of a question about one key of a JWT bundle.
func eachKey(ask func(jwk) error) func(context.Context, *session) (string, error) {
	return func(ctx context.Context, s *session) (string, error) {
		sets, err := s.keySets(ctx)
		if err != nil {
			return "", err
		}
		n := 0
		for name, raw := range sets {
			_, keys, err := parseSet(raw)
			if err != nil {
				return "", skip("a bundle cannot be read; see jwt-bundles-form")
			}
			for i, k := range keys {
				if err := ask(k); err != nil {
					return "", fmt.Errorf("%s: key %d: %w", name, i+1, err)
				}
				n++
			}
		}
		return fmt.Sprintf("%d keys", n), nil
	}
}

// checkKeyUse takes a key without a use: a JWK set for verifiers that know nothing
// of SPIFFE may say none.
func checkKeyUse(k jwk) error {
	if use, there := k["use"]; there && use != "jwt-svid" {
		return fmt.Errorf("its use is %v", use)
	}
	if _, there := k["x5c"]; there {
		return errors.New("it has x5c, as keys of X509-SVIDs have")
	}
	return nil
}

func checkKids(ctx context.Context, s *session) (string, error) {
	sets, err := s.keySets(ctx)
	if err != nil {
		return "", err
	}
	for name, raw := range sets {
		_, keys, err := parseSet(raw)
		if err != nil {
			return "", skip("a bundle cannot be read; see jwt-bundles-form")
		}
		seen := map[string]bool{}
		for i, k := range keys {
			kid := k.text("kid")
			switch {
			case kid == "":
				return "", fmt.Errorf("%s: key %d has none", name, i+1)
			case seen[kid]:
				return "", fmt.Errorf("%s: two keys have %q", name, kid)
			}
			seen[kid] = true
		}
	}
	return fmt.Sprintf("%d bundles", len(sets)), nil
}
