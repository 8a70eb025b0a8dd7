package main

import (
	"crypto/rand"
	"fmt"
	"io"
	"net"
	"os"
	"path/filepath"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

// readyWord is what the first process says when the machine is up.
const readyWord = "ready\n"

// initMain is the first process of a machine: when it ends, the kernel ends all
// others. It returns only with an error.
func initMain(dir string) error {
	ready := os.NewFile(3, "ready")
	unix.CloseOnExec(3)
	s, forward, err := setUp(dir)
	if err != nil {
		_, _ = fmt.Fprintln(ready, err)
		return err
	}
	if forward != "" {
		unix.CloseOnExec(4)
		l, err := net.FileListener(os.NewFile(4, "listener"))
		if err != nil {
			return err
		}
		go serveForward(l, forward)
	}
	if _, err := io.WriteString(ready, readyWord); err != nil {
		return err
	}
	if err := ready.Close(); err != nil {
		return err
	}
	return s.run()
}

// setUp makes the machine out of the new namespaces.
func setUp(dir string) (s *supervisor, forward string, err error) {
	m, err := readMachine(dir)
	if err != nil {
		return nil, "", err
	}
	// It stays open: after pivot_root the folder has no path any more.
	root, err := os.OpenRoot(dir)
	if err != nil {
		return nil, "", err
	}
	// First of all, so that whoever clears up finds the process: /proc is
	// still that of the real machine, with its numbers.
	self, err := os.Readlink("/proc/self")
	if err != nil {
		return nil, "", err
	}
	pid, err := strconv.Atoi(self)
	if err != nil {
		return nil, "", err
	}
	record := spec.Record{BootID: newBootID()}
	if record.Process, err = spec.Find("/proc", pid); err != nil {
		return nil, "", err
	}
	if err := spec.Write(root, spec.RecordFile, record); err != nil {
		return nil, "", err
	}
	if err := makeRoot(filepath.Join(dir, spec.DiskDir), m, record.BootID); err != nil {
		return nil, "", err
	}
	if err := unix.Sethostname([]byte(m.Name)); err != nil {
		return nil, "", err
	}
	if err := setSysctls(); err != nil {
		return nil, "", err
	}
	s, err = newSupervisor(root)
	return s, m.Forward, err
}

// newBootID returns a random UUID.
func newBootID() string {
	var b [16]byte
	_, _ = rand.Read(b[:]) // it never fails
	b[6], b[8] = b[6]&0x0f|0x40, b[8]&0x3f|0x80
	return fmt.Sprintf("%x-%x-%x-%x-%x", b[:4], b[4:6], b[6:8], b[8:10], b[10:])
}

// setSysctls makes the network namespace one of a router, without the wait for
// duplicates of IPv6 addresses.
func setSysctls() error {
	for name, value := range map[string]string{
		"net/ipv4/ip_forward":                  "1",
		"net/ipv4/conf/all/rp_filter":          "0",
		"net/ipv4/conf/default/rp_filter":      "0",
		"net/ipv6/conf/all/forwarding":         "1",
		"net/ipv6/conf/default/forwarding":     "1",
		"net/ipv6/conf/all/accept_dad":         "0",
		"net/ipv6/conf/default/accept_dad":     "0",
		"net/ipv6/conf/default/accept_ra":      "0",
		"net/ipv4/ip_local_reserved_ports":     "30000-32767",
		"net/ipv4/conf/default/arp_notify":     "1",
		"net/ipv6/conf/default/ndisc_notify":   "1",
		"net/ipv6/conf/default/disable_ipv6":   "0",
		"net/ipv4/conf/default/route_localnet": "0",
	} {
		if err := os.WriteFile("/proc/sys/"+name, []byte(value), 0); err != nil {
			return fmt.Errorf("sysctl %s: %w", strings.ReplaceAll(name, "/", "."), err)
		}
	}
	return nil
}

// serveForward passes connections on for as long as the machine is on. The
// socket is in the network namespace of the real machine, its other side here.
func serveForward(l net.Listener, to string) {
	for {
		in, err := l.Accept()
		if err != nil {
			fmt.Fprintln(os.Stderr, "forward:", err)
			return
		}
		go func() {
			defer in.Close()
			out, err := net.Dial("tcp", to)
			if err != nil {
				return // the API server is down: the client sees the end of its connection
			}
			defer out.Close()
			go func() {
				_, _ = io.Copy(out, in)
				_ = out.(*net.TCPConn).CloseWrite()
			}()
			_, _ = io.Copy(in, out)
			_ = in.(*net.TCPConn).CloseWrite()
		}()
	}
}
