package e2e

import (
	"bytes"
	"context"
	"errors"
	"net"
	"net/http"
	"net/netip"
	"os"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// dualStack is a mesh whose pods have IPv6 addresses too: fd88::a is
// 10.88.0.10, and so on. six has nothing else, as far as the mesh knows, and in
// four IPv6 is switched off. server has a service of both families, one of IPv6
// alone, and the IPv6 of each leads to the IPv6 of the pod.
func dualStack(t *testing.T) *harness.Mesh {
	t.Helper()
	l, err := lab.New(lab.Config{Bridge6: netip.MustParsePrefix("fd88::/64")})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { l.Close() })
	four, err := l.AddPod("four", netip.MustParseAddr("10.88.0.15"))
	if err != nil {
		t.Fatal(err)
	}
	if err := four.Do(func() error {
		return os.WriteFile("/proc/sys/net/ipv6/conf/all/disable_ipv6", []byte("1"), 0)
	}); err != nil {
		t.Fatal(err)
	}
	return harness.Start(t, harness.Options{
		Lab: l,
		Pods: map[string]string{
			"client": "10.88.0.10", "other": "10.88.0.11", "server": "10.88.0.12", "watched": "10.88.0.13", "six": "10.88.0.14",
			"stranger": "10.88.0.20",
		},
		Documents: map[string]string{
			"mesh.yaml": harness.Config("1h") +
				harness.Namespace("shop", "enforce") + harness.Namespace("old", "observe") +
				harness.Workload("shop", "client", `10.88.0.10, "fd88::a"`) + harness.Workload("shop", "other", `10.88.0.11, "fd88::b"`) +
				harness.Workload("shop", "server", `10.88.0.12, "fd88::c"`) + harness.Workload("old", "watched", `10.88.0.13, "fd88::d"`) +
				harness.Workload("shop", "six", `"fd88::e"`) + harness.Workload("shop", "four", `10.88.0.15, "fd88::f"`) +
				harness.Service("shop", "server", `10.96.0.1, "fd96::1"`, 80, 8080, "server") +
				harness.Service("shop", "server6", `"fd96::2"`, 80, 8080, "server"),
			"policies.yaml": sixGrants(true),
		},
	})
}

func sixGrants(client bool) string {
	from := []string{"six", "four"}
	if client {
		from = append(from, "client")
	}
	return harness.Allow("shop", "to-server", "server", []int{8080}, from...) +
		harness.Allow("shop", "to-six", "six", nil, "server") +
		harness.Allow("shop", "server-to-four", "four", nil, "server") +
		harness.Allow("old", "to-watched", "watched", nil, "shop/client")
}

// TestIPv6: calls by IPv6 pod addresses and services are what calls by IPv4
// are: through a tunnel between proved identities, by policy, not to be read on
// the wire, with a record on each side.
func TestIPv6(t *testing.T) {
	m := dualStack(t)
	var reached atomic.Int64
	for _, name := range []string{"server", "watched", "six", "four"} {
		serve(t, m.Pod(name), ":8080", greet(&reached))
	}
	const word = "canary-six-77a1f0"
	wire, err := m.Lab.Sniff(t.Context(), []byte(word), []byte(greeting))
	if err != nil {
		t.Fatal(err)
	}
	defer wire.Close()
	for _, c := range []struct {
		from, at, via, to string // via: the pod's address and port
	}{
		{"client", "[fd88::c]:8080", "[fd88::c]:8080", "shop/server"},
		{"client", "[fd96::1]:80", "[fd88::c]:8080", "shop/server"},
		{"client", "[fd96::2]:80", "[fd88::c]:8080", "shop/server"},
		{"client", "10.96.0.1:80", "10.88.0.12:8080", "shop/server"},
		{"client", "[fd88::d]:8080", "[fd88::d]:8080", "old/watched"},
		{"six", "[fd88::c]:8080", "[fd88::c]:8080", "shop/server"},
		{"server", "[fd88::e]:8080", "[fd88::e]:8080", "shop/six"},
		{"four", "10.88.0.12:8080", "10.88.0.12:8080", "shop/server"},
		{"server", "10.88.0.15:8080", "10.88.0.15:8080", "shop/four"},
	} {
		got, own, err := callGreeter(t.Context(), m.Pod(c.from), c.at, word)
		if got != greeting+word || err != nil {
			t.Errorf("%s to %s: %q, %v", c.from, c.at, got, err)
			continue
		}
		s := recordOf(t, m, audit.Source, own)
		if s.Verdict != audit.Allowed || s.Transport != "mtls" || s.Source.ID != sa(c.from) || s.Source.Workload != "shop/"+c.from ||
			s.Destination.Workload != c.to || s.Destination.Address != c.at || s.Destination.Via != c.via || s.BytesSent != uint64(len(word)) {
			t.Errorf("%s to %s: the source's record is %+v", c.from, c.at, s)
		}
		r := destinationRecord(t, m, c.via, sa(c.from))
		if r.Verdict != audit.Allowed || r.Transport != "mtls" || r.Destination.Workload != c.to ||
			!strings.HasPrefix(r.Source.Address, strings.TrimSuffix(own, own[strings.LastIndex(own, ":"):])+":") {
			t.Errorf("%s to %s: the destination's record is %+v", c.from, c.at, r)
		}
	}
	allowed := reached.Load()

	// Nothing allows these; six admits no client, and server no other.
	for _, c := range [][2]string{{"other", "[fd88::c]:8080"}, {"other", "[fd96::1]:80"}, {"other", "[fd96::2]:80"}, {"client", "[fd88::e]:8080"}} {
		got, own, err := callGreeter(t.Context(), m.Pod(c[0]), c[1], word)
		if got != "" || timedOut(err) {
			t.Errorf("%s to %s: %q, %v; want a refusal", c[0], c[1], got, err)
			continue
		}
		if r := recordOf(t, m, audit.Source, own); r.Verdict != audit.Denied || r.Destination.Address != c[1] || !strings.Contains(r.Reason, "default deny") {
			t.Errorf("%s to %s: the record is %+v", c[0], c[1], r)
		}
	}
	if reached.Load() != allowed {
		t.Errorf("the applications were reached %d times by callers that nothing allows", reached.Load()-allowed)
	}
	if err := wire.Close(); err != nil {
		t.Fatal(err)
	}
	if n := wire.Count([]byte(word)) + wire.Count([]byte(greeting)); n != 0 || wire.Packets() == 0 {
		t.Errorf("%d times in plain on the wire, in %d packets", n, wire.Packets())
	}
}

// destinationRecord waits for the ended record of a connection to an address
// from an identity.
func destinationRecord(t *testing.T, m *harness.Mesh, to, from string) (found audit.Record) {
	t.Helper()
	m.Eventually(15*time.Second, "the destination's record of "+to, func() error {
		for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination}) {
			if r.Destination.Address == to && r.Source.ID == from && !r.End.IsZero() {
				found = r
				return nil
			}
		}
		return errors.New("none yet")
	})
	return found
}

// TestIPv6Plaintext: IPv6 is no way around the proxy. What comes without a
// tunnel is refused where its namespace enforces, by the pod's address and its
// link-local one, and flows where it observes; a pod that lets nobody in by
// IPv6, since it has no such address, is not reached by its link-local one.
//
// What it defends: the capture rules hold for both families, and the listeners
// behind them.
func TestIPv6Plaintext(t *testing.T) {
	m := dualStack(t)
	var reached, watched atomic.Int64
	serve(t, m.Pod("server"), ":8080", greet(&reached))
	serve(t, m.Pod("watched"), ":8080", greet(&watched))
	// The proxy names the interface by its number.
	number := func(addr string) string { return strings.Replace(addr, "%eth0", "%2", 1) }
	for _, at := range []string{"[fd88::c]:8080", "[" + linkLocal(t, m.Pod("server")) + "%eth0]:8080"} {
		got, own, err := callGreeter(t.Context(), m.Pod("stranger"), at, "hello")
		if got != "" || timedOut(err) {
			t.Errorf("a plaintext caller of %s got %q, %v; want nothing and the connection closed", at, got, err)
		}
		r := recordOf(t, m, audit.Destination, number(own))
		if r.Verdict != audit.Denied || r.Transport != "plaintext" || !strings.Contains(r.Reason, "plaintext") ||
			r.Destination.Workload != "shop/server" || r.Destination.Address != number(at) || r.BytesReceived != 0 {
			t.Errorf("the record is %+v", r)
		}
	}
	if c, err := net.DialTimeout("tcp", "[fd88::c]:8080", 10*time.Second); err == nil { // from the node
		_ = c.SetDeadline(time.Now().Add(20 * time.Second))
		if n, err := c.Read(make([]byte, 1)); n != 0 || timedOut(err) {
			t.Errorf("a caller on the node got %d bytes, %v", n, err)
		}
		c.Close()
	}
	if reached.Load() != 0 {
		t.Errorf("the application was reached %d times", reached.Load())
	}
	got, own, err := callGreeter(t.Context(), m.Pod("stranger"), "[fd88::d]:8080", "hello")
	if got != greeting+"hello" || err != nil {
		t.Errorf("a plaintext caller where it is observed got %q, %v", got, err)
	}
	if r := recordOf(t, m, audit.Destination, own); r.Verdict != audit.Observed || r.Transport != "plaintext" || r.Destination.Address != "[fd88::d]:8080" {
		t.Errorf("the record is %+v", r)
	}

	// Outwards: a destination outside of the mesh is one by IPv6 too, and a
	// neighbour's link-local address is none.
	serve(t, m.Pod("stranger"), ":9090", greet(&watched))
	got, own, err = callGreeter(t.Context(), m.Pod("client"), "[fd88::14]:9090", "hello")
	if got != greeting+"hello" || err != nil {
		t.Errorf("a destination outside of the mesh: %q, %v", got, err)
	}
	if r := recordOf(t, m, audit.Source, own); r.Verdict != audit.Allowed || r.Transport != "plaintext" || r.Destination.Address != "[fd88::14]:9090" || r.Source.ID != idClient {
		t.Errorf("the record is %+v", r)
	}
	for _, name := range []string{"stranger", "watched"} {
		before := watched.Load()
		at := "[" + linkLocal(t, m.Pod(name)) + "%eth0]:"
		for _, port := range []string{"8080", "9090"} {
			if got, _, err := callGreeter(t.Context(), m.Pod("client"), at+port, "hello"); got != "" || timedOut(err) || watched.Load() != before {
				t.Errorf("the link-local address of %s: %q, %v", name, got, err)
			}
		}
	}
}

// linkLocal returns the address of a pod's eth0 that begins with fe80.
func linkLocal(t *testing.T, p *lab.Pod) (found string) {
	t.Helper()
	err := p.Do(func() error {
		eth0, err := net.InterfaceByName("eth0")
		if err != nil {
			return err
		}
		list, err := eth0.Addrs()
		for _, a := range list {
			if n := a.(*net.IPNet); n.IP.To4() == nil && n.IP.IsLinkLocalUnicast() {
				found = n.IP.String()
			}
		}
		return err
	})
	if err != nil || found == "" {
		t.Fatalf("no link-local address of %s: %v", p.Name, err)
	}
	return found
}

// TestIPv6NoOpenRelay: a caller of the server has the server's proxy dial the
// server by its own addresses, in the one spelling that they have, and nothing
// else; see TestNoOpenRelay.
func TestIPv6NoOpenRelay(t *testing.T) {
	m := dualStack(t)
	var server, victims atomic.Int64
	serve(t, m.Pod("server"), "[fd88::c]:8080", greet(&server))
	serve(t, m.Pod("server"), "[::1]:8080", greet(&victims))
	for _, name := range []string{"watched", "stranger"} {
		serve(t, m.Pod(name), ":8080", greet(&victims))
	}
	u := openTunnel(t, m.Pod("stranger"), "fd88::c", stolenForge(t, m).sign(t, nil, idClient))
	for _, authority := range []string{
		"[fd88::d]:8080", "[fd88::14]:8080", "[fd88::1]:8080", // another pod, one outside of the mesh, the node
		"[::1]:8080", "[::]:8080", "[::ffff:127.0.0.1]:8080",
		"[fd88:0::c]:8080", "[FD88::C]:8080", "[fd88::c%25eth0]:8080", "[fd88::0.0.0.12]:8080", "fd88::c:8080",
		"[fd88::c]:15001", "[fd88::c]:15006", "[fd88::c]:15008", "[fd88::c]:08080",
		"[" + linkLocal(t, m.Pod("server")) + "]:8080",
	} {
		status, _, got, err := u.ask(t.Context(), http.MethodConnect, authority, http.Header{})
		if status == http.StatusOK || got == greeting+"hello" {
			t.Errorf("%s: %d, %q, %v", authority, status, got, err)
		}
	}
	if server.Load()+victims.Load() != 0 {
		t.Errorf("the server was reached %d times, others %d times", server.Load(), victims.Load())
	}
	if status, _, got, err := u.ask(t.Context(), http.MethodConnect, "[fd88::c]:8080", http.Header{}); status != http.StatusOK || got != greeting+"hello" || err != nil {
		t.Errorf("the workload's own address: %d, %q, %v", status, got, err)
	}
}

// TestIPv6Revoked: a connection by IPv6 ends within a second when its grant is
// removed, and one without a tunnel when its namespace enforces.
func TestIPv6Revoked(t *testing.T) {
	m := dualStack(t)
	serve(t, m.Pod("server"), ":8080", echo)
	serve(t, m.Pod("watched"), ":8080", echo)
	victim, neighbour := hold(t, m.Pod("client"), "[fd96::1]:80"), hold(t, m.Pod("six"), "[fd88::c]:8080")
	end, edit := victim.ending(), time.Now()
	m.Write("policies.yaml", sixGrants(false))
	if at := <-end; at.IsZero() || at.Sub(edit) > atOnce {
		t.Errorf("the connection ended %s after the edit, want at most %s", at.Sub(edit), atOnce)
	}
	if r := recordOf(t, m, audit.Source, victim.own); r.Destination.Address != "[fd96::1]:80" {
		t.Errorf("the source's record is %+v", r)
	}
	m.Eventually(15*time.Second, "the record of the revoked connection", func() error {
		for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination}) {
			if r.Ended == "revoked" && r.Source.ID == idClient && r.Destination.Address == "[fd88::c]:8080" {
				return nil
			}
		}
		return errors.New("none yet")
	})
	if err := neighbour.ping(); err != nil {
		t.Errorf("the connection of another did not survive: %v", err)
	}

	plain := hold(t, m.Pod("stranger"), "[fd88::d]:8080")
	near := hold(t, m.Pod("stranger"), "["+linkLocal(t, m.Pod("watched"))+"%eth0]:8080")
	end, edit = plain.ending(), time.Now()
	nearEnd := near.ending()
	b, err := os.ReadFile(m.Dir + "/mesh.yaml")
	if err != nil {
		t.Fatal(err)
	}
	m.Write("mesh.yaml", strings.Replace(string(b), `"observe"`, `"enforce"`, 1))
	if at := <-end; at.IsZero() || at.Sub(edit) > atOnce {
		t.Errorf("the plaintext connection ended %s after the edit, want at most %s", at.Sub(edit), atOnce)
	}
	if at := <-nearEnd; at.IsZero() || at.Sub(edit) > atOnce {
		t.Errorf("the one by a link-local address ended %s after the edit, want at most %s", at.Sub(edit), atOnce)
	}
	for _, own := range []string{plain.own, strings.Replace(near.own, "%eth0", "%2", 1)} {
		if r := recordOf(t, m, audit.Destination, own); r.Verdict != audit.Observed || r.Ended != "revoked" {
			t.Errorf("the record is %+v", r)
		}
	}
}

// TestIPv6WhereItIsNot: in a pod without IPv6 nothing comes or goes by it,
// whatever the documents say, and the rest of the mesh works; see also
// TestIPv6. Datagrams of IPv6 are left alone as those of IPv4 are.
func TestIPv6WhereItIsNot(t *testing.T) {
	m := dualStack(t)
	serve(t, m.Pod("four"), ":8080", echo)
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	if c, err := m.Pod("four").Dial(ctx, "tcp", "[fd88::c]:8080"); err == nil {
		c.Close()
		t.Error("a pod without IPv6 dialled by it")
	} else if !errors.Is(err, syscall.EADDRNOTAVAIL) && !errors.Is(err, syscall.ENETUNREACH) {
		t.Error(err)
	}
	l, err := m.Pod("server").ListenPacket("udp", "[fd88::c]:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	conn, err := m.Pod("other").Dial(ctx, "udp", "[fd88::c]:5353")
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if _, err := conn.Write([]byte("datagram")); err != nil {
		t.Fatal(err)
	}
	_ = l.SetDeadline(time.Now().Add(10 * time.Second))
	b := make([]byte, 100)
	if n, from, err := l.ReadFrom(b); err != nil || !bytes.Equal(b[:n], []byte("datagram")) || from.String() != conn.LocalAddr().String() {
		t.Errorf("a datagram: %q from %v, %v", b[:n], from, err)
	}
}
