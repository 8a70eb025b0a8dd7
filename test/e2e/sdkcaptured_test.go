package e2e

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/sdk"
	"github.com/signet-mesh/signet/test/harness"
)

// TestSDKCaptured: programs with the SDK in captured pods reach each other, with
// their TLS inside the tunnel; what a captured program sends there in plain text
// is refused, as docs/sdk.md says.
func TestSDKCaptured(t *testing.T) {
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"client": "10.88.0.10", "server": "10.88.0.12"},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			capturedProgram("client", "10.88.0.10", self(t)) + capturedProgram("server", "10.88.0.12", self(t)) +
			harness.Allow("shop", "allow-client", "server", []int{8443}, "client")},
	})
	open := func(name string) *sdk.Mesh {
		t.Helper()
		s, err := sdk.Open(t.Context(), sdk.WithSocket("unix://"+filepath.Join(m.RunDir, "api", "agent.sock")),
			sdk.WithIdentity(sdkID(name)), sdk.WithDialer(m.Pod(name).Dial))
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { s.Close() })
		return s
	}
	client, server := open("client"), open("server")
	inner, err := m.Pod("server").Listen("tcp", ":8443")
	if err != nil {
		t.Fatal(err)
	}
	l := server.NewListener(inner)
	t.Cleanup(func() { l.Close() })
	go acceptAll(l, echo)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := client.Dial(ctx, "tcp", "10.88.0.12:8443", sdkID("server"))
	if err != nil {
		t.Fatal(err)
	}
	if err := word(c); err != nil {
		t.Error(err)
	}
	c.Close()
	plain, err := m.Pod("client").Dial(ctx, "tcp", "10.88.0.12:8443")
	if err != nil {
		t.Fatal(err)
	}
	defer plain.Close()
	_ = plain.SetDeadline(time.Now().Add(10 * time.Second))
	if _, err := plain.Write([]byte("GET / HTTP/1.0\r\n\r\n")); err != nil {
		t.Fatal(err)
	}
	if b, err := io.ReadAll(plain); errors.Is(err, os.ErrDeadlineExceeded) || strings.Contains(string(b), "GET") {
		t.Errorf("plain text was answered with %q, %v", b, err)
	}
	m.Eventually(10*time.Second, "the tunnel's ends, the SDK's ends, and the refusal in the audit", func() error {
		ends, refusals := map[string]int{}, 0
		for _, r := range m.Records(adminclient.AuditQuery{}) {
			witness := "proxy"
			if r.Proxy == "sdk" {
				witness = "sdk"
			}
			if r.Verdict == audit.Allowed && r.Source.ID == sa("client") && r.Destination.ID == sa("server") {
				ends[witness+" "+string(r.Side)]++
			}
			if r.Verdict == audit.Denied && strings.HasPrefix(r.Reason, "plaintext: ") {
				refusals++
			}
		}
		if ends["sdk source"] != 1 || ends["sdk destination"] != 1 || ends["proxy source"] < 1 || ends["proxy destination"] < 1 || refusals != 1 {
			return fmt.Errorf("ends %v, %d refusals", ends, refusals)
		}
		return nil
	})
}
