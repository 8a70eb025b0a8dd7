package xds

import (
	"slices"
	"testing"

	routev3 "github.com/envoyproxy/go-control-plane/envoy/config/route/v3"

	"github.com/signet-mesh/signet/internal/mesh"
)

// Defends a node's proxy from a pod that has no address yet: Envoy refuses a
// whole route with an empty list in it, and every other pod would keep its old
// policies. What is checked are the messages' own rules, which Envoy has too.
func TestPodWithoutAddress(t *testing.T) {
	for _, mode := range []mesh.Mode{mesh.ModeEnforce, mesh.ModeObserve} {
		v := view(t, "shop.yaml")
		state := &mesh.State{
			TrustDomain: v.State.TrustDomain, SVIDTTL: v.State.SVIDTTL,
			Workloads: slices.Clone(v.State.Workloads), Namespaces: map[string]mesh.Mode{},
		}
		for i := range state.Workloads {
			w := &state.Workloads[i]
			state.Namespaces[w.Namespace] = mode
			if w.Capture != nil {
				capture := *w.Capture
				capture.Addrs = nil
				w.Capture = &capture
			}
		}
		v.State = state
		set, err := Local(v, "n1", Options{})
		if err != nil {
			t.Fatal(err)
		}
		if len(set[TypeRoute]) == 0 {
			t.Fatal("no routes")
		}
		for name, r := range set[TypeRoute] {
			m, err := r.Body.UnmarshalNew()
			if err != nil {
				t.Fatal(err)
			}
			for _, host := range m.(*routev3.RouteConfiguration).VirtualHosts {
				for _, route := range host.Routes {
					for filter, config := range route.TypedPerFilterConfig {
						inner, err := config.UnmarshalNew()
						if err != nil {
							t.Fatal(err)
						}
						if err := inner.(interface{ ValidateAll() error }).ValidateAll(); err != nil {
							t.Errorf("%v: route %s, filter %s: %v", mode, name, filter, err)
						}
					}
				}
			}
		}
	}
}
