package e2e

import (
	"context"
	"fmt"
	"io"
	"net"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// serve answers every connection to a pod's port with f, until the test ends.
func serve(t *testing.T, p *lab.Pod, addr string, f func(net.Conn)) {
	t.Helper()
	l, err := p.Listen("tcp", addr)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	go acceptAll(l, f)
}

// acceptAll has f answer every connection, until the listener is closed.
func acceptAll(l net.Listener, f func(net.Conn)) {
	for {
		c, err := l.Accept()
		if err != nil {
			return
		}
		go func() { defer c.Close(); f(c) }()
	}
}

// echo sends back what it gets until the caller closes its side.
func echo(c net.Conn) { _, _ = io.Copy(c, c) }

// TestAllowedAndDenied: the shortest way through the whole mesh.
func TestAllowedAndDenied(t *testing.T) {
	m := harness.Start(t, harness.Options{
		Pods: map[string]string{"client": "10.88.0.10", "other": "10.88.0.11", "server": "10.88.0.12"},
		Documents: map[string]string{"mesh.yaml": harness.Config("20s") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "other", "10.88.0.11") +
			harness.Workload("shop", "server", "10.88.0.12") +
			harness.Service("shop", "server", "10.96.0.1", 80, 8080, "server") +
			harness.Allow("shop", "allow-client", "server", []int{8080}, "client")},
	})
	serve(t, m.Pod("server"), ":8080", echo)
	for _, addr := range []string{"10.96.0.1:80", "10.88.0.12:8080"} {
		ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
		defer cancel()
		c, err := m.Pod("client").Dial(ctx, "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		if _, err := c.Write([]byte("hello")); err != nil {
			t.Fatal(err)
		}
		_ = c.(*net.TCPConn).CloseWrite()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		got, err := io.ReadAll(c)
		if err != nil || string(got) != "hello" {
			t.Fatalf("%s: got %q, %v; want hello", addr, got, err)
		}
		c.Close()

		d, err := m.Pod("other").Dial(ctx, "tcp", addr)
		if err != nil {
			t.Fatal(err)
		}
		_ = d.SetDeadline(time.Now().Add(5 * time.Second))
		if n, err := d.Read(make([]byte, 1)); n != 0 || err == nil {
			t.Fatalf("%s: a denied caller read %d bytes, %v", addr, n, err)
		}
		d.Close()
	}
	// The proxy writes its lines within some 20 ms of the event.
	m.Eventually(10*time.Second, "4 allowed and 4 denied records, one for each connection and side", func() error {
		count := map[audit.Verdict]int{}
		for _, r := range m.Records(adminclient.AuditQuery{}) {
			count[r.Verdict]++
			if r.TLS == nil && r.Verdict == audit.Allowed || r.TLS != nil && r.TLS.Group != "X25519MLKEM768" {
				t.Errorf("record %d: TLS %+v, want X25519MLKEM768", r.Seq, r.TLS)
			}
		}
		if count[audit.Allowed] != 4 || count[audit.Denied] != 4 {
			return fmt.Errorf("the audit has %v", count)
		}
		return nil
	})
}
