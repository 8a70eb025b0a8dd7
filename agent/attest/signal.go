package attest

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"strconv"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/agent/attest/procfs"
)

// SignalPod sends a signal to the processes in the containers of a pod that run a
// program, given by its path as they see it, and returns to how many. Only those
// get it that handle it, since it would end others, and of parent and child that run
// the same program only the parent, whose business its children are.
//
// Each is held on to while it is looked at, so that nobody else gets the signal who
// was given its number.
func SignalPod(ctx context.Context, uid, program string, signal unix.Signal) (sent int, err error) {
	entries, err := os.ReadDir("/proc")
	if err != nil {
		return 0, fmt.Errorf("attest: %w", err)
	}
	found := map[int]*Process{} // by number
	parents := map[int]int{}
	defer func() {
		for _, p := range found {
			p.Close()
		}
	}()
	for _, e := range entries {
		pid, err := strconv.Atoi(e.Name())
		if err != nil {
			continue
		}
		if err := ctx.Err(); err != nil {
			return 0, err
		}
		// Most processes are none of the pod's: a cheap look first.
		if exe, err := os.Readlink("/proc/" + e.Name() + "/exe"); err != nil || exe != program {
			continue
		}
		p, err := hold(pid)
		if err != nil {
			continue // it has ended
		}
		parent, ok := p.runsIn(ctx, uid, program, signal)
		if !ok {
			p.Close()
			continue
		}
		found[pid], parents[pid] = p, parent
	}
	for pid, p := range found {
		if found[parents[pid]] != nil {
			continue
		}
		if p.signal(signal) == nil {
			sent++
		}
	}
	return sent, nil
}

// hold opens a process by its number, as it is now.
func hold(pid int) (*Process, error) {
	dir, err := procfs.Process(pid)
	if err != nil {
		return nil, err
	}
	defer dir.Close()
	status, err := dir.Read("status")
	if err != nil {
		return nil, err
	}
	uid, gid, err := effectiveIDs(status)
	if err != nil {
		return nil, err
	}
	return open(&unix.Ucred{Pid: int32(pid), Uid: uid, Gid: gid}, -1)
}

// runsIn reports whether a process is in a container of a pod, runs a program and
// handles a signal, and who its parent is.
func (p *Process) runsIn(ctx context.Context, uid, program string, signal unix.Signal) (parent int, ok bool) {
	p.mu.RLock()
	defer p.mu.RUnlock()
	f := &facts{ctx: ctx, p: p}
	at, err := f.place.get(f.readPlace)
	if err != nil || at.value.cgroups.inPod(at.value.roots, uid) != nil {
		return 0, false
	}
	if exe, err := p.dir.Link("exe"); err != nil || exe != program {
		return 0, false
	}
	status, err := p.read("status")
	if err != nil {
		return 0, false
	}
	parent, caught, err := parentAndCaught(status)
	return parent, err == nil && caught&(1<<(uint(signal)-1)) != 0 && p.same() == nil && f.unmoved() == nil
}

// signal sends a signal to the process, if it is still the same.
func (p *Process) signal(signal unix.Signal) error {
	p.mu.RLock()
	defer p.mu.RUnlock()
	if err := p.same(); err != nil {
		return err
	}
	return unix.PidfdSendSignal(p.pidfd, signal, nil, 0)
}

// parentAndCaught reads the lines PPid and SigCgt of /proc/<pid>/status. The line
// with the process's own name comes first, and has its line feeds escaped.
func parentAndCaught(status []byte) (parent int, caught uint64, err error) {
	err = fmt.Errorf("status: no lines PPid and SigCgt")
	for line := range bytes.Lines(status) {
		name, value, _ := bytes.Cut(bytes.TrimSpace(line), []byte(":"))
		text := string(bytes.TrimSpace(value))
		switch string(name) {
		case "PPid":
			if parent, err = strconv.Atoi(text); err != nil {
				return 0, 0, fmt.Errorf("status: PPid: %w", err)
			}
		case "SigCgt":
			if caught, err = strconv.ParseUint(text, 16, 64); err != nil {
				return 0, 0, fmt.Errorf("status: SigCgt: %w", err)
			}
			return parent, caught, nil
		}
	}
	return 0, 0, err
}
