//go:build !cgo

package pkcs11

import (
	"errors"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/ca"
)

// A build without PKCS#11 says how to get one with it, and is not started again.
func TestAbsent(t *testing.T) {
	keys, err := Open(Config{})
	if keys != nil || !errors.Is(err, ca.ErrNoRetry) || !strings.Contains(err.Error(), "built without PKCS#11") || !strings.Contains(err.Error(), "make build PKCS11=1") {
		t.Errorf("%v, %v", keys, err)
	}
}
