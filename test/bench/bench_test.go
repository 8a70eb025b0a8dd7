package main

import (
	"bytes"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/test/harness"
)

// TestShortRun: the program runs from end to end and every request and
// connection is answered. It asserts no timing. The ordinary tests run it on
// raw TCP alone, which is the load generators; the long ones on every subject
// that is there.
func TestShortRun(t *testing.T) {
	program := filepath.Join(t.TempDir(), "bench")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	document := filepath.Join(t.TempDir(), "benchmarks.md")
	if err := os.WriteFile(document, []byte("above\n"+beginMark+"old"+endMark+"\nbelow\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	args := []string{"-short", "-out", document}
	if os.Getenv("SIGNET_TEST_LONG") != "1" {
		args = append(args, "-only", nameRaw)
	}
	cmd := exec.CommandContext(t.Context(), program, args...)
	cmd.Env = append(os.Environ(), "SIGNET_ENVOY="+harness.Envoy(t))
	var stderr bytes.Buffer
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	t.Logf("%s%s", stderr.String(), out)
	if err != nil {
		t.Fatal(err)
	}
	written, err := os.ReadFile(document)
	if err != nil {
		t.Fatal(err)
	}
	if want := "above\n" + beginMark + "\n" + string(out) + endMark + "\nbelow\n"; string(written) != want {
		t.Errorf("the document is\n%s\nwant the tables between its marks", written)
	}
	for line := range strings.Lines(string(out)) {
		if cells := strings.Split(strings.TrimSpace(line), "|"); strings.HasPrefix(line, "| failed") {
			for _, cell := range cells[2 : len(cells)-1] {
				if strings.TrimSpace(cell) != "0" {
					t.Errorf("failures: %s", line)
				}
			}
		}
	}
}

// TestReport: medians are over rounds, and ratios are taken within a round. A
// ratio of two medians would mix rounds in which the machine differed.
func TestReport(t *testing.T) {
	turn := func(p50 float64, conns int64) *sample {
		var s sample
		for _, m := range []*measured{&s.latency, &s.rate, &s.upload, &s.download} {
			m.P50, m.P99, m.Count, m.Seconds, m.proxies, m.machine = p50, 2*p50, conns, 1, 0.1, 0.2
		}
		return &s
	}
	b := &bench{subjects: []*subject{{name: nameRaw}, {name: nameMesh}}}
	b.rounds = 3
	for _, r := range [][2]float64{{100e-6, 300e-6}, {200e-6, 400e-6}, {400e-6, 2000e-6}} {
		b.results = append(b.results, map[string]*sample{nameRaw: turn(r[0], 1000), nameMesh: turn(r[1], 500)})
	}
	var out bytes.Buffer
	b.report(t.Context(), &out)
	for _, want := range []string{
		"| latency p50, µs | 200 (100–400) | 400 (300–2000) |",
		"| added latency p50, µs |  | 200 (200–1600) |",
		"| latency p50 | 3.00 (2.00–5.00) |",
		"| new connections | 0.50 (0.50–0.50) |",
		"| added latency p50 |  |",
	} {
		if !strings.Contains(out.String(), want+"\n") {
			t.Errorf("no row %q in\n%s", want, out.String())
		}
	}
}

// TestTreesCPU: the time of a process includes its descendants'; otherwise
// only the supervisor of a mesh would be measured, which does nothing.
func TestTreesCPU(t *testing.T) {
	cmd := exec.Command("sh", "-c", "sh -c 'while :; do :; done'; :")
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	defer func() {
		_ = syscall.Kill(-cmd.Process.Pid, syscall.SIGKILL) // the child too
		_ = cmd.Wait()
	}()
	deadline := time.Now().Add(30 * time.Second)
	for {
		d, _, err := treesCPU([]int{cmd.Process.Pid})
		if err != nil {
			t.Fatal(err)
		}
		if d >= 5*tick {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("a busy child process used %s, by this reckoning", d)
		}
		time.Sleep(20 * time.Millisecond)
	}
}
