package e2e

import (
	"fmt"
	"io"
	"net"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/test/harness"
)

// TestQuarantineCutsBothWays: a Quarantine ends what its identity has open
// within a second, whatever policies say and in an observed namespace too, and
// refuses what it dials and what dials it; its neighbour notices nothing. The
// audit names the quarantine. Without the rules ahead of the policies the
// observed namespace would let it all through.
func TestQuarantineCutsBothWays(t *testing.T) {
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"client": "10.88.0.10", "second": "10.88.0.11", "server": "10.88.0.12", "outside": "10.88.0.13"},
		Documents: map[string]string{"mesh.yaml": harness.Config("20s") + harness.Namespace("shop", "observe") +
			harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "second", "10.88.0.11") +
			harness.Workload("shop", "server", "10.88.0.12")},
	})
	serve(t, m.Pod("server"), ":8080", echo)
	serve(t, m.Pod("client"), ":8080", echo)
	serve(t, m.Pod("outside"), ":8080", echo)
	open := func(from, to string) net.Conn {
		t.Helper()
		c, err := m.Pod(from).Dial(t.Context(), "tcp", to+":8080")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Close() })
		if err := ping(c); err != nil {
			t.Fatalf("%s before the quarantine: %v", from, err)
		}
		return c
	}
	cut, neighbour := open("client", "10.88.0.12"), open("second", "10.88.0.12")
	// Not of the mesh, so no tunnel's policy ends it.
	leak := open("client", "10.88.0.13")
	// Also the first audit line of both has been read by then.
	m.Eventually(5*time.Second, "both connections to be known", func() error {
		if n := len(m.Records(adminclient.AuditQuery{Verdicts: []audit.Verdict{audit.Observed}})); n < 2 {
			return fmt.Errorf("%d records", n)
		}
		return nil
	})

	m.Write("quarantine.yaml", `apiVersion: signet.dev/v1alpha1
kind: Quarantine
metadata: {name: incident-7}
spec: {serviceAccounts: [shop/client], reason: stolen token}
`)
	began := time.Now()
	_ = cut.SetReadDeadline(began.Add(10 * time.Second))
	n, err := cut.Read(make([]byte, 1))
	t.Logf("the open connection ended %s after the edit: %d bytes, %v", time.Since(began).Round(time.Millisecond), n, err)
	if took := time.Since(began); n != 0 || took > 3*time.Second {
		t.Errorf("the open connection of the quarantined workload ended after %s", took)
	}
	_ = leak.SetReadDeadline(began.Add(10 * time.Second))
	n, err = leak.Read(make([]byte, 1))
	t.Logf("the open connection out of the mesh ended %s after the edit: %d bytes, %v", time.Since(began).Round(time.Millisecond), n, err)
	if took := time.Since(began); n != 0 || took > 3*time.Second {
		t.Errorf("an open plaintext connection of a quarantined workload lived on for %s", took)
	}
	for from, to := range map[string]string{"client": "10.88.0.12:8080", "second": "10.88.0.10:8080"} {
		m.Eventually(5*time.Second, "a connection from "+from+" to be refused", func() error {
			c, err := m.Pod(from).Dial(t.Context(), "tcp", to)
			if err != nil {
				return nil
			}
			defer c.Close()
			if ping(c) == nil {
				return io.ErrNoProgress
			}
			return nil
		})
	}
	if err := ping(neighbour); err != nil {
		t.Errorf("the neighbour's connection: %v", err)
	}
	m.Eventually(5*time.Second, "records that name the quarantine", func() error {
		for _, r := range m.Records(adminclient.AuditQuery{Verdicts: []audit.Verdict{audit.Denied}}) {
			if strings.Contains(r.Reason, `quarantined by "incident-7"`) {
				return nil
			}
		}
		return io.ErrNoProgress
	})
}

// ping sends a byte and wants it back.
func ping(c net.Conn) error {
	_ = c.SetDeadline(time.Now().Add(3 * time.Second))
	if _, err := c.Write([]byte("x")); err != nil {
		return err
	}
	_, err := io.ReadFull(c, make([]byte, 1))
	return err
}
