// Package e2e tests the whole mesh from outside: unmodified programs in
// network namespaces, a real Envoy, and what the audit says about them.
package e2e

import (
	"testing"

	"github.com/signet-mesh/signet/test/harness"
)

func TestMain(m *testing.M) { harness.Main(m) }
