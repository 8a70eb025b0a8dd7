//go:build interop

package spire

import (
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"net/url"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/net/http2"

	"github.com/signet-mesh/signet/sdk"
	"github.com/signet-mesh/signet/test/harness"
	"github.com/signet-mesh/signet/test/spire"
)

// Who is who. The programs are this test itself: the two Workload APIs each give
// it the identities of their own trust domain.
var (
	ownTD   = spiffeid.RequireTrustDomainFromString("mesh.test")
	ledger  = spiffeid.RequireFromString("spiffe://mesh.test/ns/pay/sa/ledger")
	spireTD = spiffeid.RequireTrustDomainFromString("spire.test")
	app     = spiffeid.RequireFromString("spiffe://spire.test/ns/shop/sa/app")
	other   = spiffeid.RequireFromString("spiffe://spire.test/ns/shop/sa/other")
	// backend has a name as SPIRE's users like them, which is none of a service
	// account.
	backend = spiffeid.RequireFromString("spiffe://spire.test/backend/v2")
)

const (
	ownEndpoint = "127.0.0.1:8461"
	webAddr     = "10.88.0.31" // of web, a captured server
	webPort     = "8080"
	greeting    = "ready\n"

	// refreshHint is what SPIRE is told. It asks every 15 s at most, whatever it
	// is told, and its agents ask their server every 5 s: three hints, for which a
	// rotation waits, are enough for that.
	refreshHint = 10 * time.Second
	// firstAsk is when a server that began without a bundle of the other trust
	// domain has asked by itself for the first time, and asks regularly.
	firstAsk = 75 * time.Second
	// follow is how long SPIRE's programs may take to have what this mesh's
	// endpoint shows.
	follow  = 40 * time.Second
	svidTTL = 8 * time.Second
)

// world is both trust domains at work.
type world struct {
	*harness.Mesh
	server *spire.Server
	agent  *spire.Agent
	log    harness.Output // of SPIRE
	began  time.Time      // SPIRE's server
	base   string         // documents of the mesh, without any about SPIRE
	port   int            // of the SDK's server

	own     *workloadapi.X509Source                 // the mesh's Workload API
	sdk     *sdk.Mesh                               // the same, with the mesh's policies
	foreign map[spiffeid.ID]*workloadapi.X509Source // SPIRE's Workload API, by identity
}

// start starts both, which do not know of each other yet.
func start(t *testing.T) *world {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	w := &world{foreign: map[spiffeid.ID]*workloadapi.X509Source{}}
	w.base = harness.ConfigOf(ownTD.Name(), svidTTL.String()) + harness.Namespace("pay", "enforce") +
		harness.Workload("pay", "web", webAddr) + harness.Program("pay", "ledger", os.Geteuid(), exe)
	w.Mesh = harness.Start(t, harness.Options{
		Pods: map[string]string{"web": webAddr, "outside": "10.88.0.32"}, Documents: map[string]string{"mesh.yaml": w.base},
		Args: []string{"--bundle-listen", ownEndpoint, "--bundle-refresh-hint", refreshHint.String()},
	})
	w.startSPIRE(t)

	w.own = source(t, "unix://"+w.socket())
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if w.sdk, err = sdk.Open(ctx, sdk.WithSocket("unix://"+w.socket())); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { w.sdk.Close() })
	w.greet(t)
	return w
}

// startSPIRE starts a server and an agent, with a bundle endpoint, and with this
// mesh's to be followed.
func (w *world) startSPIRE(t *testing.T) {
	t.Helper()
	// Not t.TempDir: socket paths have a small maximum length.
	dir, err := os.MkdirTemp("", "spire-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		if t.Failed() {
			t.Logf("log of SPIRE:\n%s", w.log.String())
		}
		_ = os.RemoveAll(dir)
	})
	w.began = time.Now()
	w.server, err = spire.StartServer(t.Context(), programs, spire.Options{
		Dir: dir, TrustDomain: spireTD,
		Address: netip.MustParseAddrPort("127.0.0.1:8463"), BundleEndpoint: netip.MustParseAddrPort("127.0.0.1:8462"),
		Federates: []spire.Federation{{
			TrustDomain: ownTD, URL: "https://" + ownEndpoint + "/bundle",
			Endpoint: spiffeid.RequireFromPath(ownTD, "/signet/bundle"),
		}},
		SVIDTTL: time.Minute,
	}, &w.log)
	if err != nil {
		t.Fatalf("%v\n%s", err, w.log.String())
	}
	t.Cleanup(w.server.Stop)
	if w.agent, err = w.server.StartAgent(t.Context(), &w.log); err != nil {
		t.Fatalf("%v\n%s", err, w.log.String())
	}
	t.Cleanup(w.agent.Stop)
	version, err := programs.Version(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	t.Logf("SPIRE %s", version)
}

// register gives this test its identities of SPIRE.
func (w *world) register(t *testing.T, federatesWith ...spiffeid.TrustDomain) {
	t.Helper()
	var entries []spire.Entry
	for _, id := range []spiffeid.ID{app, other, backend} {
		entries = append(entries, spire.Entry{ID: id, Selectors: []string{fmt.Sprintf("unix:uid:%d", os.Geteuid())}, FederatesWith: federatesWith})
	}
	if err := w.server.AddEntries(t.Context(), w.agent.ID(), entries...); err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		w.foreign[e.ID] = source(t, w.agent.Socket(), workloadapi.WithDefaultX509SVIDPicker(func(all []*x509svid.SVID) *x509svid.SVID {
			for _, s := range all {
				if s.ID == e.ID {
					return s
				}
			}
			return nil
		}))
	}
}

func source(t *testing.T, socket string, options ...workloadapi.X509SourceOption) *workloadapi.X509Source {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute) // SPIRE's agent learns of entries every 5 s
	defer cancel()
	s, err := workloadapi.NewX509Source(ctx, append(options, workloadapi.WithClientOptions(workloadapi.WithAddr(socket)))...)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func (w *world) socket() string { return filepath.Join(w.RunDir, "api", "agent.sock") }

// federation is the document about SPIRE's trust domain, with a bundle.
func (w *world) federation(bundle []byte) string {
	return harness.Federation(spireTD.Name(), w.server.BundleEndpointURL(), w.server.BundleEndpointID().String(), string(bundle))
}

// allow lets one foreign identity in, to web and to the SDK's server.
func (w *world) allow(id string) string {
	policy := func(target, port string) string {
		return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: AllowPolicy
metadata: {name: spire-%[1]s, namespace: pay}
spec: {target: {serviceAccount: %[1]s}, ports: [%[2]s], from: [{spiffeID: %[3]q}]}
---
`, target, port, id)
	}
	return policy("web", webPort) + policy("ledger", fmt.Sprint(w.port))
}

// greet serves in web's pod, which knows nothing of any of this.
func (w *world) greet(t *testing.T) {
	t.Helper()
	l, err := w.Pod("web").Listen("tcp", "0.0.0.0:"+webPort)
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
}

// serve answers everybody with a greeting, and sends back what it hears.
func serve(t *testing.T, l net.Listener) {
	t.Helper()
	var all sync.WaitGroup
	t.Cleanup(func() { _ = l.Close(); all.Wait() })
	all.Go(func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			all.Go(func() {
				defer func() { _ = c.Close() }()
				_ = c.SetDeadline(time.Now().Add(10 * time.Second))
				if _, err := io.WriteString(c, greeting); err == nil {
					_, _ = io.Copy(c, c)
				}
			})
		}
	})
}

// hear reads the greeting.
func hear(c io.Reader) error {
	got := make([]byte, len(greeting))
	if _, err := io.ReadFull(c, got); err != nil || string(got) != greeting {
		return fmt.Errorf("heard %q: %w", got, err)
	}
	return nil
}

// connect asks web's proxy for a tunnel to web with a configuration, as a program
// with the Workload API does it by itself.
func (w *world) connect(ctx context.Context, config *tls.Config) (status int, got string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	raw, err := w.Pod("outside").Dial(ctx, "tcp", net.JoinHostPort(webAddr, "15008"))
	if err != nil {
		return 0, "", err
	}
	defer raw.Close()
	config.NextProtos = []string{"h2"}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return 0, "", err
	}
	c, err := (&http2.Transport{}).NewClientConn(conn) //nolint:staticcheck // speaks CONNECT over a connection made here
	if err != nil {
		return 0, "", err
	}
	defer c.Close()
	host := net.JoinHostPort(webAddr, webPort)
	req := (&http.Request{
		Method: http.MethodConnect, URL: &url.URL{Scheme: "https", Host: host}, Host: host, Header: http.Header{},
		Body: io.NopCloser(strings.NewReader("hello")), ContentLength: -1,
	}).WithContext(ctx)
	resp, err := c.RoundTrip(req)
	if err != nil {
		return 0, "", err
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if resp.StatusCode != http.StatusOK {
		return resp.StatusCode, resp.Header.Get("x-signet-reason"), nil // the status is the answer
	}
	return resp.StatusCode, string(body), err
}
