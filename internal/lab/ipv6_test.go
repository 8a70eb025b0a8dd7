package lab

import (
	"io"
	"net/netip"
	"testing"
	"time"
)

// A lab with an IPv6 subnet: pods reach each other and the gateway at once,
// and addresses that exist nowhere have a route.
func TestBridge6(t *testing.T) {
	l, err := New(Config{Bridge6: netip.MustParsePrefix("fd88::/64")})
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	a, b := addPod(t, l, "a", "10.88.0.2"), addPod(t, l, "b", "10.88.1.3")
	if want := netip.MustParseAddr("fd88::103"); b.Addr6 != want {
		t.Errorf("b has %s, want %s", b.Addr6, want)
	}
	ln, err := b.Listen("tcp", "[fd88::103]:80")
	if err != nil {
		t.Fatal(err)
	}
	defer ln.Close()
	c, err := a.Dial(t.Context(), "tcp", "[fd88::103]:80")
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	got, err := ln.Accept()
	if err != nil {
		t.Fatal(err)
	}
	defer got.Close()
	if _, err := io.WriteString(got, "hi"); err != nil {
		t.Fatal(err)
	}
	_ = c.SetReadDeadline(time.Now().Add(3 * time.Second))
	if _, err := io.ReadFull(c, make([]byte, 2)); err != nil {
		t.Error(err)
	}
	u, err := a.Dial(t.Context(), "udp", "[fd96::1]:53")
	if err != nil {
		t.Fatalf("no route to an address that exists nowhere: %v", err)
	}
	u.Close()
	for _, bad := range []string{"10.0.0.0/8", "fd88::/120"} {
		if _, err := New(Config{Bridge6: netip.MustParsePrefix(bad)}); err == nil {
			t.Errorf("%s was accepted", bad)
		}
	}
}
