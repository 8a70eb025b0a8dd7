package e2e

import (
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// plainMesh has a workload in a namespace that enforces, one in a namespace
// that observes, and two pods that are in no mesh. A policy lets the client
// reach every port of both.
func plainMesh(t *testing.T) *harness.Mesh {
	return harness.Start(t, harness.Options{
		Pods: map[string]string{
			"client": "10.88.0.10", "server": "10.88.0.12", "watched": "10.88.0.13",
			"stranger": "10.88.0.20", "legacy": "10.88.0.21",
		},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") +
			harness.Namespace("shop", "enforce") + harness.Namespace("old", "observe") +
			harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "server", "10.88.0.12") +
			harness.Workload("old", "watched", "10.88.0.13") +
			harness.Allow("shop", "client-to-server", "server", nil, "client") +
			harness.Allow("old", "client-to-watched", "watched", nil, "shop/client")},
	})
}

// greet is a server that speaks first and says everything twice.
func greet(reached *atomic.Int64) func(net.Conn) {
	return func(c net.Conn) {
		reached.Add(1)
		_, _ = io.WriteString(c, greeting)
		echo(c)
	}
}

const greeting = "220 at your service\r\n"

// callGreeter says a word to a greeting server, closes its side, and returns
// what came back and the caller's address.
func callGreeter(ctx context.Context, pod *lab.Pod, at, word string) (got, own string, err error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp", at)
	if err != nil {
		return "", "", err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	own = c.LocalAddr().String()
	_, _ = io.WriteString(c, word) // an error of it is the read's too
	_ = c.(*net.TCPConn).CloseWrite()
	b, err := io.ReadAll(c)
	return string(b), own, err
}

// TestPlaintext: what reaches a workload without a tunnel is refused where its
// namespace enforces, before the application has said or heard anything, and
// flows where it observes. Both are recorded.
//
// What it defends: the cluster without endpoints behind port 15006 in enforce
// mode, and the capture rule that leads everything there.
func TestPlaintext(t *testing.T) {
	m := plainMesh(t)
	var reached, watched atomic.Int64
	serve(t, m.Pod("server"), ":8080", greet(&reached))
	serve(t, m.Pod("watched"), ":8080", greet(&watched))

	t.Run("enforce", func(t *testing.T) {
		got, own, err := callGreeter(t.Context(), m.Pod("stranger"), "10.88.0.12:8080", "hello")
		if got != "" || timedOut(err) {
			t.Errorf("a plaintext caller got %q, %v; want nothing and the connection closed", got, err)
		}
		r := recordOf(t, m, audit.Destination, own)
		if r.Verdict != audit.Denied || r.Transport != "plaintext" || r.TLS != nil || r.Source.ID != "" ||
			!strings.Contains(r.Reason, "plaintext") || r.Destination.Workload != "shop/server" || r.Destination.Address != "10.88.0.12:8080" ||
			r.BytesSent != 0 || r.BytesReceived != 0 {
			t.Errorf("the record is %+v", r)
		}
		t.Logf("audit: %s %s, %s", r.Transport, r.Verdict, r.Reason)

		// From the node itself, outside of every pod.
		c, err := net.DialTimeout("tcp", "10.88.0.12:8080", 10*time.Second)
		if err == nil {
			defer c.Close()
			_ = c.SetDeadline(time.Now().Add(20 * time.Second))
			if n, err := io.Copy(io.Discard, c); n != 0 || timedOut(err) {
				t.Errorf("a caller on the node got %d bytes, %v", n, err)
			}
		}
		if reached.Load() != 0 {
			t.Errorf("the application was reached %d times", reached.Load())
		}
	})
	t.Run("observe", func(t *testing.T) {
		got, own, err := callGreeter(t.Context(), m.Pod("stranger"), "10.88.0.13:8080", "hello")
		if got != greeting+"hello" || err != nil {
			t.Errorf("a plaintext caller got %q, %v; want it to flow", got, err)
		}
		r := recordOf(t, m, audit.Destination, own)
		if r.Verdict != audit.Observed || r.Transport != "plaintext" || r.TLS != nil || r.Source.ID != "" ||
			!strings.Contains(r.Reason, "plaintext") || r.Destination.Workload != "old/watched" || r.Destination.Address != "10.88.0.13:8080" ||
			r.BytesSent != 5 || r.BytesReceived != uint64(len(greeting)+5) {
			t.Errorf("the record is %+v", r)
		}
		t.Logf("audit: %s %s, %s", r.Transport, r.Verdict, r.Reason)
	})
	// The same servers through the mesh.
	for _, at := range []string{"10.88.0.12:8080", "10.88.0.13:8080"} {
		if got, _, err := callGreeter(t.Context(), m.Pod("client"), at, "hello"); got != greeting+"hello" || err != nil {
			t.Errorf("%s through the mesh: %q, %v", at, got, err)
		}
	}
	if reached.Load() != 1 || watched.Load() != 2 {
		t.Errorf("the applications were reached %d and %d times, want 1 and 2", reached.Load(), watched.Load())
	}
}

// TestNothingInPlain: what two workloads say to each other is not to be read
// on the network between them. The same look at the same bridge finds what two
// pods outside the mesh say, so it would find it.
func TestNothingInPlain(t *testing.T) {
	m := plainMesh(t)
	word := func(name string) []byte { return []byte("canary-" + name + "-9f31c6") }
	meshRequest, meshAnswer := word("mesh-request"), word("mesh-answer")
	plainRequest, plainAnswer := word("plain-request"), word("plain-answer")
	s, err := m.Lab.Sniff(t.Context(), meshRequest, meshAnswer, plainRequest, plainAnswer)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	answer := func(text []byte) func(net.Conn) {
		return func(c net.Conn) {
			_, _ = io.Copy(io.Discard, c)
			_, _ = c.Write(bytes.Repeat(text, 100))
		}
	}
	serve(t, m.Pod("server"), ":8080", answer(meshAnswer))
	serve(t, m.Pod("watched"), ":8080", answer(meshAnswer))
	serve(t, m.Pod("legacy"), ":8080", answer(plainAnswer))
	const calls = 50
	for range calls {
		for _, c := range []struct {
			from, to        string
			request, answer []byte
		}{
			{"client", "10.88.0.12:8080", meshRequest, meshAnswer},
			{"client", "10.88.0.13:8080", meshRequest, meshAnswer}, // observe mode encrypts too
			{"stranger", "10.88.0.21:8080", plainRequest, plainAnswer},
		} {
			got, _, err := callGreeter(t.Context(), m.Pod(c.from), c.to, string(c.request))
			if err != nil || bytes.Count([]byte(got), c.answer) != 100 {
				t.Fatalf("%s to %s: %d answers, %v", c.from, c.to, bytes.Count([]byte(got), c.answer), err)
			}
		}
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	t.Logf("%d packets, %d lost; in plain: %d of the mesh's requests, %d of its answers; %d and %d of the others'",
		s.Packets(), s.Lost(), s.Count(meshRequest), s.Count(meshAnswer), s.Count(plainRequest), s.Count(plainAnswer))
	if s.Packets() == 0 || s.Lost() != 0 {
		t.Errorf("looked at %d packets and lost %d", s.Packets(), s.Lost())
	}
	if s.Count(meshRequest) != 0 || s.Count(meshAnswer) != 0 {
		t.Error("what workloads said was to be read between them")
	}
	// On the bridge a packet is seen when it comes in and when it leaves.
	if s.Count(plainRequest) < calls || s.Count(plainAnswer) < calls {
		t.Error("the look does not find what was said in plain, so it shows nothing")
	}
}

// TestUDPIsLeftAlone documents that datagrams are neither encrypted, refused
// nor recorded: the mesh carries TCP.
func TestUDPIsLeftAlone(t *testing.T) {
	m := plainMesh(t)
	word := []byte("canary-datagram-9f31c6")
	s, err := m.Lab.Sniff(t.Context(), word)
	if err != nil {
		t.Fatal(err)
	}
	defer s.Close()
	for _, c := range []struct{ from, to string }{
		{"client", "server"}, {"client", "watched"}, {"stranger", "server"}, {"server", "legacy"}, {"watched", "client"},
	} {
		to := m.Pod(c.to)
		l, err := to.ListenPacket("udp", ":5353")
		if err != nil {
			t.Fatal(err)
		}
		_ = l.SetDeadline(time.Now().Add(10 * time.Second))
		conn, err := m.Pod(c.from).Dial(t.Context(), "udp", net.JoinHostPort(to.Addr.String(), "5353"))
		if err != nil {
			t.Fatal(err)
		}
		_ = conn.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := conn.Write(word); err != nil {
			t.Fatal(err)
		}
		b := make([]byte, 100)
		n, from, err := l.ReadFrom(b)
		if err != nil || !bytes.Equal(b[:n], word) || from.String() != conn.LocalAddr().String() {
			t.Errorf("%s to %s: %q from %v, %v; want it as it was sent, from %s", c.from, c.to, b[:n], from, err, conn.LocalAddr())
		} else if _, err := l.WriteTo(b[:n], from); err != nil {
			t.Error(err)
		} else if n, err := conn.Read(b); err != nil || !bytes.Equal(b[:n], word) {
			t.Errorf("%s to %s: answered %q, %v", c.from, c.to, b[:n], err)
		}
		_, _ = conn.Close(), l.Close()
	}
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	if s.Count(word) == 0 {
		t.Error("the datagrams were not in plain on the bridge")
	}
	// By the time that a later connection is recorded they would be too.
	serve(t, m.Pod("server"), ":8080", echo)
	_, own, err := callGreeter(t.Context(), m.Pod("client"), "10.88.0.12:8080", "hello")
	if err != nil {
		t.Fatal(err)
	}
	recordOf(t, m, audit.Source, own)
	for _, r := range m.Records(adminclient.AuditQuery{}) {
		if r.Destination.Address != "10.88.0.12:8080" {
			t.Errorf("datagrams left a record: %+v", r)
		}
	}
}

// TestProxyPorts: the ports that the proxy listens on inside a pod are no way
// to the application or around the mesh, from wherever they are dialled and in
// whichever mode, and a connection to one is not led to itself until the proxy
// is full.
//
// What it defends: the capture rules "no loop into the proxy" and the
// redirection of all ports but the tunnel's, and that the mesh's own ports are
// no destinations.
func TestProxyPorts(t *testing.T) {
	m := plainMesh(t)
	var reached atomic.Int64
	for _, name := range []string{"server", "watched", "client"} {
		serve(t, m.Pod(name), ":8080", greet(&reached))
	}
	survives := func() {
		t.Helper()
		for _, at := range []string{"10.88.0.12:8080", "10.88.0.13:8080"} {
			if got, _, err := callGreeter(t.Context(), m.Pod("client"), at, "hello"); got != greeting+"hello" || err != nil {
				t.Errorf("%s through the mesh: %q, %v", at, got, err)
			}
		}
		reached.Add(-2)
	}
	survives()
	proxy, files := m.Pid("envoy"), openFiles(t, m.Pid("envoy"))

	calls := 0
	for _, target := range []string{"server", "watched"} {
		for _, port := range []string{"15001", "15006", "15008"} {
			for _, from := range []string{"stranger", "client", target, target + " over loopback"} {
				name, loopback := strings.CutSuffix(from, " over loopback")
				host := m.Pod(target).Addr.String()
				if loopback {
					host = "127.0.0.1"
				}
				began := time.Now()
				got, own, err := callGreeter(t.Context(), m.Pod(name), net.JoinHostPort(host, port), "GET / HTTP/1.0\r\n\r\n")
				took := time.Since(began).Round(time.Millisecond)
				calls++
				// Only the tunnel's port may say something: that this is no TLS.
				if timedOut(err) || strings.Contains(got, greeting) || port != "15008" && got != "" {
					t.Errorf("%s to %s of %s: %q, %v; want the connection closed", from, port, target, got, err)
				}
				t.Logf("%s (%s) to %s of %s: %d bytes after %s, %v", from, own, port, target, len(got), took, err)
			}
		}
	}
	if reached.Load() != 0 {
		t.Errorf("the applications were reached %d times", reached.Load())
	}
	survives()
	if m.Pid("envoy") != proxy {
		t.Error("the proxy did not survive")
	}
	m.Eventually(20*time.Second, "the proxy to have closed what it opened", func() error {
		if n := openFiles(t, proxy); n > files+calls/2 {
			return fmt.Errorf("it has %d files open, before the calls %d", n, files)
		}
		return nil
	})
	// Each call has one record at most on either side. A loop would leave one
	// of every turn.
	ports := 0
	for _, r := range m.Records(adminclient.AuditQuery{}) {
		if !strings.Contains(r.Destination.Address, ":1500") {
			continue
		}
		if ports++; ports > 2*calls {
			continue
		}
		t.Logf("audit: %s %s %s -> %s: %s, %s", r.Side, r.Transport, r.Source.Address, r.Destination.Address, r.Verdict, r.Reason)
		if r.Verdict == audit.Allowed {
			t.Errorf("a connection to %s was allowed: %s", r.Destination.Address, r.Reason)
		}
		if r.Side == audit.Source && r.Reason != "no such destination in the mesh" {
			t.Errorf("a connection to %s left the caller's proxy: %s", r.Destination.Address, r.Reason)
		}
	}
	if ports == 0 || ports > 2*calls {
		t.Errorf("%d calls to the proxy's ports left %d records", calls, ports)
	}
}

// openFiles counts the open files of a process.
func openFiles(t *testing.T, pid int) int {
	t.Helper()
	entries, err := os.ReadDir(fmt.Sprintf("/proc/%d/fd", pid))
	if err != nil {
		t.Fatal(err)
	}
	return len(entries)
}
