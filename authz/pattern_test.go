package authz

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

func id(s string) spiffeid.ID { return spiffeid.RequireFromString(s) }

func pattern(t testing.TB, s string) Pattern {
	t.Helper()
	p, err := ParsePattern(s)
	if err != nil {
		t.Fatalf("ParsePattern(%q): %v", s, err)
	}
	return p
}

// Each row is one way in which a comparison of text would go wrong where a
// comparison of parsed segments does not.
func TestPatternMatches(t *testing.T) {
	for _, test := range []struct {
		pattern, id string
		want        bool
	}{
		{"spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/sa/web", true},
		{"spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/sa/web2", false},  // prefix of another name
		{"spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/sa/we", false},    // and the reverse
		{"spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/sa/web/x", false}, // deeper
		{"spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/sa", false},       // shallower
		{"spiffe://td/ns/shop/sa/web", "spiffe://td/ns/shop/sa/Web", false},   // case
		{"spiffe://td/ns/shop/sa/web", "spiffe://td2/ns/shop/sa/web", false},  // other trust domain
		{"spiffe://td/ns/shop/sa/web", "spiffe://td.evil/ns/shop/sa/web", false},
		{"spiffe://td/ns/shop/sa/a.b", "spiffe://td/ns/shop/sa/a-b", false}, // a dot is a dot
		{"spiffe://td/ns/shop/sa/a.b", "spiffe://td/ns/shop/sa/a.b", true},
		{"spiffe://td/ns/shop/sa/*", "spiffe://td/ns/shop/sa/web", true},
		{"spiffe://td/ns/shop/sa/*", "spiffe://td/ns/shop/sa/web/x", false}, // one segment only
		{"spiffe://td/ns/shop/sa/*", "spiffe://td/ns/shop/sa", false},       // and not none
		{"spiffe://td/ns/shop/sa/*", "spiffe://td/ns/shop2/sa/web", false},
		{"spiffe://td/ns/*/sa/backup", "spiffe://td/ns/shop/sa/backup", true},
		{"spiffe://td/ns/*/sa/backup", "spiffe://td/ns/shop/sa/web", false},
		{"spiffe://td/ns/*/sa/backup", "spiffe://td/ns/a/b/sa/backup", false},
		{"spiffe://td/*", "spiffe://td/x", true},
		{"spiffe://td/*", "spiffe://td/x/y", false},
		{"spiffe://td/*", "spiffe://td", false},
		{"spiffe://td/*/*", "spiffe://td/x/y", true},
	} {
		if got := pattern(t, test.pattern).Matches(id(test.id)); got != test.want {
			t.Errorf("%s matches %s = %v", test.pattern, test.id, got)
		}
	}
	if (Pattern{}).Matches(spiffeid.ID{}) || (Pattern{}).Matches(id("spiffe://td/x")) || pattern(t, "spiffe://td/*").Matches(spiffeid.ID{}) {
		t.Error("a zero pattern or a zero ID matches")
	}
}

func TestParsePatternRefuses(t *testing.T) {
	for _, test := range []struct{ in, want string }{
		{"", "must start with spiffe://"},
		{"*", "must start with"},
		{"td/ns/x", "must start with"},
		{"SPIFFE://td/x", "must start with"},
		{"https://td/x", "must start with"},
		{"spiffe:///ns/x", "trust domain is missing"},
		{"spiffe://*/ns/x", "trust domain cannot hold a wildcard"},
		{"spiffe://*.example/ns/x", "trust domain cannot hold a wildcard"},
		{"spiffe://TD/ns/x", "trust domain characters"},
		{"spiffe://td:80/ns/x", "trust domain characters"},
		{"spiffe://user@td/ns/x", "trust domain characters"},
		{"spiffe://td", "has no path"},
		{"spiffe://td/", "has no path"},
		{"spiffe://td/ns/x/", "empty segment"},
		{"spiffe://td//ns", "empty segment"},
		{"spiffe://td/ns/we*", "mixes *"},
		{"spiffe://td/ns/*b", "mixes *"},
		{"spiffe://td/ns/**", "mixes *"},
		{"spiffe://td/ns/..", "dot segment"},
		{"spiffe://td/./x", "dot segment"},
		{"spiffe://td/../x", "dot segment"},
		{"spiffe://td/a%2fb", "path segment characters"},
		{"spiffe://td/a?b", "path segment characters"},
		{"spiffe://td/a#b", "path segment characters"},
		{"spiffe://td/.*|x", "mixes *"},
		{"spiffe://td/a b", "path segment characters"},
		{"spiffe://td/a\x00", "path segment characters"},
		{"spiffe://td/ünï", "path segment characters"},
		{"spiffe://td/" + strings.Repeat("a", 2048), "bytes long"},
	} {
		p, err := ParsePattern(test.in)
		if err == nil || !strings.Contains(err.Error(), test.want) {
			t.Errorf("ParsePattern(%q) = %v, want an error with %q", test.in, err, test.want)
		}
		if p != (Pattern{}) {
			t.Errorf("ParsePattern(%q) returned a pattern with its error", test.in)
		}
	}
}

// Every byte is tried in every kind of place: none but the listed characters
// may pass, and a star only alone.
func TestParsePatternEveryByte(t *testing.T) {
	const name = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789._-"
	for c := range 256 {
		b := string([]byte{byte(c)})
		_, err := ParsePattern("spiffe://td/x" + b + "y")
		if ok := strings.Contains(name+"/", b); ok != (err == nil) {
			t.Errorf("byte %q inside a segment: %v", b, err)
		}
		_, err = ParsePattern("spiffe://td/" + b)
		if ok := b != "." && strings.Contains(name+"*", b); ok != (err == nil) {
			t.Errorf("byte %q as a segment: %v", b, err)
		}
	}
}

func TestPatternForms(t *testing.T) {
	for _, test := range []struct {
		in, prefix string
		exact      bool
	}{
		{"spiffe://td/ns/shop/sa/web", "", true},
		{"spiffe://td/ns/shop/sa/*", "spiffe://td/ns/shop/sa/", false},
		{"spiffe://td/*", "spiffe://td/", false},
		{"spiffe://td/ns/*/sa/*", "", false},
		{"spiffe://td/ns/*/sa/web", "", false},
	} {
		p := pattern(t, test.in)
		if p.String() != test.in {
			t.Errorf("%s prints as %s", test.in, p)
		}
		if p != pattern(t, test.in) {
			t.Errorf("%s is not equal to itself", test.in)
		}
		prefix, ok := p.Prefix()
		if prefix != test.prefix || ok != (test.prefix != "") {
			t.Errorf("%s: Prefix = %q, %v", test.in, prefix, ok)
		}
		exact, ok := p.Exact()
		if ok != test.exact || ok && exact.String() != test.in {
			t.Errorf("%s: Exact = %v, %v", test.in, exact, ok)
		}
	}
	var zero Pattern
	if _, ok := zero.Exact(); ok {
		t.Error("the zero pattern is exact")
	}
	if _, ok := zero.Prefix(); ok || zero.String() != "" {
		t.Error("the zero pattern has text")
	}
}

// reference is Matches written another way.
func reference(pattern, id string) bool {
	want, have := strings.Split(pattern, "/"), strings.Split(id, "/")
	if len(want) != len(have) {
		return false
	}
	for i := range want {
		if want[i] != have[i] && (want[i] != "*" || have[i] == "") {
			return false
		}
	}
	return true
}

// hostileNames are names that trip comparisons of text, for seeds.
var hostileNames = []string{
	"web", "web2", "we", "w.b", "a-b", "*", "we*", "**", ".", "..", "", "a/b", "//", "%2f", "%2e%2e",
	"WEB", "wéb", "web\x00", "web\n", " web", "web ", "sa", "ns", "xn--web", "-web", "web-", ".*", "[a-z]", "a|b",
	strings.Repeat("a", 64), strings.Repeat("a", 254),
}

func FuzzPattern(f *testing.F) {
	for _, name := range hostileNames {
		f.Add("spiffe://td/ns/"+name+"/sa/web", "spiffe://td/ns/shop/sa/"+name)
		f.Add("spiffe://"+name+"/ns/shop", "spiffe://td/ns/shop")
		f.Add("spiffe://td/ns/shop/sa/*", "spiffe://td/ns/shop/sa/"+name)
		f.Add("spiffe://td/ns/shop/sa/"+name, "spiffe://td/ns/shop/sa/"+name)
	}
	f.Fuzz(func(t *testing.T, text, caller string) {
		p, err := ParsePattern(text)
		if err != nil {
			if p != (Pattern{}) {
				t.Fatal("a pattern came with an error")
			}
			return
		}
		if p.String() != text {
			t.Fatalf("%q prints as %q", text, p)
		}
		exact, isExact := p.Exact()
		if isExact == strings.Contains(text, "*") {
			t.Fatalf("%q: exact = %v", text, isExact)
		}
		if isExact && (exact.String() != text || !p.Matches(exact)) {
			t.Fatalf("%q: does not match its own ID %v", text, exact)
		}
		from, err := spiffeid.FromString(caller)
		if err != nil {
			return
		}
		got := p.Matches(from)
		if got != reference(text, caller) {
			t.Fatalf("%q matches %q = %v", text, caller, got)
		}
		if prefix, ok := p.Prefix(); ok {
			rest, under := strings.CutPrefix(caller, prefix)
			if got != (under && rest != "" && !strings.Contains(rest, "/")) {
				t.Fatalf("prefix %q disagrees on %q", prefix, caller)
			}
		}
	})
}
