package caserver

import (
	"slices"
	"strings"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// podView is testView with shop/web-1 as a pod.
func podView(revision, uid string) *mesh.View {
	v := testView()
	v.Revision = revision
	w := &v.State.Workloads[3]
	w.UID = uid
	w.Attest = &mesh.Attest{PodUID: uid}
	w.Capture = &mesh.Capture{Probes: []uint16{8080}}
	v.State.Excluded = map[string]string{"out-1": "one", "out-2": "two"}
	return v
}

// A pod that was replaced by another of its name gets no certificate: its UID
// is asked for, and the newest pod's is the only good one.
func TestIssueAsksForThePod(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	w.feed.Set(podView("r2", "u2"))
	one := w.asNode("one")
	_, csr := newKey(t)
	for _, uid := range []string{"u1", "", "U2", "u2 "} {
		_, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Uid: uid, Csr: csr})
		wantCode(t, err, codes.PermissionDenied, "is not pod")
	}
	if _, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Uid: "u2", Csr: csr}); err != nil {
		t.Error(err)
	}
	w.feed.Set(podView("r3", "u3"))
	_, err := one.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Uid: "u2", Csr: csr})
	wantCode(t, err, codes.PermissionDenied, "is not pod")
}

// cutOff is a view in which node one is quarantined.
func cutOff(v *mesh.View) *mesh.View {
	out := *v
	out.Revision += "-cut"
	out.Model = v.Model.WithQuarantines(testDomain, []authz.Quarantine{{Name: "stolen", Nodes: []string{"one"}}})
	return &out
}

// A quarantined node gets nothing more: no call works, it cannot join again,
// and the stream that it has open ends at once. Other nodes go on.
func TestQuarantinedNode(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	_, csr := newKey(t)
	one, two := w.asNode("one"), w.asNode("two")
	stream, other := watch(t, one, ""), watch(t, two, "")
	recv(t, stream)
	recv(t, other)
	w.feed.Set(cutOff(testView()))
	_, err := stream.Recv()
	wantCode(t, err, codes.PermissionDenied, `quarantine "stolen"`)
	for call, err := range tryAll(ctx, one, csr) {
		t.Log(call)
		wantCode(t, err, codes.PermissionDenied, `quarantine "stolen"`)
	}
	token, err := w.tokens.Create("one", time.Minute)
	if err != nil {
		t.Fatal(err)
	}
	_, err = w.dial(nil).Join(ctx, &nodev1.JoinRequest{Token: token, Csr: csr})
	wantCode(t, err, codes.PermissionDenied, `quarantine "stolen"`)
	if _, err := two.Renew(ctx, &nodev1.RenewRequest{Csr: csr}); err != nil {
		t.Errorf("another node: %v", err)
	}
	w.feed.Set(testView())
	if _, err := one.Renew(ctx, &nodev1.RenewRequest{Csr: csr}); err != nil {
		t.Errorf("after the quarantine: %v", err)
	}
}

// What a node is told of pods, and of what others it may not know: only its
// own excluded pods.
func TestNodeStateOfPods(t *testing.T) {
	v := podView("r2", "u2")
	v.Model = v.Model.WithQuarantines(testDomain, []authz.Quarantine{
		{Name: "cut", Identities: []authz.Pattern{mustPattern("spiffe://mesh.example/ns/bank/sa/vault"), mustPattern("spiffe://mesh.example/ns/*/sa/db")}},
		{Name: "nodes", Nodes: []string{"nine"}},
	})
	s := nodeState(v, "one", nil)
	w := s.Workloads[0]
	if w.Uid != "u2" || w.Attest.PodUid != "u2" || !slices.Equal(w.Capture.ProbePorts, []uint32{8080}) {
		t.Errorf("workload %v", w)
	}
	if !slices.Equal(s.EnrolledNamespaces, []string{"bank", "shop"}) || !slices.Equal(s.ExcludedPods, []string{"out-1"}) {
		t.Errorf("enrolled %v, excluded %v", s.EnrolledNamespaces, s.ExcludedPods)
	}
	if len(s.Quarantined) != 1 || s.Quarantined[0].Name != "cut" || len(s.Quarantined[0].Identities) != 2 {
		t.Errorf("quarantined %v", s.Quarantined)
	}
	// The policy's ns/*/sa/web, and the quarantine's ns/*/sa/db.
	if want := "spiffe://mesh.example/ns/shop/sa/db spiffe://mesh.example/ns/shop/sa/web"; strings.Join(s.Identities, " ") != want {
		t.Errorf("identities %v, want %s", s.Identities, want)
	}
}

// A proxy compares one identity, and every service account of one namespace,
// by itself. Any other pattern is expanded, also one that ends in a wildcard.
func TestIdentitiesAreExpanded(t *testing.T) {
	for pattern, wide := range map[string]bool{
		"spiffe://mesh.example/ns/shop/sa/web": false,
		"spiffe://mesh.example/ns/shop/sa/*":   false,
		"spiffe://mesh.example/ns/*/sa/*":      true,
		"spiffe://mesh.example/ns/*/sa/web":    true,
		"spiffe://mesh.example/ns/shop/*":      true,
		"spiffe://mesh.example/*":              true,
		"spiffe://mesh.example/ns/shop/x/*":    true,
	} {
		if got := len(appendWide(nil, []authz.Pattern{mustPattern(pattern)})) == 1; got != wide {
			t.Errorf("%s: expanded %t, want %t", pattern, got, wide)
		}
	}
}

// A change elsewhere is none for this node: it is not sent another state at
// once, counts as current all the same, and hears the revision a little later.
func TestChangeElsewhere(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	stream := watch(t, one, "")
	recv(t, stream)
	if _, err := one.Report(ctx, &nodev1.ReportRequest{Revision: "r1"}); err != nil {
		t.Fatal(err)
	}
	v := testView()
	v.Revision = "r2"
	v.State.Workloads[2].Node = "three" // shop/db-1
	begin := time.Now()
	w.feed.Set(v)
	waitFor(t, func() bool { return status1(w, "one").Revision == "r2" })
	if took := time.Since(begin); took > revisionDelay/2 {
		t.Errorf("current after %v", took)
	}
	if got := recv(t, stream); got.Revision != "r2" || time.Since(begin) < revisionDelay/2 {
		t.Errorf("sent %s after %v", got.Revision, time.Since(begin))
	}
	// What it confirmed is the same state under another name.
	if got := status1(w, "one").Revision; got != "r2" {
		t.Errorf("revision %s after it was sent the new name", got)
	}
	// A state that is another counts when it is confirmed, and not before.
	v = testView()
	v.Revision, v.Model = "r3", authz.NewModel(nil)
	w.feed.Set(v)
	recv(t, stream)
	if got := status1(w, "one").Revision; got == "r3" {
		t.Errorf("revision %s before it was confirmed", got)
	}
}

// What a node reports is kept for status, within bounds.
func TestReports(t *testing.T) {
	w := newWorld(t, nil)
	ctx := testContext(t)
	one := w.asNode("one")
	report := []*nodev1.WorkloadReport{{Workload: "shop/web-1", Uid: "u1", Problem: "its rules are gone"}}
	if _, err := one.Report(ctx, &nodev1.ReportRequest{Revision: "r1", Workloads: report}); err != nil {
		t.Fatal(err)
	}
	got := w.server.Reports()
	if len(got) != 1 || got[0].Node != "one" || got[0].Connected || !got[0].At.Equal(w.clock.now()) || got[0].Workloads[0].GetProblem() != "its rules are gone" {
		t.Errorf("%+v", got)
	}
	_, err := one.Report(ctx, &nodev1.ReportRequest{Workloads: make([]*nodev1.WorkloadReport, maxReported+1)})
	wantCode(t, err, codes.InvalidArgument, "at most")
	for _, roots := range []*nodev1.Roots{{Trusted: make([][]byte, maxRoots+1)}, {Used: make([][]byte, maxRoots+1)}, {Waits: strings.Repeat("x", maxProblem+1)}} {
		_, err = one.Report(ctx, &nodev1.ReportRequest{Roots: roots})
		wantCode(t, err, codes.InvalidArgument, "roots")
	}
	report[0].Problem = strings.Repeat("x", maxProblem+1)
	_, err = one.Report(ctx, &nodev1.ReportRequest{Workloads: report})
	wantCode(t, err, codes.InvalidArgument, "too long")
}

// Defends the status of pods against a node that speaks for another's: what it
// says of them is not kept, and the log has it. Of a pod that is gone it may
// speak, since it hears of that later.
func TestReportForAnotherNode(t *testing.T) {
	w := newWorld(t, nil)
	w.feed.Set(podView("r1", "u1")) // on node one
	report := []*nodev1.WorkloadReport{{Workload: "shop/web-1", Uid: "u1", Problem: "lies"}, {Workload: "shop/gone", Uid: "u0"}}
	if _, err := w.asNode("two").Report(testContext(t), &nodev1.ReportRequest{Revision: "r1", Workloads: report}); err != nil {
		t.Fatal(err)
	}
	if got := w.server.Reports(); len(got) != 1 || len(got[0].Workloads) != 1 || got[0].Workloads[0].GetUid() != "u0" {
		t.Errorf("kept %+v", got)
	}
	if !strings.Contains(w.logged.String(), "what is said of it is not kept") {
		t.Errorf("not in the log: %s", w.logged)
	}
	if _, err := w.asNode("one").Report(testContext(t), &nodev1.ReportRequest{Revision: "r1", Workloads: report}); err != nil {
		t.Fatal(err)
	}
	if got := w.server.Reports(); len(got) != 2 || len(got[0].Workloads) != 2 {
		t.Errorf("of its own node: kept %+v", got)
	}
}

// Defends the reason when a node refuses good certificates, or is refused: that
// its clock is not the control plane's is known before anybody asks.
func TestClockOfNode(t *testing.T) {
	w := newWorld(t, nil)
	one := w.asNode("one")
	for _, test := range []struct{ ahead, want time.Duration }{
		{0, 0}, {clockTolerance, 0}, {10 * time.Minute, 10 * time.Minute}, {-10 * time.Minute, -10 * time.Minute}, {-clockTolerance, 0},
	} {
		if _, err := one.Report(testContext(t), &nodev1.ReportRequest{Clock: w.clock.now().Add(test.ahead).Unix()}); err != nil {
			t.Fatal(err)
		}
		if got := w.server.Reports()[0].Clock; (got - test.want).Abs() > time.Second {
			t.Errorf("a clock that is %s ahead counts as %s", test.ahead, got)
		}
	}
	if _, err := one.Report(testContext(t), &nodev1.ReportRequest{}); err != nil || w.server.Reports()[0].Clock != 0 {
		t.Errorf("an agent that does not say: %v, %s", err, w.server.Reports()[0].Clock)
	}
	for _, want := range []string{"a node's clock and the control plane's differ", "node_is_ahead=10m0s", "agrees with the control plane's again"} {
		if !strings.Contains(w.logged.String(), want) {
			t.Errorf("%q is not in the log: %s", want, w.logged)
		}
	}
}
