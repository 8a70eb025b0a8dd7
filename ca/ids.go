package ca

import (
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// ControlID returns the control plane's own ID,
// spiffe://<trust domain>/signet/control. The trust domain must not be zero.
func ControlID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "signet", "control")
}

// BundleEndpointID returns the ID of the server that shows the trust domain's
// bundle to others, spiffe://<trust domain>/signet/bundle. The trust domain must
// not be zero.
func BundleEndpointID(td spiffeid.TrustDomain) spiffeid.ID {
	return spiffeid.RequireFromSegments(td, "signet", "bundle")
}

// NodeID returns the ID of a node's agent,
// spiffe://<trust domain>/signet/node/<name>. The name must be one valid path
// segment: letters, digits, dot, dash, underscore.
func NodeID(td spiffeid.TrustDomain, name string) (spiffeid.ID, error) {
	id, err := spiffeid.FromSegments(td, "signet", "node", name)
	if err != nil {
		return spiffeid.ID{}, fmt.Errorf("node name %q: %w; use letters, digits, '.', '-' and '_'", name, err)
	}
	return id, nil
}

// NodeName returns the name in a node's ID, and false when the ID is not a
// node's.
func NodeName(id spiffeid.ID) (string, bool) {
	if s := segments(id); len(s) == 3 && s[0] == "signet" && s[1] == "node" {
		return s[2], true
	}
	return "", false
}

// checkID refuses every ID that the authority has no business to sign.
func checkID(td spiffeid.TrustDomain, id spiffeid.ID) error {
	if id.IsZero() {
		return fmt.Errorf("id: empty; a SPIFFE ID of trust domain %q is needed", td)
	}
	if id.TrustDomain() != td {
		return fmt.Errorf("id %q: not in trust domain %q, which is the only one this authority signs for", id, td)
	}
	s := segments(id)
	workload := len(s) == 4 && s[0] == "ns" && s[2] == "sa"
	_, node := NodeName(id)
	if !workload && !node && id != ControlID(td) && id != BundleEndpointID(td) {
		return fmt.Errorf("id %q: path must be /ns/<namespace>/sa/<service account>, /signet/node/<name>, /signet/control or /signet/bundle", id)
	}
	return nil
}

func segments(id spiffeid.ID) []string {
	return strings.Split(strings.TrimPrefix(id.Path(), "/"), "/")
}
