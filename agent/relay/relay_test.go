package relay

import (
	"context"
	"crypto/x509"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"sync"
	"testing"
	"time"

	clusterv3 "github.com/envoyproxy/go-control-plane/envoy/config/cluster/v3"
	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"

	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/internal/bundle"
	"github.com/signet-mesh/signet/xds"
	"github.com/signet-mesh/signet/xds/xdsserver"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// noKeys is a node without certificates.
type noKeys struct{}

func (noKeys) All() []*svid.SVID                 { return nil }
func (noKeys) Bundle() []*x509.Certificate       { return nil }
func (noKeys) Foreign() []*bundle.Bundle         { return nil }
func (noKeys) TrustDomain() spiffeid.TrustDomain { return spiffeid.TrustDomain{} }
func (noKeys) Changed() <-chan struct{}          { return nil }

// upstream is a control plane: a real delta ADS server over a set.
type upstream struct {
	mu      sync.Mutex
	set     xds.Set
	demand  map[string]xds.Resource
	changed chan struct{}
}

func (u *upstream) Resources() (xds.Set, <-chan struct{}) {
	u.mu.Lock()
	defer u.mu.Unlock()
	return u.set, u.changed
}

func (u *upstream) Lookup(_, name string) (xds.Resource, xdsserver.Answer) {
	u.mu.Lock()
	defer u.mu.Unlock()
	if r, ok := u.demand[name]; ok {
		return r, xdsserver.Found
	}
	return xds.Resource{}, xdsserver.Absent
}

func (u *upstream) edit(set xds.Set) {
	u.mu.Lock()
	defer u.mu.Unlock()
	u.set = set
	close(u.changed)
	u.changed = make(chan struct{})
}

// serve runs the control plane until stop.
func (u *upstream) serve(t *testing.T) (conn *grpc.ClientConn, stop func()) {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, &xdsserver.Server{
		Log:  slog.New(slog.DiscardHandler),
		Open: func(context.Context) (xdsserver.Source, xdsserver.Subscriber, error) { return u, nil, nil },
	})
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	return conn, func() { g.Stop(); <-done; conn.Close() }
}

func cluster(t *testing.T, name string, timeout int64) xds.Resource {
	t.Helper()
	r, err := xds.NewResource(name, &clusterv3.Cluster{Name: name, AltStatName: time.Duration(timeout).String()})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func listener(t *testing.T, name, netns string) xds.Resource {
	t.Helper()
	r, err := xds.NewResource(name, &listenerv3.Listener{Name: name, Address: &corev3.Address{
		Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{Address: "0.0.0.0", NetworkNamespaceFilepath: netns}},
	}})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func setOf(rs ...xds.Resource) xds.Set {
	s := xds.Set{}
	for _, r := range rs {
		s.Put(r)
	}
	return s
}

func follow(t *testing.T, r *Relay, conn grpc.ClientConnInterface) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	done := make(chan struct{})
	go func() { defer close(done); r.Follow(ctx, conn) }()
	return func() { cancel(); <-done }
}

func eventually(t *testing.T, what string, f func() bool) {
	t.Helper()
	for range 1000 {
		if f() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatalf("waited 10 s for %s", what)
}

func has(r *Relay, typeURL, name string) bool {
	set, _ := r.Resources()
	_, ok := set[typeURL][name]
	return ok
}

// TestCopySurvivesControlPlane: what was in force stays in force while the
// control plane is away, and a new relay starts with it.
func TestCopySurvivesControlPlane(t *testing.T) {
	u := &upstream{changed: make(chan struct{}), set: setOf(cluster(t, "a", 1), cluster(t, "b", 1))}
	conn, stopServer := u.serve(t)
	cache := filepath.Join(t.TempDir(), "xds.pb")
	log := slog.New(slog.DiscardHandler)
	r := New(Config{Cache: cache, Keys: noKeys{}, Log: log})
	r.SetNamespaces(map[string]uint64{})
	r.SetLocal(setOf(cluster(t, "shared", 1)))
	if set, _ := r.Resources(); set != nil {
		t.Fatal("a relay that never heard of the control plane has resources: the proxy would take them for all there is")
	}
	stop := follow(t, r, conn)
	eventually(t, "the first copy", func() bool { return r.Version() == u.set.Version() })
	u.edit(setOf(cluster(t, "b", 2)))
	eventually(t, "the edit", func() bool { return r.Version() == u.set.Version() && !has(r, xds.TypeCluster, "a") })
	stopServer()
	time.Sleep(50 * time.Millisecond)
	if !has(r, xds.TypeCluster, "b") {
		t.Error("the copy went with the control plane")
	}
	stop()
	again := New(Config{Cache: cache, Keys: noKeys{}, Log: log})
	again.SetNamespaces(map[string]uint64{})
	again.SetLocal(setOf(cluster(t, "shared", 1)))
	if again.Version() != r.Version() || !has(again, xds.TypeCluster, "b") {
		t.Error("a relay that starts anew does not have the last good copy")
	}
}

// TestOnDemandPassesThrough: a destination that is asked for is asked for
// upstream, once, and answered when that answers; names that are no
// destinations are refused here. One that the control plane does not know gets
// a cluster that refuses, so that its callers do not wait.
func TestOnDemandPassesThrough(t *testing.T) {
	const known, unknown = "dst|10.0.0.1:80", "dst|10.0.0.2:80"
	u := &upstream{changed: make(chan struct{}), set: setOf(cluster(t, "a", 1)), demand: map[string]xds.Resource{known: cluster(t, known, 1)}}
	conn, stopServer := u.serve(t)
	defer stopServer()
	r := New(Config{Keys: noKeys{}, Log: slog.New(slog.DiscardHandler)})
	r.SetNamespaces(map[string]uint64{})
	defer follow(t, r, conn)()
	if _, a := r.Lookup(xds.TypeCluster, "tunnel"); a != xdsserver.Absent {
		t.Errorf("a name that is no destination: %v", a)
	}
	nobody, ok := xds.Refused(unknown)
	if !ok {
		t.Fatalf("%s cannot be refused", unknown)
	}
	for name, want := range map[string]xds.Resource{known: u.demand[known], unknown: nobody} {
		if _, a := r.Lookup(xds.TypeCluster, name); a != xdsserver.Pending {
			t.Errorf("%s: first answer %v, want pending", name, a)
		}
		eventually(t, "an answer about "+name, func() bool {
			got, a := r.Lookup(xds.TypeCluster, name)
			return a == xdsserver.Found && got.Version == want.Version
		})
	}
	eventually(t, "the copy", func() bool { return r.Version() == u.set.Version() })
	if has(r, xds.TypeCluster, known) {
		t.Error("an on-demand answer became part of the wildcard set")
	}
}

// TestAskedThenPushed: a destination that a proxy asked for, and that a policy
// then lets the control plane push, is part of the copy, and goes back to being
// an answer when it is pushed no more.
//
// What it defends: a copy that lacks it never equals the control plane's, and
// the node would count as behind for ever.
func TestAskedThenPushed(t *testing.T) {
	const name = "dst|10.0.0.1:80"
	it := cluster(t, name, 1)
	u := &upstream{changed: make(chan struct{}), set: setOf(cluster(t, "a", 1)), demand: map[string]xds.Resource{name: it}}
	conn, stopServer := u.serve(t)
	defer stopServer()
	r := New(Config{Keys: noKeys{}, Log: slog.New(slog.DiscardHandler)})
	r.SetNamespaces(map[string]uint64{})
	r.SetLocal(setOf())
	defer follow(t, r, conn)()
	answered := func() bool { _, a := r.Lookup(xds.TypeCluster, name); return a == xdsserver.Found }
	eventually(t, "an answer", answered)
	pushed := setOf(cluster(t, "a", 1), it)
	u.edit(pushed)
	eventually(t, "the copy to have it", func() bool { return r.Version() == pushed.Version() && has(r, xds.TypeCluster, name) })
	fewer := setOf(cluster(t, "a", 1))
	u.edit(fewer)
	eventually(t, "the copy not to have it", func() bool { return r.Version() == fewer.Version() && !has(r, xds.TypeCluster, name) })
	if !answered() {
		t.Error("a destination that is pushed no more is not answered for")
	}
}

// TestListenersWaitForTheirNamespace: a listener in a namespace that does not
// exist would be refused by the proxy for good; one in a namespace that was
// made anew must move there.
func TestListenersWaitForTheirNamespace(t *testing.T) {
	r := New(Config{Keys: noKeys{}, Log: slog.New(slog.DiscardHandler)})
	r.apply(xds.TypeCluster, []xds.Resource{cluster(t, "a", 1)}, nil)
	r.SetLocal(setOf(cluster(t, "shared", 1), listener(t, "in|a", "/run/netns/a"), listener(t, "tunnel", "")))
	if set, _ := r.Resources(); set != nil {
		t.Error("resources without knowing which namespaces exist")
	}
	r.SetNamespaces(map[string]uint64{"/run/netns/other": 3})
	if !has(r, xds.TypeListener, "tunnel") || has(r, xds.TypeListener, "in|a@7") {
		t.Error("want the tunnel listener, and none in a namespace that does not exist")
	}
	r.SetNamespaces(map[string]uint64{"/run/netns/a": 7})
	if !has(r, xds.TypeListener, "in|a@7") {
		t.Error("the namespace exists, its listener is missing")
	}
	r.SetNamespaces(map[string]uint64{"/run/netns/a": 8})
	if has(r, xds.TypeListener, "in|a@7") || !has(r, xds.TypeListener, "in|a@8") {
		t.Error("the namespace was made anew, its listener did not move")
	}
}

// TestRestartRemovesNoListener: an agent that starts again learns of its parts
// one after the other: the copy of what the control plane gave, what it builds
// for its own workloads, which namespaces exist. The proxy, which has worked on
// meanwhile, may ask in between; if it were told of some parts without the
// others, it would remove the rest and end every connection of the node.
func TestRestartRemovesNoListener(t *testing.T) {
	path := filepath.Join(t.TempDir(), "xds.pb")
	if err := saveCopy(path, setOf(cluster(t, "a", 1))); err != nil {
		t.Fatal(err)
	}
	local := setOf(cluster(t, "shared", 1), listener(t, "in|a", "/run/netns/a"))
	parts := map[string]func(*Relay){
		"what is built here":      func(r *Relay) { r.SetLocal(local) },
		"the namespaces":          func(r *Relay) { r.SetNamespaces(map[string]uint64{"/run/netns/a": 7}) },
		"the control plane's set": func(r *Relay) { r.apply(xds.TypeCluster, []xds.Resource{cluster(t, "a", 1)}, nil) },
	}
	for missing := range parts {
		c := Config{Cache: path, Keys: noKeys{}, Log: slog.New(slog.DiscardHandler)}
		if missing == "the control plane's set" {
			c.Cache = "" // nor is there a copy of it
		}
		r := New(c)
		for name, give := range parts {
			if name != missing {
				give(r)
			}
		}
		if set, _ := r.Resources(); set != nil {
			t.Errorf("without %s, the proxy sees %v", missing, set)
		}
		parts[missing](r)
		if !has(r, xds.TypeListener, "in|a@7") || !has(r, xds.TypeCluster, "a") || !has(r, xds.TypeCluster, "shared") {
			t.Errorf("with %s at last, the proxy does not get everything", missing)
		}
	}
}

// TestDamagedCopy: a copy that cannot be read is not half used.
func TestDamagedCopy(t *testing.T) {
	path := filepath.Join(t.TempDir(), "xds.pb")
	if err := saveCopy(path, setOf(cluster(t, "a", 1))); err != nil {
		t.Fatal(err)
	}
	if err := writeGarbage(path); err != nil {
		t.Fatal(err)
	}
	r := New(Config{Cache: path, Keys: noKeys{}, Log: slog.New(slog.DiscardHandler)})
	r.SetNamespaces(map[string]uint64{})
	r.SetLocal(setOf(cluster(t, "shared", 1)))
	if set, _ := r.Resources(); set != nil {
		t.Error("a damaged copy was used")
	}
}
func writeGarbage(path string) error { return os.WriteFile(path, []byte{0xff, 0xff, 0xff}, 0o600) }
