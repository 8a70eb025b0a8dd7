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
	config := func(kind string) string {
		return strings.Replace(harness.Config("8s"), "svidTTL:", "svidKeyType: "+kind+", svidTTL:", 1) + harness.Namespace("shop", "enforce") +
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
		Documents: map[string]string{"mesh.yaml": config("ec-p256")},
	})
	serve(t, m.Pod("server"), ":8080", echo)
	loaded, enough := context.WithTimeout(t.Context(), 2*time.Minute)
	defer enough()
	done := make(chan struct{})
	go func() { defer close(done); underLoad(loaded, t, m) }()
	defer func() { enough(); <-done }()

	// The identity is the captured server's: what the process here is given is
	// what its proxy shows.
	socket := workloadapi.WithAddr("unix://" + filepath.Join(m.RunDir, "api", "agent.sock"))
	for _, kind := range []string{"rsa-2048", "ec-p384", "ec-p256"} {
		m.Edit("mesh.yaml", config(kind))
		m.Eventually(20*time.Second, "a key of "+kind, func() error {
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
	enough()
	<-done
}
