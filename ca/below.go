package ca

import (
	"bytes"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
)

// Names in a RootStore of what stands below a root whose key is not here.
const (
	belowPrefix = "below-"
	askedFile   = "asked.key"
)

// maxAbove is how many authorities may stand between the intermediate and its
// root: with leaf and intermediate a chain is as long as peers read.
const maxAbove = 6

// errRootAbove is what a root that is an authority's above makes impossible.
var errRootAbove = errors.New("the root is that of an authority above, whose key is not here; it is replaced there, and a control plane that is not told of that authority cannot sign below it")

// chain is an intermediate and what stands above it, without the root.
func (p *pair) chain() []*x509.Certificate { return append([]*x509.Certificate{p.cert}, p.above...) }

func (p *pair) raw() [][]byte {
	var out [][]byte
	for _, c := range p.chain() {
		out = append(out, c.Raw)
	}
	return out
}

// ends is when the first of an intermediate, what stands above it and its root ends:
// authorities above may certify what outlives themselves.
func (p *pair) ends(root *x509.Certificate) time.Time {
	end := root.NotAfter
	for _, c := range p.chain() {
		if c.NotAfter.Before(end) {
			end = c.NotAfter
		}
	}
	return end
}

// checkedAt is when a stored root is looked at. That one of an authority above has
// expired must not keep the next from being put in its place.
func checkedAt(root *pair, now time.Time) time.Time {
	if root.key == nil {
		return root.cert.NotBefore
	}
	return now
}

// addBelow adds what is stored of roots without a key, and of what is asked for.
func (s rootSet) addBelow(files map[string][]byte) error {
	for name, of := range map[string]struct{ root, below *pair }{rootName: {s.signs, s.below}, nextRootName: {s.next, s.nextBelow}} {
		if of.below == nil {
			continue
		}
		key, err := encodeKey(of.below.key)
		if err != nil {
			return err
		}
		files[name+".crt"] = encodeCerts(of.root.cert)
		files[belowPrefix+name+".crt"], files[belowPrefix+name+".key"] = encodeCerts(of.below.chain()...), key
	}
	if s.asked != nil {
		key, err := encodeKey(s.asked)
		if err != nil {
			return err
		}
		files[askedFile] = key
	}
	return nil
}

// parseRoot reads a root with its key, or, where it has none, with the intermediate
// below it. Both are nil when neither is there.
func parseRoot(td spiffeid.TrustDomain, place, name string, files map[string][]byte, keys RootKeys) (root, below *pair, err error) {
	chain := files[belowPrefix+name+".crt"]
	if chain == nil {
		root, err = rootPair(place, name, files, keys)
		return root, nil, err
	}
	path, belowPath := filepath.Join(place, name+".crt"), filepath.Join(place, belowPrefix+name)
	if files[name+".key"] != nil || files[name+keyNameExt] != nil {
		return nil, nil, fmt.Errorf("%s: there is a key of this root and an intermediate from elsewhere; remove one of them", path)
	}
	certs, err := parseCerts(path, files[name+".crt"])
	if err != nil {
		return nil, nil, err
	}
	if len(certs) != 1 {
		return nil, nil, fmt.Errorf("%s: holds %d certificates; exactly one is needed", path, len(certs))
	}
	all, err := parseCerts(belowPath+".crt", chain)
	if err != nil {
		return nil, nil, err
	}
	key, err := parseKey(belowPath+".key", files[belowPrefix+name+".key"])
	if err != nil {
		return nil, nil, err
	}
	root, below = &pair{cert: certs[0]}, &pair{cert: all[0], key: key, above: all[1:]}
	at := root.cert.NotBefore
	for _, c := range all {
		if c.NotBefore.After(at) {
			at = c.NotBefore
		}
	}
	if err := checkBelow(td, root.cert, below, at); err != nil {
		return nil, nil, fmt.Errorf("%s.crt: %w", belowPath, err)
	}
	return root, below, nil
}

// checkBelow verifies an intermediate that an authority above certified: that it and
// all above it may sign, and that peers would believe a workload's certificate below it.
func checkBelow(td spiffeid.TrustDomain, root *x509.Certificate, p *pair, at time.Time) error {
	if pub, ok := p.cert.PublicKey.(interface{ Equal(crypto.PublicKey) bool }); !ok || !pub.Equal(p.key.Public()) {
		return errors.New("the certificate is for another key than the one that was asked for")
	}
	if len(p.above) > maxAbove {
		return fmt.Errorf("%d authorities stand between it and the root; at most %d may", len(p.above), maxAbove)
	}
	for i, c := range append(p.chain(), root) {
		if err := checkAuthority(td, c); err != nil {
			return fmt.Errorf("certificate %d of the chain (%.256q): %w", i, c.Subject, err)
		}
	}
	return tryLeaf(td, root, p, at)
}

// checkAuthority holds each certificate of a chain to what proxies and libraries ask.
func checkAuthority(td spiffeid.TrustDomain, c *x509.Certificate) error {
	switch {
	case !c.IsCA || !c.BasicConstraintsValid:
		return errors.New("is not a CA certificate; the issuer must honour isCA")
	case c.KeyUsage&x509.KeyUsageCertSign == 0:
		return errors.New("its key usage has no keyCertSign")
	case c.SerialNumber.Sign() <= 0 || c.SerialNumber.BitLen() > 160:
		return errors.New("its serial number must be positive and of at most 20 bytes")
	case len(c.ExtKeyUsage)+len(c.UnknownExtKeyUsage) > 0 &&
		(!slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageServerAuth) || !slices.Contains(c.ExtKeyUsage, x509.ExtKeyUsageClientAuth)):
		return errors.New("is an authority for other purposes than serverAuth and clientAuth")
	}
	if err := checkTrustDomain(td, c, false); err != nil {
		return err
	}
	return checkPublicKey(c.PublicKey)
}

// tryLeaf signs a workload's certificate that nobody gets, for a key that is thrown
// away, and verifies it as a peer would: name constraints and path lengths above may
// forbid it.
func tryLeaf(td spiffeid.TrustDomain, root *x509.Certificate, p *pair, at time.Time) error {
	id, err := spiffeid.FromSegments(td, "ns", "signet", "sa", "trial")
	if err != nil {
		return err
	}
	serial, err := newSerial()
	if err != nil {
		return err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return err
	}
	der, err := x509.CreateCertificate(rand.Reader, &x509.Certificate{
		SerialNumber: serial, NotBefore: at.Add(-backdate), NotAfter: at.Add(time.Minute), URIs: []*url.URL{id.URL()},
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}, BasicConstraintsValid: true,
	}, p.cert, key.Public(), p.key)
	if err != nil {
		return fmt.Errorf("sign a trial: %w", err)
	}
	leaf, err := x509.ParseCertificate(der)
	if err != nil {
		return err
	}
	_, _, err = x509svid.Verify(append([]*x509.Certificate{leaf}, p.chain()...), x509bundle.FromX509Authorities(td, []*x509.Certificate{root}), x509svid.WithTime(at))
	if err != nil {
		return fmt.Errorf("a workload's certificate below it would not be believed: %w", err)
	}
	return nil
}

// useBelow puts an intermediate into force that is stored. The caller holds mu.
func (a *Authority) useBelow(p *pair) {
	if a.intermediate != nil && bytes.Equal(a.intermediate.cert.Raw, p.cert.Raw) {
		return
	}
	a.intermediate = p
	a.log.Info("another intermediate signs", "serial", formatSerial(p.cert.SerialNumber), "issuer", p.cert.Issuer.String(), "not_after", stamp(p.cert.NotAfter))
}
