package conformance

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
)

var x509Checks = []check{
	{Check{"x509-served", docAPI, "5.2.1", Must, "FetchX509SVID answers with one X509-SVID or more"}, checkServed},
	{Check{"x509-every-identity", docAPI, "5.2.1", Must, "there is an X509-SVID for each identity of the caller, and for no other"}, checkEveryIdentity},
	{Check{"x509-fields", docAPI, "5.2.1", Must, "all fields of an X509-SVID but hint are set"}, eachSVID(checkMandatory)},
	{Check{"x509-hint", docAPI, "5.2.1", Must, "no hint is given twice"}, checkX509Hints},
	{Check{"x509-chain-der", docAPI, "5.1", Must, "the chain is certificates in DER, one after the other"}, eachSVID(checkChainDER)},
	{Check{"x509-chain-order", docAPI, "5.1", Must, "the leaf comes first, and each further certificate signed the one before"}, eachLeaf(checkChainOrder)},
	{Check{"x509-key-form", docAPI, "5.1", Must, "the key is PKCS#8 in DER, not encrypted"}, eachSVID(checkKeyForm)},
	{Check{"x509-key-match", docAPI, "5.1", Must, "the key is that of the certificate"}, eachLeaf(checkKeyMatch)},
	{Check{"x509-bundle-der", docAPI, "5.1", Must, "the bundle is certificates in DER, one after the other"}, eachSVID(checkBundleDER)},
	{Check{"x509-one-uri", docX509, "2", Must, "a leaf has exactly one URI name"}, eachLeaf(checkOneURI)},
	{Check{"x509-id-form", docID, "2", Must, "the URI name is a SPIFFE ID as it has to be written"}, eachLeaf(checkIDForm)},
	{Check{"x509-id-path", docX509, "3.1", Must, "the SPIFFE ID of a leaf has a path"}, eachLeaf(checkIDPath)},
	{Check{"x509-id-match", docAPI, "5.1", Must, "spiffe_id is the one in the certificate"}, eachLeaf(checkIDMatch)},
	{Check{"x509-domain", docAPI, "4.6, 5.2.1", Must, "the identities are of the trust domain that the server is said to be in"}, checkDomain},
	{Check{"x509-san-critical", docX509, "3.1", Must, "without a subject, the subject alternative name is critical"}, eachLeaf(checkSANCritical)},
	{Check{"x509-leaf-ca", docX509, "4.1", Must, "cA is false in a leaf"}, eachLeaf(checkLeafCA)},
	{Check{"x509-key-usage", docX509, "4.3", Must, "key usage is there, and critical"}, eachLeaf(checkKeyUsage)},
	{Check{"x509-key-usage-leaf", docX509, "4.3", Must, "a leaf has digitalSignature, and neither keyCertSign nor cRLSign"}, eachLeaf(checkLeafUsage)},
	{Check{"x509-purposes", docX509, "4.4", Must, "extended key usage, if it is there, has serverAuth and clientAuth"}, eachLeaf(checkPurposes)},
	{Check{"x509-purposes-there", docX509, "4.4", Should, "extended key usage is there"}, eachLeaf(checkPurposesThere)},
	{Check{"x509-verifies", docX509, "5.1", Must, "the chain leads to the bundle beside it, and is valid now"}, eachLeaf(checkVerifies)},
}

// leaf is a certificate chain as it was served.
type leaf struct {
	svid  *workload.X509SVID
	certs []*x509.Certificate // at least one
}

// eachSVID makes a check of a question about one SVID.
func eachSVID(ask func(*workload.X509SVID) error) func(context.Context, *session) (string, error) {
	return func(ctx context.Context, s *session) (string, error) {
		svids, err := s.served(ctx)
		if err != nil {
			return "", err
		}
		err = each(svids, (*workload.X509SVID).GetSpiffeId, ask)
		return seen(svids), err
	}
}

// eachLeaf makes a check of a question about one certificate chain.
func eachLeaf(ask func(leaf) error) func(context.Context, *session) (string, error) {
	return func(ctx context.Context, s *session) (string, error) {
		svids, err := s.served(ctx)
		if err != nil {
			return "", err
		}
		var leaves []leaf
		for _, svid := range svids {
			certs, err := x509.ParseCertificates(svid.GetX509Svid())
			if err != nil || len(certs) == 0 {
				return "", skip("a certificate cannot be read; see x509-chain-der")
			}
			leaves = append(leaves, leaf{svid, certs})
		}
		err = each(leaves, func(l leaf) string { return l.svid.GetSpiffeId() }, ask)
		return seen(svids), err
	}
}

func seen(svids []*workload.X509SVID) string {
	if len(svids) == 1 {
		return "of " + svids[0].GetSpiffeId()
	}
	return fmt.Sprintf("of %d identities", len(svids))
}

func checkServed(ctx context.Context, s *session) (string, error) {
	if err := s.open(ctx); err != nil {
		return "", err
	}
	m, err := s.fetchX509(ctx)
	switch {
	case err != nil:
		return "", fmt.Errorf("FetchX509SVID ends with %s", describe(err))
	case len(m.GetSvids()) == 0:
		return "", errors.New("the message has none")
	}
	return fmt.Sprintf("%q", ids(m.GetSvids())), nil
}

func checkEveryIdentity(ctx context.Context, s *session) (string, error) {
	svids, err := s.served(ctx)
	if err != nil {
		return "", err
	}
	got := ids(svids)
	switch {
	case len(got) != len(svids):
		return "", fmt.Errorf("%d X509-SVIDs for %d identities", len(svids), len(got))
	case s.IDs == nil:
		return "", skip("the options do not say which identities the caller has")
	case !slices.Equal(got, s.IDs):
		return "", fmt.Errorf("got %q, want %q", got, s.IDs)
	}
	return seen(svids), nil
}

// mandatory names a field that is not set.
func mandatory(svid *workload.X509SVID) string {
	switch {
	case svid.GetSpiffeId() == "":
		return "spiffe_id"
	case len(svid.GetX509Svid()) == 0:
		return "x509_svid"
	case len(svid.GetX509SvidKey()) == 0:
		return "x509_svid_key"
	case len(svid.GetBundle()) == 0:
		return "bundle"
	}
	return ""
}

func checkMandatory(svid *workload.X509SVID) error {
	if name := mandatory(svid); name != "" {
		return fmt.Errorf("%s is not set", name)
	}
	return nil
}

func checkX509Hints(ctx context.Context, s *session) (string, error) {
	svids, err := s.served(ctx)
	if err != nil {
		return "", err
	}
	var hints []string
	for _, svid := range svids {
		hints = append(hints, svid.GetHint())
	}
	return uniqueHints(hints)
}

func uniqueHints(hints []string) (string, error) {
	given := map[string]bool{}
	for _, h := range hints {
		if h == "" {
			continue
		}
		if given[h] {
			return "", fmt.Errorf("two have the hint %q", h)
		}
		given[h] = true
	}
	return fmt.Sprintf("%d hints", len(given)), nil
}

func checkChainDER(svid *workload.X509SVID) error {
	if len(svid.GetX509Svid()) == 0 {
		return skip("there is none; see x509-fields")
	}
	err := checkCertificates(svid.GetX509Svid())
	return err
}

func checkBundleDER(svid *workload.X509SVID) error {
	if len(svid.GetBundle()) == 0 {
		return skip("there is none; see x509-fields")
	}
	err := checkCertificates(svid.GetBundle())
	return err
}

func checkChainOrder(l leaf) error {
	for i := range len(l.certs) - 1 {
		signer := l.certs[i+1]
		if !bytes.Equal(l.certs[i].RawIssuer, signer.RawSubject) {
			return fmt.Errorf("certificate %d is not the issuer of the one before", i+2)
		}
		if err := signer.CheckSignature(l.certs[i].SignatureAlgorithm, l.certs[i].RawTBSCertificate, l.certs[i].Signature); err != nil {
			return fmt.Errorf("certificate %d did not sign the one before: %w", i+2, err)
		}
	}
	return nil
}

func checkKeyForm(svid *workload.X509SVID) error {
	if len(svid.GetX509SvidKey()) == 0 {
		return skip("there is none; see x509-fields")
	}
	if bytes.HasPrefix(svid.GetX509SvidKey(), []byte("-----BEGIN")) {
		return errors.New("it is PEM")
	}
	_, err := x509.ParsePKCS8PrivateKey(svid.GetX509SvidKey())
	return err
}

func checkKeyMatch(l leaf) error {
	key, err := x509.ParsePKCS8PrivateKey(l.svid.GetX509SvidKey())
	if err != nil {
		return skip("the key cannot be read; see x509-key-form")
	}
	signer, ok := key.(crypto.Signer)
	if !ok {
		return fmt.Errorf("a %T does not sign", key)
	}
	public, ok := signer.Public().(interface{ Equal(crypto.PublicKey) bool })
	if !ok || !public.Equal(l.certs[0].PublicKey) {
		return errors.New("it is another key")
	}
	return nil
}

func checkOneURI(l leaf) error {
	names, err := uriNames(l.certs[0])
	if err == nil && len(names) != 1 {
		err = fmt.Errorf("it has %d: %q", len(names), names)
	}
	return err
}

// id is the SPIFFE ID of a leaf.
func (l leaf) id() (string, error) {
	names, err := uriNames(l.certs[0])
	if err != nil || len(names) == 0 {
		return "", skip("it has no URI name; see x509-one-uri")
	}
	return names[0], nil
}

func checkIDForm(l leaf) error {
	name, err := l.id()
	if err == nil {
		_, err = parseID(name)
	}
	return err
}

func checkIDPath(l leaf) error {
	name, err := l.id()
	if err != nil {
		return err
	}
	id, err := parseID(name)
	if err != nil {
		return skip("it is no SPIFFE ID; see x509-id-form")
	}
	if id.path == "" {
		return errors.New("it has none")
	}
	return nil
}

func checkIDMatch(l leaf) error {
	name, err := l.id()
	if err != nil {
		return err
	}
	if name != l.svid.GetSpiffeId() {
		return fmt.Errorf("the certificate names %s", name)
	}
	return nil
}

func checkDomain(ctx context.Context, s *session) (string, error) {
	svids, err := s.served(ctx)
	if err != nil {
		return "", err
	}
	if s.TrustDomain == "" {
		return "", skip("the options do not say which trust domain the server is in")
	}
	for _, svid := range svids {
		if id, err := parseID(svid.GetSpiffeId()); err == nil && id.domain != s.TrustDomain {
			return "", fmt.Errorf("%s is of another trust domain than %s", id, s.TrustDomain)
		}
	}
	return s.TrustDomain, nil
}

func checkSANCritical(l leaf) error {
	if _, critical := extension(l.certs[0], oidSAN); len(l.certs[0].Subject.Names) == 0 && !critical {
		return errors.New("it is not")
	}
	return nil
}

func checkLeafCA(l leaf) error {
	if l.certs[0].IsCA {
		return errors.New("it is true")
	}
	return nil
}

func checkKeyUsage(l leaf) error { return criticalUsage(l.certs[0]) }

func criticalUsage(c *x509.Certificate) error {
	value, critical := extension(c, oidKeyUsage)
	switch {
	case value == nil:
		return errors.New("it is not there")
	case !critical:
		return errors.New("it is not critical")
	}
	return nil
}

func checkLeafUsage(l leaf) error {
	if value, _ := extension(l.certs[0], oidKeyUsage); value == nil {
		return skip("there is no key usage; see x509-key-usage")
	}
	usage := l.certs[0].KeyUsage
	switch {
	case usage&x509.KeyUsageDigitalSignature == 0:
		return errors.New("digitalSignature is not set")
	case usage&x509.KeyUsageCertSign != 0:
		return errors.New("keyCertSign is set")
	case usage&x509.KeyUsageCRLSign != 0:
		return errors.New("cRLSign is set")
	}
	return nil
}

func checkPurposes(l leaf) error {
	if value, _ := extension(l.certs[0], oidPurposes); value == nil {
		return skip("it is not there")
	}
	for _, want := range []struct {
		name string
		x509.ExtKeyUsage
	}{{"serverAuth", x509.ExtKeyUsageServerAuth}, {"clientAuth", x509.ExtKeyUsageClientAuth}} {
		if !slices.Contains(l.certs[0].ExtKeyUsage, want.ExtKeyUsage) {
			return fmt.Errorf("it has no %s", want.name)
		}
	}
	return nil
}

func checkPurposesThere(l leaf) error {
	if value, _ := extension(l.certs[0], oidPurposes); value == nil {
		return errors.New("it is not")
	}
	return nil
}

func checkVerifies(l leaf) error {
	roots, err := x509.ParseCertificates(l.svid.GetBundle())
	if err != nil || len(roots) == 0 {
		return skip("the bundle cannot be read; see x509-bundle-der")
	}
	return verify(l.certs, roots)
}
