package xds

import (
	"net/netip"
	"slices"
	"strings"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"

	"github.com/signet-mesh/signet/internal/mesh"
)

// dual is the shop with an IPv6 address for each workload but one.
func dual(t *testing.T) (v *mesh.View, without string) {
	t.Helper()
	v = view(t, "shop.yaml")
	state := &mesh.State{
		TrustDomain: v.State.TrustDomain, SVIDTTL: v.State.SVIDTTL, Namespaces: v.State.Namespaces,
		Workloads: slices.Clone(v.State.Workloads), Services: v.State.Services,
	}
	next := netip.MustParseAddr("fd88::1")
	for i := range state.Workloads {
		w := &state.Workloads[i]
		if w.Capture == nil {
			continue
		}
		if without == "" && w.Node == "n1" {
			without = w.Key()
			continue
		}
		c := *w.Capture
		c.Addrs = append(slices.Clone(c.Addrs), next)
		w.Capture, next = &c, next.Next()
	}
	v.State = state
	return v, without
}

// TestIPv6Listeners: listeners are on IPv6 too where the workload has such an
// address, in its namespace, and nothing names IPv6 where the kernel has none:
// the proxy would refuse all of it there.
func TestIPv6Listeners(t *testing.T) {
	for _, six := range []bool{true, false} {
		v, without := dual(t)
		set, err := Local(v, "n1", Options{IPv6: six})
		if err != nil {
			t.Fatal(err)
		}
		both := 0
		for name, r := range set[TypeListener] {
			var l listenerv3.Listener
			if err := r.Body.UnmarshalTo(&l); err != nil {
				t.Fatal(err)
			}
			if err := l.ValidateAll(); err != nil {
				t.Errorf("%s: %v", name, err)
			}
			want := six && l.GetInternalListener() == nil && !strings.HasSuffix(name, "|"+without)
			if (len(l.AdditionalAddresses) == 1) != want {
				t.Errorf("IPv6 %t: %s has additional addresses %v, want some: %t", six, name, l.AdditionalAddresses, want)
				continue
			}
			for _, a := range l.AdditionalAddresses {
				both++
				first, second := l.Address.GetSocketAddress(), a.Address.GetSocketAddress()
				if first.Address != "0.0.0.0" || second.Address != "::" || second.GetPortValue() != first.GetPortValue() ||
					second.NetworkNamespaceFilepath != first.NetworkNamespaceFilepath || second.Ipv4Compat {
					t.Errorf("%s listens on %v and %v", name, first, second)
				}
			}
		}
		if six == (both == 0) {
			t.Errorf("IPv6 %t: %d listeners of both families", six, both)
		}
		for _, name := range []string{clusterTunnel, clusterLocal, clusterPlain} {
			var c clusterv3.Cluster
			if err := set[TypeCluster][name].Body.UnmarshalTo(&c); err != nil {
				t.Fatal(err)
			}
			if extra := c.UpstreamBindConfig.ExtraSourceAddresses; (len(extra) == 1) != six {
				t.Errorf("IPv6 %t: cluster %s dials from %v too", six, name, extra)
			}
		}
	}
}

// TestIPv6Destinations: a service's IPv6 address leads to the IPv6 addresses of
// its endpoints and to nothing else, and a link-local one to nothing.
func TestIPv6Destinations(t *testing.T) {
	v, _ := dual(t)
	s := *v.State.ServiceAt(netip.MustParseAddr("10.96.0.1"))
	s.Endpoints = append(slices.Clone(s.Endpoints), mesh.Endpoint{Addr: netip.MustParseAddr("2001:db8::7")})
	s.VIPs = append(slices.Clone(s.VIPs), netip.MustParseAddr("fd96::1"))
	state := &mesh.State{TrustDomain: v.State.TrustDomain, Namespaces: v.State.Namespaces, Workloads: v.State.Workloads, Services: []mesh.Service{s}}
	db := state.Workload("shop/db")
	if db == nil || len(db.Capture.Addrs) != 2 {
		t.Fatalf("shop/db is %+v", db)
	}
	six := db.Capture.Addrs[1]
	for dialled, want := range map[string]string{
		"[fd96::1]:5432":                     netip.AddrPortFrom(six, 15432).String() + " meshed, [2001:db8::7]:15432",
		netip.AddrPortFrom(six, 99).String(): netip.AddrPortFrom(six, 99).String() + " meshed",
		"[2001:db8::9]:443":                  "[2001:db8::9]:443",
		"[fe80::1]:443":                      "nothing",
		"[fe80::1%2]:443":                    "nothing",
		"[fd96::1]:5433":                     "nothing",
	} {
		addr := netip.MustParseAddrPort(dialled)
		got := "nothing"
		if d, ok := resolve(&mesh.View{State: state}, "n1", addr); ok {
			var hops []string
			for _, h := range d.hops {
				text := h.addr.String()
				if h.workload != nil {
					text += " meshed"
				}
				hops = append(hops, text)
			}
			slices.Sort(hops)
			slices.Reverse(hops)
			got = strings.Join(hops, ", ")
		}
		if got != want {
			t.Errorf("%s leads to %s, want %s", dialled, got, want)
		}
		r, ok := Destination(&mesh.View{State: state}, "n1", DestinationName(addr))
		if ok != (want != "nothing") {
			t.Errorf("%s: a cluster: %t", dialled, ok)
		}
		if !ok || strings.Count(want, "meshed") == strings.Count(want, ",")+1 {
			continue
		}
		var c clusterv3.Cluster
		if err := r.Body.UnmarshalTo(&c); err != nil {
			t.Fatal(err)
		}
		if len(c.UpstreamBindConfig.ExtraSourceAddresses) != 1 {
			t.Errorf("%s is dialled from IPv4 only", dialled)
		}
	}
}
