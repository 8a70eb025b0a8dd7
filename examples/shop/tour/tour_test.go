package tour

import (
	"reflect"
	"strings"
	"testing"
)

const document = "# A\n\ntext $ no command\n\n```sh\n$ not run\n```\n\n```console\n$ echo a \\\n> b\na b\n$ true\n```\n\n```console\n$ echo c; exit 3\nc\ncommand terminated with exit code 3\n```\n"

// Defends the tour from commands that are in the document and not in the test.
func TestExtract(t *testing.T) {
	got, err := Extract(document)
	want := []Step{
		{Line: 10, Command: "echo a \\\nb", Output: []string{"a b"}},
		{Line: 13, Command: "true"},
		{Line: 17, Command: "echo c; exit 3", Output: []string{"c", "command terminated with exit code 3"}},
	}
	if err != nil || !reflect.DeepEqual(got, want) {
		t.Errorf("%+v, %v; want %+v", got, err, want)
	}
	for doc, says := range map[string]string{
		"":                          "no console block",
		"```console\n```\n":         "without a command",
		"```console\nx\n$ y\n```\n": "line 2",
		"```console\n$ x\n":         "no end",
		"```sh\n":                   "no end",
		"```console\n$ a\n```\n```console\nb\n```": "line 5",
	} {
		if _, err := Extract(doc); err == nil || !strings.Contains(err.Error(), says) {
			t.Errorf("%q: %v, want %q", doc, err, says)
		}
	}
}

// Defends the tour from an output that differs and passes, and from one that is
// the same but for what may differ.
func TestMatches(t *testing.T) {
	for _, c := range []struct {
		want, got string
		match     bool
	}{
		{"a", "a\n", true},
		{"a", "a", true},
		{"a", "b\n", false},
		{"a", "a\nb\n", false},
		{"a\nb", "a\n", false},
		{"", "", true},
		{"", "\n", true},
		{"", "a\n", false},
		{"a  b", "a       b\n", true},
		{"a b", "ab\n", false},
		{"a ... c", "a b c\n", true},
		{"a ... c", "a b d\n", false},
		{"a ... c", "a b\nx c\n", false},
		{"a...", "abc\n", true},
		{"...", "a\nb\nc\n", true},
		{"...", "", true},
		{"...\nc", "a\nb\nc\n", true},
		{"...\nc", "a\nb\nd\n", false},
		{"a\n...\nc", "a\nc\n", true},
		{"a\n...\nc", "a\nb\nb\nc\n", true},
		{"(a|b)", "a\n", false},
	} {
		s := Step{}
		if c.want != "" {
			s.Output = strings.Split(c.want, "\n")
		}
		if s.matches(c.got) != c.match {
			t.Errorf("%q and %q: match is %v", c.want, c.got, !c.match)
		}
	}
}

func console(lines ...string) string {
	return "```console\n" + strings.Join(lines, "\n") + "\n```\n"
}

// Defends the tour from a step that goes wrong unseen.
func TestRun(t *testing.T) {
	for _, c := range []struct {
		name, doc, says string
	}{
		{"good", console("$ echo $KUBECONFIG | tr a-z A-Z", "/K/CONFIG"), ""},
		{"trust domain", console("$ echo spiffe://test.example/a", "spiffe://mesh.example/a"), ""},
		{"fails as it says", console("$ echo command terminated with exit code 7 >&2; exit 7", "command terminated with exit code ..."), ""},
		{"fails", console("$ echo a; exit 3", "a"), "exit status 3"},
		{"fails in a pipe", console("$ false | true"), "exit status 1"},
		{"succeeds instead", console("$ echo command terminated with exit code 7", "command terminated with exit code 7"), "succeeded"},
		{"says something else", console("$ echo b", "a"), "the document says"},
		{"second", console("$ true", "$ echo b", "a"), "line 3"},
	} {
		err := Run(t.Context(), Options{Document: c.doc, Kubeconfig: "/k/config", Dir: t.TempDir(), TrustDomain: "test.example"})
		if c.says == "" && err != nil || c.says != "" && (err == nil || !strings.Contains(err.Error(), c.says)) {
			t.Errorf("%s: %v, want %q", c.name, err, c.says)
		}
	}
}

// Defends the tour from doing things twice: only a look is repeated.
func TestLooks(t *testing.T) {
	for command, want := range map[string]bool{
		"kubectl signet audit --since 1m": true, "kubectl get pods": true, "kubectl -n shop get pods": true, "kubectl -n data logs job/x": true,
		"kubectl apply -f x": false, "kubectl -n shop exec deploy/web -- get": false, "kubectl delete namespace get": false, "echo kubectl get": false,
	} {
		s := Step{Command: command}
		if s.looks() != want {
			t.Errorf("%s: looks is %v", command, !want)
		}
	}
}
