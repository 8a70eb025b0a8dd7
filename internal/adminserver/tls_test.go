package adminserver

import (
	"context"
	"crypto/tls"
	"errors"
	"io"
	"net"
	"net/http"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/ca"
)

func authority(t *testing.T, name string) *ca.Authority {
	t.Helper()
	a, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: spiffeid.RequireTrustDomainFromString(name)})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	return a
}

func certificate(t *testing.T, a *ca.Authority, id string) func() (*tls.Certificate, error) {
	t.Helper()
	c, err := a.ServerCertificate(spiffeid.RequireFromString(id), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return c.Get
}

// get asks as a client with the certificate, or with none.
func get(t *testing.T, address string, cert func() (*tls.Certificate, error), change func(*tls.Config)) (int, string, error) {
	t.Helper()
	cfg := &tls.Config{InsecureSkipVerify: true} // who serves is tested in package fanout
	if cert != nil {
		cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return cert() }
	}
	if change != nil {
		change(cfg)
	}
	tr := &http.Transport{TLSClientConfig: cfg}
	defer tr.CloseIdleConnections()
	res, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get("https://" + address + "/v1/status")
	if err != nil {
		return 0, "", err
	}
	defer func() { _ = res.Body.Close() }()
	b, err := io.ReadAll(res.Body)
	return res.StatusCode, string(b), err
}

// start serves until the test ends.
func start(t *testing.T, cfg TLS, h http.Handler) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan error, 1)
	go func() { done <- ServeTLS(ctx, l, h, cfg) }()
	t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			t.Error(err)
		}
	})
	return l.Addr().String()
}

// Defends what a node knows (all audit records, all certificates' facts)
// against everybody who can reach its port: only the control plane may ask.
// Without the check of the ID, every workload and every other node has a
// certificate of the right authority.
func TestOnlyTheControlPlaneMayAsk(t *testing.T) {
	a, other := authority(t, "mesh.example"), authority(t, "mesh.example")
	asked := 0
	address := start(t, TLS{
		Certificate: certificate(t, a, "spiffe://mesh.example/signet/node/n1"),
		Bundle:      a, Client: ca.ControlID(a.TrustDomain()),
	}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { asked++; Answer(w, "well", nil) }))

	control := certificate(t, a, "spiffe://mesh.example/signet/control")
	if status, body, err := get(t, address, control, nil); err != nil || status != 200 || body != "\"well\"\n" {
		t.Fatalf("the control plane: %d %q %v", status, body, err)
	}
	for name, c := range map[string]struct {
		cert   func() (*tls.Certificate, error)
		change func(*tls.Config)
	}{
		"no certificate":                     {nil, nil},
		"the node itself":                    {certificate(t, a, "spiffe://mesh.example/signet/node/n1"), nil},
		"another node":                       {certificate(t, a, "spiffe://mesh.example/signet/node/n2"), nil},
		"a workload":                         {certificate(t, a, "spiffe://mesh.example/ns/shop/sa/web"), nil},
		"the same name, from elsewhere":      {certificate(t, other, "spiffe://mesh.example/signet/control"), nil},
		"the control plane with old TLS":     {control, func(c *tls.Config) { c.MaxVersion = tls.VersionTLS12 }},
		"a workload called /signet/control/": {certificate(t, a, "spiffe://mesh.example/ns/signet/sa/control"), nil},
	} {
		if status, body, err := get(t, address, c.cert, c.change); err == nil {
			t.Errorf("%s got %d %q", name, status, body)
		}
	}
	if asked != 1 {
		t.Errorf("%d requests reached the handler, want 1", asked)
	}
}

// A connection may live for hours, a certificate must not: it is looked at
// again at every request.
func TestOpenConnectionEndsWithItsCertificate(t *testing.T) {
	a := authority(t, "mesh.example")
	var late atomic.Int64
	address := start(t, TLS{
		Certificate: certificate(t, a, "spiffe://mesh.example/signet/node/n1"),
		Bundle:      a, Client: ca.ControlID(a.TrustDomain()),
		Now: func() time.Time { return time.Now().Add(time.Duration(late.Load())) },
	}, http.HandlerFunc(func(w http.ResponseWriter, _ *http.Request) { Answer(w, "well", nil) }))

	control := certificate(t, a, "spiffe://mesh.example/signet/control")
	tr := &http.Transport{TLSClientConfig: &tls.Config{
		InsecureSkipVerify:   true,
		GetClientCertificate: func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return control() },
	}}
	defer tr.CloseIdleConnections()
	ask := func() (int, string) {
		res, err := (&http.Client{Transport: tr, Timeout: 10 * time.Second}).Get("https://" + address)
		if err != nil {
			t.Fatal(err)
		}
		defer func() { _ = res.Body.Close() }()
		b, _ := io.ReadAll(res.Body)
		return res.StatusCode, string(b)
	}
	if status, _ := ask(); status != 200 {
		t.Fatalf("status %d", status)
	}
	late.Store(int64(2 * time.Hour))
	if status, body := ask(); status != http.StatusForbidden || !strings.Contains(body, "no longer good") {
		t.Errorf("after its end: %d %s", status, body)
	}
}

// Without one of the three, either nobody or everybody could ask.
func TestTLSNeedsAllThree(t *testing.T) {
	a := authority(t, "mesh.example")
	cert := certificate(t, a, "spiffe://mesh.example/signet/node/n1")
	id := ca.ControlID(a.TrustDomain())
	for name, cfg := range map[string]TLS{"Certificate": {Bundle: a, Client: id}, "Bundle": {Certificate: cert, Client: id}, "Client": {Certificate: cert, Bundle: a}} {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		if err := ServeTLS(t.Context(), l, http.NotFoundHandler(), cfg); err == nil || !strings.Contains(err.Error(), name) {
			t.Errorf("without %s: %v", name, err)
		}
		if _, err := l.Accept(); !errors.Is(err, net.ErrClosed) {
			t.Errorf("without %s the listener stays open: %v", name, err)
		}
	}
}
