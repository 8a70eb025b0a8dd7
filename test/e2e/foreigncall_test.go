package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/netip"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

const (
	foreignVIP  = "10.96.0.5"
	callerAddr  = "10.88.0.33"
	outsideAddr = "10.88.0.32"
)

var alphaCaller = spiffeid.RequireFromString("spiffe://alpha.test/ns/shop/sa/caller")

// foreignService has captured clients of alpha reach an address of another mesh.
func foreignService(addr string, id spiffeid.ID) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: ServiceEntry
metadata: {name: partner, namespace: shop}
spec:
  vips: [%s]
  ports: [{port: 80, targetPort: 8080}]
  endpoints: [{address: %s, spiffeID: %q}]
---
`, foreignVIP, addr, id)
}

// impostor answers tunnels in a pod with a certificate of the test's, and greets.
func impostor(t *testing.T, pod *lab.Pod, cert *tls.Certificate) {
	t.Helper()
	l, err := pod.Listen("tcp", ":15008")
	if err != nil {
		t.Fatal(err)
	}
	server := &http.Server{
		ReadHeaderTimeout: 10 * time.Second,
		TLSConfig:         &tls.Config{Certificates: []tls.Certificate{*cert}, MinVersion: tls.VersionTLS13, NextProtos: []string{"h2"}, ClientAuth: tls.RequireAnyClientCert},
		Handler: http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
			w.WriteHeader(http.StatusOK)
			_, _ = io.WriteString(w, greeting)
			_ = http.NewResponseController(w).Flush()
			_, _ = io.Copy(io.Discard, r.Body)
		}),
	}
	served := make(chan error, 1)
	go func() { served <- server.ServeTLS(l, "", "") }()
	t.Cleanup(func() {
		_ = server.Close()
		<-served
	})
}

// TestForeignCall: an unmodified, captured client of one mesh calls an unmodified,
// captured server of another, under the other's policy, and the audit of each side
// names both. Whoever proves another identity at the address is not spoken to, nor who
// proves the right name by roots that are not its trust domain's.
//
// What it defends: that tunnels to another trust domain have a validation of their own,
// with its roots and its names, and want one identity (package xds, foreignTunnels).
func TestForeignCall(t *testing.T) {
	alpha, beta := startSides(t)
	if _, err := alpha.Lab.AddPod("caller", netip.MustParseAddr(callerAddr)); err != nil {
		t.Fatal(err)
	}
	call := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 8*time.Second)
		defer cancel()
		c, err := alpha.Pod("caller").Dial(ctx, "tcp", net.JoinHostPort(foreignVIP, "80"))
		if err != nil {
			return err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(8 * time.Second)); err != nil {
			return err
		}
		b := make([]byte, len(greeting))
		if n, err := io.ReadFull(c, b); err != nil || string(b) != greeting {
			return fmt.Errorf("%q %w", b[:n], err)
		}
		return nil
	}
	newest := func(s *side, where audit.Side, is func(audit.Record) error) {
		t.Helper()
		s.Eventually(10*time.Second, "the audit of the "+string(where), func() error {
			var last audit.Record
			for _, r := range s.Records(adminclient.AuditQuery{Side: where}) {
				if r.Start.After(last.Start) && r.Transport == "mtls" {
					last = r
				}
			}
			return is(last)
		})
	}
	both := func(verdict audit.Verdict) func(audit.Record) error {
		return func(r audit.Record) error {
			if r.Verdict != verdict || r.Source.ID != alphaCaller.String() || r.Destination.ID != betaWeb.String() {
				return fmt.Errorf("the newest record is %+v", r)
			}
			return nil
		}
	}

	// Nobody is known in the other trust domain yet.
	alpha.Edit("caller.yaml", harness.Workload("shop", "caller", callerAddr))
	alpha.Write("partner.yaml", foreignService(webAddr, betaWeb))
	rejected := func(what, word string) {
		t.Helper()
		alpha.Eventually(10*time.Second, what, func() error {
			s, err := alpha.Client.ControlStatus(t.Context())
			if err == nil && (word == "" && len(s.Rejected) > 0 || !strings.Contains(fmt.Sprint(s.Rejected), word)) {
				err = fmt.Errorf("rejected: %v", s.Rejected)
			}
			return err
		})
	}
	rejected("an endpoint of an unknown trust domain to be refused", "add a Federation")
	alpha.Write("partner.yaml", "---\n")
	rejected("the documents to be good again", "")
	alpha.Edit("federation.yaml", federate(t, beta, betaTD, betaEndpoint))
	beta.Edit("federation.yaml", federate(t, alpha, alphaTD, alphaEndpoint))
	alpha.Edit("partner.yaml", foreignService(webAddr, betaWeb))

	// No policy of the other mesh admits the caller.
	alpha.Eventually(20*time.Second, "both ends to know each other", func() error {
		if err := call(); err == nil {
			t.Fatal("without a policy the caller is let in")
		}
		for _, r := range beta.Records(adminclient.AuditQuery{Side: audit.Destination}) {
			if r.Source.ID == alphaCaller.String() {
				return nil
			}
		}
		return errors.New("beta has not heard of the caller")
	})
	newest(beta, audit.Destination, both(audit.Denied))
	newest(alpha, audit.Source, both(audit.Denied))

	beta.Edit("policy.yaml", allowForeign("web", alphaCaller.String()))
	if err := call(); err != nil {
		t.Fatalf("under the other mesh's policy: %v", err)
	}
	newest(beta, audit.Destination, both(audit.Allowed))
	newest(alpha, audit.Source, both(audit.Allowed))
	for began := time.Now(); time.Since(began) < 10*time.Second; time.Sleep(50 * time.Millisecond) { // a certificate's life, and more
		if err := call(); err != nil {
			t.Fatalf("%s on: %v", time.Since(began), err)
		}
	}

	refused := func(what string) {
		t.Helper()
		if err := call(); err == nil {
			t.Errorf("%s: spoken to", what)
		}
		newest(alpha, audit.Source, func(r audit.Record) error {
			if r.Verdict != audit.Failed || !strings.Contains(r.Reason, "did not prove that it is") {
				return fmt.Errorf("the newest record is %+v", r)
			}
			return nil
		})
	}
	alpha.Edit("partner.yaml", foreignService(webAddr, betaApp))
	refused("another identity of the other mesh")

	alphaForge, betaForge := stolenForge(t, alpha.Mesh), stolenForge(t, beta.Mesh)
	alpha.Edit("partner.yaml", foreignService(outsideAddr, betaWeb))
	t.Run("by the mesh's own root", func(t *testing.T) {
		impostor(t, alpha.Pod("outside"), alphaForge.sign(t, nil, betaWeb.String()))
		refused("the right name by the mesh's own root")
	})
	t.Run("by its own root", func(t *testing.T) { // so what is above shows something
		impostor(t, alpha.Pod("outside"), betaForge.sign(t, nil, betaWeb.String()))
		if err := call(); err != nil {
			t.Errorf("the right name by its own root: %v", err)
		}
	})

	// A program of the other mesh that is not captured and speaks mutual TLS itself.
	t.Run("without a tunnel", func(t *testing.T) {
		g := withSPIFFE(t, alpha.Pod("outside"), "8080", tlsconfig.MTLSServerConfig(beta.source, beta.source, tlsconfig.AuthorizeID(alphaCaller)))
		itself := func(id spiffeid.ID) string {
			return strings.Replace(foreignService(outsideAddr, id), `"}]`, `", tls: originate}]`, 1)
		}
		alpha.Edit("partner.yaml", itself(betaApp))
		if err := call(); err != nil {
			t.Fatal(err)
		}
		if n, all, _ := g.of(alphaCaller.String()); n != 1 || all != 1 {
			t.Errorf("the caller is known in %d of %d calls", n, all)
		}
		alpha.Edit("partner.yaml", itself(betaWeb))
		if err := call(); err == nil {
			t.Error("another identity of the other mesh: spoken to")
		}
		alpha.Eventually(10*time.Second, "both in the audit", func() error {
			seen := map[audit.Verdict]bool{}
			for _, r := range alpha.Records(adminclient.AuditQuery{Side: audit.Source}) {
				if r.Transport == audit.Direct && r.Source.ID == alphaCaller.String() &&
					(r.Verdict == audit.Allowed && r.Destination.ID == betaApp.String() || strings.Contains(r.Reason, "did not prove by mutual TLS that it is "+betaWeb.String())) {
					seen[r.Verdict] = true
				}
			}
			if !seen[audit.Allowed] || !seen[audit.Failed] {
				return fmt.Errorf("%v", seen)
			}
			return nil
		})
	})
}
