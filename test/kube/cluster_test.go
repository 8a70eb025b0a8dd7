package kube

import (
	"bytes"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/test/cluster"
)

// left is all that a cluster in a folder could leave on the machine: mounts,
// links, control groups of a name, and processes that name the folder.
func left(t *testing.T, dir, cgroup string) []string {
	t.Helper()
	var all []string
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if strings.Contains(line, dir) {
			all = append(all, "mount "+strings.TrimSpace(line))
		}
	}
	links, err := exec.CommandContext(t.Context(), "ip", "-o", "link").Output()
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(links)) {
		if fields := strings.Fields(line); len(fields) > 1 {
			all = append(all, "link "+strings.TrimSuffix(fields[1], ":"))
		}
	}
	found, err := filepath.Glob("/sys/fs/cgroup/*/" + cgroup)
	more, merr := filepath.Glob("/sys/fs/cgroup/" + cgroup)
	if err != nil || merr != nil {
		t.Fatal(err, merr)
	}
	for _, path := range append(found, more...) {
		all = append(all, "cgroup "+path)
	}
	lines, err := filepath.Glob("/proc/[0-9]*/cmdline")
	if err != nil {
		t.Fatal(err)
	}
	for _, path := range lines {
		if argv, err := os.ReadFile(path); err == nil && bytes.Contains(argv, []byte(dir)) {
			all = append(all, fmt.Sprintf("process %s %q", path, argv))
		}
	}
	if _, err := os.Stat(dir); err == nil {
		all = append(all, "folder "+dir)
	}
	slices.Sort(all)
	return all
}

// What make cluster makes, make cluster-down removes, another cluster beside it
// is left alone, and a second start takes no time to speak of.
func TestClusterLeavesNothing(t *testing.T) {
	b := open(t)
	dir, err := filepath.Abs(project + "/.cache/cluster-left")
	if err != nil {
		t.Fatal(err)
	}
	if err := cluster.Down(t.Context(), dir, nil); err != nil { // of a test that was killed
		t.Fatal(err)
	}
	before := left(t, dir, "none")
	cgroup := ""
	for range 2 {
		began := time.Now()
		c, err := cluster.Start(t.Context(), cluster.Options{Dir: dir, Log: t.Output()})
		if err != nil {
			t.Fatal(err)
		}
		t.Logf("two nodes and DNS were up after %.1f s", time.Since(began).Seconds())
		var machine struct{ Cgroup string }
		if text, err := os.ReadFile(filepath.Join(dir, "node1", "machine.json")); err != nil {
			t.Fatal(err)
		} else if err := json.Unmarshal(text, &machine); err != nil {
			t.Fatal(err)
		}
		cgroup, _, _ = strings.Cut(machine.Cgroup, "/")
		if len(left(t, dir, cgroup)) <= len(before) {
			t.Error("a running cluster is not seen")
		}
		if err := c.Down(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	if after := left(t, dir, cgroup); !slices.Equal(before, after) {
		t.Errorf("left:\n%s\nbefore:\n%s", strings.Join(after, "\n"), strings.Join(before, "\n"))
	}
	b.ready()
}
