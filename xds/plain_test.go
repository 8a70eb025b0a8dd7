package xds

import (
	"maps"
	"net/netip"
	"testing"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"

	"github.com/signet-mesh/signet/internal/mesh"
)

// A workload whose namespace is on its way into the mesh or out of it is called
// in plain, by its address and by its services, and through a tunnel as soon as
// the namespace has joined.
//
// What it defends: a tunnel to a pod that does not listen for one yet.
func TestCalledInPlain(t *testing.T) {
	v := view(t, "shop.yaml")
	for _, plain := range []bool{false, true} {
		state := &mesh.State{
			TrustDomain: v.State.TrustDomain, SVIDTTL: v.State.SVIDTTL, Namespaces: v.State.Namespaces,
			Workloads: v.State.Workloads, Services: v.State.Services, Plain: map[string]bool{},
		}
		for ns := range maps.Keys(state.Namespaces) {
			state.Plain[ns] = plain
		}
		of := *v
		of.State = state
		looked := 0
		for i := range state.Workloads {
			w := &state.Workloads[i]
			if w.Capture == nil || len(w.Capture.Addrs) == 0 || state.Mode(w.Namespace) == mesh.ModeOff {
				continue
			}
			r, ok := Destination(&of, "n1", DestinationName(netip.AddrPortFrom(w.Capture.Addrs[0], 8080)))
			if !ok {
				t.Fatalf("%s is no destination", w.Key())
			}
			var c clusterv3.Cluster
			if err := r.Body.UnmarshalTo(&c); err != nil {
				t.Fatal(err)
			}
			for _, group := range c.GetLoadAssignment().GetEndpoints() {
				for _, e := range group.GetLbEndpoints() {
					looked++
					if tunnel := e.GetEndpoint().GetAddress().GetEnvoyInternalAddress() != nil; tunnel == plain {
						t.Errorf("plain %v: %s is called through a tunnel: %v", plain, w.Key(), tunnel)
					}
				}
			}
		}
		if looked == 0 {
			t.Fatal("no endpoint was looked at")
		}
	}
}
