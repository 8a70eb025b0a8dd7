package e2e

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/test/harness"
)

// TestWorkloadAPI: a process that is what a WorkloadEntry says gets its
// identity through go-spiffe, sees it rotate, and does mutual TLS with it; one
// whose executable has another digest gets nothing.
func TestWorkloadAPI(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	content, err := os.ReadFile(exe)
	if err != nil {
		t.Fatal(err)
	}
	entry := func(name, sha string) string {
		return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: %[1]s, namespace: shop}
spec: {serviceAccount: %[1]s, attest: {uid: %[2]d, path: %[3]q, sha256: %[4]q}}
---
`, name, os.Geteuid(), exe, sha)
	}
	sum := sha256.Sum256(content)
	right, wrong := hex.EncodeToString(sum[:]), hex.EncodeToString(make([]byte, 32))
	base := harness.Config("8s") + harness.Namespace("shop", "enforce")
	m := harness.Start(t, harness.Options{Documents: map[string]string{"mesh.yaml": base + entry("app", wrong)}})
	socket := workloadapi.WithAddr("unix://" + filepath.Join(m.RunDir, "api", "agent.sock"))
	ctx, cancel := context.WithTimeout(t.Context(), 40*time.Second)
	defer cancel()

	if _, err := workloadapi.FetchX509SVID(ctx, socket); status.Code(err) != codes.PermissionDenied {
		t.Fatalf("a process with another digest got %v, want PermissionDenied", err)
	}
	m.Edit("mesh.yaml", base+entry("app", right))
	source, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(socket))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	first, err := source.GetX509SVID()
	if err != nil {
		t.Fatal(err)
	}
	want := spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/app")
	if first.ID != want {
		t.Fatalf("got %s, want %s", first.ID, want)
	}

	l, err := spiffetls.ListenWithMode(ctx, "tcp", "127.0.0.1:0",
		spiffetls.MTLSServerWithSource(tlsconfig.AuthorizeID(want), source))
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	go func() {
		for {
			c, err := l.Accept()
			if err != nil {
				return
			}
			_, _ = c.Write([]byte("hello"))
			c.Close()
		}
	}()
	call := func() {
		t.Helper()
		c, err := spiffetls.DialWithMode(ctx, "tcp", l.Addr().String(), spiffetls.MTLSClientWithSource(tlsconfig.AuthorizeID(want), source))
		if err != nil {
			t.Fatal(err)
		}
		defer c.Close()
		if b, err := io.ReadAll(c); err != nil || string(b) != "hello" {
			t.Fatalf("got %q, %v", b, err)
		}
	}
	call()
	m.Eventually(20*time.Second, "a rotation", func() error {
		now, err := source.GetX509SVID()
		if err == nil && now.Certificates[0].SerialNumber.Cmp(first.Certificates[0].SerialNumber) == 0 {
			err = fmt.Errorf("still the first certificate")
		}
		return err
	})
	call()

	// The entitlement goes, and with it the identity, on the open stream too.
	m.Edit("mesh.yaml", base+entry("app", wrong))
	m.Eventually(10*time.Second, "the identity to be taken away", func() error {
		if _, err := workloadapi.FetchX509SVID(ctx, socket); status.Code(err) != codes.PermissionDenied {
			return fmt.Errorf("got %w, want PermissionDenied", err)
		}
		return nil
	})
}
