// Package output prints what a command found: as tables for people, as JSON
// or YAML for programs. Every command answers with one Document, so that the
// forms cannot differ in content, only in looks.
package output

import (
	"encoding/json"
	"fmt"
	"io"
	"slices"
	"strings"

	"sigs.k8s.io/yaml"
)

// APIVersion is the version of every JSON and YAML document that the CLI
// prints. Fields may be added to it; a change of meaning gets a new version.
const APIVersion = "signet.dev/cli/v1"

// Format is a form of output.
type Format string

// The forms. Wide is Table with more columns.
const (
	Table Format = "table"
	Wide  Format = "wide"
	JSON  Format = "json"
	YAML  Format = "yaml"
)

// Formats lists every form, in the order of the help text.
var Formats = []Format{Table, Wide, JSON, YAML}

// Set parses a form; with String and Type it makes *Format a flag value.
func (f *Format) Set(s string) error {
	if !slices.Contains(Formats, Format(s)) {
		return fmt.Errorf("must be one of %s", FormatNames())
	}
	*f = Format(s)
	return nil
}

// String returns the form's name.
func (f *Format) String() string { return string(*f) }

// Type names the flag's kind of value in the help text.
func (f *Format) Type() string { return "form" }

// FormatNames returns "table|wide|json|yaml".
func FormatNames() string {
	names := make([]string, len(Formats))
	for i, f := range Formats {
		names[i] = string(f)
	}
	return strings.Join(names, "|")
}

// Meta opens every document.
type Meta struct {
	APIVersion string `json:"apiVersion"`
	Kind       string `json:"kind"`
}

// NewMeta returns the opening of a document of a kind.
func NewMeta(kind string) Meta { return Meta{APIVersion: APIVersion, Kind: kind} }

// Document is a command's whole answer. Its JSON form is the value itself.
type Document interface {
	// Text writes the form for people.
	Text(t *Text)
}

// YAMLDocument is a document with a YAML form of its own, such as one that is
// made to be applied.
type YAMLDocument interface {
	Document
	// YAML returns the form.
	YAML() ([]byte, error)
}

// Printer writes documents in one form. It is not safe for concurrent use.
type Printer struct {
	out    io.Writer
	format Format
	color  bool
	docs   int
}

// NewPrinter returns a printer to out. Only tables have colour.
func NewPrinter(out io.Writer, format Format, color bool) *Printer {
	return &Printer{out: out, format: format, color: color}
}

// Print writes one document, indented.
func (p *Printer) Print(doc Document) error {
	switch p.format {
	case JSON:
		b, err := json.MarshalIndent(doc, "", "  ")
		if err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		return p.write(append(b, '\n'))
	case YAML:
		own, ok := doc.(YAMLDocument)
		if ok {
			b, err := own.YAML()
			if err != nil {
				return fmt.Errorf("encode output: %w", err)
			}
			return p.write(b)
		}
		b, err := yaml.Marshal(doc)
		if err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		return p.write(b)
	}
	t := &Text{Wide: p.format == Wide, color: p.color}
	doc.Text(t)
	return p.write([]byte(t.b.String()))
}

// Stream writes one of many documents as soon as it is there: a line of JSON,
// a YAML document of its own, or rows of text.
func (p *Printer) Stream(doc Document) error {
	defer func() { p.docs++ }()
	switch p.format {
	case JSON:
		b, err := json.Marshal(doc)
		if err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		return p.write(append(b, '\n'))
	case YAML:
		b, err := yaml.Marshal(doc)
		if err != nil {
			return fmt.Errorf("encode output: %w", err)
		}
		return p.write(append([]byte("---\n"), b...))
	}
	t := &Text{Wide: p.format == Wide, color: p.color, follows: p.docs > 0}
	doc.Text(t)
	return p.write([]byte(t.b.String()))
}

func (p *Printer) write(b []byte) error {
	if _, err := p.out.Write(b); err != nil {
		return fmt.Errorf("write output: %w", err)
	}
	return nil
}
