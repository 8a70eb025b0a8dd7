package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"golang.org/x/sys/unix"
)

// metric is one row of the table.
type metric struct {
	name   string
	of     func(*turn) float64
	digits int
	// ratio: the row is one of the ratios, too.
	ratio bool
}

var metrics = []metric{
	{"certificates, /s", (*turn).rate, 0, true},
	{"server's CPU per certificate, µs", (*turn).perCertificate, 0, true},
	{"a call, median, ms", func(t *turn) float64 { return t.quantile(0.5) }, 2, false},
	{"a call, 99th percentile, ms", func(t *turn) float64 { return t.quantile(0.99) }, 2, false},
	{"share of its processor that the server had", (*turn).busy, 2, false},
}

// values of a metric in all rounds.
func (b *bench) values(m *metric, subject string) []float64 {
	var out []float64
	for _, round := range b.turns {
		out = append(out, m.of(round[subject]))
	}
	return out
}

// ratios of a metric between two subjects: of the same round, since the machine
// is not the same from one to the next.
func (b *bench) ratios(m *metric, subject, to string) []float64 {
	var out []float64
	for _, round := range b.turns {
		out = append(out, m.of(round[subject])/m.of(round[to]))
	}
	return out
}

// spread is the median, and the lowest and the highest.
func spread(values []float64, digits int) string {
	v := slices.Sorted(slices.Values(values))
	mid := v[len(v)/2]
	if len(v)%2 == 0 {
		mid = (v[len(v)/2-1] + v[len(v)/2]) / 2
	}
	number := func(f float64) string { return strconv.FormatFloat(f, 'f', digits, 64) }
	if len(v) == 1 {
		return number(mid)
	}
	return fmt.Sprintf("%s (%s–%s)", number(mid), number(v[0]), number(v[len(v)-1]))
}

// report writes the tables and how they came about, in Markdown.
func (b *bench) report(ctx context.Context, w io.Writer) error {
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }
	row := func(cells []string) { p("| %s |", strings.Join(cells, " | ")) }
	head := func(cells []string) { row(cells); p("|%s", strings.Repeat(" --- |", len(cells))) }
	p("\nMedian of %d rounds (lowest–highest).\n", b.rounds)
	cells := []string{""}
	for _, s := range b.subjects {
		cells = append(cells, s.name)
	}
	head(cells)
	for i := range metrics {
		cells := []string{metrics[i].name}
		for _, s := range b.subjects {
			cells = append(cells, spread(b.values(&metrics[i], s.name), metrics[i].digits))
		}
		row(cells)
	}
	p("\nRatios, each taken within a round; median (lowest–highest). Of certificates more is better, of CPU less.")
	for at, own := range b.subjects[:2] { // one certificate a call, and many
		others := slices.Delete(slices.Clone(b.subjects), at, at+1)
		p("")
		cells := []string{own.name + " to"}
		for _, s := range others {
			cells = append(cells, s.name)
		}
		head(cells)
		for i := range metrics {
			if !metrics[i].ratio {
				continue
			}
			cells := []string{metrics[i].name}
			for _, s := range others {
				cells = append(cells, spread(b.ratios(&metrics[i], own.name, s.name), 2))
			}
			row(cells)
		}
	}
	version, err := b.programs.Version(ctx)
	if err != nil {
		return err
	}
	var kernel unix.Utsname
	_ = unix.Uname(&kernel) // leaves it empty, should it ever fail
	load, _ := os.ReadFile("/proc/loadavg")
	p("")
	p("- %s to %s, %d rounds of turns of %s; every round begins with another subject. SPIRE %s.", b.started.UTC().Format("2006-01-02 15:04"), time.Now().UTC().Format("15:04 MST"), b.rounds, b.turn, version)
	p("- %d processors, Linux %s, %s. Each server is kept on the first processor (GOMAXPROCS=1, and the affinity of its threads), the clients are kept off it. Load average at the end: %s.",
		runtime.NumCPU(), unix.ByteSliceToString(kernel.Release[:]), runtime.Version(), strings.Join(strings.Fields(string(load))[:3], " "))
	p("- %d clients, each an attested node or agent with a connection of its own (mutual TLS over loopback) and one call at a time, for %d workloads each. Certificate requests are made before: keys and authorities are P-256.", b.clients, workloads)
	for _, s := range b.subjects {
		p("- `%s`: %s.", s.name, s.about)
	}
	return nil
}
