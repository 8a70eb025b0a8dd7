// Package tour takes the commands and their outputs out of a document, runs
// them, and says where what it gets is not what the document promises.
//
// Commands are in fenced blocks that begin with ```console. A line there that
// begins with "$ " is a command, lines after it that begin with "> " continue
// it, and all others are its output. In an output, "..." stands for anything in
// its line, and a line that is "..." for any number of lines. How many spaces
// stand between two words is not compared. A command has to succeed, unless its
// output ends in kubectl's "command terminated with exit code"; then it has to
// fail.
package tour

import (
	"errors"
	"fmt"
	"regexp"
	"strings"
)

// Step is one command of a tour.
type Step struct {
	// Line is where the command is in the document, from 1.
	Line int
	// Command is for bash; it may have several lines.
	Command string
	// Output is what the document promises, with wildcards.
	Output []string
}

const (
	fence  = "```"
	opener = "```console"
)

// Extract returns the commands of a document in Markdown, in order.
func Extract(document string) ([]Step, error) {
	var steps []Step
	begun := 0 // line of the fence of the console block that is open, or 0
	other := false
	for i, line := range strings.Split(document, "\n") {
		n := i + 1
		switch {
		case begun == 0 && !other && strings.TrimRight(line, " ") == opener:
			begun = n
		case begun == 0 && strings.HasPrefix(line, fence):
			other = !other
		case begun == 0:
		case strings.HasPrefix(line, fence):
			if len(steps) == 0 || steps[len(steps)-1].Line < begun {
				return nil, fmt.Errorf("line %d: a console block without a command", begun)
			}
			begun = 0
		case strings.HasPrefix(line, "$ "):
			steps = append(steps, Step{Line: n, Command: line[len("$ "):]})
		case len(steps) == 0 || steps[len(steps)-1].Line < begun:
			return nil, fmt.Errorf("line %d: output that no command is above of", n)
		default:
			s := &steps[len(steps)-1]
			if more, ok := strings.CutPrefix(line, "> "); ok && len(s.Output) == 0 {
				s.Command += "\n" + more
			} else {
				s.Output = append(s.Output, line)
			}
		}
	}
	if begun != 0 || other {
		return nil, errors.New("the last block has no end")
	}
	if len(steps) == 0 {
		return nil, errors.New("there is no console block")
	}
	return steps, nil
}

const (
	wildcard = "..."
	// failure begins what kubectl says of a program that did not succeed.
	failure = "command terminated with exit code "
)

// fails reports whether the document says that the command fails.
func (s *Step) fails() bool {
	return len(s.Output) > 0 && strings.HasPrefix(s.Output[len(s.Output)-1], failure)
}

// matches reports whether an output is the one that the document promises.
func (s *Step) matches(output string) bool {
	var want strings.Builder
	for _, line := range s.Output {
		line = words(line)
		if line == wildcard {
			want.WriteString(`(?:[^\n]*\n)*?`)
			continue
		}
		for i, part := range strings.Split(line, wildcard) {
			if i > 0 {
				want.WriteString(`[^\n]*`)
			}
			want.WriteString(regexp.QuoteMeta(part))
		}
		want.WriteString(`\n`)
	}
	var got strings.Builder
	for line := range strings.Lines(strings.TrimRight(output, "\n") + "\n") {
		got.WriteString(words(line) + "\n")
	}
	if strings.TrimSpace(output) == "" {
		got.Reset()
	}
	return regexp.MustCompile(`\A` + want.String() + `\z`).MatchString(got.String())
}

// words is a line with single spaces.
func words(line string) string { return strings.Join(strings.Fields(line), " ") }
