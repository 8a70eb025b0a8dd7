//go:build !cgo

package pkcs11

import (
	"fmt"

	"github.com/signet-mesh/signet/ca"
)

// Open says that this build has no PKCS#11.
func Open(Config) (ca.RootKeys, error) {
	return nil, fmt.Errorf("this signet-control was built without PKCS#11, which needs cgo; build it with `make build PKCS11=1` (%w)", ca.ErrNoRetry)
}
