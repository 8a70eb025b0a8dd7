package lab

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"os/signal"
	"runtime"
	"strings"
	"syscall"
	"testing"

	"github.com/vishvananda/netlink"
	"golang.org/x/sys/unix"
)

// stageVar carries the stage of the re-executed program. Its value is
// stageInit in the first process of the namespaces, and "in:" with the name
// of the mount namespace in the program that runs inside them. Naming the
// namespace keeps an inherited variable from passing for isolation.
const (
	stageVar  = "SIGNET_LAB_STAGE"
	stageInit = "init"
	stageIn   = "in:"
)

// forwarded are the signals that an outer process hands to the inner one.
var forwarded = []os.Signal{
	syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP, syscall.SIGQUIT, syscall.SIGUSR1, syscall.SIGUSR2,
}

// Main runs the tests of a package in namespaces of their own and exits with
// their code. It is the whole body of a TestMain:
//
//	func TestMain(m *testing.M) { lab.Main(m) }
func Main(m *testing.M) {
	if _, err := Isolate(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	os.Exit(m.Run())
}

// Isolate moves the program into a network, mount and process-id namespace of
// its own. Where the caller may not make those, it also makes a user
// namespace in which the caller is root. It returns true inside. Outside it
// runs the program again, with the same arguments, environment and standard
// files, forwards signals to it, and exits with its code (128 plus the signal
// number if a signal ended it); it returns there only with an error, when the
// namespaces could not be made. Call it first: everything before it runs more
// than once.
//
// Inside, mounts are private, /run is an empty tmpfs, /proc is that of the
// new namespace and loopback is up. When the program ends, or is killed, or
// the outer process is killed, the kernel ends every process started inside,
// detached ones too, and with the last of them go all links, rules, mounts
// and namespaces. The program is in a process group of its own, so it cannot
// read from a terminal.
func Isolate() (isolated bool, err error) {
	switch stage := os.Getenv(stageVar); {
	case stage == stageInit:
		code, err := runInit()
		if err != nil {
			fmt.Fprintln(os.Stderr, "lab: in the new namespaces:", err)
			syscall.Exit(1)
		}
		syscall.Exit(code)
	case inside():
		return true, nil
	}
	code, err := runOuter()
	if err != nil {
		return false, err
	}
	// Not os.Exit, here and above: its hooks (coverage files, a second's wait
	// of the race detector) are for the inner program alone.
	syscall.Exit(code)
	panic("unreachable")
}

// inside reports whether this process runs in namespaces that Isolate made.
func inside() bool {
	name, ok := strings.CutPrefix(os.Getenv(stageVar), stageIn)
	if !ok {
		return false
	}
	mnt, err := os.Readlink("/proc/self/ns/mnt")
	return err == nil && mnt == name
}

// runOuter starts the first process of the namespaces and waits for it.
func runOuter() (code int, err error) {
	// Pdeathsig fires when the starting thread ends, so it must be this one.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	defer signal.Stop(signals)

	cmd, err := startInit(os.Geteuid() != 0)
	if errors.Is(err, os.ErrPermission) && os.Geteuid() == 0 {
		// Root without CAP_SYS_ADMIN, as in a container.
		cmd, err = startInit(true)
	}
	if err != nil {
		return 0, refused(err)
	}
	stop, stopped := make(chan struct{}), make(chan struct{})
	go func() {
		defer close(stopped)
		for {
			select {
			case s := <-signals:
				_ = cmd.Process.Signal(s) // it may be gone already
			case <-stop:
				return
			}
		}
	}()
	err = cmd.Wait()
	close(stop)
	<-stopped
	var exit *exec.ExitError
	if err != nil && !errors.As(err, &exit) {
		return 0, fmt.Errorf("lab: waiting for the isolated program: %w", err)
	}
	return exitCode(cmd.ProcessState.Sys().(syscall.WaitStatus)), nil
}

func startInit(userNS bool) (*exec.Cmd, error) {
	cmd := exec.Command("/proc/self/exe")
	cmd.Args = os.Args
	cmd.Env = append(os.Environ(), stageVar+"="+stageInit)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS | syscall.CLONE_NEWPID,
		Pdeathsig:  syscall.SIGKILL,
		Setpgid:    true, // a terminal's Ctrl-C must arrive once: forwarded
	}
	if userNS {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	return cmd, cmd.Start()
}

// refused explains why the kernel would not make the namespaces.
func refused(err error) error {
	for _, s := range []struct{ path, bad, fix string }{
		{"/proc/sys/kernel/unprivileged_userns_clone", "0", "sysctl kernel.unprivileged_userns_clone=1"},
		{"/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "sysctl kernel.apparmor_restrict_unprivileged_userns=0"},
		{"/proc/sys/user/max_user_namespaces", "0", "sysctl user.max_user_namespaces=10000"},
		{"/proc/sys/user/max_net_namespaces", "0", "sysctl user.max_net_namespaces=10000"},
	} {
		if b, rerr := os.ReadFile(s.path); rerr == nil && strings.TrimSpace(string(b)) == s.bad {
			return fmt.Errorf("lab: the kernel refused new namespaces (%w) because %s is %s: run as root, or: %s", err, s.path, s.bad, s.fix)
		}
	}
	return fmt.Errorf("lab: the kernel refused new namespaces: %w: run as root, or where user namespaces are allowed (a container's seccomp profile may forbid them)", err)
}

// runInit prepares the namespaces, runs the program in them and reaps every
// orphan until the program ends. It is process 1: when it exits, the kernel
// kills everything that is left.
func runInit() (code int, err error) {
	if os.Getpid() != 1 {
		return 0, fmt.Errorf("%s=%s is set outside of new namespaces: unset it", stageVar, stageInit)
	}
	signals := make(chan os.Signal, 16)
	signal.Notify(signals, forwarded...)
	if err := prepare(); err != nil {
		return 0, err
	}
	mnt, err := os.Readlink("/proc/self/ns/mnt")
	if err != nil {
		return 0, err
	}
	if err := os.Setenv(stageVar, stageIn+mnt); err != nil {
		return 0, err
	}
	// Not os/exec: its Wait would compete with the reaping below.
	pid, err := syscall.ForkExec("/proc/self/exe", os.Args, &syscall.ProcAttr{Env: os.Environ(), Files: []uintptr{0, 1, 2}})
	if err != nil {
		return 0, fmt.Errorf("start the program: %w", err)
	}
	go func() { // ends with this process
		for s := range signals {
			_ = syscall.Kill(pid, s.(syscall.Signal))
		}
	}()
	for {
		var ws syscall.WaitStatus
		got, err := syscall.Wait4(-1, &ws, 0, nil)
		switch {
		case err == syscall.EINTR:
		case err != nil:
			return 0, fmt.Errorf("wait: %w", err)
		case got == pid:
			return exitCode(ws), nil
		}
	}
}

// prepare sets up the mounts and loopback of the new namespaces.
func prepare() error {
	if err := unix.Mount("", "/", "", unix.MS_REC|unix.MS_PRIVATE, ""); err != nil {
		return fmt.Errorf("make mounts private: %w", err)
	}
	const safe = unix.MS_NOSUID | unix.MS_NODEV | unix.MS_NOEXEC
	if err := unix.Mount("proc", "/proc", "proc", safe, ""); err != nil {
		return fmt.Errorf("mount /proc: %w (a container that hides parts of /proc forbids it: run it with an unmasked /proc, or outside)", err)
	}
	if err := unix.Mount("tmpfs", "/run", "tmpfs", unix.MS_NOSUID|unix.MS_NODEV, "mode=0755"); err != nil {
		return fmt.Errorf("mount a tmpfs on /run: %w", err)
	}
	if err := os.MkdirAll(netnsDir, 0o755); err != nil {
		return err
	}
	return loopbackUp(nil)
}

// loopbackUp brings lo up through h, or in the calling thread's namespace.
func loopbackUp(h *netlink.Handle) error {
	if h == nil {
		h = &netlink.Handle{}
	}
	lo, err := h.LinkByName("lo")
	if err != nil {
		return fmt.Errorf("find lo: %w", err)
	}
	if err := h.LinkSetUp(lo); err != nil {
		return fmt.Errorf("set lo up: %w", err)
	}
	return nil
}

func exitCode(ws syscall.WaitStatus) int {
	if ws.Signaled() {
		return 128 + int(ws.Signal())
	}
	return ws.ExitStatus()
}
