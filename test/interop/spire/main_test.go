//go:build interop

package spire

import (
	"fmt"
	"os"
	"testing"

	"github.com/signet-mesh/signet/test/harness"
	"github.com/signet-mesh/signet/test/spire"
)

// programs are the SPIRE under test.
var programs spire.Programs

func TestMain(m *testing.M) {
	var err error
	if programs, err = spire.Find(os.Getenv(spire.Env)); err != nil {
		fmt.Fprintf(os.Stderr, "%v\nRun this as: make interop SPIRE=/path/to/bin\n", err)
		os.Exit(2)
	}
	harness.Main(m)
}
