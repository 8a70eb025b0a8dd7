// Command bench measures what this mesh costs: raw TCP, a hand-written static
// Envoy pair with mTLS, this mesh with and without audit, and a pair of
// ztunnels, all in network namespaces of one machine, in turns, in one run.
//
// It prints a table, and a full run writes it into docs/benchmarks.md.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// options are the command's flags.
type options struct {
	short   bool
	rounds  int
	wait    time.Duration
	against string
	ztunnel string
	envoy   string
	only    string
	out     string
}

func main() {
	// The load generators are this program too, started inside the pods.
	if len(os.Args) > 1 && os.Args[1] == workerArg {
		if err := worker(os.Args[2:]); err != nil {
			fmt.Fprintln(os.Stderr, "bench worker:", err)
			os.Exit(1)
		}
		return
	}
	o := options{ztunnel: os.Getenv("ZTUNNEL"), envoy: os.Getenv("SIGNET_ENVOY")}
	flag.BoolVar(&o.short, "short", false, "one short round, about a minute: shows that everything runs, measures little")
	flag.IntVar(&o.rounds, "rounds", 6, "rounds; in each, every subject has its turn")
	flag.DurationVar(&o.wait, "wait", 2*time.Minute, "how long, in all, to wait for and repeat what other work on the machine disturbed")
	flag.StringVar(&o.against, "against", "", "`directory` of another build of this mesh's programs, to measure beside this one")
	flag.StringVar(&o.only, "only", "", "names of subjects to measure, with commas between; raw is always there")
	flag.StringVar(&o.out, "out", "", "`file` to write the tables into; a full run writes docs/benchmarks.md")
	flag.Parse()
	err := run(&o)
	switch {
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench:", err)
		os.Exit(1)
	}
}

var errUsage = errors.New("usage")

func run(o *options) error {
	if flag.NArg() > 0 || o.rounds < 1 {
		return fmt.Errorf("%w: unknown arguments %v, or fewer than one round; see -help", errUsage, flag.Args())
	}
	if o.envoy == "" {
		return fmt.Errorf("%w: SIGNET_ENVOY is not set: run this with `make bench`", errUsage)
	}
	if o.ztunnel != "" {
		path, err := filepath.Abs(o.ztunnel)
		if err != nil {
			return err
		}
		if _, err := os.Stat(path); err != nil {
			return fmt.Errorf("%w: ZTUNNEL: %w", errUsage, err)
		}
		o.ztunnel = path
	}
	out := o.out
	if out == "" && !o.short && o.only == "" && o.against == "" {
		out = filepath.Join("docs", "benchmarks.md")
	}
	// As users get them: without the race detector.
	if err := harness.Build(false); err != nil {
		return err
	}
	if _, err := lab.Isolate(); err != nil {
		return err
	}
	defer harness.RemoveBuilt()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	l, err := lab.New(lab.Config{})
	if err != nil {
		return err
	}
	defer func() { _ = l.Close() }()
	dir, err := os.MkdirTemp("", "bench-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()

	b := &bench{options: *o, lab: l, dir: dir, started: time.Now(), plan: fullPlan}
	if o.short {
		b.plan, b.rounds, b.wait = shortPlan, 1, 0
	}
	defer b.stop()
	if err := b.setUp(ctx); err != nil {
		return err
	}
	if err := b.measure(ctx); err != nil {
		return err
	}
	b.ended = time.Now()
	var text bytes.Buffer
	b.report(ctx, &text)
	_, _ = io.Copy(os.Stdout, bytes.NewReader(text.Bytes()))
	if out == "" {
		return nil
	}
	return splice(out, text.String())
}

// Marks of the part of a document that this program writes.
const (
	beginMark = "<!-- bench:begin -->"
	endMark   = "<!-- bench:end -->"
)

// splice replaces what stands between the marks in a file.
func splice(path, text string) error {
	old, err := os.ReadFile(path)
	if err != nil {
		return err
	}
	before, rest, ok := strings.Cut(string(old), beginMark)
	_, after, ok2 := strings.Cut(rest, endMark)
	if !ok || !ok2 {
		return fmt.Errorf("%s: no %s and %s in it to write between", path, beginMark, endMark)
	}
	return os.WriteFile(path, []byte(before+beginMark+"\n"+text+endMark+after), 0o644)
}

// firstLine is the first line of what a program says, for the report.
func firstLine(ctx context.Context, name string, args ...string) string {
	out, err := exec.CommandContext(ctx, name, args...).Output()
	if err != nil {
		return "unknown"
	}
	line, _, _ := strings.Cut(strings.TrimSpace(string(out)), "\n")
	return line
}
