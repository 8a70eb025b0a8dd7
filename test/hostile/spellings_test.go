package hostile

import (
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"slices"
	"strings"
	"unicode/utf16"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// spelling is one way to write an identity wrong, or another that looks alike.
type spelling struct{ name, uri string }

// spellings of a SPIFFE ID of the mesh. None of them is a SPIFFE ID of a leaf of
// the mesh's trust domain.
func spellingsOf(id string) []spelling {
	rest := strings.TrimPrefix(id, "spiffe://")
	td, path, _ := strings.Cut(rest, "/")
	path = "/" + path
	cut := strings.LastIndex(path, "/") + 1
	last := path[cut:]
	var out []spelling
	put := func(name, format string, args ...any) {
		out = append(out, spelling{name, fmt.Sprintf(format, args...)})
	}

	for i, scheme := range []string{"SPIFFE", "Spiffe", "spiffE", "https", "http", "urn:spiffe", "spiffe+x", "xspiffe", " spiffe", "spiffe ", "sp\x00iffe", "ѕpiffe", "javascript", "file", "1spiffe"} {
		put(fmt.Sprintf("scheme %d", i), "%s://%s", scheme, rest)
	}
	put("no scheme", "%s", rest)
	put("no scheme, two slashes", "//%s", rest)
	put("no slashes", "spiffe:%s", rest)
	put("one slash", "spiffe:/%s", rest)
	put("three slashes", "spiffe:///%s", rest)
	put("four slashes", "spiffe:////%s", rest)
	put("backslashes", `spiffe:\\%s`, rest)
	put("colon encoded", "spiffe%%3a//%s", rest)
	put("slashes encoded", "spiffe:%%2f%%2f%s", rest)
	put("a space after the scheme", "spiffe: //%s", rest)

	for name, domain := range map[string]string{
		"upper case": strings.ToUpper(td), "one capital": strings.ToUpper(td[:1]) + td[1:],
		"dot at the end": td + ".", "dot at the beginning": "." + td, "two dots": strings.Replace(td, ".", "..", 1),
		"another": "other.test", "that begins like it": td + ".evil.example", "that ends like it": "evil" + td, "below it": "a." + td, "above it": "test",
		"cut short": td[:len(td)-1], "empty": "", "port": td + ":443", "port 0": td + ":0", "empty port": td + ":", "a word as port": td + ":https",
		"user": "u@" + td, "user and password": "u:p@" + td, "empty user": "@" + td, "itself as user": td + "@evil.example", "encoded at": "u%40" + td,
		"encoded letter": "m%65sh.test", "encoded dot": "mesh%2etest", "encoded NUL": td + "%00", "encoded slash": td + "%2f",
		"NUL at the end": td + "\x00", "NUL and another": td + "\x00.evil.example", "NUL in it": "mesh\x00.test",
		"a homograph": "mеsh.test", "full width": "ｍesh.test", "punycode": "xn--msh-hya.test", "soft hyphen": "me\u00adsh.test", "ideographic full stop": "mesh。test",
		"IPv6": "[::1]", "IPv4": "10.88.0.1", "brackets": "[" + td + "]", "space before": " " + td, "space after": td + " ", "tab": td + "\t", "newline": td + "\n",
		"backslash": td + `\@evil.example`, "star": "*", "star below": "*.test", "comma": td + ",evil", "underscore": "mesh_test", "hyphen": "mesh-test", "too long": strings.Repeat("a.", 124) + td,
		"of 256 bytes": strings.Repeat("a", 246) + "." + td, "plus": td + "+", "tilde": "~" + td, "percent": td + "%", "quote": td + "'", "exclamation": td + "!",
	} {
		put("trust domain "+name, "spiffe://%s%s", domain, path)
	}

	base := "spiffe://" + td
	put("the trust domain itself", "%s", base)
	put("the trust domain and a slash", "%s/", base)
	put("the trust domain and two slashes", "%s//", base)
	put("slash at the end", "%s/", id)
	put("two slashes at the end", "%s//", id)
	put("dot at the end", "%s/.", id)
	put("dots at the end", "%s/..", id)
	put("up and down again", "%s/../%s", id, last)
	put("up over the root", "%s/../../../../../../..%s", base, path)
	segments := strings.Split(path[1:], "/")
	for i := range segments {
		with := func(s ...string) string {
			return base + "/" + strings.Join(slices.Insert(slices.Clone(segments), i, s...), "/")
		}
		put(fmt.Sprintf("empty segment %d", i), "%s", with(""))
		put(fmt.Sprintf("dot segment %d", i), "%s", with("."))
		put(fmt.Sprintf("dots segment %d", i), "%s", with("x", ".."))
		put(fmt.Sprintf("dots only segment %d", i), "%s", with(".."))
		put(fmt.Sprintf("encoded dots segment %d", i), "%s", with("x", "%2e%2e"))
		put(fmt.Sprintf("half encoded dots segment %d", i), "%s", with("x", ".%2E"))
		put(fmt.Sprintf("star segment %d", i), "%s", with("*"))
		changed := slices.Clone(segments)
		changed[i] = fmt.Sprintf("%%%02x%s", segments[i][0], segments[i][1:])
		put(fmt.Sprintf("encoded letter in segment %d", i), "%s/%s", base, strings.Join(changed, "/"))
		changed[i] = segments[i] + "%00"
		put(fmt.Sprintf("encoded NUL in segment %d", i), "%s/%s", base, strings.Join(changed, "/"))
		changed[i] = segments[i] + "\x00"
		put(fmt.Sprintf("NUL in segment %d", i), "%s/%s", base, strings.Join(changed, "/"))
	}
	put("star at the end", "%s*", id)
	put("a pattern", "%s%s*", base, path[:cut])
	put("slashes encoded in the path", "%s/%s", base, strings.Join(segments, "%2f"))
	put("backslashes in the path", "%s/%s", base, strings.Join(segments, `\`))
	put("query", "%s?x=y", id)
	put("empty query", "%s?", id)
	put("fragment", "%s#x", id)
	put("empty fragment", "%s#", id)
	put("query and fragment", "%s?#", id)
	put("parameter", "%s;v=1", id)
	put("percent sign", "%s%%", id)
	put("half an escape", "%s%%2", id)
	put("a bad escape", "%s%%zz", id)
	put("NUL at the end", "%s\x00", id)
	put("NUL and another name", "%s\x00%s", id, idServer)
	put("NUL at the beginning", "\x00%s", id)
	for _, r := range " \t\r\n\v\x7f!\"$&'()+,:;<=>@[\\]^`{|}~" {
		put(fmt.Sprintf("character %#02x at the end", r), "%s%c", id, r)
		put(fmt.Sprintf("character %#02x inside", r), "%s%s%c%s", base, path[:cut], r, last)
	}
	put("space at the beginning", " %s", id)
	put("another name before", "%s,%s", idServer, id)
	put("another name behind", "%s,%s", id, idServer)
	put("another name on a second line", "%s\n%s", id, idServer)
	put("in quotes", `"%s"`, id)
	put("in angle brackets", "<%s>", id)
	put("as a web address' query", "https://evil.example/?%s", id)
	put("as a web address' fragment", "https://evil.example/#%s", id)
	put("as another's path", "spiffe://other.test/%s", id)
	put("empty", "%s", "")
	put("scheme only", "%s", "spiffe://")

	for name, s := range map[string]string{
		"é": "é", "cyrillic a": "а", "zero width space": "\u200b", "right to left": "\u202e", "full width slash": "／x", "combining": "\u0301", "emoji": "🔑",
		"overlong slash": "\xc0\xafx", "overlong NUL": "\xc0\x80", "no UTF-8": "\xff", "half a rune": "\xd0", "surrogate": "\xed\xa0\x80", "latin-1": "\xe9", "byte order mark": "\ufeff",
	} {
		put("then "+name, "%s%s", id, s)
		put("before "+name, "%s%s%s%s", base, path[:cut], s, last)
	}
	put("byte order mark first", "\ufeff%s", id)
	for name, order := range map[string]binary.ByteOrder{"little endian": binary.LittleEndian, "big endian": binary.BigEndian} {
		wide := make([]byte, 0, 2*len(id))
		for _, u := range utf16.Encode([]rune(id)) {
			var b [2]byte
			order.PutUint16(b[:], u)
			wide = append(wide, b[:]...)
		}
		put("UTF-16 "+name, "%s", wide)
		mark := []byte{0xfe, 0xff}
		if order == binary.LittleEndian {
			mark = []byte{0xff, 0xfe}
		}
		put("UTF-16 with mark "+name, "%s%s", mark, wide)
	}
	for _, n := range []int{2049, 2050, 3000, 4096, 12000} {
		put(fmt.Sprintf("%d bytes", n), "%s%s", id, strings.Repeat("a", n-len(id)))
	}
	slices.SortFunc(out, func(a, b spelling) int { return strings.Compare(a.name, b.name) }) // maps have no order
	return out
}

// spellings: each of the ways, for each of the aims.
func (c *corpus) spellings() {
	for _, id := range aims {
		_, who, _ := strings.Cut(strings.TrimPrefix(id, "spiffe://"), "/")
		for _, s := range spellingsOf(id) {
			c.hostile("spelling", s.name+", "+who, c.issue(s.uri))
		}
	}
}

// randomIDs returns strings near to SPIFFE IDs, the same in every run.
func randomIDs(n int) []string {
	rng := rand.New(rand.NewPCG(seed, seed))
	alphabet := []string{"/", "//", "/.", "/..", ".", "..", "-", "_", "a", "Z", "0", "%", "%2f", "%00", "\x00", ":", "@", "?", "#", ",", ";", " ", "\n", "\\", "*", "~", "é", "\xff", "spiffe://", "mesh.test", "/ns/", "/sa/"}
	bases := append(slices.Clone(aims), "spiffe://mesh.test/", "spiffe://mesh.test", "spiffe://mesh.test/a", "spiffe://other.test/a")
	seen := map[string]bool{}
	var out []string
	for len(out) < n {
		s := []byte(bases[rng.IntN(len(bases))])
		for range 1 + rng.IntN(3) {
			at := rng.IntN(len(s) + 1)
			switch rng.IntN(5) {
			case 0: // lose some
				s = slices.Delete(s, at, min(len(s), at+1+rng.IntN(3)))
			case 1: // change case
				if at < len(s) {
					s[at] ^= 0x20
				}
			case 2: // any byte at all
				s = slices.Insert(s, at, byte(rng.IntN(256)))
			default:
				s = slices.Insert(s, at, []byte(alphabet[rng.IntN(len(alphabet))])...)
			}
		}
		if !seen[string(s)] {
			seen[string(s)] = true
			out = append(out, string(s))
		}
	}
	return out
}

// svidOf is the identity that a string is, exactly as it is written, if it may
// be that of a leaf of the mesh.
func svidOf(s string) (string, bool) {
	id, err := spiffeid.FromString(s)
	if err != nil || id.TrustDomain().Name() != trustDomain || id.Path() == "" || len(s) > 2048 {
		return "", false
	}
	return id.String(), true
}

// randomNames: near misses that nobody thought of. Some of them hit.
func (c *corpus) randomNames() {
	for i, s := range randomIDs(600) {
		name := fmt.Sprintf("%03d %q", i, s)
		if id, ok := svidOf(s); ok {
			c.good("stray", name, id, c.issue(s))
			continue
		}
		c.hostile("stray", name, c.issue(s))
	}
}
