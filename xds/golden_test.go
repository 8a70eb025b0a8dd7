package xds

import (
	"bytes"
	"encoding/json"
	"flag"
	"maps"
	"net/netip"
	"os"
	"path/filepath"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/encoding/protojson"

	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/internal/mesh"
)

var update = flag.Bool("update", false, "rewrite the golden files")

// view loads a mesh from testdata.
func view(t testing.TB, name string) *mesh.View {
	t.Helper()
	m, err := manifest.Load(filepath.Join("testdata", name), "n1")
	if err != nil {
		t.Fatal(err)
	}
	model, bad := authz.Compile(m.State.TrustDomain, m.Policies)
	if len(bad) > 0 {
		t.Fatal(bad)
	}
	v := &mesh.View{Revision: m.Revision, State: m.State, Model: model}
	for i := range m.State.Workloads {
		v.Identities = append(v.Identities, m.State.Workloads[i].ID)
	}
	return v
}

// whole is all that a node's proxy gets: what its agent builds and what the
// control plane pushes ahead.
func whole(v *mesh.View, node string, o Options) (Set, error) {
	set, err := Local(v, node, o)
	if err != nil {
		return nil, err
	}
	far, err := Destinations(v, node)
	if err != nil {
		return nil, err
	}
	for _, r := range far[TypeCluster] {
		set.Put(r)
	}
	return set, nil
}

// TestGolden: what a node gets, one file for each type. Run with -update after
// a change that is meant, and read the difference.
func TestGolden(t *testing.T) {
	v := view(t, "shop.yaml")
	set, err := whole(v, "n1", Options{AccessLog: "/state/spool/access.log"})
	if err != nil {
		t.Fatal(err)
	}
	files := map[string]string{TypeListener: "listeners", TypeCluster: "clusters", TypeRoute: "routes"}
	if got := len(set); got != len(files) {
		t.Errorf("%d types of resources, want %d", got, len(files))
	}
	for typeURL, file := range files {
		var all []json.RawMessage
		for _, name := range slices.Sorted(maps.Keys(set[typeURL])) {
			m, err := set[typeURL][name].Body.UnmarshalNew()
			if err != nil {
				t.Fatal(err)
			}
			b, err := protojson.Marshal(m)
			if err != nil {
				t.Fatal(err)
			}
			all = append(all, b)
		}
		// protojson varies its white space on purpose; encoding/json does not.
		got, err := json.MarshalIndent(all, "", " ")
		if err != nil {
			t.Fatal(err)
		}
		got = append(got, '\n')
		path := filepath.Join("testdata", "shop."+file+".json")
		if *update {
			if err := os.WriteFile(path, got, 0o644); err != nil {
				t.Fatal(err)
			}
			continue
		}
		want, err := os.ReadFile(path)
		if err != nil {
			t.Fatal(err)
		}
		if !bytes.Equal(got, want) {
			t.Errorf("%s differs from what was built; see it with go test ./xds -update && git diff", path)
		}
	}
}

// TestBuildIsDeterministic: the same input gives the same bytes, or every
// restart of the control plane would push everything to everyone.
func TestBuildIsDeterministic(t *testing.T) {
	v := view(t, "shop.yaml")
	first, err := whole(v, "n1", Options{AccessLog: "/log"})
	if err != nil {
		t.Fatal(err)
	}
	for range 20 {
		again, err := whole(v, "n1", Options{AccessLog: "/log"})
		if err != nil {
			t.Fatal(err)
		}
		if first.Version() != again.Version() {
			t.Fatal("two builds of the same view differ")
		}
	}
}

// TestNodeScope: a node gets listeners and policies of its own workloads only.
func TestNodeScope(t *testing.T) {
	set, err := whole(view(t, "shop.yaml"), "n2", Options{})
	if err != nil {
		t.Fatal(err)
	}
	for _, typeURL := range []string{TypeListener, TypeRoute} {
		for name := range set[typeURL] {
			if name != listenerTunnel && name != originateName(spiffeid.RequireTrustDomainFromString("mesh.test")) && !strings.HasSuffix(name, "|shop/db") {
				t.Errorf("node n2 gets %q of another node", name)
			}
		}
	}
	if set, err = whole(view(t, "shop.yaml"), "stranger", Options{}); err != nil {
		t.Fatal(err)
	}
	if len(set[TypeRoute]) != 0 || len(set[TypeListener]) != 2 {
		t.Errorf("a node without workloads gets %d listeners and %d routes, want 2 and 0", len(set[TypeListener]), len(set[TypeRoute]))
	}
}

// TestDestinations: what a dialled address becomes.
func TestDestinations(t *testing.T) {
	v := view(t, "shop.yaml")
	for _, c := range []struct {
		name  string
		found bool
		parts []string // that the cluster must mention
	}{
		{"dst|10.88.0.3:15432", true, []string{"10.88.0.3:15008", "spiffe://mesh.test/ns/shop/sa/db"}},
		{"dst|10.96.0.1:5432", true, []string{"10.88.0.3:15432", "192.0.2.7"}},
		{"dst|10.96.0.1:5433", false, nil}, // the service has no such port
		{"dst|10.88.0.5:80", true, []string{"10.88.0.5"}},
		{"dst|198.51.100.1:443", true, []string{"198.51.100.1"}},
		{"dst|10.88.0.3:15008", false, nil}, // the mesh's own ports
		{"dst|10.88.0.3:15001", false, nil},
		{"dst|10.88.0.3:15006", false, nil},
		{"dst|10.88.0.3:0", false, nil},
		{"dst|10.88.0.3:015432", false, nil}, // another spelling
		{"dst|10.88.0.3", false, nil},
		{"10.88.0.3:80", false, nil},
		{"dst|::ffff:10.88.0.3:80", false, nil},
		{"dst|[::ffff:10.88.0.3]:80", false, nil},
	} {
		r, ok := Destination(v, "n1", c.name)
		if ok != c.found {
			t.Errorf("%s: found %t, want %t", c.name, ok, c.found)
			continue
		}
		for _, part := range c.parts {
			if !bytes.Contains(r.Body.Value, []byte(part)) {
				t.Errorf("%s: no %q in the cluster", c.name, part)
			}
		}
	}
	v.State.RefuseUnknown = true
	if _, ok := Destination(v, "n1", "dst|198.51.100.1:443"); ok {
		t.Error("an unknown destination is found although unknown destinations are refused")
	}
	if _, ok := Destination(nil, "n1", "dst|198.51.100.1:443"); ok {
		t.Error("a destination is found without any state")
	}
}

// TestNoPlainWayToEnrolled: an endpoint in an enrolled namespace is reached
// through a tunnel that names its identity, whichever address was dialled. An
// endpoint given by address only must not turn that off.
func TestNoPlainWayToEnrolled(t *testing.T) {
	v := view(t, "shop.yaml")
	d, ok := resolve(v, "n1", netip.MustParseAddrPort("10.88.0.3:80"))
	if !ok || len(d.hops) != 1 || d.hops[0].workload == nil {
		t.Fatalf("an enrolled workload's address resolves to %+v, want a tunnel to it", d.hops)
	}
}

// TestServiceKeepsToTheNode: internalTrafficPolicy: Local means the caller's
// node and no other; session affinity chooses by the caller's address; an
// endpoint may have a port of its own, or not serve a port at all; one that ends
// serves where the caller's node and the port have no other.
func TestServiceKeepsToTheNode(t *testing.T) {
	v := view(t, "shop.yaml")
	s := *v.State.ServiceAt(netip.MustParseAddr("10.96.0.1"))
	vip := netip.MustParseAddr("10.97.0.1")
	s.Name, s.VIPs, s.Local, s.Affinity = "near", []netip.Addr{vip}, true, true
	s.Ports = []mesh.ServicePort{{Port: 80, Target: 8080}, {Port: 81, Target: 8081}}
	s.Endpoints = []mesh.Endpoint{
		{Addr: netip.MustParseAddr("192.0.2.1"), Node: "n1", Targets: []uint16{1080, 0}},
		{Addr: netip.MustParseAddr("192.0.2.2"), Node: "n2"},
		{Addr: netip.MustParseAddr("192.0.2.3"), Node: "n2", Ending: true},
		{Addr: netip.MustParseAddr("192.0.2.4"), Node: "n4", Ending: true},
		{Addr: netip.MustParseAddr("192.0.2.5"), Node: "n5", Targets: []uint16{8080, 0}},
		{Addr: netip.MustParseAddr("192.0.2.6"), Node: "n5", Ending: true},
	}
	v.State = &mesh.State{TrustDomain: v.State.TrustDomain, Services: []mesh.Service{s}}
	for _, c := range []struct {
		node string
		port uint16
		want string
	}{
		{"n1", 80, "192.0.2.1:1080"}, {"n1", 81, ""}, {"n2", 80, "192.0.2.2:8080"}, {"n2", 81, "192.0.2.2:8081"}, {"n3", 80, ""},
		{"n4", 80, "192.0.2.4:8080"}, {"n5", 80, "192.0.2.5:8080"}, {"n5", 81, "192.0.2.6:8081"},
	} {
		d, ok := resolve(v, c.node, netip.AddrPortFrom(vip, c.port))
		var hops []string
		for _, h := range d.hops {
			hops = append(hops, h.addr.String())
		}
		got := strings.Join(hops, " ")
		if !ok || got != c.want || !d.affinity {
			t.Errorf("from %s, port %d: %q, want %q (%+v)", c.node, c.port, got, c.want, d)
		}
	}
}
