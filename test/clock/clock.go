// Package clock moves the wall clock of one running program, for tests. The
// kernel has one wall clock for all programs, and a time namespace does not cover
// it. But programs, Envoy and those in Go alike, read it by functions that the
// kernel maps into each of them (the vDSO). Move puts others in their place, in
// that program only, which ask the kernel and add an offset.
//
// Move leaves the monotonic clock and with it every timer alone: a program that
// is stopped, moved ahead and continued sees what it sees after a machine was
// suspended. Stand is the reverse: a program that is stopped for a time, and whose
// timers are then behind by that, sees what it sees when its machine alone was.
// Times that the kernel writes, such as those of files, do not move.
package clock

import (
	"bytes"
	"debug/elf"
	"encoding/binary"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"
	"time"
)

// The offsets, in whole seconds, that stand before the functions that are put into a
// program.
const (
	wall = iota
	timers
	offsets // their number
)

// distance is the place of an instruction's distance to an offset, from which the
// next instruction follows.
type distance struct{ at, to int }

// What is put into a program, by the function that it replaces; see put.
var stubs = []struct {
	symbol    string
	code      []byte
	distances []distance
}{
	{"__vdso_clock_gettime", []byte{
		0xb8, 228, 0, 0, 0, // mov eax, SYS_clock_gettime
		0x0f, 0x05, // syscall
		0x85, 0xc0, // test eax, eax
		0x75, 0x26, // jne ret
		0x85, 0xff, // test edi, edi (CLOCK_REALTIME)
		0x74, 0x18, // je wall
		0x83, 0xff, 0x05, // cmp edi, CLOCK_REALTIME_COARSE
		0x74, 0x13, // je wall
		0x83, 0xff, 0x01, // cmp edi, CLOCK_MONOTONIC
		0x74, 0x05, // je timers
		0x83, 0xff, 0x06, // cmp edi, CLOCK_MONOTONIC_COARSE
		0x75, 0x13, // jne ret
		0x48, 0x8b, 0x0d, 0, 0, 0, 0, // timers: mov rcx, [timers]
		0xeb, 0x07, // jmp add
		0x48, 0x8b, 0x0d, 0, 0, 0, 0, // wall: mov rcx, [wall]
		0x48, 0x01, 0x0e, // add: add [rsi], rcx
		0xc3, // ret
	}, []distance{{33, timers}, {42, wall}}},
	{"__vdso_gettimeofday", []byte{
		0xb8, 96, 0, 0, 0, // mov eax, SYS_gettimeofday
		0x0f, 0x05, // syscall
		0x85, 0xff, // test edi, edi
		0x74, 0x0a, // je ret
		0x48, 0x8b, 0x0d, 0, 0, 0, 0, // mov rcx, [wall]
		0x48, 0x01, 0x0f, // add [rdi], rcx
		0xc3, // ret
	}, []distance{{14, wall}}},
	{"__vdso_time", []byte{
		0xb8, 201, 0, 0, 0, // mov eax, SYS_time
		0x0f, 0x05, // syscall
		0x48, 0x03, 0x05, 0, 0, 0, 0, // add rax, [wall]
		0x48, 0x85, 0xff, // test rdi, rdi
		0x74, 0x03, // je ret
		0x48, 0x89, 0x07, // mov [rdi], rax
		0xc3, // ret
	}, []distance{{10, wall}}},
}

// Move lets the wall clock of a program be off by a time, in whole seconds, from
// now on; 0 sets it right. A stopped program stays stopped, another is stopped for
// a moment.
func Move(pid int, off time.Duration) error { return set(pid, wall, off) }

// Stand lets the timers of a program be behind by a time, in whole seconds, from now
// on. The program must be stopped, and have been for as long: no clock goes back.
func Stand(pid int, still time.Duration) error { return set(pid, timers, -still) }

func set(pid, which int, off time.Duration) error {
	switch {
	case runtime.GOARCH != "amd64":
		return fmt.Errorf("clock: %s: what would be put into the program is written for amd64 only", runtime.GOARCH)
	case off%time.Second != 0:
		return fmt.Errorf("clock: %s: give whole seconds", off)
	}
	if err := put(pid, which, int64(off/time.Second)); err != nil {
		return fmt.Errorf("clock: process %d: %w", pid, err)
	}
	return nil
}

func put(pid, which int, seconds int64) error {
	start, end, err := vdso(pid)
	if err != nil {
		return err
	}
	mem, err := os.OpenFile(fmt.Sprintf("/proc/%d/mem", pid), os.O_RDWR, 0)
	if err != nil {
		return err
	}
	defer mem.Close()
	image := make([]byte, end-start)
	if _, err := mem.ReadAt(image, int64(start)); err != nil {
		return fmt.Errorf("read its vDSO: %w", err)
	}
	entries, free, err := layout(image)
	if err != nil {
		return err
	}
	offset := binary.LittleEndian.AppendUint64(nil, uint64(seconds))
	at := int64(start+free) + int64(which*len(offset))
	if image[entries[0]] == jump { // done before
		_, err := mem.WriteAt(offset, at)
		return err
	}
	tail, places := functions()
	if int(free)+len(tail) > len(image) {
		return fmt.Errorf("its vDSO has no room for %d bytes at %#x", len(tail), free)
	}
	if _, err := mem.WriteAt(tail, int64(start+free)); err != nil {
		return fmt.Errorf("write into its vDSO: %w", err)
	}
	if _, err := mem.WriteAt(offset, at); err != nil {
		return fmt.Errorf("write into its vDSO: %w", err)
	}
	return halted(pid, func(at []uint64) error {
		for _, e := range entries {
			for _, pc := range at {
				if pc > start+e && pc < start+e+jumpSize {
					return errBusy
				}
			}
		}
		for i, e := range entries {
			if _, err := mem.WriteAt(jumpTo(e, free+uint64(places[i])), int64(start+e)); err != nil {
				return fmt.Errorf("write into its vDSO: %w", err)
			}
		}
		return nil
	})
}

// errBusy says that a thread is about to run what would be overwritten.
var errBusy = errors.New("one of its threads is reading the clock each time that is looked")

const (
	jump     = 0xe9 // opcode
	jumpSize = 5
)

func jumpTo(from, to uint64) []byte {
	return binary.LittleEndian.AppendUint32([]byte{jump}, uint32(int32(int64(to)-int64(from)-jumpSize)))
}

// functions returns the offsets, which are zero, and the functions that add them,
// with where each begins.
func functions() (out []byte, places []int) {
	const size = 8
	out = append(out, make([]byte, offsets*size)...)
	for _, s := range stubs {
		code := bytes.Clone(s.code)
		for _, d := range s.distances {
			// It counts from the instruction after it.
			binary.LittleEndian.PutUint32(code[d.at:], uint32(int32(d.to*size-(len(out)+d.at+4))))
		}
		places = append(places, len(out))
		out = append(out, code...)
	}
	return out, places
}

// vdso returns where a process has its vDSO.
func vdso(pid int) (start, end uint64, err error) {
	maps, err := os.ReadFile(fmt.Sprintf("/proc/%d/maps", pid))
	if err != nil {
		return 0, 0, err
	}
	for line := range strings.Lines(string(maps)) {
		if strings.HasSuffix(line, "[vdso]\n") {
			_, err := fmt.Sscanf(line, "%x-%x ", &start, &end)
			return start, end, err
		}
	}
	return 0, 0, errors.New("it has no vDSO")
}

// layout returns where the functions to replace begin, and where the image is
// no longer used by anything.
func layout(image []byte) (entries []uint64, free uint64, err error) {
	f, err := elf.NewFile(bytes.NewReader(image))
	if err != nil {
		return nil, 0, fmt.Errorf("its vDSO: %w", err)
	}
	symbols, err := f.DynamicSymbols()
	if err != nil {
		return nil, 0, fmt.Errorf("its vDSO: %w", err)
	}
	for _, s := range stubs {
		found := false
		for _, sym := range symbols {
			if sym.Name == s.symbol {
				entries, found = append(entries, sym.Value), true
			}
		}
		if !found {
			return nil, 0, fmt.Errorf("its vDSO has no %s", s.symbol)
		}
	}
	// What is loaded by the program headers ends before the mapping does; the
	// table of section headers behind it is read by nobody who runs.
	for _, p := range f.Progs {
		if p.Type == elf.PT_LOAD {
			free = max(free, p.Vaddr+p.Memsz)
		}
	}
	return entries, (free + 15) &^ 15, nil
}

// halted calls do with the places at which the threads of a process are, while
// they are stopped, and again after a moment as long as it says errBusy.
func halted(pid int, do func(at []uint64) error) error {
	for range 100 {
		state, err := stateOf(pid, pid)
		if err != nil {
			return err
		}
		if state != 'T' {
			if err := syscall.Kill(pid, syscall.SIGSTOP); err != nil {
				return err
			}
		}
		at, err := places(pid)
		if err == nil {
			err = do(at)
		}
		if state != 'T' {
			err = errors.Join(err, syscall.Kill(pid, syscall.SIGCONT))
		}
		if !errors.Is(err, errBusy) {
			return err
		}
		time.Sleep(10 * time.Millisecond)
	}
	return errBusy
}

// places waits until every thread is stopped and returns where.
func places(pid int) ([]uint64, error) {
	for deadline := time.Now().Add(10 * time.Second); time.Now().Before(deadline); time.Sleep(time.Millisecond) {
		tasks, err := filepath.Glob(fmt.Sprintf("/proc/%d/task/*", pid))
		if err != nil || len(tasks) == 0 {
			return nil, errors.Join(err, errors.New("it has no threads"))
		}
		var at []uint64
		for _, task := range tasks {
			tid, err := strconv.Atoi(filepath.Base(task))
			if err != nil {
				return nil, err
			}
			if state, err := stateOf(pid, tid); err != nil || state != 'T' {
				break
			}
			text, err := os.ReadFile(filepath.Join(task, "syscall"))
			fields := strings.Fields(string(text))
			if err != nil || len(fields) < 3 {
				break // "running": not stopped yet
			}
			pc, err := strconv.ParseUint(strings.TrimPrefix(fields[len(fields)-1], "0x"), 16, 64)
			if err != nil {
				return nil, err
			}
			at = append(at, pc)
		}
		if len(at) == len(tasks) {
			return at, nil
		}
	}
	return nil, errors.New("its threads do not stop")
}

// stateOf is the state of a thread, as /proc has it.
func stateOf(pid, tid int) (byte, error) {
	stat, err := os.ReadFile(fmt.Sprintf("/proc/%d/task/%d/stat", pid, tid))
	if err != nil {
		return 0, err
	}
	_, after, ok := strings.Cut(string(stat[max(0, bytes.LastIndexByte(stat, ')')):]), ") ")
	if !ok || after == "" {
		return 0, fmt.Errorf("its state reads %q", stat)
	}
	return after[0], nil
}
