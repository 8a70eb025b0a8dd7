package e2e

import (
	"context"
	"errors"
	"fmt"
	"slices"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/test/clock"
	"github.com/signet-mesh/signet/test/harness"
)

// tunnelsInto returns the tunnels in which a node's workloads took the connections of
// an identity, by their callers' addresses: a tunnel has one. The oldest is first.
func tunnelsInto(t *testing.T, n *harness.Node, id string) (out []string) {
	t.Helper()
	for r, err := range n.Client.Audit(t.Context(), adminclient.AuditQuery{}) {
		if err != nil {
			t.Fatal(err)
		}
		if r.Side == audit.Destination && strings.HasSuffix(r.Source.ID, id) && !slices.Contains(out, r.Source.Address) {
			out = append(out, r.Source.Address)
		}
	}
	return out
}

// TestDestinationAsleep: of two nodes one is suspended, with the server on it, while
// the caller's node goes on. When it wakes, by its timers the tunnel is as young as it
// was, but the caller's proxy uses another. The connection that was open stays, and no
// call fails.
//
// What it defends: that callers' proxies count the life of tunnels too (package xds).
func TestDestinationAsleep(t *testing.T) {
	const ttl, still = 40 * time.Second, 18 * time.Second // tunnels take connections for 16 s
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"red": "10.88.0.10", "server": "10.88.0.12"},
		Documents: map[string]string{"mesh.yaml": harness.Config(ttl.String()) + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "red", "10.88.0.10") +
			strings.Replace(harness.Workload("shop", "server", "10.88.0.12"), "capture:", "node: n2, capture:", 1) +
			harness.Allow("shop", "allow", "server", []int{8080}, "red")},
		Args: []string{"--proxy-threads", "1"}, // each has tunnels of its own
	})
	serve(t, m.Pod("server"), ":8080", echo)
	far := m.Join("n2")
	call := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return callEcho(ctx, m.Pod("red"), serverAt)
	}
	m.Eventually(30*time.Second, "the server to be reached on the other node", call)
	long := hold(t, m.Pod("red"), serverAt)
	if err := call(); err != nil {
		t.Fatal(err)
	}
	heard := func(least int) (seen []string) {
		m.Eventually(10*time.Second, fmt.Sprintf("the audit of the server's node to have %d tunnels", least), func() error {
			if seen = tunnelsInto(t, far, "/sa/red"); len(seen) < least {
				return fmt.Errorf("it has %v", seen)
			}
			return nil
		})
		return seen
	}
	before := heard(1)
	if len(before) != 1 {
		t.Fatalf("before the suspend calls went by several tunnels: %v", before)
	}

	pids := far.Pids()
	each := func(f func(pid int) error) {
		t.Helper()
		for _, pid := range pids {
			if err := f(pid); err != nil {
				t.Fatal(err)
			}
		}
	}
	each(func(pid int) error { return syscall.Kill(pid, syscall.SIGSTOP) })
	time.Sleep(still)
	each(func(pid int) error { return clock.Stand(pid, still) })
	each(func(pid int) error { return syscall.Kill(pid, syscall.SIGCONT) })
	woke := time.Now()
	// The server's certificate may have to be renewed first.
	m.Eventually(resumeWithin, "the first call", call)
	t.Logf("the first call %s after the node went on", time.Since(woke).Round(10*time.Millisecond))
	for range 10 {
		if err := call(); err != nil {
			t.Errorf("a call after the suspend: %v", err)
		}
	}
	after := heard(2)
	if err := long.ping(); err != nil {
		t.Errorf("the connection that was open: %v", err)
	}
	var last string
	m.Eventually(10*time.Second, "the audit to have the last calls", func() error {
		var newest time.Time
		n := 0
		for r, err := range far.Client.Audit(t.Context(), adminclient.AuditQuery{}) {
			if err != nil {
				return err
			}
			if r.Side != audit.Destination || r.Start.Before(woke) {
				continue
			}
			if n++; r.Source.Address == before[0] {
				t.Fatalf("a call %s after the suspend went by the tunnel from before it: %+v", r.Start.Sub(woke), r)
			}
			if r.Start.After(newest) {
				newest, last = r.Start, r.Source.Address
			}
		}
		if n < 11 {
			return errors.New("some are missing")
		}
		return nil
	})
	t.Logf("tunnels: %v, the last call by %s", after, last)
}
