package clients

import (
	"errors"
	"fmt"
	"io"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"
)

// TestPlainCaller: a captured program that speaks no TLS calls servers of all
// languages, to which its proxy speaks for it, by certificates that are replaced
// meanwhile. Each server looks at whom it speaks with, as it does with programs that
// have a library: it answers the one that it wants, and no other.
func TestPlainCaller(t *testing.T) {
	f := start(t, 10*time.Second)
	const plainID = "spiffe://mesh.test/ns/shop/sa/" + plain
	here := f.mesh.Lab.Gateway().String()
	type place struct{ open, closed string } // addresses of the mesh's own
	places := map[*language]place{}
	servers := map[*language]*server{}
	var docs strings.Builder
	vip := netip.MustParseAddr("10.96.0.10")
	for _, l := range f.languages {
		s := &server{program: f.run(t, l, 0, "serve", here+":0", plainID, here+":0", nobodyID), language: l}
		s.open, s.closed = s.next(t).Listening, s.next(t).Listening
		if s.closed == "" {
			t.Fatalf("%s does not listen: %s", s.what, s.next(t).Error)
		}
		fmt.Fprintf(&docs, `apiVersion: signet.dev/v1alpha1
kind: ServiceEntry
metadata: {namespace: shop, name: %s}
spec:
  vips: [%s]
  ports: [{port: 80, targetPort: %d}, {port: 81, targetPort: %d}]
  endpoints: [{address: %s, spiffeID: %q, tls: originate}]
---
`, l.name, vip, netip.MustParseAddrPort(s.open).Port(), netip.MustParseAddrPort(s.closed).Port(), here, l.id())
		servers[l], places[l] = s, place{net.JoinHostPort(vip.String(), "80"), net.JoinHostPort(vip.String(), "81")}
		vip = vip.Next()
	}
	f.mesh.Edit("servers.yaml", docs.String())
	call := func(at string) (string, error) {
		c, err := f.mesh.Pod(plain).Dial(t.Context(), "tcp", at)
		if err != nil {
			return "", err
		}
		defer c.Close()
		if err := c.SetDeadline(time.Now().Add(20 * time.Second)); err != nil {
			return "", err
		}
		b := make([]byte, len("hello"))
		n, err := io.ReadFull(c, b)
		return string(b[:n]), err
	}
	spare := patience(2)
	for _, l := range f.languages {
		t.Run(l.name, func(t *testing.T) {
			s, serials := servers[l], map[string]bool{}
			for began := time.Now(); len(serials) < 2; time.Sleep(500 * time.Millisecond) {
				if time.Since(began) > 20*time.Second {
					t.Fatalf("the caller shows the same certificate all the time: %v", serials)
				}
				got, err := call(places[l].open)
				saw := s.next(t)
				if err != nil || got != "hello" || saw.Error != "" || saw.Server != s.open {
					why := errors.New(fmt.Sprint("got ", got, ", ", err, "; the server: ", saw.Error))
					if spare.again(t, why, l) {
						continue
					}
					t.Fatal(why)
				}
				leaf := saw.leaf(t)
				if len(leaf.URIs) != 1 || leaf.URIs[0].String() != plainID {
					t.Fatalf("the server speaks with %v", leaf.URIs)
				}
				serials[leaf.SerialNumber.String()] = true
			}
			got, err := call(places[l].closed)
			if saw := s.next(t); err == nil || got != "" || saw.Error == "" || saw.Server != s.closed {
				t.Errorf("by a server that wants another: %q, %v; the server: %q", got, err, saw.Error)
			}
		})
	}
}
