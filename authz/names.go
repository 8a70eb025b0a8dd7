package authz

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// CheckNamespace says what is wrong with the name of a namespace: it must be
// an RFC 1123 label and a valid SPIFFE path segment.
func CheckNamespace(name string) error {
	if len(name) > 63 {
		return fmt.Errorf("%q is %d bytes long, at most 63 are allowed", name, len(name))
	}
	if strings.Contains(name, ".") {
		return fmt.Errorf("%q holds a dot; use lower-case letters, digits and dashes", name)
	}
	return CheckName(name)
}

// CheckName says what is wrong with the name of a service account, workload,
// service or policy: it must be an RFC 1123 subdomain and a valid SPIFFE path
// segment.
func CheckName(name string) error {
	if name == "" {
		return errors.New("is empty")
	}
	if len(name) > 253 {
		return fmt.Errorf("%q is %d bytes long, at most 253 are allowed", name, len(name))
	}
	for label := range strings.SplitSeq(name, ".") {
		if !isLabel(label) {
			return fmt.Errorf("%q is no valid name; use lower-case letters, digits and dashes (and dots between them), starting and ending with a letter or digit", name)
		}
	}
	return spiffeid.ValidatePathSegment(name)
}

func isLabel(label string) bool {
	if label == "" {
		return false
	}
	for i := range len(label) {
		c := label[i]
		alnum := c >= 'a' && c <= 'z' || c >= '0' && c <= '9'
		if !alnum && (c != '-' || i == 0 || i == len(label)-1) {
			return false
		}
	}
	return true
}
