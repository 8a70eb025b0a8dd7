package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/sdk"
	"github.com/signet-mesh/signet/test/harness"
)

// sdkWorkload is a workload that is this very test: not captured, it decides
// with package sdk.
func sdkWorkload(t *testing.T, name string) string {
	t.Helper()
	return sdkEntry(name, self(t))
}

func sdkEntry(name, exe string) string {
	return harness.Program("shop", name, os.Geteuid(), exe)
}

// sdkMesh has three workloads that use package sdk; client may call server at a
// port.
type sdkMesh struct {
	*harness.Mesh
	base   string
	client *sdk.Mesh
	other  *sdk.Mesh
	server *sdk.Mesh
}

func startSDK(t *testing.T, ttl string) *sdkMesh {
	t.Helper()
	base := harness.Config(ttl) + harness.Namespace("shop", "enforce") +
		sdkWorkload(t, "client") + sdkWorkload(t, "other") + sdkWorkload(t, "server")
	m := &sdkMesh{base: base, Mesh: harness.Start(t, harness.Options{Documents: map[string]string{"mesh.yaml": base}})}
	m.client, m.other, m.server = m.as(t, "client"), m.as(t, "other"), m.as(t, "server")
	return m
}

// as takes part in the mesh as one of this process's identities.
func (m *sdkMesh) as(t *testing.T, name string) *sdk.Mesh {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	s, err := sdk.Open(ctx, sdk.WithSocket("unix://"+filepath.Join(m.RunDir, "api", "agent.sock")), sdk.WithIdentity(sdkID(name)))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { s.Close() })
	return s
}

func sdkID(name string) spiffeid.ID { return spiffeid.RequireFromString(sa(name)) }

// serve answers every connection to the server with echo.
func (m *sdkMesh) serve(t *testing.T) *sdk.Listener {
	t.Helper()
	l, err := m.server.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go acceptAll(l, echo)
	return l
}

func sdkPort(l net.Listener) int { return l.Addr().(*net.TCPAddr).Port }

// open dials the server and exchanges a word.
func (m *sdkMesh) open(ctx context.Context, as *sdk.Mesh, l net.Listener) (*sdk.Conn, error) {
	ctx, cancel := context.WithTimeout(ctx, 5*time.Second)
	defer cancel()
	c, err := as.Dial(ctx, "tcp", l.Addr().String(), sdkID("server"))
	if err != nil {
		return nil, err
	}
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if err := word(c); err != nil {
		c.Close()
		return nil, err
	}
	return c, nil
}

// allow has a policy let the client call the server, and returns the first connection
// by it.
func (m *sdkMesh) allow(t *testing.T, l net.Listener) (c *sdk.Conn) {
	t.Helper()
	m.Edit("mesh.yaml", m.base+harness.Allow("shop", "allow-client", "server", []int{sdkPort(l)}, "client"))
	m.Eventually(5*time.Second, "the policy to be in force", func() (err error) {
		c, err = m.open(t.Context(), m.client, l)
		return err
	})
	return c
}

// word exchanges a word with an echo.
func word(c net.Conn) error {
	if _, err := c.Write([]byte("hello")); err != nil {
		return err
	}
	b := make([]byte, 5)
	if _, err := io.ReadFull(c, b); err != nil || string(b) != "hello" {
		return fmt.Errorf("got %q: %w", b, err)
	}
	return nil
}

// TestSDK: two programs that use package sdk, without a proxy. Who is allowed
// gets through, who is not gets nothing and is told nothing but that; the node's
// audit has both ends of both, with what each end proved itself with.
func TestSDK(t *testing.T) {
	m := startSDK(t, "1h")
	l := m.serve(t)
	c := m.allow(t, l)
	if c.PeerID() != sdkID("server") {
		t.Errorf("the client talks to %s", c.PeerID())
	}
	c.Close()
	began := time.Now()
	refused := &sdk.RefusedError{}
	if _, err := m.open(t.Context(), m.other, l); !errors.As(err, &refused) || refused.Reason != "refused by the destination" {
		t.Errorf("whom no policy names got %v; want a refusal by the destination", err)
	}
	if _, err := m.client.Dial(t.Context(), "tcp", l.Addr().String(), sdkID("other")); err == nil || !strings.Contains(err.Error(), "did not prove that it is") {
		t.Errorf("a server that is not the wanted one: %v", err)
	}

	const deny = "default deny: 1 policy protects shop/server, it does not admit this caller"
	m.Eventually(5*time.Second, "both ends of each connection in the audit", func() error {
		seen := map[string]audit.Record{}
		for _, r := range m.Records(adminclient.AuditQuery{Since: began.Add(-5 * time.Second)}) {
			if r.End.IsZero() {
				continue
			}
			seen[fmt.Sprintf("%s %s %s %s", r.Side, strings.TrimPrefix(r.Source.ID, sa("")), strings.TrimPrefix(r.Destination.ID, sa("")), r.Verdict)] = r
		}
		for what, reason := range map[string]string{
			"source client server allowed":      "accepted by the destination",
			"destination client server allowed": "allowed by shop/allow-client",
			"source other server denied":        "refused by the destination",
			"destination other server denied":   deny,
		} {
			r, ok := seen[what]
			if !ok {
				return fmt.Errorf("no record %q in %v", what, seen)
			}
			if r.Reason != reason || r.Source.Serial == "" || r.Destination.Serial == "" || r.Node != "n1" {
				return fmt.Errorf("%s: %+v; want the reason %q and both serial numbers", what, r, reason)
			}
			if r.Verdict == audit.Allowed && (r.BytesSent != 5 || r.BytesReceived != 5 || r.TLS == nil || r.TLS.Group != "X25519MLKEM768") {
				return fmt.Errorf("%s: %+v; want 5 bytes each way, and X25519MLKEM768", what, r)
			}
		}
		return nil
	})
	out, code := m.CLI("audit", "--verdict", "denied")
	if code != 0 || !strings.Contains(out, deny) {
		t.Errorf("signet audit (%d):\n%s", code, out)
	}
	serial := m.Records(adminclient.AuditQuery{Verdicts: []audit.Verdict{audit.Denied}, Side: "destination"})[0].Source.Serial
	if out, code := m.CLI("audit", "--serial", serial); code != 0 || !strings.Contains(out, "shop/other") {
		t.Errorf("signet audit --serial (%d):\n%s", code, out)
	}
}

// TestSDKRevoked: an edit that refuses an open connection ends it at once,
// at both ends, and so does a quarantine; new ones are refused in the
// mesh's words.
func TestSDKRevoked(t *testing.T) {
	m := startSDK(t, "1h")
	l := m.serve(t)
	policy := harness.Allow("shop", "allow-client", "server", []int{sdkPort(l)}, "client")
	quarantine := `apiVersion: signet.dev/v1alpha1
kind: Quarantine
metadata: {name: incident-7}
spec: {reason: a test, serviceAccounts: [shop/client]}
---
`
	for _, change := range []struct{ name, documents, reason string }{
		{"policy", m.base, "default deny: no policy protects shop/server"},
		{"quarantine", m.base + policy + quarantine, `quarantined by "incident-7": caller ` + sa("client") + " is cut off"},
	} {
		m.Write("mesh.yaml", m.base+policy)
		var c *sdk.Conn
		m.Eventually(5*time.Second, "the policy to be in force", func() (err error) {
			c, err = m.open(t.Context(), m.client, l)
			return err
		})
		began := time.Now()
		m.Write("mesh.yaml", change.documents)
		var err error
		for err == nil && time.Since(began) < 5*time.Second {
			err = word(c)
			time.Sleep(5 * time.Millisecond)
		}
		took := time.Since(began)
		c.Close()
		if err == nil || took > 3*time.Second { // three quarters of which the control plane has, on a machine with much else to do
			t.Errorf("%s: the open connection ended after %v with %v; want 3 s at most", change.name, took, err)
		}
		t.Logf("%s: the open connection ended after %v: %v", change.name, took, err)
		if _, err := m.open(t.Context(), m.client, l); err == nil {
			t.Errorf("%s: a new connection got through", change.name)
		}
		// Both ends hear of a quarantine, and the one that does first ends the
		// connection; the other then knows only that its peer did.
		m.Eventually(5*time.Second, "the revocation in the audit", func() error {
			for _, r := range m.Records(adminclient.AuditQuery{Since: began}) {
				if r.Ended == "revoked" && strings.HasSuffix(r.Reason, "; revoked: "+change.reason) {
					return nil
				}
			}
			return fmt.Errorf("no record says revoked: %s", change.reason)
		})
	}
}

// TestSDKRevokedCertificate: a connection of a certificate that is revoked ends
// within seconds, at both ends, while the program goes on with another one.
func TestSDKRevokedCertificate(t *testing.T) {
	m := startSDK(t, "1h")
	l := m.serve(t)
	m.Write("mesh.yaml", m.base+harness.Allow("shop", "allow-client", "server", []int{sdkPort(l)}, "client"))
	for _, who := range []string{"client", "server"} {
		var c *sdk.Conn
		m.Eventually(5*time.Second, "a connection", func() (err error) {
			c, err = m.open(t.Context(), m.client, l)
			return err
		})
		certs, err := m.Client.Certificates(t.Context())
		if err != nil {
			t.Fatal(err)
		}
		serial := ""
		for _, cert := range certs {
			if cert.ID == sa(who) {
				serial = cert.Serial
			}
		}
		began := time.Now()
		which := []string{"--serial", serial}
		if who == "server" {
			which = []string{"--id", sa(who)}
		}
		if out, code := m.CLI(append([]string{"ca", "revoke", "--reason", "copied"}, which...)...); code != 0 {
			t.Fatalf("signet ca revoke: %d, %s", code, out)
		}
		for err == nil && time.Since(began) < 10*time.Second {
			err = word(c)
			time.Sleep(5 * time.Millisecond)
		}
		c.Close()
		t.Logf("%s: the open connection ended after %v: %v", who, time.Since(began), err)
		if err == nil || !strings.Contains(err.Error(), "certificate is revoked: copied") && who == "server" {
			t.Errorf("%s: the open connection: %v", who, err)
		}
		m.Eventually(2*time.Second, "a connection with another certificate", func() error {
			c, err := m.open(t.Context(), m.client, l)
			if err == nil {
				err = c.Close()
			}
			return err
		})
		m.Eventually(5*time.Second, "the revocation in the audit", func() error {
			for _, r := range m.Records(adminclient.AuditQuery{Since: began.Add(-time.Minute)}) {
				if r.Ended == "revoked" && strings.HasSuffix(r.Reason, "certificate is revoked: copied") {
					return nil
				}
			}
			return errors.New("no record says so")
		})
	}
}
