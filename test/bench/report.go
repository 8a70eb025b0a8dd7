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

	"golang.org/x/sys/unix"
)

// metric is one row of the tables.
type metric struct {
	name string
	unit string
	// of reads it from a subject's turn; raw is the turn of raw TCP in the
	// same round.
	of func(s, raw *sample) float64
	// digits after the point.
	digits int
	// noRaw: there is nothing of it in raw TCP.
	noRaw bool
	// meshOnly: only this mesh has it.
	meshOnly bool
}

func latencyCPU(f func(*measured) float64) func(s, _ *sample) float64 {
	return func(s, _ *sample) float64 { return f(&s.latency) / float64(s.latency.Count) * 1e6 }
}

func rateCPU(f func(*measured) float64) func(s, _ *sample) float64 {
	return func(s, _ *sample) float64 { return f(&s.rate) / float64(s.rate.Count) * 1e6 }
}

func byProxies(m *measured) float64 { return m.proxies }
func byHelpers(m *measured) float64 { return m.helpers }
func byMachine(m *measured) float64 { return m.machine }

var metrics = []metric{
	{name: "latency p50", unit: "µs", of: func(s, _ *sample) float64 { return s.latency.P50 * 1e6 }},
	{name: "latency p99", unit: "µs", of: func(s, _ *sample) float64 { return s.latency.P99 * 1e6 }},
	{name: "added latency p50", unit: "µs", noRaw: true, of: func(s, raw *sample) float64 { return (s.latency.P50 - raw.latency.P50) * 1e6 }},
	{name: "added latency p99", unit: "µs", noRaw: true, of: func(s, raw *sample) float64 { return (s.latency.P99 - raw.latency.P99) * 1e6 }},
	{name: "new connections", unit: "/s", of: func(s, _ *sample) float64 { return s.rate.rate() }},
	{name: "bulk, client to server", unit: "Gbit/s", digits: 2, of: func(s, _ *sample) float64 { return s.upload.rate() * 8 / 1e9 }},
	{name: "bulk, server to client", unit: "Gbit/s", digits: 2, of: func(s, _ *sample) float64 { return s.download.rate() * 8 / 1e9 }},
	{name: "CPU per 1,000 requests, proxies", unit: "ms", noRaw: true, of: latencyCPU(byProxies)},
	{name: "CPU per 1,000 requests, machine", unit: "ms", of: latencyCPU(byMachine)},
	{name: "CPU per 1,000 connections, proxies", unit: "ms", noRaw: true, of: rateCPU(byProxies)},
	{name: "of which agent and control plane", unit: "ms", meshOnly: true, of: rateCPU(byHelpers)},
	{name: "CPU per 1,000 connections, machine", unit: "ms", of: rateCPU(byMachine)},
	{name: "CPU per GB to the server, machine", unit: "ms", of: func(s, _ *sample) float64 { return s.upload.machine / float64(s.upload.Count) * 1e12 }},
}

// median of values, which it sorts; the lowest and the highest with it.
func median(v []float64) (mid, low, high float64) {
	slices.Sort(v)
	n := len(v)
	mid = v[n/2]
	if n%2 == 0 {
		mid = (v[n/2-1] + v[n/2]) / 2
	}
	return mid, v[0], v[n-1]
}

// values of a metric in all rounds.
func (b *bench) values(m *metric, subject string) []float64 {
	var out []float64
	for _, round := range b.results {
		out = append(out, m.of(round[subject], round[nameRaw]))
	}
	return out
}

// ratios of a metric between two subjects: of the same round, since the
// machine is not the same from one to the next.
func (b *bench) ratios(m *metric, subject, to string) []float64 {
	a, c := b.values(m, subject), b.values(m, to)
	for i := range a {
		a[i] /= c[i]
	}
	return a
}

func (b *bench) subject(name string) *subject {
	for _, s := range b.subjects {
		if s.name == name {
			return s
		}
	}
	return nil
}

// report writes the tables and how they came about, in Markdown.
func (b *bench) report(ctx context.Context, w io.Writer) {
	p := func(format string, args ...any) { _, _ = fmt.Fprintf(w, format+"\n", args...) }
	p("\n### Absolute numbers\n")
	p("Median of %d rounds (lowest–highest).\n", b.rounds)
	b.absolute(p)
	p("\n### Ratios\n")
	p("Each is taken within a round; median of %d (lowest–highest). For rates more is better, for the rest less.\n", b.rounds)
	for _, name := range []string{nameMesh, nameNoAudit, nameAgainst} {
		if b.subject(name) != nil {
			b.relative(p, name)
		}
	}
	p("\n### How it was run\n")
	b.circumstances(ctx, p)
}

func row(p func(string, ...any), cells ...string) { p("| %s |", strings.Join(cells, " | ")) }

func head(p func(string, ...any), cells ...string) {
	row(p, cells...)
	p("|%s", strings.Repeat(" --- |", len(cells)))
}

func (b *bench) absolute(p func(string, ...any)) {
	cells := []string{""}
	for _, s := range b.subjects {
		cells = append(cells, s.name)
	}
	head(p, cells...)
	for i := range metrics {
		m := &metrics[i]
		cells := []string{m.name + ", " + m.unit}
		for _, s := range b.subjects {
			if m.noRaw && s.name == nameRaw || m.meshOnly && !s.isMesh() {
				cells = append(cells, "")
				continue
			}
			cells = append(cells, spread(b.values(m, s.name), m.digits))
		}
		row(p, cells...)
	}
	cells = []string{"CPU without load, ms per second"}
	for _, s := range b.subjects {
		cells = append(cells, number(b.idle[s.name]*1000, 0))
	}
	row(p, cells...)
	cells = []string{"failed requests and connections"}
	for _, s := range b.subjects {
		n := int64(0)
		for _, round := range b.results {
			n += round[s.name].failures()
		}
		cells = append(cells, strconv.FormatInt(n, 10))
	}
	row(p, cells...)
}

func (b *bench) relative(p func(string, ...any), name string) {
	var others []string
	for _, s := range b.subjects {
		if s.name != name && (s.name != nameNoAudit || name == nameMesh) && s.name != nameAgainst && (s.name != nameMesh || name == nameAgainst) {
			others = append(others, s.name)
		}
	}
	p("")
	cells := []string{name + " to"}
	head(p, append(cells, others...)...)
	for i := range metrics {
		m := &metrics[i]
		if m.meshOnly {
			continue
		}
		cells := []string{m.name}
		for _, other := range others {
			if m.noRaw && other == nameRaw {
				cells = append(cells, "")
				continue
			}
			cells = append(cells, spread(b.ratios(m, name, other), 2))
		}
		row(p, cells...)
	}
}

func spread(v []float64, digits int) string {
	mid, low, high := median(v)
	if len(v) == 1 {
		return number(mid, digits)
	}
	return fmt.Sprintf("%s (%s–%s)", number(mid, digits), number(low, digits), number(high, digits))
}

func number(v float64, digits int) string { return strconv.FormatFloat(v, 'f', digits, 64) }

func (b *bench) circumstances(ctx context.Context, p func(string, ...any)) {
	var kernel unix.Utsname
	_ = unix.Uname(&kernel) // leaves it empty, should it ever fail
	p("- %s to %s, %d rounds; every round gives each subject its turn and begins with another one.", b.started.UTC().Format("2006-01-02 15:04"), b.ended.UTC().Format("15:04 MST"), b.rounds)
	p("- %d processors (%s), Linux %s, %s.", runtime.NumCPU(), cpuModel(), unix.ByteSliceToString(kernel.Release[:]), runtime.Version())
	p("- Envoy %s.", part(firstLine(ctx, b.envoy, "--version"), "version: ", ""))
	if b.ztunnel != "" {
		text := firstLine(ctx, b.ztunnel, "version")
		p("- ztunnel %s, %s build.", part(text, `Version:"`, `"`), part(text, `BuildProfile:"`, `"`))
	}
	p("- All subjects run for the whole time, client and server each in a network namespace on one bridge; load generators and proxies share the processors.")
	p("- Latency: %d requests/s of %d bytes, answered with as many, over %d kept connections for %s, at fixed instants (open loop), counted from the intended instant.", latencyRPS, requestSize, latencyConns, b.plan.latency)
	p("- New connections: connect, a byte each way, close, %d at a time, for %s (at most %d). Bulk: one stream for %s.", rateConns, b.plan.rate, rateLimit, b.plan.bulk)
	p("- CPU: user and system time from /proc; “proxies” is the subject's own processes (for the mesh Envoy, agent, control plane and supervisor), “machine” is everything that ran, load generators included.")
	for _, s := range b.subjects {
		p("- `%s`: %s.", s.name, s.about)
	}
	p("- Noise: a load during which others used more than %.0f %% of the processors was repeated, while the patience for that lasted. Of %d loads, %d were thrown away and %d were kept although they were disturbed. Before the rounds, others used %.0f %%; load average at the end: %s.",
		quiet*100, b.loads, b.repeated, b.disturbed, b.noise*100, loadAverage())
}

// part is what stands in text between two marks; all of it if they are not
// there. No second mark means up to the end.
func part(text, from, to string) string {
	_, rest, ok := strings.Cut(text, from)
	if !ok {
		return text
	}
	if to == "" {
		return rest
	}
	found, _, _ := strings.Cut(rest, to)
	return found
}

func cpuModel() string {
	data, _ := os.ReadFile("/proc/cpuinfo")
	for line := range strings.Lines(string(data)) {
		if key, value, ok := strings.Cut(line, ":"); ok && strings.TrimSpace(key) == "model name" {
			return strings.TrimSpace(value)
		}
	}
	return runtime.GOARCH
}

func loadAverage() string {
	data, _ := os.ReadFile("/proc/loadavg")
	f := strings.Fields(string(data))
	return strings.Join(f[:min(3, len(f))], " ")
}
