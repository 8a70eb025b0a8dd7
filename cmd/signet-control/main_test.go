package main

import (
	"strings"
	"testing"
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
