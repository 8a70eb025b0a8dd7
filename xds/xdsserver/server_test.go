package xdsserver

import (
	"context"
	"errors"
	"log/slog"
	"net"
	"slices"
	"sync"
	"testing"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"go.uber.org/goleak"
	"google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/test/bufconn"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-mesh/signet/xds"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

// fake is a source whose contents the test sets.
type fake struct {
	mu      sync.Mutex
	set     xds.Set
	lookup  map[string]Answer
	changed chan struct{}
	settled []xds.Set
	nacks   []string
	closed  int
}

func newFake() *fake { return &fake{changed: make(chan struct{}), lookup: map[string]Answer{}} }

func (f *fake) Resources() (xds.Set, <-chan struct{}) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return f.set, f.changed
}

func (f *fake) Lookup(typeURL, name string) (xds.Resource, Answer) {
	f.mu.Lock()
	defer f.mu.Unlock()
	return resource(typeURL, name, "on-demand"), f.lookup[name]
}

func (f *fake) Settled(s xds.Set)     { f.mu.Lock(); f.settled = append(f.settled, s); f.mu.Unlock() }
func (f *fake) Nacked(_, text string) { f.mu.Lock(); f.nacks = append(f.nacks, text); f.mu.Unlock() }
func (f *fake) Closed()               { f.mu.Lock(); f.closed++; f.mu.Unlock() }

// edit changes the source and wakes its stream.
func (f *fake) edit(change func()) {
	f.mu.Lock()
	defer f.mu.Unlock()
	change()
	close(f.changed)
	f.changed = make(chan struct{})
}

func resource(typeURL, name, version string) xds.Resource {
	return xds.Resource{Name: name, Version: version, Body: &anypb.Any{TypeUrl: typeURL}}
}

// setOf makes a set of "name@version" clusters.
func setOf(names ...string) xds.Set {
	s := xds.Set{}
	for _, n := range names {
		name, version := n[:len(n)-2], n[len(n)-1:]
		s.Put(resource(xds.TypeCluster, name, version))
	}
	return s
}

// peer is a subscriber on a real stream.
type peer struct {
	t      *testing.T
	stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	in     chan *discoveryv3.DeltaDiscoveryResponse
}

func connect(t *testing.T, s *Server) *peer {
	t.Helper()
	l := bufconn.Listen(1 << 20)
	g := grpc.NewServer()
	s.Log = slog.New(slog.DiscardHandler)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, s)
	served := make(chan struct{})
	go func() { defer close(served); _ = g.Serve(l) }()
	conn, err := grpc.NewClient("passthrough:x", grpc.WithTransportCredentials(insecure.NewCredentials()),
		grpc.WithContextDialer(func(ctx context.Context, _ string) (net.Conn, error) { return l.DialContext(ctx) }))
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		t.Fatal(err)
	}
	p := &peer{t: t, stream: stream, in: make(chan *discoveryv3.DeltaDiscoveryResponse, 100)}
	received := make(chan struct{})
	go func() {
		defer close(received)
		defer close(p.in)
		for {
			r, err := stream.Recv()
			if err != nil {
				return
			}
			p.in <- r
		}
	}()
	t.Cleanup(func() { cancel(); <-received; conn.Close(); g.Stop(); <-served })
	return p
}

func (p *peer) send(r *discoveryv3.DeltaDiscoveryRequest) {
	p.t.Helper()
	if r.TypeUrl == "" {
		r.TypeUrl = xds.TypeCluster
	}
	if err := p.stream.Send(r); err != nil {
		p.t.Fatal(err)
	}
}

func (p *peer) ack(r *discoveryv3.DeltaDiscoveryResponse) {
	p.t.Helper()
	p.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: r.GetTypeUrl(), ResponseNonce: r.GetNonce()})
}

// want receives one response, checks it against "name@version" and "-name",
// and acknowledges it.
func (p *peer) want(items ...string) *discoveryv3.DeltaDiscoveryResponse {
	p.t.Helper()
	select {
	case r, ok := <-p.in:
		if !ok {
			p.t.Fatalf("the stream ended, want %v", items)
		}
		var got []string
		for _, x := range r.GetResources() {
			got = append(got, x.GetName()+"@"+x.GetVersion())
		}
		for _, n := range r.GetRemovedResources() {
			got = append(got, "-"+n)
		}
		slices.Sort(got)
		slices.Sort(items)
		if !slices.Equal(got, items) {
			p.t.Fatalf("got %v, want %v", got, items)
		}
		p.ack(r)
		return r
	case <-time.After(5 * time.Second):
		p.t.Fatalf("nothing came, want %v", items)
		return nil
	}
}

// nothing checks that the server stays silent.
func (p *peer) nothing() {
	p.t.Helper()
	select {
	case r := <-p.in:
		p.t.Fatalf("unexpected response %v", r)
	case <-time.After(100 * time.Millisecond):
	}
}

func serve(f *fake) *Server {
	return &Server{Open: func(context.Context) (Source, Subscriber, error) { return f, f, nil }}
}

// TestSilentUntilKnown: a source that does not know its resources yet must not
// look like one that has none, or a restart would take a proxy's listeners away.
func TestSilentUntilKnown(t *testing.T) {
	f := newFake()
	p := connect(t, serve(f))
	p.send(&discoveryv3.DeltaDiscoveryRequest{InitialResourceVersions: map[string]string{"a": "1", "b": "1"}})
	p.nothing()
	f.edit(func() { f.set = setOf("a@1", "b@2", "c@1") })
	p.want("b@2", "c@1") // a is there already
	f.edit(func() { f.set = setOf("b@2") })
	p.want("-a", "-c")
}

func TestWildcard(t *testing.T) {
	f := newFake()
	f.set = setOf()
	p := connect(t, serve(f))
	p.send(&discoveryv3.DeltaDiscoveryRequest{})
	p.want() // nothing there is an answer, too: the peer waits for it
	f.edit(func() { f.set = setOf("a@1") })
	p.want("a@1")
	f.edit(func() {}) // a change that changes nothing is not sent
	p.nothing()
	f.edit(func() { f.set = setOf("a@2", "b@1") })
	p.want("a@2", "b@1")
}

// TestOnDemand: names beside the wildcard, found, absent, or not known yet.
func TestOnDemand(t *testing.T) {
	f := newFake()
	f.set = setOf("a@1")
	f.lookup["x"], f.lookup["y"], f.lookup["z"] = Found, Absent, Pending
	p := connect(t, serve(f))
	p.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"*"}})
	p.want("a@1")
	p.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"x", "y", "z"}})
	p.want("x@on-demand", "-y")
	f.edit(func() { f.lookup["z"], f.lookup["y"] = Absent, Found })
	p.want("y@on-demand", "-z")
	// Asked again, a name is answered again.
	p.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"z"}})
	p.want("-z")
	p.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesUnsubscribe: []string{"x"}})
	f.edit(func() { f.set = setOf("a@2") })
	p.want("a@2")
}

// TestNameOutsideWildcard: a peer that names resources gets those only.
func TestNameOutsideWildcard(t *testing.T) {
	f := newFake()
	f.set = setOf("a@1", "b@1")
	p := connect(t, serve(f))
	p.send(&discoveryv3.DeltaDiscoveryRequest{ResourceNamesSubscribe: []string{"b"}})
	p.want("b@1")
	f.edit(func() { f.set = setOf("a@2", "b@1", "c@1") })
	p.nothing()
}

// TestSettledAndNack: settled only once everything sent was taken; a refusal
// is reported and is not a settlement.
func TestSettledAndNack(t *testing.T) {
	f := newFake()
	f.set = setOf("a@1")
	p := connect(t, serve(f))
	p.send(&discoveryv3.DeltaDiscoveryRequest{})
	p.want("a@1")
	wait(t, func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.settled) > 0 })
	f.mu.Lock()
	before := len(f.settled)
	f.mu.Unlock()
	f.edit(func() { f.set = setOf("a@2") })
	r := <-p.in
	p.send(&discoveryv3.DeltaDiscoveryRequest{ResponseNonce: r.GetNonce(), ErrorDetail: &status.Status{Message: "bad cluster"}})
	wait(t, func() bool { f.mu.Lock(); defer f.mu.Unlock(); return len(f.nacks) == 1 && f.nacks[0] == "bad cluster" })
	f.mu.Lock()
	defer f.mu.Unlock()
	if len(f.settled) != before {
		t.Error("a refused update counts as settled")
	}
}

func TestUnknownTypeIsRefused(t *testing.T) {
	p := connect(t, serve(newFake()))
	p.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: "type.googleapis.com/envoy.service.runtime.v3.Runtime"})
	if _, ok := <-p.in; ok {
		t.Error("a type that is not served was answered")
	}
}

// TestOnlyTheTypesNamed: a server of clusters has no secrets for anybody, though
// its source had some. Without the list, what a source holds by mistake is out.
func TestOnlyTheTypesNamed(t *testing.T) {
	f := newFake()
	f.set = setOf("a@1")
	f.set.Put(resource(xds.TypeSecret, "key", "1"))
	s := serve(f)
	s.Types = []string{xds.TypeCluster}
	p := connect(t, s)
	p.send(&discoveryv3.DeltaDiscoveryRequest{})
	p.want("a@1")
	p.send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.TypeSecret})
	for r := range p.in {
		if r.GetTypeUrl() != xds.TypeCluster {
			t.Errorf("answered with %v", r)
		}
	}
}

// TestOpenDecides: whom Open refuses gets nothing.
func TestOpenDecides(t *testing.T) {
	p := connect(t, &Server{Open: func(context.Context) (Source, Subscriber, error) { return nil, nil, errors.New("no certificate") }})
	if _, ok := <-p.in; ok {
		t.Error("a stream that Open refused was served")
	}
}

func wait(t *testing.T, f func() bool) {
	t.Helper()
	for range 500 {
		if f() {
			return
		}
		time.Sleep(10 * time.Millisecond)
	}
	t.Fatal("waited 5 s in vain")
}
