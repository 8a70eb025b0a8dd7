package capture

import (
	"net"
	"testing"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
)

// A namespace that leaves the mesh keeps the connections that the proxy has
// taken, in both directions, while new ones pass it by; when the last has ended,
// nothing of the mesh is left. A namespace that comes back in between takes
// them back.
//
// Defends: leaving breaks no connection. Without the chains of translation, or
// without the rules in them, the kernel stops translating, and both connections die.
func TestLeave(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":8080", "own app")
	serve(t, p.b, "tcp", ":8080", "app")
	n := open(t, p.a)
	before, err := n.readSettings()
	if err != nil {
		t.Fatal(err)
	}
	apply(t, p.a)
	out, who, err := dial(t, p.a, net.Dialer{}, "10.88.0.3:8080")
	if err != nil || who != "outbound 10.88.0.3:8080" {
		t.Fatal(who, err)
	}
	in, who, err := dial(t, p.b, net.Dialer{}, "10.88.0.2:8080")
	if err != nil || who != "inbound 10.88.0.2:8080" {
		t.Fatal(who, err)
	}
	left := func(want int) {
		t.Helper()
		var open int
		for deadline := time.Now().Add(5 * time.Second); time.Now().Before(deadline); time.Sleep(20 * time.Millisecond) {
			if open, err = Leave(p.a.NetNS); err != nil {
				t.Fatal(err)
			}
			if open == want {
				return
			}
		}
		t.Fatalf("%d connections are open, want %d", open, want)
	}
	works := func(c net.Conn) {
		t.Helper()
		_ = c.SetDeadline(time.Now().Add(5 * time.Second))
		if !alive(c) {
			t.Fatal("a connection that the proxy had taken is broken")
		}
	}
	left(2)
	works(out)
	works(in)
	reaches(t, p.a, net.Dialer{}, "10.88.0.3:8080", "app -")
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "own app -")
	if err := Verify(p.a.NetNS, opts); err == nil {
		t.Error("a namespace that has left counts as captured")
	}

	apply(t, p.a)
	if ended, err := ResetEstablished(p.a.NetNS); err != nil || ended > 2 { // those of reaches
		t.Errorf("%d ended, %v", ended, err)
	}
	works(out)
	works(in)
	left(2)
	out.Close()
	left(1)
	works(in)
	in.Close()
	left(0)
	if found, err := n.findTable(); err != nil || found != nil {
		t.Errorf("table %v is left, %v", found, err)
	}
	after, err := n.readSettings()
	if err != nil {
		t.Fatal(err)
	}
	for name, value := range before {
		if after[name] != value {
			t.Errorf("setting %s is %q, was %q", name, after[name], value)
		}
	}
	left(0) // again, where there is nothing
}

// A connection that has begun while the namespace was out of the mesh goes on when
// it comes back, although another between the same two ports was redirected before.
//
// Defends: the kernel forgets what it has redirected.
func TestLeave_samePorts(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":8080", "own app")
	from := net.Dialer{LocalAddr: &net.TCPAddr{IP: net.IPv4(10, 88, 0, 3), Port: 40123}}
	apply(t, p.a)
	c, who, err := dial(t, p.b, from, "10.88.0.2:8080")
	if err != nil || who != "inbound 10.88.0.2:8080" {
		t.Fatal(who, err)
	}
	_ = c.(*net.TCPConn).SetLinger(0) // so that the port is free at once
	c.Close()
	if err := Remove(p.a.NetNS); err != nil {
		t.Fatal(err)
	}
	c, who, err = dial(t, p.b, from, "10.88.0.2:8080")
	if err != nil || who != "own app -" {
		t.Fatal(who, err)
	}
	if err := Apply(p.a.NetNS, Options{KeepOpen: true}); err != nil {
		t.Fatal(err)
	}
	_ = c.SetDeadline(time.Now().Add(5 * time.Second))
	if !alive(c) {
		t.Error("the kernel took it for the one before")
	}
}

// What is open in a namespace whose processes are gone ends at once, although
// the peers are there no more to say so.
//
// Defends: a proxy that is to be replaced does not wait for connections of pods
// that do not exist.
func TestEnd(t *testing.T) {
	p := newPair(t)
	serve(t, p.a, "tcp", ":8080", "own app")
	c, _, err := dial(t, p.b, net.Dialer{}, "10.88.0.2:8080")
	if err != nil {
		t.Fatal(err)
	}
	if n, err := End(p.a.NetNS); n != 1 || err != nil {
		t.Fatalf("%d ended, %v, want 1", n, err)
	}
	if alive(c) {
		t.Error("the connection goes on")
	}
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "own app -") // listeners stay
}

// With KeepOpen, connections from before go on in both directions, and new ones
// are captured; without it again, those from before end, and new ones stay.
//
// Defends: to observe breaks nothing, and to enforce leaves nothing past the
// proxy.
func TestKeepOpen(t *testing.T) {
	p := newPair(t)
	proxy(t, p.a)
	serve(t, p.a, "tcp", ":8080", "own app")
	serve(t, p.b, "tcp", ":8080", "app")
	var old []net.Conn
	for _, d := range []struct {
		from *lab.Pod
		to   string
	}{{p.a, "10.88.0.3:8080"}, {p.b, "10.88.0.2:8080"}} {
		c, _, err := dial(t, d.from, net.Dialer{}, d.to)
		if err != nil {
			t.Fatal(err)
		}
		old = append(old, c)
	}
	set := func(keep bool) {
		t.Helper()
		o := Options{Probes: opts.Probes, KeepOpen: keep}
		if err := Apply(p.a.NetNS, o); err != nil {
			t.Fatal(err)
		}
		if err := Verify(p.a.NetNS, o); err != nil {
			t.Fatal(err)
		}
		if err := Verify(p.a.NetNS, Options{Probes: opts.Probes, KeepOpen: !keep}); err == nil {
			t.Error("with and without KeepOpen are the same to Verify")
		}
	}
	set(true)
	for _, c := range old {
		if !alive(c) {
			t.Error("a connection from before is broken")
		}
	}
	young, who, err := dial(t, p.a, net.Dialer{}, "10.88.0.3:8080")
	if err != nil || who != "outbound 10.88.0.3:8080" {
		t.Fatal(who, err)
	}
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	set(false)
	for _, c := range old {
		if alive(c) {
			t.Error("a connection from before goes on")
		}
	}
	if !alive(young) {
		t.Error("a captured connection is broken")
	}
}
