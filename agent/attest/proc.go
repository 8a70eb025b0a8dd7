package attest

import (
	"bytes"
	"errors"
	"fmt"
	"strconv"
)

// startTime reads field 22 of /proc/<pid>/stat: when the process started, in
// clock ticks after boot. The second field is the command name in
// parentheses. The process chooses it, spaces, parentheses and line feeds
// included, so fields are counted from the last closing parenthesis.
func startTime(stat []byte) (uint64, error) {
	end := bytes.LastIndexByte(stat, ')')
	if end < 0 {
		return 0, errors.New("stat: no command name in parentheses")
	}
	fields := bytes.Fields(stat[end+1:]) // the first of them is field 3
	const at = 22 - 3
	if len(fields) <= at {
		return 0, fmt.Errorf("stat: %d fields after the command name; want more than %d", len(fields), at)
	}
	t, err := strconv.ParseUint(string(fields[at]), 10, 64)
	if err != nil {
		return 0, fmt.Errorf("stat: start time: %w", err)
	}
	return t, nil
}

// pidfdPid reads the line "Pid:" of /proc/self/fdinfo/<pidfd>: the process
// that a pidfd stands for, as a number in the reader's namespace; 0 when it
// has none there, and -1 once it has been reaped.
func pidfdPid(fdinfo []byte) (int, error) {
	for line := range bytes.Lines(fdinfo) {
		if rest, ok := bytes.CutPrefix(line, []byte("Pid:")); ok {
			pid, err := strconv.Atoi(string(bytes.TrimSpace(rest)))
			if err != nil {
				return 0, fmt.Errorf("fdinfo: %w", err)
			}
			return pid, nil
		}
	}
	return 0, errors.New("fdinfo: no line Pid")
}

// effectiveIDs reads the lines "Uid:" and "Gid:" of /proc/<pid>/status, which
// have the real, effective, saved and file system ids. The command name is on
// an earlier line; the kernel escapes line feeds in it there.
func effectiveIDs(status []byte) (uid, gid uint32, err error) {
	var found int
	for line := range bytes.Lines(status) {
		name, rest, _ := bytes.Cut(line, []byte(":"))
		var to *uint32
		switch string(name) {
		case "Uid":
			to = &uid
		case "Gid":
			to = &gid
		default:
			continue
		}
		fields := bytes.Fields(rest)
		if len(fields) != 4 {
			return 0, 0, fmt.Errorf("status: %d numbers in %s; want 4", len(fields), name)
		}
		n, err := strconv.ParseUint(string(fields[1]), 10, 32)
		if err != nil {
			return 0, 0, fmt.Errorf("status: %s: %w", name, err)
		}
		*to = uint32(n)
		found++
	}
	if found != 2 {
		return 0, 0, errors.New("status: no lines Uid and Gid, or several")
	}
	return uid, gid, nil
}
