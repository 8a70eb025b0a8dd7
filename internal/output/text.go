package output

import (
	"fmt"
	"strings"
	"unicode"
	"unicode/utf8"
)

// Style is how a piece of text looks where colour is on. It never carries
// meaning that the words do not.
type Style uint8

// The styles.
const (
	Plain Style = iota
	Good
	Warn
	Bad
	Dim
)

var escapes = [...]string{Plain: "", Good: "\x1b[32m", Warn: "\x1b[33m", Bad: "\x1b[31m", Dim: "\x1b[2m"}

// Cell is a styled piece of text.
type Cell struct {
	Text  string
	Style Style
}

// C returns a plain cell of a value.
func C(v any) Cell { return Cell{Text: fmt.Sprint(v)} }

// S returns a cell in a style.
func S(style Style, v any) Cell { return Cell{Text: fmt.Sprint(v), Style: style} }

// Column is the head of a table's column.
type Column struct {
	Name string
	// Wide columns show only with -o wide.
	Wide bool
	// Min is the least width, so that rows that are printed one by one align.
	Min int
}

// Text collects a document's form for people.
type Text struct {
	// Wide asks for everything there is.
	Wide bool

	b       strings.Builder
	color   bool
	follows bool // an earlier document of the stream had the table's head
}

// Line writes one line of plain and styled pieces, each an any or a Cell.
func (t *Text) Line(pieces ...any) {
	for _, p := range pieces {
		c, ok := p.(Cell)
		if !ok {
			c = C(p)
		}
		t.cell(c, 0)
	}
	t.b.WriteByte('\n')
}

// Linef writes one line.
func (t *Text) Linef(format string, args ...any) { t.Line(fmt.Sprintf(format, args...)) }

// Table writes rows under a head, aligned, two spaces apart, with nothing
// behind the last column. Each row has one cell for each column.
func (t *Text) Table(head []Column, rows [][]Cell) {
	widths := make([]int, len(head))
	for i, h := range head {
		widths[i] = max(h.Min, utf8.RuneCountInString(h.Name))
		for _, row := range rows {
			widths[i] = max(widths[i], utf8.RuneCountInString(Clean(row[i].Text)))
		}
	}
	last := 0
	for i, h := range head {
		if t.Wide || !h.Wide {
			last = i
		}
	}
	line := func(cell func(int) Cell) {
		for i, h := range head {
			if h.Wide && !t.Wide {
				continue
			}
			if i == last {
				t.cell(cell(i), 0)
				continue
			}
			t.cell(cell(i), widths[i]+2)
		}
		t.b.WriteByte('\n')
	}
	if !t.follows {
		line(func(i int) Cell { return S(Dim, head[i].Name) })
	}
	for _, row := range rows {
		line(func(i int) Cell { return row[i] })
	}
}

func (t *Text) cell(c Cell, width int) {
	text := Clean(c.Text)
	if t.color && c.Style != Plain && text != "" {
		t.b.WriteString(escapes[c.Style])
		t.b.WriteString(text)
		t.b.WriteString("\x1b[0m")
	} else {
		t.b.WriteString(text)
	}
	for n := utf8.RuneCountInString(text); n < width; n++ {
		t.b.WriteByte(' ')
	}
}

// Clean makes text from elsewhere harmless on a terminal: what is not
// printable, such as an escape sequence or a line break, is shown as Go would
// write it in a string literal.
func Clean(s string) string {
	harmless := func(r rune) bool { return unicode.IsPrint(r) && r != utf8.RuneError }
	if strings.IndexFunc(s, func(r rune) bool { return !harmless(r) }) < 0 {
		return s
	}
	var b strings.Builder
	for i := 0; i < len(s); {
		r, n := utf8.DecodeRuneInString(s[i:])
		if harmless(r) {
			b.WriteRune(r)
		} else {
			q := fmt.Sprintf("%+q", s[i:i+n])
			b.WriteString(q[1 : len(q)-1])
		}
		i += n
	}
	return b.String()
}
