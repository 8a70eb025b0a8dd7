package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/svid/jwtsvid"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/test/harness"
)

// entryFor is a workload that this test's own process is, or, with another user
// id, is not.
func entryFor(t *testing.T, name string, uid int) string {
	t.Helper()
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	return harness.Program("shop", name, uid, exe)
}

// Defends: who was refused an identity is in the audit of the node, with the
// reason; a caller in a loop is in it once, with how often, also over a stop of
// the agent; and the chain of the audit holds.
func TestRefusedIdentities(t *testing.T) {
	base := harness.Config("1h") + harness.Namespace("shop", "enforce")
	m := harness.Start(t, harness.Options{Documents: map[string]string{"mesh.yaml": base + entryFor(t, "other", 4711)}})
	socket := workloadapi.WithAddr("unix://" + filepath.Join(m.RunDir, "api", "agent.sock"))
	ctx, cancel := context.WithTimeout(t.Context(), time.Minute)
	defer cancel()
	const tries = 200
	for range tries {
		if _, err := workloadapi.FetchX509SVID(ctx, socket); status.Code(err) != codes.PermissionDenied {
			t.Fatalf("%v, want PermissionDenied", err)
		}
	}
	// One that has an identity asks for another's.
	m.Edit("mesh.yaml", base+entryFor(t, "other", 4711)+entryFor(t, "mine", os.Geteuid()))
	m.Eventually(10*time.Second, "its own identity", func() error {
		_, err := workloadapi.FetchX509SVID(ctx, socket)
		return err
	})
	others := spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/other")
	if _, err := workloadapi.FetchJWTSVID(ctx, jwtsvid.Params{Audience: "x", Subject: others}, socket); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("%v, want PermissionDenied", err)
	}

	q := adminclient.AuditQuery{Verdicts: []audit.Verdict{audit.Refused}}
	var records []audit.Record
	m.Eventually(5*time.Second, "both refusals in the audit", func() error {
		if records = m.Records(q); len(records) < 2 {
			return fmt.Errorf("%d records", len(records))
		}
		return nil
	})
	if len(records) > 3 {
		t.Errorf("%d records of %d refusals", len(records), tries+1)
	}
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	kinds := map[string]bool{}
	for _, r := range records {
		f := r.Refusal
		if f == nil || f.PID != os.Getpid() || f.UID == nil || *f.UID != uint32(os.Geteuid()) || f.Executable != exe || r.Node != "n1" {
			t.Errorf("%+v of %+v", f, r)
			continue
		}
		kinds[f.Kind+" "+f.Call+" "+f.ID] = true
	}
	if !kinds["stranger FetchX509SVID "] || !kinds["not-its-own FetchJWTSVID "+others.String()] {
		t.Errorf("in the audit are %v", kinds)
	}
	out, code := m.CLI("audit", "--verdict", "refused")
	if code != 0 || !strings.Contains(out, "stranger: attest: process") || !strings.Contains(out, "uid: want 4711, is 0") || !strings.Contains(out, "shop/other") {
		t.Errorf("code %d:\n%s", code, out)
	}
	if all, _ := m.CLI("audit", "--verdict", "denied"); strings.Contains(all, "stranger") {
		t.Errorf("it is called a denied connection:\n%s", all)
	}
	if out, code := m.CLI("audit", "verify"); code != 0 {
		t.Errorf("verify: code %d: %s", code, out)
	}

	// What has not been told yet is told when the agent ends.
	m.Stop()
	again := harness.Start(t, harness.Options{Dir: filepath.Dir(m.Dir), Documents: map[string]string{"mesh.yaml": base}, Lab: m.Lab})
	var count uint64
	for _, r := range again.Records(q) {
		if r.Refusal.Kind == "stranger" {
			count += r.Refusal.Count
		}
	}
	if count != tries {
		t.Errorf("%d refusals are in the audit, want %d", count, tries)
	}
	if out, code := again.CLI("audit", "verify"); code != 0 {
		t.Errorf("verify: code %d: %s", code, out)
	}
}

// Defends: without an audit there is none of refusals either, nor of what programs
// with the SDK report.
func TestRefusedWithoutAudit(t *testing.T) {
	base := harness.Config("1h") + harness.Namespace("shop", "enforce")
	m := harness.Start(t, harness.Options{Documents: map[string]string{"mesh.yaml": base}, Args: []string{"--no-audit"}})
	at := "unix://" + filepath.Join(m.RunDir, "api", "agent.sock")
	socket := workloadapi.WithAddr(at)
	if _, err := workloadapi.FetchX509SVID(t.Context(), socket); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("%v, want PermissionDenied", err)
	}
	m.Edit("mesh.yaml", base+entryFor(t, "mine", os.Geteuid()))
	conn, err := grpc.NewClient(at, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	now := time.Now().UnixNano()
	m.Eventually(10*time.Second, "a report is taken", func() error {
		_, err := sdkv1.NewConnectionsClient(conn).Report(metadata.AppendToOutgoingContext(t.Context(), "workload.spiffe.io", "true"), &sdkv1.ReportRequest{
			SpiffeId: "spiffe://mesh.test/ns/shop/sa/mine", Session: make([]byte, 16), First: 1,
			Events: []*sdkv1.Event{{Connection: 1, Final: true, Start: now, End: now, Verdict: "allowed"}},
		})
		return err
	})
	time.Sleep(time.Second)
	if got := m.Records(adminclient.AuditQuery{}); len(got) != 0 {
		t.Errorf("%+v", got)
	}
}

// Defends: what somebody tries with a node's certificate that they stole is seen
// by the operator, and still is after the control plane was killed.
func TestStolenNodeCertificateIsSeen(t *testing.T) {
	base := harness.Config("1h") + harness.Namespace("shop", "enforce")
	elsewhere := `apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: far, namespace: shop}
spec: {serviceAccount: far, node: n2, attest: {uid: 1}}
---
`
	m := harness.Start(t, harness.Options{Documents: map[string]string{"mesh.yaml": base + elsewhere}})
	agent := filepath.Join(m.StateDir, "agent")
	cert, err := tls.LoadX509KeyPair(filepath.Join(agent, "node.pem"), filepath.Join(agent, "node.pem"))
	if err != nil {
		entries, _ := os.ReadDir(agent)
		t.Fatal(err, entries)
	}
	td := spiffeid.RequireTrustDomainFromString("mesh.test")
	roots, err := x509bundle.Load(td, filepath.Join(agent, "bundle.pem"))
	if err != nil {
		t.Fatal(err)
	}
	config, err := caserver.ClientTLS(caserver.ClientConfig{TrustDomain: td, Bundle: roots, Certificate: func() (*tls.Certificate, error) { return &cert, nil }})
	if err != nil {
		t.Fatal(err)
	}
	conn, err := grpc.NewClient("unix://"+filepath.Join(m.RunDir, "control.sock"), grpc.WithTransportCredentials(credentials.NewTLS(config)))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	const tries = 100
	for range tries {
		if _, err := nodev1.NewNodeClient(conn).Issue(t.Context(), &nodev1.IssueRequest{Workload: "shop/far", Csr: csr}); status.Code(err) != codes.PermissionDenied {
			t.Fatalf("%v, want PermissionDenied", err)
		}
	}
	var list adminv1.Refusals
	look := func() error {
		out, code := m.CLI("ca", "refused", "-o", "json")
		if code != 0 {
			return errors.New(out)
		}
		list = adminv1.Refusals{}
		if err := json.Unmarshal([]byte(out), &list); err != nil {
			return err
		}
		for _, r := range list.Refused {
			if r.Node == "n1" && r.Workload == "shop/far" && r.Why == "node" && r.Call == "Issue" {
				return nil
			}
		}
		return fmt.Errorf("%+v", list)
	}
	m.Eventually(10*time.Second, "the attempts in the issuance log", look)
	if len(list.Refused) > 5 {
		t.Errorf("%d lines of %d attempts", len(list.Refused), tries)
	}
	m.Kill("control")
	m.Eventually(20*time.Second, "the attempts after the control plane was killed", look)
}
