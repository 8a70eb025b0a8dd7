//go:build chart

package chart

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"io"
	"math/big"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/coreos/go-oidc/v3/oidc"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/internal/lab"
)

const (
	release    = "signet-system"
	webHost    = "signet-federation." + release + ".svc"
	issuer     = "https://" + webHost
	partner    = "partner.example"
	meshDomain = "mesh.example"
)

// company is a public authority, as far as this cluster is concerned.
type company struct {
	t    *testing.T
	cert *x509.Certificate
	key  *ecdsa.PrivateKey
}

func newCompany(t *testing.T) *company {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "company"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	c := &company{t, tmpl, key}
	c.cert = c.sign(tmpl, key)
	return c
}

func (c *company) sign(tmpl *x509.Certificate, key *ecdsa.PrivateKey) *x509.Certificate {
	c.t.Helper()
	der, err := x509.CreateCertificate(rand.Reader, tmpl, c.cert, key.Public(), c.key)
	if err != nil {
		c.t.Fatal(err)
	}
	cert, err := x509.ParseCertificate(der)
	if err != nil {
		c.t.Fatal(err)
	}
	return cert
}

func (c *company) roots() *x509.CertPool {
	pool := x509.NewCertPool()
	pool.AddCert(c.cert)
	return pool
}

// server certifies a host, a name or an address, under a serial number.
func (c *company) server(host string, serial int64) tls.Certificate {
	c.t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		c.t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(serial), NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		KeyUsage: x509.KeyUsageDigitalSignature, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
	}
	if ip := net.ParseIP(host); ip != nil {
		tmpl.IPAddresses = []net.IP{ip}
	} else {
		tmpl.DNSNames = []string{host}
	}
	return tls.Certificate{Certificate: [][]byte{c.sign(tmpl, key).Raw}, PrivateKey: key}
}

// file writes PEM.
func (b *bench) file(name, kind string, der []byte) string {
	b.Helper()
	path := filepath.Join(b.TempDir(), name)
	if err := os.WriteFile(path, pem.EncodeToMemory(&pem.Block{Type: kind, Bytes: der}), 0o600); err != nil {
		b.Fatal(err)
	}
	return path
}

// webCertificate puts a certificate into the Secret that the chart is told of.
func (b *bench) webCertificate(cert *tls.Certificate) {
	b.Helper()
	key, err := x509.MarshalPKCS8PrivateKey(cert.PrivateKey)
	if err != nil {
		b.Fatal(err)
	}
	b.kubectl("-n", release, "delete", "secret", "web", "--ignore-not-found")
	b.kubectl("-n", release, "create", "secret", "tls", "web", "--cert="+b.file("tls.crt", "CERTIFICATE", cert.Certificate[0]), "--key="+b.file("tls.key", "PRIVATE KEY", key))
}

// prepareWeb makes what the chart's values name, as docs/identity.md tells users, and
// returns those values.
func (b *bench) prepareWeb(c *company) []string {
	b.Helper()
	cert := c.server(webHost, 100)
	b.webCertificate(&cert)
	b.kubectl("-n", release, "create", "configmap", "authorities", "--from-file=ca-certificates.crt="+b.file("ca.crt", "CERTIFICATE", c.cert.Raw))
	return []string{
		"--set", "federation.web.enabled=true", "--set", "federation.web.certificateSecret=web", "--set", "federation.web.oidcIssuer=" + issuer,
		"--set", "federation.refreshHint=10s", "--set", "federation.webAuthorities=authorities",
	}
}

// web looks at a mesh that shows itself to the web: its bundle and the keys of its
// tokens are at the Service, by the certificate in the Secret, also after that was
// replaced; a token of a pod is taken by a verifier that knows of SPIFFE nothing; and a
// partner's bundle is fetched from an endpoint that the named authorities have
// certified, and from no other.
func (b *bench) web(c *company) {
	b.Helper()
	node := b.cluster.Nodes()[0]
	address := net.JoinHostPort(b.kubectl("-n", release, "get", "service", "signet-federation", "-o", "jsonpath={.spec.clusterIP}"), "443")
	var shown *x509.Certificate
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true,
		DialContext:       func(ctx context.Context, _, _ string) (net.Conn, error) { return node.DialContext(ctx, "tcp", address) },
		TLSClientConfig: &tls.Config{RootCAs: c.roots(), VerifyConnection: func(s tls.ConnectionState) error {
			shown = s.PeerCertificates[0]
			return nil
		}},
	}}
	get := func(path string) ([]byte, error) {
		req, err := http.NewRequestWithContext(b.Context(), http.MethodGet, issuer+path, nil)
		if err != nil {
			return nil, err
		}
		resp, err := client.Do(req)
		if err != nil {
			return nil, err
		}
		defer resp.Body.Close()
		text, err := io.ReadAll(resp.Body)
		if err == nil && resp.StatusCode != http.StatusOK {
			err = fmt.Errorf("%s: %s", resp.Status, text)
		}
		return text, err
	}
	b.eventually(30*time.Second, func() string {
		text, err := get("/bundle")
		if err != nil {
			return "the bundle is not shown: " + err.Error()
		}
		bundle, err := spiffebundle.Parse(spiffeid.RequireTrustDomainFromString(meshDomain), text)
		if err != nil || len(bundle.X509Authorities()) == 0 || len(bundle.JWTAuthorities()) == 0 {
			return fmt.Sprintf("what is shown: %v\n%s", err, text)
		}
		return ""
	})
	if shown.SerialNumber.Int64() != 100 {
		b.Errorf("shown by the certificate %s", shown.SerialNumber)
	}

	b.token(client)
	b.partnerByWeb(c)

	next := c.server(webHost, 101)
	b.webCertificate(&next)
	b.eventually(3*time.Minute, func() string { // kubelet looks every minute or so
		if _, err := get("/bundle"); err != nil {
			return err.Error()
		}
		if got := shown.SerialNumber.Int64(); got != 101 {
			return fmt.Sprintf("shown by the certificate %d", got)
		}
		return ""
	})
}

// token has a verifier by OpenID Connect judge a pod's token.
func (b *bench) token(client *http.Client) {
	b.Helper()
	b.kubectl("apply", "-f", "token.yaml")
	b.kubectl("-n", "tokens", "wait", "--for=condition=Ready", "pod/caller", "--timeout=1m")
	ctx := oidc.ClientContext(b.Context(), client)
	provider, err := oidc.NewProvider(ctx, issuer)
	if err != nil {
		b.Fatal(err)
	}
	var text string
	b.eventually(30*time.Second, func() string {
		cmd := b.cluster.Kubectl(b.Context(), "-n", "tokens", "exec", "caller", "--", "/token", "bank")
		var said strings.Builder
		cmd.Stderr = &said
		out, err := cmd.Output()
		text = strings.TrimSpace(string(out))
		if err != nil {
			return fmt.Sprintf("the pod has no token: %v: %s", err, said.String())
		}
		return ""
	})
	verified, err := provider.Verifier(&oidc.Config{ClientID: "bank"}).Verify(ctx, text)
	if want := "spiffe://" + meshDomain + "/ns/tokens/sa/caller"; err != nil || verified.Subject != want || verified.Issuer != issuer {
		b.Errorf("the token of %s: %+v, %v", want, verified, err)
	}
	if _, err := provider.Verifier(&oidc.Config{ClientID: "shop"}).Verify(ctx, text); err == nil {
		b.Error("the token is taken by who it is not for")
	}
	head, _, _ := strings.Cut(text, ".")
	if _, err := provider.Verifier(&oidc.Config{ClientID: "bank"}).Verify(ctx, head+text[strings.LastIndex(text, "."):]); err == nil {
		b.Error("a token without its claims is taken")
	}
	b.kubectl("delete", "namespace", "tokens", "--timeout=1m")
}

// partnerByWeb has the control plane fetch a partner's bundle, from an endpoint that a
// stranger has certified and from one that the company has.
func (b *bench) partnerByWeb(c *company) {
	b.Helper()
	node := b.cluster.Nodes()[0]
	path, err := node.NetNS()
	if err != nil {
		b.Fatal(err)
	}
	root := newCompany(b.T)
	bundle := spiffebundle.New(spiffeid.RequireTrustDomainFromString(partner))
	bundle.AddX509Authority(root.cert)
	bundle.SetSequenceNumber(1)
	bundle.SetRefreshHint(time.Second)
	document, err := bundle.Marshal()
	if err != nil {
		b.Fatal(err)
	}
	host := node.Addr().String()
	for _, endpoint := range []struct {
		by   *company
		port string
		want string
	}{
		{newCompany(b.T), "8461", "Fetched=False"},
		{c, "8462", "Fetched=True"},
	} {
		var l net.Listener
		if err := lab.In(path, func() (err error) {
			l, err = net.Listen("tcp", net.JoinHostPort(host, endpoint.port))
			return err
		}); err != nil {
			b.Fatal(err)
		}
		s := httptest.NewUnstartedServer(http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { _, _ = w.Write(document) }))
		s.Listener.Close()
		s.Listener = l
		s.TLS = &tls.Config{Certificates: []tls.Certificate{endpoint.by.server(host, 7)}, MinVersion: tls.VersionTLS12}
		s.StartTLS()
		federation := filepath.Join(b.TempDir(), "federation.yaml")
		text := fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: Federation
metadata: {name: partner}
spec: {trustDomain: %s, profile: https_web, bundleEndpointURL: "https://%s/bundle"}
`, partner, net.JoinHostPort(host, endpoint.port))
		if err := os.WriteFile(federation, []byte(text), 0o600); err != nil {
			b.Fatal(err)
		}
		b.kubectl("apply", "-f", federation)
		b.eventually(30*time.Second, func() string {
			got := b.kubectl("get", "federation", "partner", "-o", `jsonpath={range .status.conditions[*]}{.type}={.status} {.message}; {end}`)
			if !strings.Contains(got, endpoint.want) || endpoint.by != c && !strings.Contains(got, "unknown authority") {
				return fmt.Sprintf("the Federation's status says %q, want %s", got, endpoint.want)
			}
			return ""
		})
		s.Close()
	}
	b.kubectl("delete", "federation", "partner")
}
