package attest

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"path/filepath"
	"strings"
	"testing"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/mesh"
)

const sumEnv = "ATTEST_SUM" // the trusted program's digest

// trustedCgroup is what the forgeries claim.
const trustedCgroup = "/trusted.slice/trusted.service"

// forgeries are mounts in the agent's own mount namespace by which somebody
// answers in the kernel's place. Each is made after the caller has connected.
var forgeries = map[string]func(pid, trusted, dir string) error{
	"none": func(string, string, string) error { return nil },
	// What lxcfs does: nobody's identity is in there.
	"elsewhere": func(_, _, dir string) error { return bind(fake(dir), "/proc/cpuinfo") },

	"a file over cgroup": func(pid, _, dir string) error { return bind(fake(dir), "/proc/"+pid+"/cgroup") },
	// The same file system, so the same device number.
	"another's cgroup":    func(pid, _, _ string) error { return bind("/proc/self/cgroup", "/proc/"+pid+"/cgroup") },
	"another's directory": func(pid, _, _ string) error { return bind("/proc/self", "/proc/"+pid) },
	"a file over the link exe": func(pid, trusted, _ string) error {
		tree, err := unix.OpenTree(unix.AT_FDCWD, trusted, unix.OPEN_TREE_CLONE|unix.OPEN_TREE_CLOEXEC)
		if err != nil {
			return err
		}
		return unix.MoveMount(tree, "", unix.AT_FDCWD, "/proc/"+pid+"/exe", unix.MOVE_MOUNT_F_EMPTY_PATH)
	},
	"a directory over /proc": func(pid, _, dir string) error {
		genuine, forged := filepath.Join(dir, "genuine"), filepath.Join(dir, "forged")
		own, agent := filepath.Join(forged, pid), filepath.Join(forged, itoa(os.Getpid()))
		stat, err := os.ReadFile("/proc/" + pid + "/stat")
		err = errors.Join(err, os.Mkdir(genuine, 0o755), bind("/proc", genuine),
			os.MkdirAll(own, 0o755), os.MkdirAll(agent+"/fdinfo", 0o755), os.Rename(fake(dir), own+"/cgroup"), os.WriteFile(own+"/stat", stat, 0o600),
			os.Symlink(filepath.Join(genuine, pid, "exe"), own+"/exe"))
		for fd := range 64 { // one of them is the handle of the process
			err = errors.Join(err, os.WriteFile(agent+"/fdinfo/"+itoa(fd), []byte("Pid:\t"+pid+"\n"), 0o600))
		}
		return errors.Join(err, bind(forged, "/proc"))
	},
}

func bind(from, to string) error {
	if err := unix.Mount(from, to, "", unix.MS_BIND, ""); err != nil {
		return fmt.Errorf("bind %s to %s: %w", from, to, err)
	}
	return nil
}

func fake(dir string) string {
	path := filepath.Join(dir, "fake")
	if err := os.WriteFile(path, []byte("0::"+trustedCgroup+"\n"), 0o600); err != nil {
		panic(err)
	}
	return path
}

// attestMounted is the agent's part, in a mount namespace of its own.
func attestMounted(in *bufio.Reader) error {
	socket := os.Getenv(socketEnv)
	ln, err := net.ListenUnix("unix", &net.UnixAddr{Name: socket})
	if err != nil {
		return err
	}
	fmt.Println("ready")
	conn, err := ln.AcceptUnix()
	if err != nil {
		return err
	}
	line, err := in.ReadString('\n')
	if err != nil {
		return err
	}
	pid, forgery, _ := strings.Cut(strings.TrimSpace(line), " ")
	dir := filepath.Dir(socket)
	trusted := filepath.Join(dir, "trusted")
	if err := forgeries[forgery](pid, trusted, dir); err != nil {
		return err
	}
	p, err := Peer(conn)
	if err == nil {
		var ws []mesh.Workload
		ws, err = attestor(mesh.Attest{Cgroup: trustedCgroup}, mesh.Attest{Path: trusted}, mesh.Attest{SHA256: os.Getenv(sumEnv)}).Attest(context.Background(), p)
		for _, w := range ws {
			fmt.Print("is ", w.Name, " ")
		}
	}
	fmt.Println("error:", err)
	return nil
}

// Defends: what is mounted over /proc, or over anything in it that tells who a
// process is, is not believed. Nobody but root in the agent's mount namespace
// can mount there, or a container that mounts propagate from.
func TestMountsOverProc(t *testing.T) {
	for forgery := range forgeries {
		t.Run(forgery, func(t *testing.T) {
			b := newBench(t)
			evil, socket := filepath.Join(b.dir, "evil"), filepath.Join(b.dir, "mounted")
			program, err := os.ReadFile(b.self)
			if err != nil {
				t.Fatal(err)
			}
			if err := os.WriteFile(evil, append(program, 0), 0o755); err != nil {
				t.Fatal(err)
			}
			t.Setenv(sumEnv, b.sum(b.self))
			agent := b.launch("mounted", socket, "unshare", "--mount", "--propagation", "private", b.self)
			agent.expect("ready")
			caller := b.launch("connect", socket, evil)
			caller.expect("ready")
			if _, err := fmt.Fprintln(agent.in, caller.cmd.Process.Pid, forgery); err != nil {
				t.Fatal(err)
			}
			said, err := agent.out.ReadString('\n')
			if err != nil {
				t.Fatal(said, err)
			}
			honest := forgery == "none" || forgery == "elsewhere"
			if strings.Contains(said, "is w") || strings.Contains(said, "mounted over /proc") == honest ||
				honest && !strings.Contains(said, "path: want "+b.self+", is "+evil) {
				t.Error(said)
			}
		})
	}
}
