package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-mesh/signet/test/harness"
)

// TestTrustBundle: what the command prints is what others verify the mesh's
// certificates and tokens by, with libraries that know nothing of this project and
// without any endpoint: the certificate that a real proxy shows for a captured
// server, as a certificate of the web's kind too, and a token. A rotation's next
// root is in it before it signs.
func TestTrustBundle(t *testing.T) {
	const serverAddr = "10.88.0.12"
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"server": serverAddr, "outside": "10.88.0.13"},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "server", serverAddr) + entryFor(t, "mine", os.Geteuid())},
	})
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	text := m.TrustBundle()
	roots, err := x509bundle.Parse(td, []byte(text))
	if err != nil || len(roots.X509Authorities()) != 1 {
		t.Fatalf("%v of\n%s", err, text)
	}
	both, err := spiffebundle.Parse(td, []byte(m.TrustBundle("-o", "spiffe")))
	if err != nil || !both.X509Bundle().Equal(roots) || len(both.JWTAuthorities()) == 0 {
		t.Fatalf("%v, %+v", err, both)
	}

	at := net.JoinHostPort(serverAddr, "15008")
	server := spiffeid.RequireFromString(sa("server"))
	shown := func(config *tls.Config) ([]*x509.Certificate, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
		defer cancel()
		raw, err := m.Pod("outside").Dial(ctx, "tcp", at)
		if err != nil {
			t.Fatal(err)
		}
		defer raw.Close()
		config.NextProtos = []string{"h2"}
		conn := tls.Client(raw, config)
		err = conn.HandshakeContext(ctx)
		return conn.ConnectionState().PeerCertificates, err
	}
	chain, err := shown(tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(server)))
	if err != nil {
		t.Fatalf("the proxy's certificate: %v", err)
	}
	pool, above := x509.NewCertPool(), x509.NewCertPool()
	pool.AppendCertsFromPEM([]byte(text))
	for _, c := range chain[1:] {
		above.AddCert(c)
	}
	if _, err := chain[0].Verify(x509.VerifyOptions{Roots: pool, Intermediates: above}); err != nil {
		t.Errorf("a program that reads PEM: %v", err)
	}
	token, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: "partner"}, workloadapi.WithAddr("unix://"+filepath.Join(m.RunDir, "api", "agent.sock")))
	if err != nil {
		t.Fatal(err)
	}
	if got, err := jwtsvid.ParseAndValidate(token.Marshal(), both, []string{"partner"}); err != nil || got.ID.String() != sa("mine") {
		t.Errorf("a token: %v, %v", got, err)
	}

	if _, err := shown(tlsconfig.TLSClientConfig(x509bundle.New(td), tlsconfig.AuthorizeID(server))); err == nil {
		t.Error("an empty bundle verifies the certificate: what is above shows nothing")
	}

	if _, err := m.Client.RotateRoot(t.Context(), false); err != nil {
		t.Fatal(err)
	}
	m.Eventually(10*time.Second, "the next root in the bundle", func() error {
		next := m.TrustBundle()
		if n := strings.Count(next, "BEGIN CERTIFICATE"); n != 2 || !strings.Contains(next, strings.TrimSpace(text)) {
			return fmt.Errorf("%d roots", n)
		}
		return nil
	})
}
