// Package e2e tests the whole mesh from outside: unmodified programs in
// network namespaces, a real Envoy, and what the audit says about them.
package e2e

import (
	"fmt"
	"os"
	"testing"

	"github.com/signet-mesh/signet/test/harness"
)

func TestMain(m *testing.M) {
	if audience := os.Getenv(envVerifier); audience != "" {
		if err := verify(audience); err != nil {
			fmt.Fprintln(os.Stderr, err)
			os.Exit(1)
		}
		return
	}
	harness.Main(m)
}
