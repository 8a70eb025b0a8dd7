package caserver

import (
	"crypto/tls"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/protobuf/proto"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

// Another replica hears at once what is known, and then every change.
func TestReplicaHears(t *testing.T) {
	w := newWorld(t, nil)
	client := nodev1.NewReplicaClient(w.conn(w.authority, certFor(t, w.authority, ca.ControlID(testDomain), time.Hour)))
	stream, err := client.Nodes(testContext(t), &nodev1.NodesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	heard := func() []NodeReport {
		t.Helper()
		m, err := stream.Recv()
		if err != nil {
			t.Fatal(err)
		}
		return ReportsOf(m)
	}
	if got := heard(); len(got) != 0 {
		t.Errorf("before any node: %+v", got)
	}
	w.feed.Set(podView("r1", "u1"))
	report := &nodev1.ReportRequest{Revision: "r1", Workloads: []*nodev1.WorkloadReport{{Workload: "shop/web-1", Uid: "u1", Problem: "none yet"}},
		Roots: &nodev1.Roots{Trusted: [][]byte{{1}}, Used: [][]byte{{2}}, Waits: "w"}}
	if _, err := w.asNode("one").Report(testContext(t), report); err != nil {
		t.Fatal(err)
	}
	var got []NodeReport
	for len(got) == 0 || len(got[0].Workloads) == 0 {
		got = heard()
	}
	want := w.server.Reports()[0]
	// The connection that the report came through uses a root, too.
	root := ca.FingerprintOf(w.authority.Bundle()[0])
	roots := &nodev1.Roots{Trusted: report.Roots.Trusted, Used: [][]byte{{2}, root[:]}, Waits: "w"}
	if g := got[0]; g.Node != "one" || g.Connected || !g.At.Equal(want.At) || !g.Since.Equal(want.Since) || g.Workloads[0].GetProblem() != "none yet" || !proto.Equal(g.Roots, roots) {
		t.Errorf("heard %+v, want %+v", g, want)
	}
}

// Defends what nodes report against everybody but the control plane's replicas:
// a node learns nothing about others.
func TestReplicaRefuses(t *testing.T) {
	w := newWorld(t, nil)
	certOf := func(id spiffeid.ID) *tls.Certificate { return certFor(t, w.authority, id, time.Hour) }
	for name, test := range map[string]struct {
		cert *tls.Certificate
		code codes.Code
	}{
		"a node":                     {certOf(nodeID("one")), codes.PermissionDenied},
		"a node by the name control": {certOf(nodeID("control")), codes.PermissionDenied},
		"a workload":                 {certOf(webID), codes.PermissionDenied},
		"nobody":                     {nil, codes.Unauthenticated},
		"another authority's":        {certFor(t, foreignAuthority(t), ca.ControlID(testDomain), time.Hour), codes.Unavailable},
	} {
		stream, err := nodev1.NewReplicaClient(w.conn(w.authority, test.cert)).Nodes(testContext(t), &nodev1.NodesRequest{})
		if err == nil {
			_, err = stream.Recv()
		}
		t.Log(name, err)
		wantCode(t, err, test.code, "")
	}
}

// The stream ends when the certificate that opened it expires.
func TestReplicaExpires(t *testing.T) {
	w := newWorld(t, nil)
	client := nodev1.NewReplicaClient(w.conn(w.authority, certFor(t, w.authority, ca.ControlID(testDomain), 2*time.Second)))
	var stream grpc.ServerStreamingClient[nodev1.NodesResponse]
	stream, err := client.Nodes(testContext(t), &nodev1.NodesRequest{})
	if err != nil {
		t.Fatal(err)
	}
	for err == nil {
		_, err = stream.Recv()
	}
	wantCode(t, err, codes.DeadlineExceeded, "")
}
