package conformance

import (
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"maps"
	"slices"
)

var authorityChecks = []check{
	{Check{"authority-ca", docX509, "4.1", Must, "cA is true in every signing certificate"}, eachAuthority(checkAuthorityCA)},
	{Check{"authority-key-usage", docX509, "4.3", Must, "key usage of a signing certificate is critical, and has keyCertSign"}, eachAuthority(checkAuthorityUsage)},
	{Check{"authority-id", docX509, "3.2", Must, "the SPIFFE ID of a signing certificate, if it has one, has no path"}, eachAuthority(checkAuthorityID)},
	{Check{"authority-svid", docX509, "3.2", Should, "a root carries the SPIFFE ID of its trust domain"}, checkRootID},
}

// x509BundleChecks are about FetchX509Bundles, and the bundles of others.
var x509BundleChecks = []check{
	{Check{"x509-bundles-own", docAPI, "5.2.2", Must, "FetchX509Bundles has the bundle of the server's trust domain, and it proves the caller's X509-SVIDs"}, checkOwnBundle},
	{Check{"x509-bundles-names", docAPI, "5.1", Must, "bundles are under the SPIFFE ID of their trust domain"}, checkBundleNames},
	{Check{"x509-bundles-der", docAPI, "5.1", Must, "bundles are certificates in DER, one after the other"}, checkBundlesDER},
}

// roots are those that come with the caller's SVIDs.
func (s *session) roots(ctx context.Context) ([]*x509.Certificate, error) {
	svids, err := s.served(ctx)
	if err != nil {
		return nil, err
	}
	var out []*x509.Certificate
	for _, svid := range svids {
		certs, err := x509.ParseCertificates(svid.GetBundle())
		if err != nil || len(certs) == 0 {
			return nil, skip("a bundle cannot be read; see x509-bundle-der")
		}
		for _, c := range certs {
			if !slices.ContainsFunc(out, c.Equal) {
				out = append(out, c)
			}
		}
	}
	return out, nil
}

// eachAuthority makes a check of a question about one signing certificate: the
// roots, and what stands in chains between them and the leaves.
func eachAuthority(ask func(*x509.Certificate) error) func(context.Context, *session) (string, error) {
	return func(ctx context.Context, s *session) (string, error) {
		all, err := s.roots(ctx)
		if err != nil {
			return "", err
		}
		svids, err := s.served(ctx)
		if err != nil {
			return "", err
		}
		for _, svid := range svids {
			certs, err := x509.ParseCertificates(svid.GetX509Svid())
			if err != nil || len(certs) == 0 {
				return "", skip("a certificate cannot be read; see x509-chain-der")
			}
			for _, c := range certs[1:] {
				if !slices.ContainsFunc(all, c.Equal) {
					all = append(all, c)
				}
			}
		}
		err = each(all, func(c *x509.Certificate) string {
			return fmt.Sprintf("%q, serial number %x", c.Subject, c.SerialNumber)
		}, ask)
		return fmt.Sprintf("%d signing certificates", len(all)), err
	}
}

func checkAuthorityCA(c *x509.Certificate) error {
	if !c.BasicConstraintsValid || !c.IsCA {
		return errors.New("it is not")
	}
	return nil
}

func checkAuthorityUsage(c *x509.Certificate) error {
	if err := criticalUsage(c); err != nil {
		return err
	}
	if c.KeyUsage&x509.KeyUsageCertSign == 0 {
		return errors.New("keyCertSign is not set")
	}
	return nil
}

func checkAuthorityID(c *x509.Certificate) error {
	names, err := uriNames(c)
	if err != nil || len(names) == 0 {
		return err
	}
	if len(names) > 1 {
		return fmt.Errorf("it has %d URI names: %q", len(names), names)
	}
	id, err := parseID(names[0])
	if err == nil && id.path != "" {
		err = fmt.Errorf("it is %s", id)
	}
	return err
}

func checkRootID(ctx context.Context, s *session) (string, error) {
	roots, err := s.roots(ctx)
	if err != nil {
		return "", err
	}
	domain, err := s.domain(ctx)
	if err != nil {
		return "", err
	}
	for _, c := range roots {
		names, err := uriNames(c)
		if err != nil {
			return "", err
		}
		if len(names) == 0 {
			return "", fmt.Errorf("%q has no SPIFFE ID", c.Subject)
		}
		if id, err := parseID(names[0]); err == nil && id.domain != domain {
			return "", fmt.Errorf("%q is of %s", c.Subject, id)
		}
	}
	return fmt.Sprintf("%d roots", len(roots)), nil
}

func checkOwnBundle(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	svids, err := s.served(ctx)
	if err != nil {
		return "", err
	}
	domain, err := s.domain(ctx)
	if err != nil {
		return "", err
	}
	m, err := s.fetchBundles(ctx)
	if err != nil {
		return "", fmt.Errorf("FetchX509Bundles ends with %s", describe(err))
	}
	der, ok := m.GetBundles()["spiffe://"+domain]
	if !ok {
		for name := range m.GetBundles() {
			if id, err := parseID(name); err != nil || id.path != "" {
				return "", skip("bundles have other names than they should; see x509-bundles-names")
			}
		}
		return "", fmt.Errorf("it has bundles of %q, and none of spiffe://%s", slices.Sorted(maps.Keys(m.GetBundles())), domain)
	}
	roots, err := x509.ParseCertificates(der)
	if err != nil {
		return "", skip("it cannot be read; see x509-bundles-der")
	}
	for _, svid := range svids {
		certs, err := x509.ParseCertificates(svid.GetX509Svid())
		if id, idErr := parseID(svid.GetSpiffeId()); err != nil || len(certs) == 0 || idErr != nil || id.domain != domain {
			continue // judged by others
		}
		if verify(certs, roots) == nil || checkVerifies(leaf{svid, certs}) != nil {
			continue // one that nothing proves is judged by x509-verifies
		}
		return "", fmt.Errorf("it does not prove %s", svid.GetSpiffeId())
	}
	return fmt.Sprintf("%d roots", len(roots)), nil
}

// allBundles are those of both streams, by the name under which they are.
func (s *session) allBundles(ctx context.Context) (map[string][][]byte, error) {
	if err := s.open(ctx); err != nil {
		return nil, err
	}
	m, err := s.fetchBundles(ctx)
	if err != nil {
		return nil, skip("no bundles were served; see x509-bundles-own")
	}
	out := map[string][][]byte{}
	add := func(bundles map[string][]byte) {
		for name, der := range bundles {
			out[name] = append(out[name], der)
		}
	}
	add(m.GetBundles())
	if x, err := s.fetchX509(ctx); err == nil {
		add(x.GetFederatedBundles())
	}
	return out, nil
}

func checkBundleNames(ctx context.Context, s *session) (string, error) {
	all, err := s.allBundles(ctx)
	if err != nil {
		return "", err
	}
	return domainNames(slices.Sorted(maps.Keys(all)))
}

func domainNames(names []string) (string, error) {
	for _, name := range names {
		id, err := parseID(name)
		if err == nil && id.path != "" {
			err = fmt.Errorf("%q has a path", name)
		}
		if err != nil {
			return "", err
		}
	}
	return fmt.Sprintf("%q", names), nil
}

func checkBundlesDER(ctx context.Context, s *session) (string, error) {
	all, err := s.allBundles(ctx)
	if err != nil {
		return "", err
	}
	for name, bundles := range all {
		for _, der := range bundles {
			if err := checkCertificates(der); err != nil {
				return "", fmt.Errorf("%s: %w", name, err)
			}
		}
	}
	return fmt.Sprintf("of %d trust domains", len(all)), nil
}
