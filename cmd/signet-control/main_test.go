package main

import (
	"errors"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/internal/control"
)

const rootKey = "pkcs11:token=mesh?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=/nowhere/pin"

// A root's key in a token goes with one machine only, and what is wrong about it is
// said before anything begins.
func TestRootKeyFlags(t *testing.T) {
	for _, tt := range []struct {
		args []string
		want string
	}{
		{[]string{"--kubernetes", "--root-key", rootKey}, "--root-key and --kubernetes: give one of them"},
		{[]string{"--config", "x", "--root-key", "pkcs11:token=mesh"}, "--root-key: module-path is missing"},
		{[]string{"--config", "x", "--root-key", "/etc/root.key"}, "--root-key: does not begin with"},
		{[]string{"--config", "x", "--root-key", rootKey}, "--root-key: pin-source: open /nowhere/pin"},
		{[]string{"--config", "x", "--root-key", rootKey, "--root-key-type", "ed25519"}, "--root-key-type: \"ed25519\""},
		{[]string{"--config", "x", "--root-key-type", "rsa-3072"}, "name one with --root-key"},
	} {
		if err := run(t.Context(), tt.args); err == nil || !strings.Contains(err.Error(), tt.want) {
			t.Errorf("%v: error %v, want one that says %q", tt.args, err, tt.want)
		}
	}
}

// The build without cgo, which is the default, says how to get one with PKCS#11,
// with the status that keeps it from being started again.
func TestWithoutPKCS11(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "signet-control")
	build := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", program, ".")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	pin := filepath.Join(dir, "pin")
	if err := os.WriteFile(pin, []byte("1234"), 0o600); err != nil {
		t.Fatal(err)
	}
	out, err := exec.CommandContext(t.Context(), program, "--config", dir, "--state-dir", filepath.Join(dir, "state"),
		"--root-key", "pkcs11:token=mesh?module-path="+program+"&pin-source="+pin).CombinedOutput()
	var exit *exec.ExitError
	if !errors.As(err, &exit) || exit.ExitCode() != control.ExitNoRetry || !strings.Contains(string(out), "built without PKCS#11") || !strings.Contains(string(out), "make build PKCS11=1") {
		t.Errorf("%v: %s", err, out)
	}
}
