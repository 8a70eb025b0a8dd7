// Command issuance measures how fast the authority issues: a bare signing loop, the
// authority with its durable log, and the whole node API by mutual TLS, in turns, in
// one run, each on one processor; and how long it takes until 10,000 pods on 100
// nodes have certificates again when all of their agents start anew.
//
// It prints tables, and writes them into a document with -out.
package main

import (
	"bytes"
	"cmp"
	"context"
	"flag"
	"fmt"
	"io"
	"os"
	"os/signal"
	"runtime"
	"slices"
	"strings"
	"syscall"
	"time"
)

type options struct {
	rounds, nodes, pods int
	turn                time.Duration
	out                 string
}

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	var err error
	if len(os.Args) > 1 && os.Args[1] == controlArg {
		err = serveControl(ctx, os.Args[2:]) // this program is the control plane too
	} else {
		err = run(ctx)
	}
	if err != nil {
		fmt.Fprintln(os.Stderr, "issuance:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context) error {
	var o options
	flag.IntVar(&o.rounds, "rounds", 6, "rounds; in each, every subject has its turn")
	flag.DurationVar(&o.turn, "turn", 3*time.Second, "how long a turn is")
	flag.IntVar(&o.nodes, "nodes", 100, "nodes whose agents start anew")
	flag.IntVar(&o.pods, "pods", 100, "pods on each")
	flag.StringVar(&o.out, "out", "", "`file` to write the tables into, between its marks")
	flag.Parse()
	if flag.NArg() > 0 || o.rounds < 1 || o.nodes < 1 || o.pods < 1 || o.turn < 10*tick {
		return fmt.Errorf("unknown arguments %v, or a number below 1; see -help", flag.Args())
	}
	dir, err := os.MkdirTemp("", "issuance-")
	if err != nil {
		return err
	}
	defer os.RemoveAll(dir)
	var text bytes.Buffer
	fmt.Fprintf(&text, "\n%s UTC, %d processors, Linux on %s, %s. Load average at the begin: %s.\n\n",
		time.Now().UTC().Format("2006-01-02 15:04"), runtime.NumCPU(), runtime.GOARCH, runtime.Version(), loadAverage())
	if err := rates(ctx, &o, dir, &text); err != nil {
		return err
	}
	if err := reissue(ctx, &o, dir, &text); err != nil {
		return err
	}
	fmt.Fprintf(&text, "Load average at the end: %s.\n", loadAverage())
	_, _ = io.Copy(os.Stdout, bytes.NewReader(text.Bytes()))
	if o.out == "" {
		return nil
	}
	return splice(o.out, text.String())
}

func loadAverage() string {
	b, _ := os.ReadFile("/proc/loadavg")
	return strings.Join(strings.Fields(string(b))[:3], " ")
}

// turn is what a subject has done in a turn.
type turn struct {
	issued    int
	wall, cpu time.Duration // cpu is of the process that issues alone
}

func (t turn) rate() float64  { return float64(t.issued) / t.wall.Seconds() }
func (t turn) spent() float64 { return float64(t.cpu.Microseconds()) / float64(t.issued) }

// subject is one way to issue certificates. What issues by another program's API,
// such as that of a SPIRE server, is one more.
type subject struct {
	name, what string
	measure    func(ctx context.Context, d time.Duration) (turn, error)
}

// rates gives every subject its turn in every round.
func rates(ctx context.Context, o *options, dir string, out io.Writer) error {
	subjects, done, err := subjects(ctx, dir)
	if err != nil {
		return err
	}
	defer done()
	results := map[string][]turn{}
	for round := range o.rounds {
		for i := range subjects {
			s := &subjects[(round+i)%len(subjects)]
			got, err := s.measure(ctx, o.turn)
			if err == nil {
				err = ctx.Err()
			}
			if err != nil {
				return fmt.Errorf("%s: %w", s.name, err)
			}
			if got.issued == 0 {
				return fmt.Errorf("%s: nothing was issued", s.name)
			}
			results[s.name] = append(results[s.name], got)
			fmt.Fprintf(os.Stderr, "round %d: %s: %.0f/s, %.0f µs of CPU each\n", round+1, s.name, got.rate(), got.spent())
		}
	}
	base := subjects[0].name
	fmt.Fprintf(out, "Median of %d rounds of %s (lowest–highest); ratios are taken within a round.\n\n", o.rounds, o.turn)
	fmt.Fprintf(out, "| | certificates/s | to %s | CPU each, µs | to %s |\n| --- | --- | --- | --- | --- |\n", base, base)
	for _, s := range subjects {
		var rate, rateRatio, spent, spentRatio []float64
		for i, got := range results[s.name] {
			first := results[base][i]
			rate, rateRatio = append(rate, got.rate()), append(rateRatio, got.rate()/first.rate())
			spent, spentRatio = append(spent, got.spent()), append(spentRatio, got.spent()/first.spent())
		}
		fmt.Fprintf(out, "| `%s` | %s | %s | %s | %s |\n", s.name, spread(rate, 0), spread(rateRatio, 2), spread(spent, 0), spread(spentRatio, 2))
	}
	fmt.Fprintln(out)
	for _, s := range subjects {
		fmt.Fprintf(out, "- `%s`: %s\n", s.name, s.what)
	}
	return nil
}

// spread writes the median of values, the lowest and the highest.
func spread(v []float64, digits int) string {
	v = slices.Sorted(slices.Values(v))
	mid := v[len(v)/2]
	if len(v)%2 == 0 {
		mid = (v[len(v)/2-1] + mid) / 2
	}
	return fmt.Sprintf("%.*f (%.*f–%.*f)", digits, mid, digits, v[0], digits, v[len(v)-1])
}

// Marks of the part of a document that this program writes.
const (
	beginMark = "<!-- issuance:begin -->"
	endMark   = "<!-- issuance:end -->"
)

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

// quantile of sorted values.
func quantile[T cmp.Ordered](v []T, q float64) T { return v[min(len(v)-1, int(q*float64(len(v))))] }
