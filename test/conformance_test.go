package test

import (
	"fmt"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"testing"

	"github.com/signet-mesh/signet/conformance"
)

var (
	named    = regexp.MustCompile("\\[([a-z0-9]+)\\](?: is)? `([a-z0-9/]+)`")
	inRow    = regexp.MustCompile(`\[([a-z0-9]+)\]|\b(Test[A-Za-z0-9]+)`)
	testFunc = regexp.MustCompile(`(?m)^func (Test[A-Za-z0-9]+)\(`)
)

// TestConformanceNamesTests: what docs/conformance.md says is shown by a test
// names one that exists, in the package that it is said to be in.
func TestConformanceNamesTests(t *testing.T) {
	raw, err := os.ReadFile("../docs/conformance.md")
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(raw), "\n", " ")
	there := map[string]map[string]bool{}
	for _, m := range named.FindAllStringSubmatch(text, -1) {
		files, err := filepath.Glob(filepath.Join("..", m[2], "*_test.go"))
		if err != nil || len(files) == 0 {
			t.Fatalf("[%s]: no tests in %s, %v", m[1], m[2], err)
		}
		there[m[1]] = map[string]bool{}
		for _, file := range files {
			code, err := os.ReadFile(file)
			if err != nil {
				t.Fatal(err)
			}
			for _, f := range testFunc.FindAllStringSubmatch(string(code), -1) {
				there[m[1]][f[1]] = true
			}
		}
	}
	rows := 0
	for line := range strings.Lines(string(raw)) {
		cells := strings.Split(line, "|")
		if len(cells) != 5 || strings.TrimSpace(cells[1]) == "section" || strings.HasPrefix(strings.TrimSpace(cells[1]), "---") {
			continue
		}
		rows++
		in, found := "", 0
		for _, m := range inRow.FindAllStringSubmatch(cells[3], -1) {
			if m[1] != "" {
				in = m[1]
				continue
			}
			found++
			if !there[in][m[2]] {
				t.Errorf("%s: there is no %s in [%s]", strings.TrimSpace(cells[2]), m[2], in)
			}
		}
		if found == 0 {
			t.Errorf("%s: no test is named", strings.TrimSpace(cells[2]))
		}
	}
	if rows < 30 {
		t.Errorf("%d rows were read", rows)
	}
}

// TestConformanceSuite: the list of checks in docs/conformance.md is the suite's.
func TestConformanceSuite(t *testing.T) {
	const path = "../docs/conformance.md"
	raw, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	before, after, ok := strings.Cut(string(raw), "TestConformanceSuite -->\n")
	if !ok {
		t.Fatal("the mark before the list is not there")
	}
	var want strings.Builder
	want.WriteString("\n| check | specification | level | what is wanted |\n| --- | --- | --- | --- |\n")
	for _, c := range conformance.Checks() {
		fmt.Fprintf(&want, "| `%s` | %s %s | %s | %s |\n", c.ID, c.Document, c.Section, c.Level, c.Demand)
	}
	if os.Getenv("UPDATE_GOLDEN") != "" {
		if err := os.WriteFile(path, []byte(before+"TestConformanceSuite -->\n"+want.String()), 0o644); err != nil {
			t.Fatal(err)
		}
		return
	}
	if after != want.String() {
		t.Error("the list is not that of the suite: UPDATE_GOLDEN=1 go test ./test -run TestConformanceSuite")
	}
}
