package tour

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"strings"
	"time"
)

// Options say where a tour is run.
type Options struct {
	// Document is the Markdown with the commands.
	Document string
	// Kubeconfig is the file of the cluster.
	Kubeconfig string
	// Dir is where commands are run: the project's folder.
	Dir string
	// Path has folders that are looked in first for programs: kubectl, and
	// kubectl-signet, which is the program signet under another name.
	Path []string
	// TrustDomain stands in for mesh.example in outputs; empty changes nothing.
	TrustDomain string
	// Log gets each command and what it answers; nil means it does not.
	Log io.Writer
}

// exampleDomain is the trust domain in documents.
const exampleDomain = "mesh.example"

const (
	// commandTime bounds one command.
	commandTime = 4 * time.Minute
	// lookTime is how long a command that only looks is asked again: a reader
	// takes a moment between two commands, a program does not, and records of
	// what just happened are on their way.
	lookTime = 15 * time.Second
	lookGap  = 500 * time.Millisecond
)

// Run runs the commands of a tour one after the other, and ends with the first
// that does not do what the document says. What the commands made stays.
func Run(ctx context.Context, o Options) error {
	steps, err := Extract(o.Document)
	if err != nil {
		return fmt.Errorf("tour: %w", err)
	}
	if o.Log == nil {
		o.Log = io.Discard
	}
	for i := range steps {
		s := &steps[i]
		if o.TrustDomain != "" {
			for i := range s.Output {
				s.Output[i] = strings.ReplaceAll(s.Output[i], exampleDomain, o.TrustDomain)
			}
		}
		if err := o.step(ctx, s); err != nil {
			return fmt.Errorf("tour: line %d: %w", s.Line, err)
		}
	}
	return nil
}

// looks reports whether a command only looks at what is there.
func (s *Step) looks() bool {
	fields := strings.Fields(s.Command)
	if len(fields) > 3 && fields[0] == "kubectl" && fields[1] == "-n" {
		fields = append(fields[:1:1], fields[3:]...)
	}
	return len(fields) > 1 && fields[0] == "kubectl" && (fields[1] == "signet" || fields[1] == "get" || fields[1] == "logs")
}

func (o *Options) step(ctx context.Context, s *Step) error {
	_, _ = fmt.Fprintf(o.Log, "$ %s\n", s.Command)
	start := time.Now()
	for {
		out, wrong, err := o.try(ctx, s)
		if err != nil {
			return err
		}
		if wrong == nil || !s.looks() || time.Since(start) > lookTime {
			_, _ = fmt.Fprintf(o.Log, "%s(%.1f s)\n", out, time.Since(start).Seconds())
			return wrong
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case <-time.After(lookGap):
		}
	}
}

// try runs a command once. The first error is about the answer, the second
// about there being none.
func (o *Options) try(ctx context.Context, s *Step) (out string, wrong, err error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, "bash", "-o", "pipefail", "-c", s.Command)
	cmd.Dir = o.Dir
	cmd.Env = append(os.Environ(), "KUBECONFIG="+o.Kubeconfig, "LC_ALL=C.UTF-8", "NO_COLOR=1",
		"PATH="+strings.Join(append(append([]string{}, o.Path...), os.Getenv("PATH")), string(os.PathListSeparator)))
	var b bytes.Buffer
	cmd.Stdout, cmd.Stderr = &b, &b
	// What the command leaves running must not hold its output open.
	cmd.WaitDelay = 5 * time.Second
	err = cmd.Run()
	out = b.String()
	var exit *exec.ExitError
	failed := errors.As(err, &exit)
	switch {
	case ctx.Err() != nil:
		return out, nil, fmt.Errorf("%s\nended early: %w; it said:\n%s", s.Command, ctx.Err(), out)
	case err != nil && !failed:
		return out, nil, fmt.Errorf("%s\n%w", s.Command, err)
	case failed && !s.fails():
		return out, fmt.Errorf("%s\nfailed (%w); it said:\n%s", s.Command, err, out), nil
	case !failed && s.fails():
		return out, fmt.Errorf("%s\nsucceeded, the document says that it fails; it said:\n%s", s.Command, out), nil
	case !s.matches(out):
		return out, fmt.Errorf("%s\nsaid:\n%s\nthe document says:\n%s", s.Command, out, strings.Join(s.Output, "\n")), nil
	}
	return out, nil, nil
}
