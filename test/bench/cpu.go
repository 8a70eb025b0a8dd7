package main

import (
	"fmt"
	"os"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"time"
)

// tick is the unit of CPU times in /proc: USER_HZ, which is 100 on every
// architecture that Go runs on.
const tick = 10 * time.Millisecond

// machineCPU is the time that all processors together have worked so far.
func machineCPU() (time.Duration, error) {
	data, err := os.ReadFile("/proc/stat")
	if err != nil {
		return 0, err
	}
	line, _, _ := strings.Cut(string(data), "\n")
	f := strings.Fields(line) // cpu user nice system idle iowait irq softirq steal ...
	if len(f) < 8 || f[0] != "cpu" {
		return 0, fmt.Errorf("/proc/stat: %q is not understood", line)
	}
	total := time.Duration(0)
	for _, i := range []int{1, 2, 3, 6, 7} {
		n, err := strconv.ParseInt(f[i], 10, 64)
		if err != nil {
			return 0, fmt.Errorf("/proc/stat: %w", err)
		}
		total += time.Duration(n) * tick
	}
	return total, nil
}

// treesCPU is the time that processes and their living descendants have worked
// so far, all together and those of them that are Envoys.
func treesCPU(roots []int) (all, envoys time.Duration, err error) {
	paths, err := filepath.Glob("/proc/[0-9]*/stat")
	if err != nil {
		return 0, 0, err
	}
	type process struct {
		parent int
		name   string
		cpu    time.Duration
	}
	found := map[int]process{}
	for _, path := range paths {
		data, err := os.ReadFile(path)
		if err != nil {
			continue // it has ended
		}
		pid, err := strconv.Atoi(filepath.Base(filepath.Dir(path)))
		if err != nil {
			return 0, 0, err
		}
		// The name, in parentheses, may hold anything.
		text := string(data)
		end := strings.LastIndexByte(text, ')')
		name := text[strings.IndexByte(text, '(')+1 : end]
		f := strings.Fields(text[end+1:])
		if len(f) < 13 {
			return 0, 0, fmt.Errorf("%s: %q is not understood", path, text)
		}
		parent, _ := strconv.Atoi(f[1])
		user, _ := strconv.ParseInt(f[11], 10, 64)
		system, _ := strconv.ParseInt(f[12], 10, 64)
		found[pid] = process{parent, name, time.Duration(user+system) * tick}
	}
	for _, pid := range roots {
		if _, ok := found[pid]; !ok {
			return 0, 0, fmt.Errorf("process %d, which is measured, has ended", pid)
		}
	}
	for pid, p := range found {
		for at := pid; at > 1; at = found[at].parent {
			if slices.Contains(roots, at) {
				all += p.cpu
				if p.name == "envoy" {
					envoys += p.cpu
				}
				break
			}
		}
	}
	return all, envoys, nil
}
