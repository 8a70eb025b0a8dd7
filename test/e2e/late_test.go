package e2e

import (
	"context"
	"fmt"
	"strings"
	"syscall"
	"testing"
	"time"
)

// TestLateRenewal: the control plane is away until a certificate has less left than
// for how long a tunnel takes new connections, and a tunnel is opened with it just
// before it is replaced. No call fails when the old certificate expires.
//
// What it defends: that the proxy is told to open new tunnels then (agent/outlived.go).
// In the old one connections are refused by that time, which is what the server's end
// is there for.
func TestLateRenewal(t *testing.T) {
	const ttl, left = 20 * time.Second, 5 * time.Second // tunnels take connections for 7 s
	m := rotating(t, ttl)
	certs, err := m.Client.Certificates(t.Context())
	if err != nil {
		t.Fatal(err)
	}
	var expires time.Time
	var before string
	for _, c := range certs {
		if c.Holder == "shop/red" {
			expires, before = c.NotAfter, c.Serial
		}
	}
	control := m.Pid("control")
	if err := syscall.Kill(control, syscall.SIGSTOP); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = syscall.Kill(control, syscall.SIGCONT) })
	time.Sleep(time.Until(expires.Add(-left)))
	call := func() error {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		return callEcho(ctx, m.Pod("red"), serverAt)
	}
	if err := call(); err != nil {
		t.Fatal(err)
	}
	long := hold(t, m.Pod("red"), serverAt)
	if err := syscall.Kill(control, syscall.SIGCONT); err != nil {
		t.Fatal(err)
	}
	m.Eventually(left-time.Second, "red to have a new certificate", func() error {
		if serial, problem := serialOf(t, m, "shop/red"); serial == "" || serial == before {
			return fmt.Errorf("serial %q: %s", serial, problem)
		}
		return nil
	})
	t.Logf("renewed %s before it expired", time.Until(expires).Round(10*time.Millisecond))
	calls := 0
	for ; time.Since(expires) < 4*time.Second; calls++ {
		if err := call(); err != nil {
			t.Fatalf("a call %s after the certificate expired: %v", time.Since(expires), err)
		}
		time.Sleep(20 * time.Millisecond)
	}
	t.Logf("%d calls, none failed", calls)
	if err := long.ping(); err != nil {
		t.Errorf("a connection that was open: %v", err)
	}
	if !strings.Contains(m.Log(), "a certificate was renewed late") {
		t.Error("nothing is said of it")
	}
}
