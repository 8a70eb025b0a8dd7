package main

import (
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
)

// The program runs from end to end, every subject issues, and every pod of every
// node has a certificate at the end. It asserts no timing.
func TestShortRun(t *testing.T) {
	dir := t.TempDir()
	program := filepath.Join(dir, "issuance")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-buildvcs=false", "-o", program, ".").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	document := filepath.Join(dir, "benchmarks.md")
	if err := os.WriteFile(document, []byte("above\n"+beginMark+"old"+endMark+"\nbelow\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	cmd := exec.CommandContext(t.Context(), program, "-rounds", "2", "-turn", "200ms", "-nodes", "4", "-pods", "5", "-out", document)
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatal(err)
	}
	text := string(out)
	for _, want := range []string{"| `bare` | ", "| `authority, 1 caller` | ", "| `authority, 16 callers` | ", "| `authority, 20 at once` | ", "| `node API, 16 callers` | ", "| `node API, 20 a call` | ", "20 pods had a certificate after"} {
		if !strings.Contains(text, want) {
			t.Errorf("the report has no %q:\n%s", want, text)
		}
	}
	written, err := os.ReadFile(document)
	if want := "above\n" + beginMark + "\n" + text + endMark + "\nbelow\n"; err != nil || string(written) != want {
		t.Errorf("the document is\n%s\nwant the tables between its marks (%v)", written, err)
	}
}
