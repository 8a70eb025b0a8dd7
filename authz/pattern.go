package authz

import (
	"errors"
	"fmt"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// maxIDLength is the longest SPIFFE ID, in bytes, that the standard obliges
// anyone to accept.
const maxIDLength = 2048

// Pattern names SPIFFE IDs: one trust domain, and a path in which a segment
// that is exactly "*" stands for any one segment. Patterns are comparable with
// ==; the zero Pattern matches nothing. It is immutable.
type Pattern struct {
	td   spiffeid.TrustDomain
	path string // starts with a slash; every segment is valid or "*"
}

// ParsePattern reads a pattern such as "spiffe://mesh.example/ns/*/sa/backup".
// There are no prefixes, suffixes or expressions: "*" must be a whole segment,
// stands for exactly one, and cannot stand for the trust domain.
func ParsePattern(s string) (Pattern, error) {
	if len(s) > maxIDLength {
		return Pattern{}, fmt.Errorf("SPIFFE ID pattern is %d bytes long, at most %d are allowed", len(s), maxIDLength)
	}
	rest, ok := strings.CutPrefix(s, "spiffe://")
	if !ok {
		return Pattern{}, fmt.Errorf("SPIFFE ID pattern %q must start with spiffe://", s)
	}
	domain, path, ok := strings.Cut(rest, "/")
	if strings.Contains(domain, "*") {
		return Pattern{}, fmt.Errorf("SPIFFE ID pattern %q: the trust domain cannot hold a wildcard, name it in full", s)
	}
	if domain == "" {
		return Pattern{}, fmt.Errorf("SPIFFE ID pattern %q: trust domain is missing", s)
	}
	td, err := spiffeid.TrustDomainFromString(domain)
	if err != nil {
		return Pattern{}, fmt.Errorf("SPIFFE ID pattern %q: %w", s, err)
	}
	if !ok || path == "" {
		return Pattern{}, fmt.Errorf("SPIFFE ID pattern %q has no path, such as /ns/shop/sa/web", s)
	}
	for segment := range strings.SplitSeq(path, "/") {
		if err := checkSegment(segment); err != nil {
			return Pattern{}, fmt.Errorf("SPIFFE ID pattern %q: %w", s, err)
		}
	}
	return Pattern{td: td, path: "/" + path}, nil
}

func checkSegment(segment string) error {
	switch {
	case segment == "*":
		return nil
	case strings.Contains(segment, "*"):
		return fmt.Errorf("segment %q mixes * with other characters; a wildcard must be a whole segment", segment)
	case segment == "":
		return errors.New("path has an empty segment; remove the doubled or trailing slash")
	}
	if err := spiffeid.ValidatePathSegment(segment); err != nil {
		return fmt.Errorf("segment %q: %w", segment, err)
	}
	return nil
}

// patternOf returns the pattern that matches id and nothing else. A zero id
// and one without a path give the zero Pattern.
func patternOf(id spiffeid.ID) Pattern {
	if id.IsZero() || id.Path() == "" {
		return Pattern{}
	}
	return Pattern{td: id.TrustDomain(), path: id.Path()}
}

// IsZero reports whether p is the zero Pattern, which matches nothing.
func (p Pattern) IsZero() bool { return p.path == "" }

// Matches reports whether id has the pattern's trust domain, as many path
// segments as the pattern, and the same text in every segment that is not a
// wildcard.
func (p Pattern) Matches(id spiffeid.ID) bool {
	if id.IsZero() || !id.MemberOf(p.td) { // no ID is a member of the zero pattern's trust domain
		return false
	}
	want, have := p.path, id.Path()
	for want != "" && have != "" {
		var w, h string
		w, want = firstSegment(want)
		h, have = firstSegment(have)
		if w != "*" && w != h {
			return false
		}
	}
	return want == "" && have == ""
}

// firstSegment splits "/a/b" into "a" and "/b".
func firstSegment(path string) (segment, rest string) {
	path = path[1:]
	if i := strings.IndexByte(path, '/'); i >= 0 {
		return path[:i], path[i:]
	}
	return path, ""
}

// String returns the text that ParsePattern reads, "" for the zero Pattern.
func (p Pattern) String() string {
	if p.IsZero() {
		return ""
	}
	return "spiffe://" + p.td.Name() + p.path
}

// Exact returns the one ID that the pattern matches, if it has no wildcard.
func (p Pattern) Exact() (spiffeid.ID, bool) {
	// No valid path holds a star, so the parser refuses every wildcard.
	if p.IsZero() {
		return spiffeid.ID{}, false
	}
	id, err := spiffeid.FromPath(p.td, p.path)
	return id, err == nil
}

// Prefix returns the text up to and including the last slash, if the last
// segment is a wildcard and no other is.
//
// A bare comparison with this prefix is wider than Matches: it also admits IDs
// that have further segments. Whoever compares prefixes has to make sure that
// what follows holds no slash.
func (p Pattern) Prefix() (string, bool) {
	head, ok := strings.CutSuffix(p.path, "/*")
	if !ok || strings.Contains(head, "*") {
		return "", false
	}
	return "spiffe://" + p.td.Name() + head + "/", true
}
