package e2e

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"testing"
	"time"

	"github.com/signet-mesh/signet/conformance"
	"github.com/signet-mesh/signet/test/harness"
)

// TestConformance: the suite that anybody can run passes here, as the program that
// users run, against the agent and the bundle endpoint; and once more as a program
// that has no identity. Nothing is passed over but what it says here.
//
// That each check fails when what it looks at is wrong is for the tests of package
// conformance to show.
func TestConformance(t *testing.T) {
	const endpoint = "127.0.0.1:8461"
	entry := func(name, more string) string {
		return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: %[1]s, namespace: shop}
spec: {serviceAccount: %[1]s, %[2]s attest: {uid: %[3]d, path: %[4]q}}
---
`, name, more, os.Geteuid(), harness.Bin("signet"))
	}
	m := harness.Start(t, harness.Options{
		Documents: map[string]string{"mesh.yaml": harness.Config("8s") + harness.Namespace("shop", "enforce") + entry("app", "hint: internal,") + entry("db", "hint: external,")},
		Args:      []string{"--bundle-listen", endpoint},
	})
	wait, passedOver := "20s", []string{"validate-expired"}
	if os.Getenv("SIGNET_TEST_LONG") != "" {
		wait, passedOver = "6m", nil // longer than a token lives
	}
	socket := "unix://" + filepath.Join(m.RunDir, "api", "agent.sock")
	run := func(program string, args ...string) []conformance.Result {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Minute)
		defer cancel()
		cmd := exec.CommandContext(ctx, program, append([]string{"conformance", "--strict", "-o", "json", "--wait", wait}, args...)...)
		var out, said bytes.Buffer
		cmd.Stdout, cmd.Stderr = &out, &said
		err := cmd.Run()
		var exit *exec.ExitError
		if err != nil && !errors.As(err, &exit) {
			t.Fatal(err)
		}
		var doc struct{ Results []conformance.Result }
		if err := json.Unmarshal(out.Bytes(), &doc); err != nil || len(doc.Results) != len(conformance.Checks()) {
			t.Fatalf("exit code %d, %d results, %v: %s", cmd.ProcessState.ExitCode(), len(doc.Results), err, said.String())
		}
		if code := cmd.ProcessState.ExitCode(); code != 0 {
			t.Errorf("exit code %d", code)
		}
		return doc.Results
	}
	passed := 0
	for _, r := range run(harness.Bin("signet"), "--endpoint", socket, "--trust-domain", "mesh.test",
		"--id", "spiffe://mesh.test/ns/shop/sa/app", "--id", "spiffe://mesh.test/ns/shop/sa/db",
		"--bundle-url", "https://"+endpoint+"/bundle", "--bundle-endpoint-id", "spiffe://mesh.test/signet/bundle") {
		want := conformance.Pass
		if r.ID == "stranger" || slices.Contains(passedOver, r.ID) {
			want = conformance.NotApplicable
		}
		if r.Verdict != want {
			t.Errorf("%s: %s (%s)", r.ID, r.Verdict, r.Reason)
		}
		if r.Verdict == conformance.Pass {
			passed++
		}
		t.Logf("%s: %s (%s)", r.ID, r.Verdict, r.Reason)
	}

	// The same program in another place is not who the rules name.
	stranger := filepath.Join(t.TempDir(), "signet")
	program, err := os.ReadFile(harness.Bin("signet"))
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(stranger, program, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, r := range run(stranger, "--stranger-endpoint", socket) {
		if r.ID != "stranger" {
			continue
		}
		if r.Verdict != conformance.Pass {
			t.Errorf("%s: %s (%s)", r.ID, r.Verdict, r.Reason)
		} else {
			passed++
		}
	}
	if want := len(conformance.Checks()) - len(passedOver); passed != want {
		t.Errorf("%d checks passed, want %d", passed, want)
	}
}
