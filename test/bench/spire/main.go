// Command spire measures how many certificates a second the control plane
// issues on one processor, and SPIRE's server beside it: the same key type, the
// same certificate requests, as many clients, in turns, in one run.
//
// It prints a table, and writes it into a document with -out.
package main

import (
	"bytes"
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"path/filepath"
	"strings"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/test/harness"
	"github.com/signet-mesh/signet/test/spire"
)

// options are the command's flags.
type options struct {
	rounds  int
	turn    time.Duration
	clients int
	out     string
}

// Marks of the part of a document that this program writes.
const (
	beginMark = "<!-- spire:begin -->"
	endMark   = "<!-- spire:end -->"
)

var errUsage = errors.New("usage")

func main() {
	var o options
	short := flag.Bool("short", false, "one short round: shows that everything runs, measures little")
	flag.IntVar(&o.rounds, "rounds", 6, "rounds; in each, every subject has its turn")
	flag.DurationVar(&o.turn, "turn", 5*time.Second, "how long a turn is")
	flag.IntVar(&o.clients, "clients", 16, "clients, each with a connection of its own and one call at a time")
	flag.StringVar(&o.out, "out", "", "`file` to write the tables into, between its marks")
	flag.Parse()
	if *short {
		o.rounds, o.turn = 1, 4*time.Second
	}
	err := run(&o)
	switch {
	case errors.Is(err, errUsage):
		fmt.Fprintln(os.Stderr, "bench-spire:", err)
		os.Exit(2)
	case err != nil:
		fmt.Fprintln(os.Stderr, "bench-spire:", err)
		os.Exit(1)
	}
}

func run(o *options) error {
	if flag.NArg() > 0 || o.rounds < 1 || o.turn <= 0 || o.clients < 1 {
		return fmt.Errorf("%w: unknown arguments %v, or a number below one; see -help", errUsage, flag.Args())
	}
	programs, err := spire.Find(os.Getenv(spire.Env))
	if err != nil {
		return fmt.Errorf("%w: %w", errUsage, err)
	}
	// As users get them: without the race detector.
	if err := harness.Build(false); err != nil {
		return err
	}
	defer harness.RemoveBuilt()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	dir, err := os.MkdirTemp("", "bench-spire-")
	if err != nil {
		return err
	}
	defer func() { _ = os.RemoveAll(dir) }()
	b := &bench{options: *o, dir: dir, programs: programs, started: time.Now()}
	defer b.stop()
	if err := b.setUp(ctx); err != nil {
		return err
	}
	if err := b.measure(ctx); err != nil {
		return err
	}
	var text bytes.Buffer
	if err := b.report(ctx, &text); err != nil {
		return err
	}
	_, _ = io.Copy(os.Stdout, bytes.NewReader(text.Bytes()))
	if o.out == "" {
		return nil
	}
	return splice(o.out, text.String())
}

// splice replaces what stands between the marks in a file.
func splice(path, text string) error {
	old, err := os.ReadFile(filepath.Clean(path))
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
