//go:build interop

package ztunnel

import (
	"fmt"
	"os"
	"path/filepath"
	"testing"

	"github.com/signet-mesh/signet/test/harness"
)

// envProgram names the ztunnel under test.
const envProgram = "ZTUNNEL"

func TestMain(m *testing.M) {
	path := os.Getenv(envProgram)
	info, err := os.Stat(path)
	switch {
	case path == "":
		err = fmt.Errorf("%s is not set: name a ztunnel program that was built with --features testing: make interop ZTUNNEL=/path/to/ztunnel", envProgram)
	case err != nil:
		err = fmt.Errorf("%s: %w", envProgram, err)
	case !filepath.IsAbs(path):
		err = fmt.Errorf("%s: %s must be an absolute path", envProgram, path)
	case !info.Mode().IsRegular() || info.Mode()&0o111 == 0:
		err = fmt.Errorf("%s: %s is not a program", envProgram, path)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(2)
	}
	harness.Main(m)
}
