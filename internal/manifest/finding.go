package manifest

import (
	"cmp"
	"fmt"
	"slices"
	"strings"
	"unicode/utf8"
)

// Codes of findings. They are stable: scripts may depend on them.
const (
	CodeFile      = "SIG1001" // a file or directory cannot be read
	CodeSyntax    = "SIG1002" // not YAML
	CodeForbidden = "SIG1003" // YAML that is refused: aliases, tags, deep nesting
	CodeKind      = "SIG1004" // apiVersion or kind is missing or unknown
	CodeUnknown   = "SIG1005" // unknown field
	CodeDoubled   = "SIG1006" // the same key twice
	CodeType      = "SIG1007" // text where a number is needed, null, and the like
	CodeRequired  = "SIG1008" // a field is missing
	CodeValue     = "SIG1009" // the value is not allowed
	CodeDuplicate = "SIG1010" // a name, address or namespace is used twice
	CodeReference = "SIG1011" // a document that is referred to does not exist
	CodeMesh      = "SIG1012" // not exactly one MeshConfig
	CodePolicy    = "SIG1013" // an AllowPolicy or a Quarantine does not compile
	CodeUseless   = "SIG1014" // a document that could have no effect
)

// Finding is one problem.
type Finding struct {
	File string `json:"file"`
	// Line starts at 1; it is 0 for a problem of the whole file.
	Line int `json:"line,omitempty"`
	// Field is a path such as spec.from[1].spiffeID; it is empty for a
	// problem of the whole document or file.
	Field   string `json:"field,omitempty"`
	Message string `json:"message"` // what is wrong and how to mend it
	Code    string `json:"code"`    // one of the Code constants
}

// String returns "file:line: field: message", without what is not known.
func (f Finding) String() string {
	s := f.File
	if f.Line > 0 {
		s = fmt.Sprintf("%s:%d", s, f.Line)
	}
	if f.Field != "" {
		s += ": " + f.Field
	}
	return s + ": " + f.Message
}

// Error is a set of documents that was refused.
type Error struct {
	// Findings are sorted by file, line and field; there is at least one.
	Findings []Finding
}

// Error returns one line for each finding.
func (e *Error) Error() string {
	lines := make([]string, len(e.Findings))
	for i, f := range e.Findings {
		lines[i] = f.String()
	}
	return strings.Join(lines, "\n")
}

// Bounds on what hostile input can make a report hold.
const (
	maxFindings = 500
	maxMessage  = 600 // bytes
)

// report collects findings.
type report struct {
	findings []Finding
	// incomplete: a file or document could not be read at all.
	incomplete bool
}

func (r *report) add(f Finding) {
	switch f.Code {
	case CodeFile, CodeSyntax, CodeForbidden, CodeKind:
		r.incomplete = true
	}
	if len(r.findings) >= maxFindings {
		return
	}
	if len(f.Message) > maxMessage {
		cut := maxMessage
		for cut > 0 && !utf8.RuneStart(f.Message[cut]) {
			cut--
		}
		f.Message = f.Message[:cut] + "..."
	}
	r.findings = append(r.findings, f)
}

func (r *report) sorted() []Finding {
	slices.SortStableFunc(r.findings, func(a, b Finding) int {
		return cmp.Or(
			strings.Compare(a.File, b.File),
			cmp.Compare(a.Line, b.Line),
			strings.Compare(a.Field, b.Field),
			strings.Compare(a.Code, b.Code),
			strings.Compare(a.Message, b.Message),
		)
	})
	return r.findings
}

func (r *report) err() error {
	if len(r.findings) == 0 {
		return nil
	}
	return &Error{Findings: r.sorted()}
}
