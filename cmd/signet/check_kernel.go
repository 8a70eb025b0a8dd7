package main

import (
	"bytes"
	"context"
	"encoding/json"
	"fmt"
	"os"
	"os/exec"
	"strings"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

var (
	subjectPrivileges = subject{"SIG0101", "privileges", "the agent enters the network namespaces of workloads and sets rules there"}
	subjectNamespaces = subject{"SIG0102", "network namespaces", "each captured workload has its own"}
	subjectNftables   = subject{"SIG0103", "nftables", "rules in each workload's namespace redirect its connections to the node proxy"}
	subjectDestroy    = subject{"SIG0104", "SOCK_DESTROY", "a connection whose grant is withdrawn is ended at once"}
	subjectKernel     = subject{"SIG0105", "kernel", "what is not tried one by one"}
	subjectPidfd      = subject{"SIG0106", "SO_PEERPIDFD", "the process at the other end of the Workload API's socket is pinned while it is attested"}
	subjectFiles      = subject{"SIG0107", "open files", "the node proxy holds several sockets for each connection"}
)

// Kernels from here on are what Signet is developed for.
const oldestKernel = "5.10"

const probeTimeout = 20 * time.Second

// kernelChecks tries the kernel's features in a child process that has
// namespaces of its own.
func kernelChecks(ctx context.Context) []check {
	privileged, how := privileges()
	probes, err := runProbes(ctx, privileged)
	var checks []check
	switch {
	case err == nil && privileged:
		checks = append(checks, subjectPrivileges.ok("%s", how))
	case err == nil:
		checks = append(checks, subjectPrivileges.ok("%s; an ordinary user can make user namespaces, where the quickstart runs", how))
	case privileged:
		checks = append(checks, subjectPrivileges.ok("%s", how),
			subjectNamespaces.error("use a kernel with CONFIG_NET_NS; in a container, allow CAP_SYS_ADMIN and the clone system call", "cannot make one: %v", err))
	default:
		checks = append(checks, subjectPrivileges.error("run as root; or let users make user namespaces: sysctl kernel.unprivileged_userns_clone=1, or on Ubuntu kernel.apparmor_restrict_unprivileged_userns=0", "%s, and cannot make a user namespace: %v", how, err))
	}
	if err == nil {
		checks = append(checks, subjectNamespaces.ok("made one, with its loopback up"))
		checks = append(checks, probes...)
	} else {
		for _, s := range []subject{subjectNftables, subjectDestroy} {
			checks = append(checks, s.error("mend what comes before", "could not be tried without a network namespace"))
		}
	}
	return append(checks, checkKernel(release()), checkPidfd())
}

// privileges reports whether this process has what the agent needs.
func privileges() (bool, string) {
	header := unix.CapUserHeader{Version: unix.LINUX_CAPABILITY_VERSION_3}
	var data [2]unix.CapUserData
	if err := unix.Capget(&header, &data[0]); err != nil {
		return false, fmt.Sprintf("cannot read capabilities: %v", err)
	}
	var missing []string
	for _, c := range []struct {
		bit  uint
		name string
	}{{unix.CAP_NET_ADMIN, "CAP_NET_ADMIN"}, {unix.CAP_SYS_ADMIN, "CAP_SYS_ADMIN"}, {unix.CAP_SYS_PTRACE, "CAP_SYS_PTRACE"}} {
		if data[c.bit/32].Effective&(1<<(c.bit%32)) == 0 {
			missing = append(missing, c.name)
		}
	}
	who := "root"
	if uid := os.Geteuid(); uid != 0 {
		who = fmt.Sprintf("user %d", uid)
	}
	if len(missing) > 0 {
		return false, fmt.Sprintf("%s without %s", who, strings.Join(missing, ", "))
	}
	return true, who + " with the capabilities that the agent needs"
}

// runProbes runs this program again in new namespaces. An error says that
// those cannot be made.
func runProbes(ctx context.Context, privileged bool) ([]check, error) {
	ctx, cancel := context.WithTimeout(ctx, probeTimeout)
	defer cancel()
	cmd := exec.CommandContext(ctx, "/proc/self/exe", probeCommand)
	cmd.Args[0] = "signet"
	cmd.SysProcAttr = &syscall.SysProcAttr{Cloneflags: syscall.CLONE_NEWNET | syscall.CLONE_NEWNS, Pdeathsig: syscall.SIGKILL}
	if !privileged {
		cmd.SysProcAttr.Cloneflags |= syscall.CLONE_NEWUSER
		cmd.SysProcAttr.UidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Geteuid(), Size: 1}}
		cmd.SysProcAttr.GidMappings = []syscall.SysProcIDMap{{ContainerID: 0, HostID: os.Getegid(), Size: 1}}
	}
	var stdout, stderr bytes.Buffer
	cmd.Stdout, cmd.Stderr = &stdout, &stderr
	if err := cmd.Run(); err != nil {
		if msg := strings.TrimSpace(stderr.String()); msg != "" {
			return nil, fmt.Errorf("%w: %s", err, msg)
		}
		return nil, err
	}
	var checks []check
	if err := json.Unmarshal(stdout.Bytes(), &checks); err != nil {
		return nil, fmt.Errorf("read the probe's answer: %w", err)
	}
	return checks, nil
}

func release() string {
	var u unix.Utsname
	if unix.Uname(&u) != nil {
		return ""
	}
	return unix.ByteSliceToString(u.Release[:])
}

func checkKernel(release string) check {
	var major, minor, wantMajor, wantMinor int
	if _, err := fmt.Sscanf(release, "%d.%d", &major, &minor); err != nil {
		return subjectKernel.warning("compare it with "+oldestKernel+" by hand", "cannot read the version %q", release)
	}
	_, _ = fmt.Sscanf(oldestKernel, "%d.%d", &wantMajor, &wantMinor)
	if major < wantMajor || major == wantMajor && minor < wantMinor {
		return subjectKernel.warning("use Linux "+oldestKernel+" or newer", "Linux %s is older than Signet is made for", release)
	}
	return subjectKernel.ok("Linux %s", release)
}

// checkPidfd asks a socket pair of this process for its peer.
func checkPidfd() check {
	const fix = "use Linux 6.5 or newer"
	fds, err := unix.Socketpair(unix.AF_UNIX, unix.SOCK_STREAM|unix.SOCK_CLOEXEC, 0)
	if err != nil {
		return subjectPidfd.warning(fix, "cannot be tried: %v", err)
	}
	defer func() { _, _ = unix.Close(fds[0]), unix.Close(fds[1]) }()
	pidfd, err := unix.GetsockoptInt(fds[0], unix.SOL_SOCKET, unix.SO_PEERPIDFD)
	if err != nil {
		return subjectPidfd.warning(fix, "the kernel does not have it (%v); the process is named by its number, which can be used again", err)
	}
	_ = unix.Close(pidfd)
	return subjectPidfd.ok("works")
}

// wantFiles is enough for the proxy's 10,000 connections and their tunnels.
const wantFiles = 65536

func openFiles() check {
	var l unix.Rlimit
	if err := unix.Getrlimit(unix.RLIMIT_NOFILE, &l); err != nil {
		return subjectFiles.warning("see `ulimit -Hn`", "cannot read the limit: %v", err)
	}
	if l.Max < wantFiles {
		return subjectFiles.warning(fmt.Sprintf("raise it: ulimit -Hn %d, or LimitNOFILE=%d in the systemd unit", wantFiles, wantFiles), "at most %d for a process", l.Max)
	}
	return subjectFiles.ok("at most %d for a process", l.Max)
}
