package conformance

import (
	"context"
	"crypto"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"strconv"
	"time"
)

var bundleDocumentChecks = []check{
	{Check{"bundle-set", docBundle, "4, 4.1.3", Must, "a bundle is a JWK set in UTF-8, with keys"}, checkSet},
	{Check{"bundle-kty", docBundle, "4.2.1", Must, "kty is set"}, eachBundleKey("", checkKty)},
	{Check{"bundle-use", docBundle, "4.2.2", Must, "use is set, to one that there is"}, eachBundleKey("", checkUse)},
	{Check{"bundle-x5c", docX509, "6.1", Must, "a key of X509-SVIDs has exactly one certificate in x5c, of an authority"}, eachBundleKey("x509-svid", checkX5C)},
	{Check{"bundle-x509-kid", docX509, "6.1", Must, "a key of X509-SVIDs has no kid"}, eachBundleKey("x509-svid", checkNoKid)},
	{Check{"bundle-jwt-kid", docJWT, "6.1", Must, "a key of JWT-SVIDs has a kid"}, eachBundleKey("jwt-svid", checkKid)},
	{Check{"bundle-keys", docBundle, "4.2", Must, "keys are public, and can be read"}, eachBundleKey("", checkPublic)},
	{Check{"bundle-sequence", docBundle, "4.1.1", Must, "spiffe_sequence, if it is there, is an integer, and rises when the bundle changes and not otherwise"}, checkSequence},
	{Check{"bundle-sequence-there", docBundle, "4.1.1", Should, "spiffe_sequence is there"}, there("spiffe_sequence")},
	{Check{"bundle-hint", docBundle, "4.1.2", Must, "spiffe_refresh_hint, if it is there, is a whole number of seconds"}, checkRefreshHint},
	{Check{"bundle-hint-there", docBundle, "4.1.2", Should, "spiffe_refresh_hint is there"}, there("spiffe_refresh_hint")},
	{Check{"bundle-complete", docFederation, "4.1", Must, "what proves the caller's X509-SVIDs and JWT-SVIDs is in the bundle"}, checkComplete},
}

func checkSet(ctx context.Context, s *session) (string, error) {
	f, err := s.answered(ctx)
	if err != nil {
		return "", err
	}
	_, keys, err := parseSet(f.body)
	return fmt.Sprintf("%d keys", len(keys)), err
}

// bundle returns the members of the bundle, and its keys.
func (s *session) bundle(ctx context.Context) (map[string]any, []jwk, error) {
	f, err := s.answered(ctx)
	if err != nil {
		return nil, nil, err
	}
	set, keys, err := parseSet(f.body)
	if err != nil {
		return nil, nil, skip("the bundle cannot be read; see bundle-set")
	}
	return set, keys, nil
}

// eachBundleKey makes a check of a question about one key; of one use, or of all.
func eachBundleKey(use string, ask func(jwk) error) func(context.Context, *session) (string, error) {
	return func(ctx context.Context, s *session) (string, error) {
		_, keys, err := s.bundle(ctx)
		if err != nil {
			return "", err
		}
		if use != "" {
			keys = with(keys, use)
		}
		if len(keys) == 0 {
			return "", skip("there is no such key")
		}
		for i, k := range keys {
			if err := ask(k); err != nil {
				return "", fmt.Errorf("key %d: %w", i+1, err)
			}
		}
		return fmt.Sprintf("%d keys", len(keys)), nil
	}
}

func checkKty(k jwk) error {
	if k.text("kty") == "" {
		return errors.New("it is not")
	}
	return nil
}

func checkUse(k jwk) error {
	if use := k.text("use"); use != "x509-svid" && use != "jwt-svid" && use != "wit-svid" {
		return fmt.Errorf("it is %q", use)
	}
	return nil
}

func checkX5C(k jwk) error {
	c, err := k.certificate()
	if err == nil && !c.IsCA {
		err = errors.New("the certificate in x5c is of no authority")
	}
	return err
}

func checkNoKid(k jwk) error {
	if kid, there := k["kid"]; there {
		return fmt.Errorf("it is %v", kid)
	}
	return nil
}

func checkKid(k jwk) error {
	if k.text("kid") == "" {
		return errors.New("it has none")
	}
	return nil
}

func checkPublic(k jwk) error {
	if secret := k.secret(); secret != "" {
		return fmt.Errorf("it has %s, which is not public", secret)
	}
	if k.text("kty") == "" {
		return skip("kty is not set; see bundle-kty")
	}
	_, err := k.public()
	return err
}

func integer(v any) (int64, error) {
	n, ok := v.(json.Number)
	if !ok {
		return 0, fmt.Errorf("it is %v", v)
	}
	i, err := strconv.ParseInt(n.String(), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("it is %s", n)
	}
	return i, nil
}

func checkSequence(ctx context.Context, s *session) (string, error) {
	set, _, err := s.bundle(ctx)
	if err != nil {
		return "", err
	}
	v, ok := set["spiffe_sequence"]
	if !ok {
		return "", skip("it is not there")
	}
	n, err := integer(v)
	if err != nil {
		return "", err
	}
	f, err := s.answered(ctx)
	if err != nil {
		return "", err
	}
	next, _, err := parseSet(f.again)
	if err != nil {
		return "", fmt.Errorf("the second time: %w", err)
	}
	m, err := integer(next["spiffe_sequence"])
	same := content(set) == content(next)
	switch {
	case err != nil:
		return "", fmt.Errorf("the second time: %w", err)
	case m < n:
		return "", fmt.Errorf("it falls from %d to %d", n, m)
	case m == n && !same:
		return "", fmt.Errorf("it stays %d, and the bundle has changed", n)
	}
	return strconv.FormatInt(n, 10), nil
}

// content is a bundle as text, whatever the order of its keys and members.
func content(set map[string]any) string {
	var keys []string
	list, _ := set["keys"].([]any)
	for _, k := range list {
		keys = append(keys, part(k))
	}
	slices.Sort(keys)
	return part(changed(set, map[string]any{"keys": keys}))
}

func checkRefreshHint(ctx context.Context, s *session) (string, error) {
	set, _, err := s.bundle(ctx)
	if err != nil {
		return "", err
	}
	v, ok := set["spiffe_refresh_hint"]
	if !ok {
		return "", skip("it is not there")
	}
	n, err := integer(v)
	if err == nil && n < 0 {
		err = fmt.Errorf("it is %d", n)
	}
	return (time.Duration(n) * time.Second).String(), err
}

// there makes a check of whether a bundle has a member.
func there(name string) func(context.Context, *session) (string, error) {
	return func(ctx context.Context, s *session) (string, error) {
		set, _, err := s.bundle(ctx)
		if err != nil {
			return "", err
		}
		if _, ok := set[name]; !ok {
			return "", errors.New("it is not")
		}
		return "it is", nil
	}
}

// checkComplete compares the bundle with what the Workload API has of the same
// trust domain.
func checkComplete(ctx context.Context, s *session) (string, error) {
	_, keys, err := s.bundle(ctx)
	if err != nil {
		return "", err
	}
	if err := s.hasEndpoint(); err != nil {
		return "", err
	}
	svids, err := s.served(ctx)
	if err != nil {
		return "", err
	}
	var roots []*x509.Certificate
	for _, k := range with(keys, "x509-svid") {
		c, err := k.certificate()
		if err != nil {
			return "", skip("a root cannot be read; see bundle-x5c")
		}
		roots = append(roots, c)
	}
	for _, svid := range svids {
		certs, err := x509.ParseCertificates(svid.GetX509Svid())
		if err != nil || len(certs) == 0 || checkVerifies(leaf{svid, certs}) != nil {
			continue // judged by others
		}
		if err := verify(certs, roots); err != nil {
			return "", fmt.Errorf("%s: %w", svid.GetSpiffeId(), err)
		}
	}
	tokens, err := s.tokens(ctx)
	if err != nil {
		return fmt.Sprintf("%d X509-SVIDs; no tokens were looked at", len(svids)), nil //nolint:nilerr // judged by others
	}
	var signers []crypto.PublicKey
	for _, k := range with(keys, "jwt-svid") {
		key, err := k.public()
		if err != nil {
			return "", skip("a key of JWT-SVIDs cannot be read; see bundle-kty and bundle-keys")
		}
		signers = append(signers, key)
	}
	for _, t := range tokens {
		if checkAlg(t) != nil {
			continue // judged by jwt-alg
		}
		if !slices.ContainsFunc(signers, func(key crypto.PublicKey) bool { return t.signedBy(key) == nil }) {
			return "", fmt.Errorf("%s: no key of the bundle signed its token", t.svid.GetSpiffeId())
		}
	}
	return fmt.Sprintf("%d X509-SVIDs, %d tokens", len(svids), len(tokens)), nil
}
