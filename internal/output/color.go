package output

import (
	"fmt"
	"os"
	"slices"

	"golang.org/x/term"
)

// ColorMode says when to use colour.
type ColorMode string

// The modes. Auto uses colour on a terminal that has it and whose user has
// not set NO_COLOR.
const (
	ColorAuto   ColorMode = "auto"
	ColorAlways ColorMode = "always"
	ColorNever  ColorMode = "never"
)

var colorModes = []ColorMode{ColorAuto, ColorAlways, ColorNever}

// Set parses a mode; with String and Type it makes *ColorMode a flag value.
func (m *ColorMode) Set(s string) error {
	if !slices.Contains(colorModes, ColorMode(s)) {
		return fmt.Errorf("must be one of auto|always|never")
	}
	*m = ColorMode(s)
	return nil
}

// String returns the mode's name.
func (m *ColorMode) String() string { return string(*m) }

// Type names the flag's kind of value in the help text.
func (m *ColorMode) Type() string { return "when" }

// Use decides about colour on w in an environment.
func (m ColorMode) Use(w any, getenv func(string) string) bool {
	switch m {
	case ColorAlways:
		return true
	case ColorNever:
		return false
	}
	return getenv("NO_COLOR") == "" && getenv("TERM") != "dumb" && IsTerminal(w)
}

// IsTerminal reports whether w is a file that is a terminal.
func IsTerminal(w any) bool {
	f, ok := w.(*os.File)
	return ok && term.IsTerminal(int(f.Fd()))
}
