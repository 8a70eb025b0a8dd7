package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

// enter runs a program in all namespaces of the process with a number, if it
// still is the one that started then. The program ends with this one.
func enter(number, start string, argv []string) (code int, err error) {
	pid, err := strconv.Atoi(number)
	if err != nil {
		return 0, err
	}
	// The namespaces are of one thread, which the program then comes from.
	runtime.LockOSThread()
	flags := map[string]int{"net": unix.CLONE_NEWNET, "uts": unix.CLONE_NEWUTS, "ipc": unix.CLONE_NEWIPC,
		"cgroup": unix.CLONE_NEWCGROUP, "pid": unix.CLONE_NEWPID}
	files := map[string]*os.File{}
	for _, kind := range []string{"net", "uts", "ipc", "cgroup", "pid", "mnt"} {
		f, err := os.Open(fmt.Sprintf("/proc/%d/ns/%s", pid, kind))
		if err != nil {
			return 0, fmt.Errorf("the machine is off: %w", err)
		}
		defer f.Close()
		files[kind] = f
	}
	exe, err := os.Open("/proc/self/exe")
	if err != nil {
		return 0, err
	}
	defer exe.Close()
	files["exe"] = exe
	if p, err := spec.Find("/proc", pid); err != nil || strconv.FormatUint(p.Start, 10) != start {
		return 0, errors.New("the machine is off")
	}
	if err := joinLike(pid); err != nil {
		return 0, err
	}
	for kind, flag := range flags {
		if err := unix.Setns(int(files[kind].Fd()), flag); err != nil {
			return 0, fmt.Errorf("enter %s namespace: %w", kind, err)
		}
	}
	// Root and working directory of the thread must not be shared for the last.
	if err := unix.Unshare(unix.CLONE_FS); err != nil {
		return 0, err
	}
	if err := unix.Setns(int(files["mnt"].Fd()), unix.CLONE_NEWNS); err != nil {
		return 0, fmt.Errorf("enter mnt namespace: %w", err)
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT)
	// The program ends with this one, which it has to ask for from within: see
	// become. Its first stage is this file, which is not in the machine.
	cmd := exec.Command("/proc/self/fd/3", append([]string{"become"}, argv...)...)
	cmd.ExtraFiles = []*os.File{files["exe"]}
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.Env = environment()
	if term := os.Getenv("TERM"); term != "" {
		cmd.Env = append(cmd.Env, "TERM="+term)
	}
	cmd.Dir = "/"
	if err := cmd.Start(); err != nil {
		return 0, err
	}
	go func() { // ends with this process
		for s := range signals {
			_ = cmd.Process.Signal(s)
		}
	}()
	err = cmd.Wait()
	var exit *exec.ExitError
	if !errors.As(err, &exit) {
		return 0, err
	}
	if ws := exit.Sys().(syscall.WaitStatus); ws.Signaled() {
		return 128 + int(ws.Signal()), nil
	}
	return exit.ExitCode(), nil
}

// become turns this process, already in the machine, into a program that is
// killed when its parent, which is outside, ends. (SysProcAttr.Pdeathsig takes
// a parent without a number for one that has ended.)
func become(argv []string) error {
	runtime.LockOSThread() // it is a property of the thread
	if err := unix.Prctl(unix.PR_SET_PDEATHSIG, uintptr(unix.SIGKILL), 0, 0, 0); err != nil {
		return err
	}
	unix.CloseOnExec(3)
	program, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	return syscall.Exec(program, argv, os.Environ())
}

// joinLike moves this process to the cgroups of another.
func joinLike(pid int) error {
	all, err := hierarchies()
	if err != nil {
		return err
	}
	b, err := os.ReadFile(fmt.Sprintf("/proc/%d/cgroup", pid))
	if err != nil {
		return err
	}
	for _, line := range strings.Split(strings.TrimSpace(string(b)), "\n") {
		fields := strings.SplitN(line, ":", 3) // number, controllers or name, path
		for _, h := range all {
			if len(fields) != 3 || !h.is(fields[1]) {
				continue
			}
			if err := h.enter(fields[2], os.Getpid()); err != nil {
				return fmt.Errorf("join %s: %w", filepath.Join(h.dir, fields[2]), err)
			}
		}
	}
	return nil
}

// is reports whether /proc/PID/cgroup calls the hierarchy by that name.
func (h hierarchy) is(name string) bool {
	if h.fstype == "cgroup2" {
		return name == ""
	}
	if name == "" {
		return false
	}
	for _, n := range strings.Split(name, ",") {
		if !strings.Contains(","+h.data+",", ","+n+",") {
			return false
		}
	}
	return true
}

// enterNet becomes a program in the network namespace of a process.
func enterNet(number string, argv []string) error {
	runtime.LockOSThread()
	f, err := os.Open("/proc/" + number + "/ns/net")
	if err != nil {
		return err
	}
	if err := unix.Setns(int(f.Fd()), unix.CLONE_NEWNET); err != nil {
		return err
	}
	program, err := exec.LookPath(argv[0])
	if err != nil {
		return err
	}
	return syscall.Exec(program, argv, os.Environ())
}
