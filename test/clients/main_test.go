// Package clients tests that workloads in other languages are served: programs
// on the unmodified SPIFFE libraries of Go, Java, Python and Rust, from their
// registries, against a real mesh and against each other.
package clients

import (
	"syscall"
	"testing"

	"github.com/signet-mesh/signet/test/harness"
)

func TestMain(m *testing.M) {
	syscall.Umask(0o022) // other users run what is made here
	harness.Main(m)
}
