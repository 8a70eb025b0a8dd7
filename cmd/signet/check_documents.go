package main

import (
	"bufio"
	"errors"
	"fmt"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/internal/mesh"
)

var (
	subjectDocuments = subject{"SIG0130", "documents", "the mesh is what they say"}
	subjectCapture   = subject{"SIG0131", "capture", "the proxy listens inside the network namespace of each captured workload"}
)

// meshPorts are those that the proxy listens on in each namespace.
var meshPorts = []uint16{mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel}

// checkDocuments reads the documents and looks at the namespaces that they
// want captured on this machine.
func checkDocuments(path string, running bool) []check {
	node, err := os.Hostname()
	if err != nil {
		node = "this-node"
	}
	m, err := manifest.Load(path, node)
	if err != nil {
		var refused *manifest.Error
		if !errors.As(err, &refused) {
			return []check{subjectDocuments.error("see `signet policy check "+path+"`", "%v", err)}
		}
		var checks []check
		for _, f := range refused.Findings {
			s := subjectDocuments
			s.code = f.Code
			checks = append(checks, s.error("correct it; `signet policy check "+path+"` tells when it is right", "%s", f))
		}
		return checks
	}
	checks := []check{subjectDocuments.ok("%s, %s, revision %s", plural(len(m.State.Workloads), "workload", "workloads"), plural(len(m.Policies), "policy", "policies"), m.Revision)}
	for i := range m.State.Workloads {
		w := &m.State.Workloads[i]
		if w.Capture != nil && w.Node == node {
			checks = append(checks, checkCapture(w, running))
		}
	}
	return checks
}

func checkCapture(w *mesh.Workload, running bool) check {
	s := subjectCapture
	busy, err := listening(w.Capture.NetNS)
	if err != nil {
		return s.error("make the namespace first, for example with `ip netns add NAME`, and run as root", "%s: %v", w.Key(), err)
	}
	var taken []string
	for _, port := range meshPorts {
		if slices.Contains(busy, port) {
			taken = append(taken, strconv.Itoa(int(port)))
		}
	}
	if len(taken) > 0 && !running {
		return s.error("stop what listens there; `ss -ltnp` in the namespace names it", "%s: port %s of %s is taken", w.Key(), strings.Join(taken, ", "), w.Capture.NetNS)
	}
	return s.ok("%s: %s is there", w.Key(), w.Capture.NetNS)
}

// listening returns the TCP ports that somebody listens on in a network
// namespace.
func listening(path string) ([]uint16, error) {
	ns, err := os.Open(path)
	if err != nil {
		return nil, err
	}
	defer func() { _ = ns.Close() }()
	type answer struct {
		ports []uint16
		err   error
	}
	done := make(chan answer)
	go func() {
		// Never unlocked: the thread, which is in another namespace now, ends
		// with the goroutine.
		runtime.LockOSThread()
		var a answer
		if err := unix.Setns(int(ns.Fd()), unix.CLONE_NEWNET); err != nil {
			a.err = fmt.Errorf("%s: enter the network namespace: %w", path, err)
		} else {
			a.ports, a.err = listeningHere()
		}
		done <- a
	}()
	a := <-done
	return a.ports, a.err
}

// listeningHere reads the kernel's tables for the calling thread.
func listeningHere() (ports []uint16, err error) {
	for _, table := range []string{"tcp", "tcp6"} {
		f, err := os.Open("/proc/thread-self/net/" + table)
		if errors.Is(err, os.ErrNotExist) {
			continue // no IPv6
		} else if err != nil {
			return nil, err
		}
		lines := bufio.NewScanner(f)
		for lines.Scan() {
			// sl local_address rem_address st ...; 0A is LISTEN.
			fields := strings.Fields(lines.Text())
			if len(fields) < 4 || fields[3] != "0A" {
				continue
			}
			_, hex, _ := strings.Cut(fields[1], ":")
			if port, err := strconv.ParseUint(hex, 16, 16); err == nil {
				ports = append(ports, uint16(port))
			}
		}
		err = lines.Err()
		_ = f.Close()
		if err != nil {
			return nil, err
		}
	}
	return ports, nil
}
