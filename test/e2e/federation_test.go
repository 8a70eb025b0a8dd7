package e2e

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"golang.org/x/net/http2"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// Who is who: an application of alpha calls programs of beta.
var (
	alphaTD  = spiffeid.RequireTrustDomainFromString("alpha.test")
	betaTD   = spiffeid.RequireTrustDomainFromString("beta.test")
	alphaApp = spiffeid.RequireFromString("spiffe://alpha.test/ns/shop/sa/app")
	betaApp  = spiffeid.RequireFromString("spiffe://beta.test/ns/pay/sa/ledger")
	betaWeb  = spiffeid.RequireFromString("spiffe://beta.test/ns/pay/sa/web")
)

const (
	alphaEndpoint = "127.0.0.1:8451"
	betaEndpoint  = "127.0.0.1:8452"
	webAddr       = "10.88.0.31"
)

// side is one of the two meshes.
type side struct {
	*harness.Mesh
	base   string
	source *workloadapi.X509Source
}

// testProgram is a WorkloadEntry for this test's own process.
func testProgram(t *testing.T, id spiffeid.ID) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	path := strings.Split(id.Path(), "/")
	return harness.Program(path[2], path[4], os.Geteuid(), exe)
}

// federate is a Federation document, with the bundle that the command prints, by
// which the endpoint is asked for the same first.
func federate(t *testing.T, of *side, td spiffeid.TrustDomain, endpoint string) string {
	t.Helper()
	doc := of.TrustBundle("-o", "spiffe")
	roots, err := x509bundle.Parse(td, []byte(of.TrustBundle()))
	if err != nil {
		t.Fatal(err)
	}
	client := &http.Client{Timeout: 10 * time.Second, Transport: &http.Transport{
		DisableKeepAlives: true, TLSClientConfig: tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(ca.BundleEndpointID(td))),
	}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "https://"+endpoint+"/bundle", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	if body, err := io.ReadAll(resp.Body); err != nil || resp.StatusCode != http.StatusOK || string(body)+"\n" != doc {
		t.Errorf("the endpoint of %s shows %s %v\n%s\nand the command prints\n%s", td, resp.Status, err, body, doc)
	}
	return harness.Federation(td.Name(), "https://"+endpoint+"/bundle", ca.BundleEndpointID(td).String(), doc)
}

func allowForeign(target string, id string) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: AllowPolicy
metadata: {name: partner, namespace: pay}
spec: {target: {serviceAccount: %s}, ports: [8080], from: [{spiffeID: %q}]}
---
`, target, id)
}

// startSides starts two meshes on one machine that do not know each other yet,
// and web, a captured server of beta.
func startSides(t *testing.T) (alpha, beta *side) {
	t.Helper()
	alpha = &side{base: harness.ConfigOf(alphaTD.Name(), "8s") + harness.Namespace("shop", "enforce") + testProgram(t, alphaApp)}
	beta = &side{base: harness.ConfigOf(betaTD.Name(), "8s") + harness.Namespace("pay", "enforce") + testProgram(t, betaApp) + harness.Workload("pay", "web", webAddr)}
	alpha.Mesh = harness.Start(t, harness.Options{
		Pods: map[string]string{"web": webAddr, "outside": "10.88.0.32"}, Documents: map[string]string{"mesh.yaml": alpha.base},
		Args: []string{"--bundle-listen", alphaEndpoint, "--bundle-refresh-hint", "1s"},
	})
	beta.Mesh = harness.Start(t, harness.Options{
		Lab: alpha.Lab, Node: "n2", Documents: map[string]string{"mesh.yaml": beta.base},
		Args: []string{"--bundle-listen", betaEndpoint, "--bundle-refresh-hint", "1s"},
	})
	for _, s := range []*side{alpha, beta} {
		source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(s.socket()))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { source.Close() })
		s.source = source
	}
	greeter(t, alpha.Pod("web"), "8080")
	return alpha, beta
}

func (s *side) socket() workloadapi.ClientOption {
	return workloadapi.WithAddr("unix://" + filepath.Join(s.RunDir, "api", "agent.sock"))
}

// greeter serves a greeting in a pod until the test ends, and says back what it
// hears.
func greeter(t *testing.T, pod *lab.Pod, port string) {
	t.Helper()
	l, err := pod.Listen("tcp", "0.0.0.0:"+port)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	serve := greet(new(atomic.Int64))
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			go func() { defer c.Close(); serve(c) }()
		}
	}()
}

// callWeb opens a tunnel to web with a configuration and asks for its port, once.
func callWeb(ctx context.Context, from *lab.Pod, config *tls.Config) (status int, got string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	raw, err := from.Dial(ctx, "tcp", net.JoinHostPort(webAddr, "15008"))
	if err != nil {
		return 0, "", err
	}
	defer raw.Close()
	config.NextProtos = []string{"h2"}
	conn := tls.Client(raw, config)
	if err := conn.HandshakeContext(ctx); err != nil {
		return 0, "", err
	}
	c, err := (&http2.Transport{}).NewClientConn(conn) //nolint:staticcheck // see tunnel
	if err != nil {
		return 0, "", err
	}
	defer c.Close()
	status, reason, got, err := (&tunnel{conn: c}).ask(ctx, http.MethodConnect, webAddr+":8080", http.Header{})
	return status, got + reason, err
}

// with presents a certificate, and does not look who answers.
func with(cert *tls.Certificate) *tls.Config {
	return &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13, InsecureSkipVerify: true} //nolint:gosec // who answers is not what is tested
}

// TestFederation: two meshes on one machine that are federated call each other
// under policy, by their programs' own TLS and to a captured server; trust domains
// are never merged; and all of it goes on while the caller's root is replaced.
func TestFederation(t *testing.T) {
	alpha, beta := startSides(t)
	ctx, outside := t.Context(), alpha.Pod("outside")
	sdk := func() *tls.Config {
		return tlsconfig.MTLSClientConfig(alpha.source, alpha.source, tlsconfig.AuthorizeID(betaWeb))
	}

	// Without a Federation, alpha is nobody: in policies, and at the proxy.
	beta.Write("policy.yaml", allowForeign("web", alphaApp.String()))
	beta.Eventually(10*time.Second, "a policy that names a stranger to be refused", func() error {
		s, err := beta.Client.ControlStatus(ctx)
		if err == nil && !strings.Contains(fmt.Sprint(s.Rejected), "add a Federation") {
			err = fmt.Errorf("rejected: %v", s.Rejected)
		}
		return err
	})
	stranger, err := alpha.source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if status, got, err := callWeb(ctx, outside, with(&tls.Certificate{Certificate: raws(stranger.Certificates), PrivateKey: stranger.PrivateKey})); err == nil {
		t.Errorf("without a Federation a stranger got %d %q", status, got)
	}

	// Federated, but not allowed by any policy.
	beta.Write("policy.yaml", "---\n")
	alpha.Edit("federation.yaml", federate(t, beta, betaTD, betaEndpoint))
	beta.Edit("federation.yaml", federate(t, alpha, alphaTD, alphaEndpoint))
	known := func(s *side, td spiffeid.TrustDomain) {
		t.Helper()
		s.Eventually(15*time.Second, td.Name()+" to be known", func() error {
			_, err := s.source.GetX509BundleForTrustDomain(td)
			return err
		})
	}
	known(alpha, betaTD)
	known(beta, alphaTD)
	if got, own := alpha.TrustBundle("--trust-domain", "beta.test"), beta.TrustBundle(); got != own {
		t.Errorf("alpha's control plane says that beta is verified by\n%sand beta's by\n%s", got, own)
	}
	if out, code := alpha.CLI("ca", "bundle", "--trust-domain", "gamma.test"); code != 1 || out != "" {
		t.Errorf("of a trust domain that nobody knows: code %d, %q", code, out)
	}
	denied := func(what string, config *tls.Config) {
		t.Helper()
		if status, got, err := callWeb(ctx, outside, config); err != nil || status != http.StatusForbidden {
			t.Errorf("%s: %d %q %v; want 403", what, status, got, err)
		}
	}
	alpha.Eventually(15*time.Second, "beta's proxy to know alpha", func() error {
		status, _, err := callWeb(ctx, outside, sdk())
		if err == nil && status != http.StatusForbidden {
			err = fmt.Errorf("status %d", status)
		}
		return err
	})
	denied("no policy", sdk())

	// Under policy.
	beta.Edit("policy.yaml", allowForeign("web", alphaApp.String()))
	allowed := func() error {
		status, got, err := callWeb(ctx, outside, sdk())
		if err == nil && (status != http.StatusOK || got != greeting+"hello") {
			err = fmt.Errorf("%d %q", status, got)
		}
		return err
	}
	if err := allowed(); err != nil {
		t.Errorf("under policy: %v", err)
	}
	alphaForge, betaForge := stolenForge(t, alpha.Mesh), stolenForge(t, beta.Mesh)
	denied("another of alpha", with(alphaForge.sign(t, nil, "spiffe://alpha.test/ns/shop/sa/other")))

	t.Run("never merged", func(t *testing.T) { neverMerged(t, beta, outside, alphaForge, betaForge) })
	t.Run("programs", func(t *testing.T) { programsCall(t, alpha, beta, alphaForge, betaForge) })
	t.Run("tokens", func(t *testing.T) { foreignTokens(t, alpha, beta) })
	t.Run("rotation", func(t *testing.T) {
		old := alphaForge.sign(t, nil, alphaApp.String())
		calls := rotateUnderCalls(t, alpha, allowed)
		t.Logf("%d calls, none failed", calls)
		alpha.Eventually(15*time.Second, "the former root to be trusted no more", func() error {
			status, got, err := callWeb(ctx, outside, with(old))
			if err == nil {
				return fmt.Errorf("a certificate below it got %d %q", status, got)
			}
			return nil
		})
		if err := allowed(); err != nil {
			t.Errorf("after the rotation: %v", err)
		}
	})
	direct := new(held)
	t.Run("without a tunnel", func(t *testing.T) {
		beta.Edit("policy.yaml", strings.Replace(allowForeign("web", alphaApp.String()), "ports: [8080]", "ports: [8080], tls: terminate", 1))
		at, hello := webAddr+":8080", make([]byte, len(greeting))
		if c, err := tlsDial(ctx, outside, at, with(stolenForge(t, alpha.Mesh).sign(t, nil, "spiffe://alpha.test/ns/shop/sa/other"))); err != nil {
			t.Errorf("another of alpha: %v", err)
		} else if b, err := io.ReadAll(c); len(b) > 0 || timedOut(err) {
			t.Errorf("another of alpha got %q, %v", b, err)
		}
		if c, err := tlsDial(ctx, outside, at, with(betaForge.sign(t, nil, alphaApp.String()))); err == nil {
			if b, err := io.ReadAll(c); len(b) > 0 || timedOut(err) {
				t.Errorf("alpha's name below beta's root got %q, %v", b, err)
			}
		}
		c, err := spiffeDial(ctx, outside, at, alpha.source, betaWeb.String())
		if err != nil {
			t.Fatal(err)
		}
		direct.Conn = c
		if _, err := io.ReadFull(c, hello); err != nil || string(hello) != greeting {
			t.Fatalf("alpha's program got %q, %v", hello, err)
		}
		if err := direct.ping(); err != nil {
			t.Error(err)
		}
	})
	t.Run("ends", func(t *testing.T) {
		over := direct.ending()
		defer func() {
			if (<-over).IsZero() {
				t.Error("a connection without a tunnel stays open")
			}
			direct.Close()
		}()
		beta.Write("policy.yaml", "---\n")
		if err := os.Remove(filepath.Join(beta.Dir, "federation.yaml")); err != nil {
			t.Fatal(err)
		}
		beta.Eventually(15*time.Second, "alpha to be nobody again", func() error {
			if _, err := beta.source.GetX509BundleForTrustDomain(alphaTD); err == nil {
				return errors.New("programs still trust it")
			}
			if status, got, err := callWeb(ctx, outside, sdk()); err == nil {
				return fmt.Errorf("the proxy still trusts it: %d %q", status, got)
			}
			return nil
		})
	})
}

func raws(s []*x509.Certificate) (out [][]byte) {
	for _, c := range s {
		out = append(out, c.Raw)
	}
	return out
}

// neverMerged: each trust domain's roots vouch for its own names only, at the
// proxy of a captured server that trusts both.
func neverMerged(t *testing.T, beta *side, outside *lab.Pod, alphaForge, betaForge *forge) {
	// A policy that both could use.
	beta.Edit("policy.yaml", allowForeign("web", alphaApp.String())+harness.Allow("pay", "own", "web", nil, "inside"))
	inside := "spiffe://beta.test/ns/pay/sa/inside"
	if status, got, err := callWeb(t.Context(), outside, with(betaForge.sign(t, nil, inside))); err != nil || status != http.StatusOK {
		t.Fatalf("beta's own: %d %q %v; so refusals below show nothing", status, got, err)
	}
	for what, cert := range map[string]*tls.Certificate{
		"alpha's name below beta's root":    betaForge.sign(t, nil, alphaApp.String()),
		"beta's name below alpha's root":    alphaForge.sign(t, nil, inside),
		"a third trust domain's name":       alphaForge.sign(t, nil, "spiffe://gamma.test/ns/shop/sa/app"),
		"alpha's name below an unknown one": foreignForge(t, alphaForge).sign(t, nil, alphaApp.String()),
	} {
		if status, got, err := callWeb(t.Context(), outside, with(cert)); err == nil {
			t.Errorf("%s: taken, and got %d %q", what, status, got)
		}
	}
	// The proxy looks for the roots by the first name only.
	for what, cert := range map[string]*tls.Certificate{
		"beta's name behind alpha's": alphaForge.sign(t, nil, "spiffe://alpha.test/ns/shop/sa/other", inside),
		"alpha's name behind beta's": betaForge.sign(t, nil, "spiffe://beta.test/ns/pay/sa/other", alphaApp.String()),
	} {
		if status, got, err := callWeb(t.Context(), outside, with(cert)); err == nil && status != http.StatusForbidden {
			t.Errorf("%s: %d %q; want 403", what, status, got)
		}
	}
	beta.Edit("policy.yaml", allowForeign("web", alphaApp.String()))
}

// programsCall: programs of the two meshes speak mutual TLS with each other, with
// go-spiffe and what the Workload API gives them, in both directions.
func programsCall(t *testing.T, alpha, beta *side, alphaForge, betaForge *forge) {
	call := func(server, client *side, serverID, clientID spiffeid.ID) error {
		l, err := spiffetls.ListenWithMode(t.Context(), "tcp", "127.0.0.1:0", spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(clientID), server.source))
		if err != nil {
			return err
		}
		defer l.Close()
		go func() {
			if c, err := l.Accept(); err == nil {
				_, _ = io.WriteString(c, greeting)
				c.Close()
			}
		}()
		c, err := spiffetls.DialWithMode(t.Context(), "tcp", l.Addr().String(), spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(serverID), client.source))
		if err != nil {
			return err
		}
		defer c.Close()
		if got, err := io.ReadAll(c); err != nil || string(got) != greeting {
			return fmt.Errorf("%q %w", got, err)
		}
		return nil
	}
	if err := call(beta, alpha, betaApp, alphaApp); err != nil {
		t.Errorf("alpha calls beta: %v", err)
	}
	if err := call(alpha, beta, alphaApp, betaApp); err != nil {
		t.Errorf("beta calls alpha: %v", err)
	}
	for what, one := range map[string]*tls.Certificate{
		"alpha's name below beta's root": betaForge.sign(t, nil, alphaApp.String()),
		"beta's name below alpha's root": alphaForge.sign(t, nil, betaApp.String()),
	} {
		var source x509bundle.Source = beta.source
		if err := tlsconfig.VerifyPeerCertificate(source, tlsconfig.AuthorizeAny())(one.Certificate, nil); err == nil {
			t.Errorf("%s: taken by a program", what)
		}
	}
}

// foreignTokens: a token of alpha is found good in beta, by the agent and by a
// program's own library, with alpha's keys.
func foreignTokens(t *testing.T, alpha, beta *side) {
	const audience = "spiffe://beta.test/ns/pay/sa/ledger"
	svid, err := workloadapi.FetchJWTSVID(t.Context(), jwtsvid.Params{Audience: audience}, alpha.socket())
	if err != nil {
		t.Fatal(err)
	}
	if got, err := workloadapi.ValidateJWTSVID(t.Context(), svid.Marshal(), audience, beta.socket()); err != nil || got.ID != alphaApp {
		t.Errorf("the agent says %v, %v", got, err)
	}
	if _, err := workloadapi.ValidateJWTSVID(t.Context(), svid.Marshal(), "spiffe://beta.test/ns/pay/sa/web", beta.socket()); status.Code(err) != codes.InvalidArgument {
		t.Errorf("for somebody else: %v", err)
	}
	source, err := workloadapi.NewJWTSource(t.Context(), workloadapi.WithClientOptions(beta.socket()))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	if got, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{audience}); err != nil || got.ID != alphaApp {
		t.Errorf("the library says %v, %v", got, err)
	}
}

// rotateUnderCalls replaces a mesh's root while calls go on, of which none may
// fail, and returns how many there were.
func rotateUnderCalls(t *testing.T, m *side, call func() error) (calls int) {
	t.Helper()
	s, err := m.Client.RotateRoot(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	waited := false
	for began := time.Now(); s.Stage != adminv1.RotationIdle; calls++ {
		if time.Since(began) > time.Minute {
			t.Fatalf("the rotation is still %s; it waits for %q, nodes %v", s.Stage, s.Waits, s.Nodes)
		}
		if err := call(); err != nil {
			t.Fatalf("call %d, %s: %v", calls, s.Stage, err)
		}
		if s, err = m.Client.Authority(t.Context()); err != nil {
			t.Fatal(err)
		}
		waited = waited || s.Waits != ""
	}
	if !waited {
		t.Error("the next root signed without regard to other trust domains, so this shows luck only")
	}
	return calls
}
