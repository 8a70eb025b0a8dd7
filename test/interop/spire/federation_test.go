//go:build interop

package spire

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
)

var web = spiffeid.RequireFromString("spiffe://mesh.test/ns/pay/sa/web")

// servers are the programs that are called, by who calls whom.
type servers struct {
	sdk     net.Listener // of ledger, by the mesh's policies
	own     net.Listener // of ledger, by go-spiffe alone: app may call
	foreign net.Listener // of app, by go-spiffe alone: ledger may call
}

// TestFederation: a mesh and a trust domain of SPIRE that follow each other's
// bundles call each other, under policy where this mesh decides; each verifies
// the other's tokens; and all of it goes on while either replaces its root. It
// fails when either's documents, certificates or tokens are nothing to the other,
// when being federated is being allowed, and when a rotation outruns the other.
func TestFederation(t *testing.T) {
	w := start(t)
	l, err := w.sdk.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
	w.port = l.Addr().(*net.TCPAddr).Port
	w.register(t)

	t.Run("strangers", func(t *testing.T) { w.strangers(t, l) })
	if t.Failed() {
		return
	}
	w.exchange(t)
	s := &servers{
		sdk:     l,
		own:     listen(t, w.own, app),
		foreign: listen(t, w.foreign[app], ledger),
	}
	t.Run("denied", func(t *testing.T) { w.denied(t, s) })
	w.Edit("policy.yaml", w.allow(app.String()))
	t.Run("allowed", func(t *testing.T) { w.allowed(t, s) })
	t.Run("tokens", func(t *testing.T) { w.tokens(t) })
	if t.Failed() {
		return
	}
	t.Run("SPIRE's root", func(t *testing.T) { w.rotateSPIRE(t, s) })
	t.Run("SPIRE's key of tokens", func(t *testing.T) { w.rotateSPIREsTokens(t) })
	t.Run("this mesh's root", func(t *testing.T) { w.rotateMesh(t, s) })
	t.Run("ends", func(t *testing.T) { w.ends(t, s) })
}

// listen serves as the identity of a source, for one caller.
func listen(t *testing.T, source *workloadapi.X509Source, caller spiffeid.ID) net.Listener {
	t.Helper()
	l, err := spiffetls.ListenWithMode(t.Context(), "tcp", "127.0.0.1:0", spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(caller), source))
	if err != nil {
		t.Fatal(err)
	}
	serve(t, l)
	return l
}

// dial calls a program, with go-spiffe alone.
func dial(ctx context.Context, l net.Listener, source *workloadapi.X509Source, server spiffeid.ID) error {
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := spiffetls.DialWithMode(ctx, "tcp", l.Addr().String(), spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(server), source))
	if err != nil {
		return err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	return hear(c)
}

// as is the configuration of a program of SPIRE that calls web.
func (w *world) as(id spiffeid.ID) *tls.Config {
	return tlsconfig.MTLSClientConfig(w.foreign[id], w.foreign[id], tlsconfig.AuthorizeID(web))
}

// with presents a certificate, and does not look who answers.
func with(svid *x509svid.SVID) *tls.Config {
	cert := tls.Certificate{PrivateKey: svid.PrivateKey}
	for _, c := range svid.Certificates {
		cert.Certificate = append(cert.Certificate, c.Raw)
	}
	return &tls.Config{Certificates: []tls.Certificate{cert}, MinVersion: tls.VersionTLS13, InsecureSkipVerify: true} //nolint:gosec // who answers is not what is tested
}

// strangers: before anything was exchanged nobody of the one is anybody to the
// other.
func (w *world) strangers(t *testing.T, sdk net.Listener) {
	w.refused(t, w.allow(app.String()), "add a Federation")
	svid, err := w.foreign[app].GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	if status, got, err := w.connect(t.Context(), with(svid)); err == nil {
		t.Errorf("web's proxy took a stranger: %d %q", status, got)
	}
	if _, _, err := w.connect(t.Context(), w.as(app)); err == nil {
		t.Error("a program of SPIRE took web for somebody")
	}
	if err := dial(t.Context(), sdk, w.foreign[app], ledger); err == nil {
		t.Error("a program of SPIRE and the SDK took each other for somebody")
	}
}

// refused writes policies that are refused in certain words, and takes them away.
func (w *world) refused(t *testing.T, policies, why string) {
	t.Helper()
	until := func(what string, good func(rejected string) bool) {
		t.Helper()
		w.Eventually(10*time.Second, what, func() error {
			s, err := w.Client.ControlStatus(t.Context())
			if err == nil && !good(fmt.Sprint(s.Rejected)) {
				err = fmt.Errorf("rejected: %v", s.Rejected)
			}
			return err
		})
	}
	w.Write("policy.yaml", policies)
	until("a policy to be refused", func(rejected string) bool { return strings.Contains(rejected, why) })
	w.Write("policy.yaml", "---\n")
	until("it to be gone", func(rejected string) bool { return rejected == "[]" })
}

// exchange has each follow the other.
func (w *world) exchange(t *testing.T) {
	t.Helper()
	bundle, err := w.server.Bundle(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	w.Edit("federation.yaml", w.federation(bundle))
	if err := w.server.SetBundle(t.Context(), ownTD, []byte(w.TrustBundle("-o", "spiffe"))); err != nil {
		t.Fatal(err)
	}
	if err := w.server.Federate(t.Context(), ownTD); err != nil {
		t.Fatal(err)
	}
	w.Eventually(20*time.Second, "this mesh's programs to know SPIRE's roots", func() error {
		_, err := w.own.GetX509BundleForTrustDomain(spireTD)
		return err
	})
	w.Eventually(follow, "SPIRE's programs to know this mesh's roots", func() error {
		_, err := w.foreign[app].GetX509BundleForTrustDomain(ownTD)
		return err
	})
	w.Eventually(20*time.Second, "web's proxy to know SPIRE's roots", func() error {
		status, got, err := w.connect(t.Context(), w.as(app))
		if err == nil && status != http.StatusForbidden {
			t.Errorf("being federated is being allowed: %d %q", status, got)
		}
		return err
	})
}

// denied: being federated allows nobody anything, and a policy allows whom it
// names.
func (w *world) denied(t *testing.T, s *servers) {
	ctx := t.Context()
	refuse := func(what string, id spiffeid.ID) {
		t.Helper()
		if status, got, err := w.connect(ctx, w.as(id)); err == nil && status != http.StatusForbidden {
			t.Errorf("%s: web answered %s: %d %q", what, id, status, got)
		}
		if err := dial(ctx, s.sdk, w.foreign[id], ledger); err == nil {
			t.Errorf("%s: the SDK's server answered %s", what, id)
		}
	}
	refuse("no policy", app)
	w.Edit("policy.yaml", w.allow(app.String()))
	refuse("a policy for another", other)
	refuse("a policy for another", backend)
	// Theirs, by SPIRE's own rules: app's server is for ledger, and not for web.
	closed := listen(t, w.foreign[app], web)
	if err := dial(ctx, closed, w.own, app); err == nil {
		t.Error("a program of SPIRE answered whom it does not want")
	}
	// A name of a form that policies do not have cannot be written into one.
	w.refused(t, w.allow(backend.String()), "/ns/")
	w.recorded(t, other, web, audit.Denied)
	w.recorded(t, other, ledger, audit.Denied)
}

// recorded checks that the audit has a call of a program of SPIRE.
func (w *world) recorded(t *testing.T, from, to spiffeid.ID, verdict audit.Verdict) {
	t.Helper()
	w.Eventually(10*time.Second, fmt.Sprintf("%s -> %s to be recorded", from, to), func() error {
		records := w.Records(adminclient.AuditQuery{From: from.String(), To: to.String()})
		i := slices.IndexFunc(records, func(r audit.Record) bool { return r.Verdict == verdict && r.Side == audit.Destination })
		if i < 0 {
			return fmt.Errorf("no record with the verdict %s; all: %+v", verdict, records)
		}
		if r := records[i]; r.Reason == "" || r.Source.Serial == "" {
			return fmt.Errorf("%+v lacks the reason or the caller's certificate", r)
		}
		return nil
	})
}

// round makes one call of each kind.
func (w *world) round(ctx context.Context, s *servers) error {
	status, got, err := w.connect(ctx, w.as(app))
	if err == nil && (status != http.StatusOK || got != greeting+"hello") {
		err = fmt.Errorf("%d %q", status, got)
	}
	if err != nil {
		return fmt.Errorf("SPIRE's app calls web: %w", err)
	}
	if err := dial(ctx, s.sdk, w.foreign[app], ledger); err != nil {
		return fmt.Errorf("SPIRE's app calls the SDK's server: %w", err)
	}
	if err := dial(ctx, s.own, w.foreign[app], ledger); err != nil {
		return fmt.Errorf("SPIRE's app calls ledger: %w", err)
	}
	if err := dial(ctx, s.foreign, w.own, app); err != nil {
		return fmt.Errorf("ledger calls SPIRE's app: %w", err)
	}
	ctx, cancel := context.WithTimeout(ctx, 10*time.Second)
	defer cancel()
	c, err := w.sdk.Dial(ctx, "tcp", s.foreign.Addr().String(), app)
	if err != nil {
		return fmt.Errorf("ledger calls SPIRE's app with the SDK: %w", err)
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(10 * time.Second))
	if err := hear(c); err != nil {
		return fmt.Errorf("ledger calls SPIRE's app with the SDK: %w", err)
	}
	return nil
}

// allowed: under policy, all calls get through, and the record says who called.
func (w *world) allowed(t *testing.T, s *servers) {
	w.Eventually(5*time.Second, "the SDK to have the policy", func() error { return dial(t.Context(), s.sdk, w.foreign[app], ledger) })
	for i := range 5 {
		if err := w.round(t.Context(), s); err != nil {
			t.Fatalf("round %d: %v", i, err)
		}
	}
	if status, got, err := w.connect(t.Context(), w.as(other)); err != nil || status != http.StatusForbidden {
		t.Errorf("another of SPIRE: %d %q %v; want 403", status, got, err)
	}
	w.recorded(t, app, web, audit.Allowed)
	w.recorded(t, app, ledger, audit.Allowed)
}

// tokens: each finds the other's tokens good, by the agent and by a library, and
// those for somebody else not.
func (w *world) tokens(t *testing.T) {
	ours, theirs := workloadapi.WithAddr("unix://"+w.socket()), workloadapi.WithAddr(w.agent.Socket())
	for _, c := range []struct {
		name                         string
		issuer, verifier             workloadapi.ClientOption
		subject, audience, elsewhere spiffeid.ID
	}{
		{"SPIRE's in this mesh", theirs, ours, app, ledger, web},
		{"this mesh's in SPIRE", ours, theirs, ledger, app, other},
	} {
		t.Run(c.name, func(t *testing.T) {
			ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
			defer cancel()
			svid, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Subject: c.subject, Audience: c.audience.String()}, c.issuer)
			if err != nil {
				t.Fatal(err)
			}
			if got, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), c.audience.String(), c.verifier); err != nil || got.ID != c.subject {
				t.Errorf("the agent says %v, %v", got, err)
			}
			if _, err := workloadapi.ValidateJWTSVID(ctx, svid.Marshal(), c.elsewhere.String(), c.verifier); status.Code(err) != codes.InvalidArgument {
				t.Errorf("for somebody else: %v", err)
			}
			source, err := workloadapi.NewJWTSource(ctx, workloadapi.WithClientOptions(c.verifier))
			if err != nil {
				t.Fatal(err)
			}
			defer source.Close()
			if got, err := jwtsvid.ParseAndValidate(svid.Marshal(), source, []string{c.audience.String()}); err != nil || got.ID != c.subject {
				t.Errorf("the library says %v, %v", got, err)
			}
		})
	}
}

// ends: whose Federation is taken away is nobody again.
func (w *world) ends(t *testing.T, s *servers) {
	w.Edit("policy.yaml", "---\n")
	w.Edit("federation.yaml", "---\n")
	w.Eventually(15*time.Second, "SPIRE to be nobody again", func() error {
		if _, err := w.own.GetX509BundleForTrustDomain(spireTD); err == nil {
			return errors.New("programs still trust it")
		}
		if status, got, err := w.connect(t.Context(), w.as(app)); err == nil {
			return fmt.Errorf("web's proxy still trusts it: %d %q", status, got)
		}
		return nil
	})
	if err := dial(t.Context(), s.own, w.foreign[app], ledger); err == nil {
		t.Error("a program of this mesh still answers SPIRE's")
	}
}
