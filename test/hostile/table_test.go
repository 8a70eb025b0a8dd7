package hostile

import (
	"fmt"
	"os"
	"regexp"
	"strconv"
	"strings"
	"testing"
)

// row is one explained disagreement of docs/hostile.md: these cases, and no
// others, are judged so.
type row struct {
	patterns []string
	number   int
	verdicts string // of the project, go-spiffe and the proxy
	why      string
	line     int
}

// Words of the list.
const (
	accepts  = "accepts"
	refuses  = "refuses"
	rewrites = "rewrites" // accepts as another name than is written
)

var quoted = regexp.MustCompile("`([^`]+)`")

// readRows reads the table under a heading of the list, with so many judges.
func readRows(t *testing.T, heading string, judges int) []row {
	t.Helper()
	raw, err := os.ReadFile("../../docs/hostile.md")
	if err != nil {
		t.Fatal(err)
	}
	var out []row
	number, under := 0, false
	for line := range strings.Lines(string(raw)) {
		number++
		if strings.HasPrefix(line, "#") {
			under = strings.TrimSpace(strings.TrimLeft(line, "#")) == heading
			continue
		}
		cells := strings.Split(strings.TrimSpace(line), "|")
		if !under || len(cells) != judges+5 || strings.HasPrefix(strings.TrimSpace(cells[1]), "---") || !strings.Contains(cells[1], "`") {
			continue
		}
		r := row{line: number, why: strings.TrimSpace(cells[judges+3])}
		for _, m := range quoted.FindAllStringSubmatch(cells[1], -1) {
			r.patterns = append(r.patterns, m[1])
		}
		if r.number, err = strconv.Atoi(strings.TrimSpace(cells[2])); err != nil {
			t.Errorf("docs/hostile.md:%d: %v", number, err)
		}
		words := make([]string, judges)
		for i := range words {
			words[i] = strings.TrimSpace(cells[3+i])
			if words[i] != accepts && words[i] != refuses && words[i] != rewrites {
				t.Errorf("docs/hostile.md:%d: %q is no verdict", number, words[i])
			}
		}
		r.verdicts = strings.Join(words, " ")
		if len(r.why) < 40 {
			t.Errorf("docs/hostile.md:%d: %q is no explanation", number, r.why)
		}
		out = append(out, r)
	}
	if len(out) == 0 {
		t.Fatalf("docs/hostile.md has no table under %q", heading)
	}
	return out
}

// matches reports whether a case's name is of a row. A star stands for anything.
func (r *row) matches(name string) bool {
	for _, p := range r.patterns {
		if wild(p, name) {
			return true
		}
	}
	return false
}

func wild(pattern, s string) bool {
	head, rest, star := strings.Cut(pattern, "*")
	if !star {
		return pattern == s
	}
	s, ok := strings.CutPrefix(s, head)
	if !ok {
		return false
	}
	for i := 0; i <= len(s); i++ {
		if wild(rest, s[i:]) {
			return true
		}
	}
	return false
}

// disagreement is a case on which not everybody says what is wanted.
type disagreement struct {
	name, verdicts string
	detail         string
}

// hold compares what happened with a table: each disagreement is in one row, and
// each row has as many as it says.
func hold(t *testing.T, rows []row, found []disagreement) {
	t.Helper()
	counts := make([]int, len(rows))
	for _, d := range found {
		in := -1
		for i := range rows {
			if rows[i].verdicts == d.verdicts && rows[i].matches(d.name) {
				if in >= 0 {
					t.Errorf("%s: lines %d and %d of docs/hostile.md are both about it", d.name, rows[in].line, rows[i].line)
				}
				in = i
			}
		}
		if in < 0 {
			t.Errorf("%s: %s, which docs/hostile.md does not explain\n%s", d.name, d.verdicts, d.detail)
			continue
		}
		counts[in]++
	}
	for i, r := range rows {
		if counts[i] != r.number {
			t.Errorf("docs/hostile.md:%d: %s: %d cases are judged so, the line says %d", r.line, strings.Join(r.patterns, ", "), counts[i], r.number)
		}
	}
}

func TestWild(t *testing.T) {
	for _, c := range []struct {
		pattern, s string
		want       bool
	}{
		{"a/b", "a/b", true}, {"a/b", "a/bc", false}, {"a/*", "a/bc", true}, {"a/*", "b/a/", false}, {"a/*c*e", "a/bcde", true}, {"a/*c", "a/cd", false}, {"*", "", true},
	} {
		if wild(c.pattern, c.s) != c.want {
			t.Errorf("%q matches %q: %v", c.pattern, c.s, !c.want)
		}
	}
}

// three writes the verdicts of three judges on one case as a row has them.
func three(c *testCase, judges ...verdict) string {
	words := make([]string, len(judges))
	for i, v := range judges {
		words[i] = c.word(v)
	}
	return strings.Join(words, " ")
}

func details(judges ...verdict) string {
	var b strings.Builder
	for _, v := range judges {
		fmt.Fprintf(&b, "\t%.300s\n", v)
	}
	return b.String()
}
