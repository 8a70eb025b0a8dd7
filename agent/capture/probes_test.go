package capture

import (
	"errors"
	"net"
	"net/netip"
	"strings"
	"testing"

	"github.com/vishvananda/netlink"

	"github.com/signet-mesh/signet/internal/lab"
)

// kubelet dials as the node's rules make the kubelet look.
var kubelet = net.Dialer{LocalAddr: &net.TCPAddr{IP: ProbeSource.AsSlice()}}

// probed is a pair whose b has the address that probes come from.
func probed(t *testing.T) pair {
	t.Helper()
	p := newPair(t)
	if err := p.b.AddAddr(netip.PrefixFrom(ProbeSource, 32)); err != nil {
		t.Fatal(err)
	}
	err := p.a.Do(func() error { // answers go to b, as if it were the node
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		to := &net.IPNet{IP: ProbeSource.AsSlice(), Mask: net.CIDRMask(32, 32)}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK})
	})
	if err != nil {
		t.Fatal(err)
	}
	proxy(t, p.a)
	for _, addr := range []string{":8080", ":8081", ":9090"} {
		serve(t, p.a, "tcp", addr, "app")
	}
	return p
}

func applyWith(t *testing.T, p *lab.Pod, o Options) {
	t.Helper()
	if err := Apply(p.NetNS, o); err != nil {
		t.Fatal(err)
	}
	if err := Verify(p.NetNS, o); err != nil {
		t.Fatal(err)
	}
}

// Defends: what comes from the probes' source passes on declared ports, and on
// no other; nobody else passes on them.
func TestProbes(t *testing.T) {
	p := probed(t)
	applyWith(t, p.a, Options{Probes: []uint16{9090, 8080, 9090}})
	reaches(t, p.b, kubelet, "10.88.0.2:8080", "app -")
	reaches(t, p.b, kubelet, "10.88.0.2:9090", "app -")
	reaches(t, p.b, kubelet, "10.88.0.2:8081", "inbound 10.88.0.2:8081")
	reaches(t, p.b, kubelet, "10.88.0.2:15001", "inbound 10.88.0.2:15001")
	reaches(t, p.b, net.Dialer{}, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	without(t, p.a, "input_nat", "probes of port 8080")
	reaches(t, p.b, kubelet, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	without(t, p.a, "input_filter", "probes of port 9090")
	reaches(t, p.b, kubelet, "10.88.0.2:9090", "refused")
}

// Defends: the same by IPv6.
func TestProbes_IPv6(t *testing.T) {
	p := newPair(t)
	if err := p.b.AddAddr(netip.PrefixFrom(ProbeSource6, 128)); err != nil {
		t.Fatal(err)
	}
	err := p.a.Do(func() error { // answers go to b, as if it were the node
		eth0, err := netlink.LinkByName("eth0")
		if err != nil {
			return err
		}
		to := &net.IPNet{IP: ProbeSource6.AsSlice(), Mask: net.CIDRMask(128, 128)}
		return netlink.RouteAdd(&netlink.Route{LinkIndex: eth0.Attrs().Index, Dst: to, Scope: netlink.SCOPE_LINK})
	})
	if err != nil {
		t.Fatal(err)
	}
	kubelet := net.Dialer{LocalAddr: &net.TCPAddr{IP: ProbeSource6.AsSlice()}}
	proxyOn(t, p.a, "tcp6")
	serve(t, p.a, "tcp", ":8080", "app")
	serve(t, p.a, "tcp", ":8081", "app")
	applyWith(t, p.a, Options{Probes: []uint16{8080}})
	reaches(t, p.b, kubelet, "[fd00::2]:8080", "app -")
	reaches(t, p.b, kubelet, "[fd00::2]:8081", "inbound [fd00::2]:8081")
	reaches(t, p.b, kubelet, "[fd00::2]:15001", "inbound [fd00::2]:15001")
	reaches(t, p.b, net.Dialer{LocalAddr: &net.TCPAddr{IP: p.b.Addr6.AsSlice()}}, "[fd00::2]:8080", "inbound [fd00::2]:8080")
	without(t, p.a, "input_filter", "probes of port 8080")
	reaches(t, p.b, kubelet, "[fd00::2]:8080", "refused")
	without(t, p.a, "input_nat", "probes of port 8080")
	reaches(t, p.b, kubelet, "[fd00::2]:8080", "inbound [fd00::2]:8080")
}

// Defends: ports that change while the namespace is captured take effect in
// one step: the old one is closed, also for connections that are open, and
// the connections through the proxy live on.
func TestProbes_change(t *testing.T) {
	p := probed(t)
	before, after := Options{Probes: []uint16{8080}}, Options{Probes: []uint16{9090}}
	applyWith(t, p.a, before)
	through, _, err := dial(t, p.b, net.Dialer{}, "10.88.0.2:8081")
	if err != nil {
		t.Fatal(err)
	}
	past, got, err := dial(t, p.b, kubelet, "10.88.0.2:8080")
	if err != nil || got != "app -" {
		t.Fatal(got, err)
	}
	if err := Verify(p.a.NetNS, after); !errors.Is(err, ErrNotCaptured) {
		t.Fatalf("with other ports: %v", err)
	}
	stop, stopped := make(chan struct{}), make(chan error)
	go func() { // somebody who tries all the time while the rules change
		for {
			select {
			case <-stop:
				stopped <- nil
				return
			default:
			}
			c, line, err := dial(t, p.b, net.Dialer{}, "10.88.0.2:8080")
			if err != nil || !strings.HasPrefix(line, "inbound") {
				<-stop
				stopped <- errors.Join(errors.New("somebody else got "+line), err)
				return
			}
			c.Close()
		}
	}()
	for range 20 {
		applyWith(t, p.a, after)
		applyWith(t, p.a, before)
	}
	applyWith(t, p.a, after)
	close(stop)
	if err := <-stopped; err != nil {
		t.Error(err)
	}
	reaches(t, p.b, kubelet, "10.88.0.2:8080", "inbound 10.88.0.2:8080")
	reaches(t, p.b, kubelet, "10.88.0.2:9090", "app -")
	if !alive(through) {
		t.Error("the connection through the proxy ended")
	}
	if alive(past) {
		t.Error("the probe's connection goes on although the port is closed")
	}
}

// Defends: a pod cannot have the proxy's own ports opened by declaring probes
// on them; nothing is changed then.
func TestProbes_refused(t *testing.T) {
	p := newPair(t)
	for _, port := range []uint16{0, 15001, 15006, 15008} {
		err := Apply(p.a.NetNS, Options{Probes: []uint16{8080, port}})
		if err == nil || !strings.Contains(err.Error(), "Probes: port") || errors.Is(err, ErrNotCaptured) {
			t.Errorf("port %d: %v", port, err)
		}
	}
	if err := Verify(p.a.NetNS, Options{}); !errors.Is(err, ErrNotCaptured) {
		t.Errorf("after refusals: %v", err)
	}
}
