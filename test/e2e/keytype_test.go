package e2e

import (
	"context"
	"crypto/ecdsa"
	"crypto/rsa"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-mesh/signet/test/harness"
)

// The kind of key is edited under load: each is taken up with the next
// certificate, by the proxies and by who speaks the Workload API, and nothing
// fails while some have the one kind and some the other.
func TestKeyTypes(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	config := func(kind, ttl string) string {
		return strings.Replace(harness.Config(ttl), "svidTTL:", "svidKeyType: "+kind+", svidTTL:", 1) + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "red", "10.88.0.10") + harness.Workload("shop", "blue", "10.88.0.11") +
			harness.Workload("shop", "server", "10.88.0.12") +
			harness.Allow("shop", "allow", "server", []int{8080}, "red", "blue") +
			fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: app, namespace: shop}
spec: {serviceAccount: server, attest: {uid: %d, path: %q}}
---
`, os.Geteuid(), exe)
	}
	m := harness.Start(t, harness.Options{
		Pods:      map[string]string{"red": "10.88.0.10", "blue": "10.88.0.11", "server": "10.88.0.12"},
		Documents: map[string]string{"mesh.yaml": config("ec-p256", "8s")},
	})
	serve(t, m.Pod("server"), ":8080", echo)
	long := os.Getenv("SIGNET_TEST_LONG") != ""
	loaded, enough := context.WithTimeout(t.Context(), map[bool]time.Duration{false: 2 * time.Minute, true: 10 * time.Minute}[long])
	defer enough()
	done := make(chan struct{})
	go func() { defer close(done); underLoad(loaded, t, m) }()
	defer func() { enough(); <-done }()

	// The identity is the captured server's: what the process here is given is
	// what its proxy shows.
	socket := workloadapi.WithAddr("unix://" + filepath.Join(m.RunDir, "api", "agent.sock"))
	takes := func(kind string, within time.Duration) {
		t.Helper()
		m.Eventually(within, "a key of "+kind, func() error {
			s, err := workloadapi.FetchX509SVID(t.Context(), socket)
			if err != nil {
				return err
			}
			is := fmt.Sprintf("%T", s.PrivateKey)
			switch k := s.PrivateKey.(type) {
			case *ecdsa.PrivateKey:
				is = fmt.Sprintf("ec-p%d", k.Params().BitSize)
			case *rsa.PrivateKey:
				is = fmt.Sprintf("rsa-%d", k.N.BitLen())
			}
			if is != kind {
				return fmt.Errorf("it is %s", is)
			}
			return nil
		})
		time.Sleep(time.Second) // of load
	}
	for _, kind := range []string{"rsa-2048", "ec-p384", "ec-p256"} {
		m.Edit("mesh.yaml", config(kind, "8s"))
		takes(kind, 20*time.Second)
	}
	if long {
		// Such a key takes seconds to make, so certificates have to live longer. A
		// shorter life than theirs has them all renewed at once.
		m.Edit("mesh.yaml", config("ec-p256", "20m"))
		lives := func(atLeast, atMost time.Duration) func() error {
			return func() error {
				certs, err := m.Client.Certificates(t.Context())
				if err != nil {
					return err
				}
				for _, c := range certs {
					if left := time.Until(c.NotAfter); strings.Contains(c.ID, "/ns/") && (left < atLeast || left > atMost) {
						return fmt.Errorf("%s lives for %s", c.ID, left)
					}
				}
				return nil
			}
		}
		m.Eventually(time.Minute, "certificates of 20 minutes", lives(15*time.Minute, 20*time.Minute))
		began := time.Now()
		m.Edit("mesh.yaml", config("rsa-4096", "10m"))
		takes("rsa-4096", 3*time.Minute)
		m.Eventually(3*time.Minute, "all certificates to be renewed", lives(5*time.Minute, 10*time.Minute))
		t.Logf("all had keys of rsa-4096 after %s", time.Since(began).Round(100*time.Millisecond))
		time.Sleep(5 * time.Second) // of load
	}
	enough()
	<-done
}
