package deploy

import (
	"bytes"
	"context"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"
)

// Defends an installation from programs that end at once because they are
// called in words that they do not know.
func TestProgramsKnowTheirFlags(t *testing.T) {
	dir := t.TempDir()
	r := render(t, "certManager.enabled=true", "certManager.issuerRef.name=company", "certManager.roots=PEM", "certManager.mode=per-workload", "certManager.workloadIssuerRef.name=leaves")
	for owner, pod := range r.pods() {
		for _, c := range pod.Containers {
			name := owner
			if len(c.Command) > 0 {
				name = filepath.Base(c.Command[0])
			}
			program := filepath.Join(dir, name)
			build := exec.CommandContext(t.Context(), "go", "build", "-o", program, "../cmd/"+name)
			if out, err := build.CombinedOutput(); err != nil {
				t.Errorf("%s: %v\n%s", name, err, out)
				continue
			}
			calls := [][]string{c.Args}
			if p := c.ReadinessProbe; p != nil && p.Exec != nil {
				if filepath.Base(p.Exec.Command[0]) != name {
					t.Errorf("%s/%s: the probe runs %q", owner, c.Name, p.Exec.Command)
				}
				calls = append(calls, p.Exec.Command[1:])
			}
			for _, call := range calls {
				// Values are of the flags' kinds: $(NODE_NAME) is a string like any.
				// -h after the last flag ends the parsing, and the program.
				// A program that takes the call for another one and starts finds nothing.
				ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second)
				cmd := exec.CommandContext(ctx, program, append(slices.Clone(call), "-h")...)
				cmd.Env = []string{}
				out, _ := cmd.CombinedOutput()
				cancel()
				if bytes.Contains(out, []byte("not defined")) || bytes.Contains(out, []byte("invalid value")) || !bytes.Contains(out, []byte("Usage")) {
					first, _, _ := strings.Cut(string(out), "\n")
					t.Errorf("%s/%s: %s %q: %s", owner, c.Name, name, call, first)
				}
			}
		}
	}
}
