package caserver

import (
	"context"
	"crypto/x509"
	"fmt"
	"slices"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

func watch(t *testing.T, c nodev1.NodeClient, revision string) grpc.ServerStreamingClient[nodev1.NodeState] {
	t.Helper()
	stream, err := c.Watch(testContext(t), &nodev1.WatchRequest{Revision: revision})
	if err != nil {
		t.Fatal(err)
	}
	return stream
}

func recv(t *testing.T, stream grpc.ServerStreamingClient[nodev1.NodeState]) *nodev1.NodeState {
	t.Helper()
	state, err := stream.Recv()
	if err != nil {
		t.Fatal(err)
	}
	return state
}

func summary(s *nodev1.NodeState) string {
	var workloads, policies []string
	for _, w := range s.Workloads {
		workloads = append(workloads, w.Namespace+"/"+w.Name+"="+w.Mode)
	}
	for _, p := range s.Policies {
		policies = append(policies, p.Namespace+"/"+p.Name)
	}
	return fmt.Sprintf("%s%v%v%d", s.Revision, workloads, policies, len(s.Bundle))
}

// Each node sees its own enrolled workloads and the policies that protect
// them: nothing of another node, of another service account, of a namespace
// that is off.
func TestWatchScope(t *testing.T) {
	w := newWorld(t, nil)
	for node, want := range map[string]string{
		"one":   "r1[shop/web-1=enforce][shop/all shop/web-http]1",
		"two":   "r1[bank/vault-1=observe shop/db-1=enforce][bank/all shop/all shop/db]1",
		"three": "r1[][]1",
	} {
		state := recv(t, watch(t, w.asNode(node), ""))
		if got := summary(state); got != want {
			t.Errorf("node %s sees %s; want %s", node, got, want)
		}
	}
	state := recv(t, watch(t, w.asNode("one"), ""))
	if state.TrustDomain != "mesh.example" || state.SvidTtlSeconds != 600 {
		t.Errorf("trust domain %q, ttl %d", state.TrustDomain, state.SvidTtlSeconds)
	}
	web := state.Workloads[0]
	// uid 0 is a demand, not an absence.
	if web.Attest.GetPath() != "/bin/web" || web.Attest.Uid == nil || *web.Attest.Uid != 0 || web.Capture != nil || web.SpiffeId != webID.String() {
		t.Errorf("workload is %v", web)
	}
	if p := state.Policies[1]; !slices.Equal(p.Ports, []uint32{80, 8080}) || !slices.Equal(p.From, []string{"spiffe://mesh.example/ns/*/sa/web"}) || p.TargetServiceAccount != "web" {
		t.Errorf("policy is %v", p)
	}
}

// A watcher gets every newest state: after an edit, and after a change of the
// bundle.
func TestWatchUpdates(t *testing.T) {
	w := newWorld(t, nil)
	stream := watch(t, w.asNode("one"), "")
	recv(t, stream)
	v := *testView()
	v.Revision, v.Model = "r2", authz.NewModel(nil)
	w.feed.Set(&v)
	if got, want := summary(recv(t, stream)), "r2[shop/web-1=enforce][]1"; got != want {
		t.Errorf("after the edit: %s; want %s", got, want)
	}
	if err := w.authority.PublishRoots([]*x509.Certificate{foreignAuthority(t).Bundle()[0]}); err != nil {
		t.Fatal(err)
	}
	if got, want := summary(recv(t, stream)), "r2[shop/web-1=enforce][]2"; got != want {
		t.Errorf("after the new root: %s; want %s", got, want)
	}
}

// Before the first view a node is told nothing, rather than that it has no
// workloads.
func TestWatchBeforeFirstView(t *testing.T) {
	w := newWorld(t, nil)
	w.feed.Set(nil)
	stream := watch(t, w.asNode("one"), "")
	waitFor(t, func() bool { return status1(w, "one").Connected })
	w.feed.Set(testView())
	if got := recv(t, stream); len(got.Workloads) != 1 {
		t.Errorf("first state has %d workloads; want 1", len(got.Workloads))
	}
}

// The same view gives the same bytes, whatever order its parts came in.
func TestNodeStateIsDeterministic(t *testing.T) {
	marshal := func(v *mesh.View) string {
		b, err := proto.MarshalOptions{Deterministic: true}.Marshal(nodeState(v, "two", nil))
		if err != nil {
			t.Fatal(err)
		}
		return string(b)
	}
	want := marshal(testView())
	v := testView()
	slices.Reverse(v.State.Workloads)
	policies := v.Model.Policies()
	slices.Reverse(policies)
	v.Model = authz.NewModel(policies)
	if marshal(v) != want {
		t.Error("the order of the input shows in the output")
	}
}

func (w *world) nodes() []adminv1.NodeStatus {
	view, _ := w.feed.Get()
	return Nodes(view, w.server.Reports())
}

func status1(w *world, name string) adminv1.NodeStatus {
	for _, n := range w.nodes() {
		if n.Name == name {
			return n
		}
	}
	return adminv1.NodeStatus{}
}

func waitFor(t *testing.T, ok func() bool) {
	t.Helper()
	for deadline := time.Now().Add(10 * time.Second); !ok(); time.Sleep(5 * time.Millisecond) {
		if time.Now().After(deadline) {
			t.Fatal("did not come true within 10 s")
		}
	}
}

// The control plane knows who is connected and which revision is in force
// there.
func TestNodes(t *testing.T) {
	w := newWorld(t, nil)
	if got := w.nodes(); len(got) != 2 || got[0].Name != "one" || got[0].Connected || !got[0].Since.IsZero() {
		t.Errorf("before any call: %+v", got)
	}
	ctx, cancel := context.WithCancel(t.Context())
	stream, err := w.asNode("one").Watch(ctx, &nodev1.WatchRequest{Revision: "r0"})
	if err != nil {
		t.Fatal(err)
	}
	recv(t, stream)
	if got := status1(w, "one"); !got.Connected || got.Revision != "r0" || got.Since.IsZero() {
		t.Errorf("connected: %+v", got)
	}
	w.server.Acked("one", "r1")
	if got := status1(w, "one"); got.Revision != "r1" {
		t.Errorf("acknowledged: %+v", got)
	}
	cancel()
	waitFor(t, func() bool { return !status1(w, "one").Connected })
}
