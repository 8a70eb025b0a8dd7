package xds

import (
	"testing"
	"time"
)

// To open new tunnels, the proxy needs another cluster for them. Nothing else may
// change: another listener would end the connections in it.
func TestNewTunnels(t *testing.T) {
	v := view(t, "shop.yaml")
	build := func(at time.Time) Set {
		t.Helper()
		set, err := Local(v, "n1", Options{Tunnels: at})
		if err != nil {
			t.Fatal(err)
		}
		return set
	}
	began := time.Unix(1_800_000_000, 0)
	sets := []Set{build(time.Time{}), build(began), build(began.Add(time.Second))}
	for i, set := range sets[1:] {
		for kind, resources := range set {
			for name, r := range resources {
				if same := sets[i][kind][name].Version == r.Version; same == (kind == TypeCluster && name == clusterTunnel) {
					t.Errorf("%d: %s %s: the same %t", i, kind, name, same)
				}
			}
		}
	}
	if again := build(began); again[TypeCluster][clusterTunnel].Version != sets[1][TypeCluster][clusterTunnel].Version {
		t.Error("another cluster for the same instant")
	}
}
