// Package spec is what the library and the first process of a machine say to
// each other: JSON files in the machine's folder.
package spec

import (
	"encoding/json"
	"fmt"
	"os"
	"strconv"
	"strings"
)

// Files in a machine's folder.
const (
	MachineFile  = "machine.json"  // a Machine, written before the first boot
	RecordFile   = "init.json"     // a Record, written by the first process
	ServicesFile = "services.json" // a Services, read by the first process on SIGHUP
	StatusFile   = "status.json"   // a Status, written by the first process
	LogDir       = "logs"
	DiskDir      = "disk"
)

// Path is the PATH inside of a machine.
const Path = "/opt/kubernetes/bin:/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"

// Machine says what a machine is made of.
type Machine struct {
	Name string
	// Cgroup is the machine's cgroup, relative to the root of each hierarchy.
	Cgroup string
	// Binds are folders of the real machine that are mounted read-only: place
	// in the machine to folder.
	Binds map[string]string
	// Forward is where connections to the listening socket that the machine
	// was booted with go; empty: there is none.
	Forward string
}

// Record names the first process of a machine that is on.
type Record struct {
	Process
	// BootID is new at each boot; the machine has it as its kernel's.
	BootID string
}

// Services are the programs that a machine keeps running.
type Services struct {
	Generation int
	Services   []Service
}

// Service is one of them.
type Service struct {
	Name string
	Argv []string
}

// Status says what runs.
type Status struct {
	Generation int  // of the Services last read
	Settled    bool // all of them were started, and all others have ended
	Pids       map[string]int
}

// Process is a process that can be told from a later one with the same number.
type Process struct {
	Pid    int
	Start  uint64 // clock ticks since the kernel's boot
	Kernel string // the kernel's boot ID
}

// Find returns the process with a number; proc is where procfs is mounted.
func Find(proc string, pid int) (Process, error) {
	b, err := os.ReadFile(fmt.Sprintf("%s/%d/stat", proc, pid))
	if err != nil {
		return Process{}, err
	}
	// The name, in parentheses, may hold anything.
	s := string(b)
	fields := strings.Fields(s[strings.LastIndexByte(s, ')')+1:])
	const startTime = 22 - 3 // field 22, of which the first here is field 3
	if len(fields) <= startTime {
		return Process{}, fmt.Errorf("%s/%d/stat: %d fields", proc, pid, len(fields))
	}
	if fields[0] == "Z" || fields[0] == "X" {
		// It has ended, and only its parent has not asked yet how.
		return Process{}, os.ErrProcessDone
	}
	start, err := strconv.ParseUint(fields[startTime], 10, 64)
	if err != nil {
		return Process{}, err
	}
	kernel, err := os.ReadFile(proc + "/sys/kernel/random/boot_id")
	if err != nil {
		return Process{}, err
	}
	return Process{Pid: pid, Start: start, Kernel: strings.TrimSpace(string(kernel))}, nil
}

// Write replaces a file by v as JSON, so that a reader sees the old or the new
// one; dir is where the file is.
func Write(dir *os.Root, name string, v any) error {
	b, err := json.MarshalIndent(v, "", "  ")
	if err != nil {
		return err
	}
	if err := dir.WriteFile(name+".new", append(b, '\n'), 0o600); err != nil {
		return err
	}
	return dir.Rename(name+".new", name)
}

// Read is the reverse of Write.
func Read(dir *os.Root, name string, v any) error {
	b, err := dir.ReadFile(name)
	if err != nil {
		return err
	}
	if err := json.Unmarshal(b, v); err != nil {
		return fmt.Errorf("%s: %w", name, err)
	}
	return nil
}
