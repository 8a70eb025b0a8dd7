package mesh

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/signet-mesh/signet/api/v1alpha1"
)

// MaxRevocations bounds the entries of a MeshConfig.
const MaxRevocations = 256

// Revocation is a certificate, or a token, that nobody is to take any more.
type Revocation struct {
	Serial string // or jti; lower-case hexadecimal, two digits for each byte
	ID     string // whose it is; empty: nobody said
	Reason string
	// Since is when it was revoked; zero: long ago.
	Since time.Time
	// NotAfter is when it expires; zero: it is not known.
	NotAfter time.Time
}

// ParseRevocation reads an entry of a MeshConfig's spec.revoked. On an error it
// also returns the field at fault. What has a serial number is a revocation all
// the same: what was meant to be refused is not let through because of a mistake
// beside it.
func ParseRevocation(in *v1alpha1.Revocation) (r Revocation, field string, err error) {
	r = Revocation{ID: in.ID, Reason: in.Reason}
	if t := in.Since; t != nil {
		r.Since = t.UTC()
	}
	if t := in.NotAfter; t != nil {
		r.NotAfter = t.UTC()
	}
	serial := strings.TrimLeft(strings.ReplaceAll(strings.ToLower(in.Serial), ":", ""), "0")
	if len(serial)%2 != 0 {
		serial = "0" + serial
	}
	if serial == "" || len(serial) > 40 || strings.Trim(serial, "0123456789abcdef") != "" {
		return r, "serial", fmt.Errorf("%.64q is no serial number; give hexadecimal digits, as `signet certs -o wide` shows them", in.Serial)
	}
	r.Serial = serial
	if strings.TrimSpace(in.Reason) == "" {
		return r, "reason", errors.New("is missing; say why, for who looks at the list")
	}
	if len(in.Reason) > 256 {
		r.Reason = strings.ToValidUTF8(in.Reason[:256], "")
		return r, "reason", fmt.Errorf("is %d bytes long; at most 256 are allowed", len(in.Reason))
	}
	return r, "", nil
}
