package output

import (
	"bytes"
	"encoding/json"
	"os"
	"strings"
	"testing"

	"golang.org/x/sys/unix"
	"sigs.k8s.io/yaml"
)

type animals struct {
	Meta
	Names []string `json:"names"`
}

func (a animals) Text(t *Text) {
	var rows [][]Cell
	for _, n := range a.Names {
		rows = append(rows, []Cell{S(Good, n), C(len(n)), C("x")})
	}
	t.Table([]Column{{Name: "NAME", Min: 6}, {Name: "LENGTH", Wide: true}, {Name: "LAST"}}, rows)
}

func printed(t *testing.T, f Format, color bool, doc Document) string {
	t.Helper()
	var b bytes.Buffer
	if err := NewPrinter(&b, f, color).Print(doc); err != nil {
		t.Fatal(err)
	}
	return b.String()
}

func TestForms(t *testing.T) {
	doc := animals{NewMeta("Animals"), []string{"ox", "wolf"}}
	for _, c := range []struct {
		format Format
		color  bool
		want   string
	}{
		{Table, false, "NAME    LAST\nox      x\nwolf    x\n"},
		{Wide, false, "NAME    LENGTH  LAST\nox      2       x\nwolf    4       x\n"},
		{Table, true, "\x1b[2mNAME\x1b[0m    \x1b[2mLAST\x1b[0m\n\x1b[32mox\x1b[0m      x\n\x1b[32mwolf\x1b[0m    x\n"},
		{YAML, true, "apiVersion: signet.dev/cli/v1\nkind: Animals\nnames:\n- ox\n- wolf\n"},
	} {
		if got := printed(t, c.format, c.color, doc); got != c.want {
			t.Errorf("%s, colour %v:\n%q\nwant\n%q", c.format, c.color, got, c.want)
		}
	}
	var back animals
	if err := json.Unmarshal([]byte(printed(t, JSON, true, doc)), &back); err != nil || back.APIVersion != APIVersion || len(back.Names) != 2 {
		t.Errorf("JSON: %+v, %v", back, err)
	}
}

// Programs that read a stream need one document per line, and a table's head
// only once.
func TestStream(t *testing.T) {
	for format, want := range map[Format]string{
		Table: "NAME    LAST\nox      x\nox      x\n",
		JSON:  strings.Repeat(`{"apiVersion":"signet.dev/cli/v1","kind":"Animals","names":["ox"]}`+"\n", 2),
	} {
		var b bytes.Buffer
		p := NewPrinter(&b, format, false)
		for range 2 {
			if err := p.Stream(animals{NewMeta("Animals"), []string{"ox"}}); err != nil {
				t.Fatal(err)
			}
		}
		if b.String() != want {
			t.Errorf("%s:\n%q\nwant\n%q", format, b.String(), want)
		}
	}
	var b bytes.Buffer
	p := NewPrinter(&b, YAML, false)
	for range 2 {
		if err := p.Stream(animals{NewMeta("Animals"), nil}); err != nil {
			t.Fatal(err)
		}
	}
	for _, part := range strings.Split(b.String(), "---\n")[1:] {
		var a animals
		if err := yaml.UnmarshalStrict([]byte(part), &a); err != nil || a.Kind != "Animals" {
			t.Errorf("YAML document %q: %v", part, err)
		}
	}
}

// Defends the terminal of whoever reads an audit: names and reasons come from
// other machines, and must not be able to move the cursor, clear the screen,
// forge a row, or turn the direction of writing.
func TestForeignTextIsHarmless(t *testing.T) {
	for in, want := range map[string]string{
		"plain, ünïcode":    "plain, ünïcode",
		"\x1b[2Jgone":       `\x1b[2Jgone`,
		"a\nDENIED b":       `a\nDENIED b`,
		"\r\a\x00":          `\r\a\x00`,
		"\u009b31m":         `\u009b31m`,
		"\u202eevil":        `\u202eevil`,
		"bad \xff utf":      `bad \xff utf`,
		"back\\slash stays": "back\\slash stays",
	} {
		if got := Clean(in); got != want {
			t.Errorf("Clean(%q) = %q, want %q", in, got, want)
		}
		if got := printed(t, Table, false, animals{Names: []string{in}}); strings.Count(got, "\n") != 2 || strings.ContainsAny(got, "\x1b\r\a\x00\u202e\u009b") {
			t.Errorf("%q printed as %q", in, got)
		}
	}
}

func TestFormatFlag(t *testing.T) {
	f := Table
	if err := f.Set("xml"); err == nil || !strings.Contains(err.Error(), "table|wide|json|yaml") {
		t.Errorf("xml: %v", err)
	}
	if err := f.Set("yaml"); err != nil || f != YAML {
		t.Errorf("yaml: %v, %v", f, err)
	}
}

// pty opens a pseudo terminal, the only real way to look like one.
func pty(t *testing.T) *os.File {
	t.Helper()
	master, err := os.OpenFile("/dev/ptmx", os.O_RDWR|unix.O_NOCTTY, 0)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = master.Close() })
	return master
}

func TestColor(t *testing.T) {
	tty := pty(t)
	for _, c := range []struct {
		mode ColorMode
		w    any
		env  map[string]string
		want bool
	}{
		{ColorAuto, tty, nil, true},
		{ColorAuto, &bytes.Buffer{}, nil, false},
		{ColorAuto, tty, map[string]string{"NO_COLOR": "1"}, false},
		{ColorAuto, tty, map[string]string{"TERM": "dumb"}, false},
		{ColorAlways, &bytes.Buffer{}, map[string]string{"NO_COLOR": "1"}, true},
		{ColorNever, tty, nil, false},
	} {
		if got := c.mode.Use(c.w, func(k string) string { return c.env[k] }); got != c.want {
			t.Errorf("%s on %T with %v: %v", c.mode, c.w, c.env, got)
		}
	}
	var m ColorMode
	if err := m.Set("sometimes"); err == nil {
		t.Error("sometimes was accepted")
	}
}
