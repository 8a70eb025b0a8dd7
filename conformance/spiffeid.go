package conformance

import (
	"errors"
	"fmt"
	"strings"
)

// maxID is the length, in bytes, up to which everybody must take SPIFFE IDs.
const maxID = 2048

// spiffeID is a SPIFFE ID, written as the specification has it.
type spiffeID struct{ domain, path string }

func (id spiffeID) String() string { return "spiffe://" + id.domain + id.path }

// parseID reads a SPIFFE ID, or the ID of a trust domain, whose path is empty.
// Nothing is normalized.
func parseID(text string) (spiffeID, error) {
	rest, ok := strings.CutPrefix(text, "spiffe://")
	if !ok {
		return spiffeID{}, fmt.Errorf("%q does not begin with spiffe://", text)
	}
	if len(text) > maxID {
		return spiffeID{}, fmt.Errorf("%d bytes; at most %d are supported by everybody", len(text), maxID)
	}
	domain, path := rest, ""
	if i := strings.IndexByte(rest, '/'); i >= 0 {
		domain, path = rest[:i], rest[i:]
	}
	switch {
	case domain == "":
		return spiffeID{}, fmt.Errorf("%q has no trust domain", text)
	case len(domain) > 255:
		return spiffeID{}, fmt.Errorf("a trust domain of %d bytes; at most 255 are a host", len(domain))
	case strings.ContainsFunc(domain, func(r rune) bool { return !isLower(r) }):
		return spiffeID{}, fmt.Errorf("%q: the trust domain has more than a-z, 0-9, '.', '-' and '_'", text)
	}
	if path != "" {
		for segment := range strings.SplitSeq(path[1:], "/") {
			if err := checkSegment(segment); err != nil {
				return spiffeID{}, fmt.Errorf("%q: %w", text, err)
			}
		}
	}
	return spiffeID{domain, path}, nil
}

func checkSegment(s string) error {
	switch {
	case s == "":
		return errors.New("an empty segment, or a slash at the end")
	case s == "." || s == "..":
		return errors.New("a relative segment")
	case strings.ContainsFunc(s, func(r rune) bool { return !isLower(r) && (r < 'A' || r > 'Z') }):
		return errors.New("a segment has more than letters, digits, '.', '-' and '_'")
	}
	return nil
}

func isLower(r rune) bool {
	return r >= 'a' && r <= 'z' || r >= '0' && r <= '9' || r == '.' || r == '-' || r == '_'
}
