package caserver

import (
	"context"
	"net"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/peer"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
)

// Defends: every call that is refused is told, with who called, what for, and
// why, so that what somebody tries with a stolen certificate is seen.
func TestRefusalsAreTold(t *testing.T) {
	var mu sync.Mutex
	var told []Refusal // guarded by mu
	w := newWorld(t, func(c *Config) {
		c.Rate, c.Burst = 1, 4
		c.Refused = func(r Refusal) {
			mu.Lock()
			defer mu.Unlock()
			told = append(told, r)
		}
	})
	seen := map[Reason]bool{}
	want := func(call, node, workload string, reason Reason, err error) {
		t.Helper()
		if err == nil {
			t.Fatalf("%s was not refused", call)
		}
		mu.Lock()
		defer mu.Unlock()
		if len(told) != 1 {
			t.Fatalf("told of %d refusals, want one: %+v", len(told), told)
		}
		got := told[0]
		told = nil
		seen[got.Reason] = true
		if !strings.HasSuffix(got.Call, call) || got.Node != node || got.Workload != workload || got.Reason != reason || got.Message == "" {
			t.Errorf("told %+v; want %s of node %q for %q because of %s", got, call, node, workload, reason)
		}
	}
	ctx := testContext(t)
	_, csr := newKey(t)
	issue := func(node, workload, uid string, csr []byte) error {
		_, err := w.asNode(node).Issue(ctx, &nodev1.IssueRequest{Workload: workload, Uid: uid, Csr: csr})
		return err
	}
	want("Issue", "one", "shop/db-1", ReasonNode, issue("one", "shop/db-1", "", csr))
	want("Issue", "one", "shop/none", ReasonNode, issue("one", "shop/none", "", csr))
	want("Issue", "one", "dark/x-1", ReasonNamespace, issue("one", "dark/x-1", "", csr))
	want("Issue", "one", "shop/web-1", ReasonRequest, issue("one", "shop/web-1", "", []byte("x")))
	want("Issue", "one", "shop/web-1", ReasonRate, issue("one", "shop/web-1", "", csr))
	w.clock.advance(10 * time.Second)
	w.feed.Set(podView("r2", "u2"))
	want("Issue", "one", "shop/web-1", ReasonPod, issue("one", "shop/web-1", "u1", csr))
	_, err := w.asNode("two").IssueJWT(ctx, tokenFor("shop/web-1", "x"))
	want("IssueJWT", "two", "shop/web-1", ReasonNode, err)

	_, err = w.dial(nil).Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1"})
	want("Issue", "", "", ReasonCertificate, err)
	_, err = w.dial(nil).Join(ctx, &nodev1.JoinRequest{Token: "stolen", Csr: csr})
	want("Join", "", "", ReasonToken, err)
	_, err = w.dial(certFor(t, w.authority, webID, time.Hour)).Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1"})
	want("Issue", "", "", ReasonCaller, err)
	cert := certFor(t, w.authority, nodeID("one"), time.Hour)
	if _, err := w.authority.Revoke(leaf(t, cert.Certificate).SerialNumber.Text(16), "stolen"); err != nil {
		t.Fatal(err)
	}
	_, err = w.dial(cert).Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1"})
	want("Issue", "one", "", ReasonRevoked, err)
	_, err = w.asNode("two").Report(ctx, &nodev1.ReportRequest{Workloads: []*nodev1.WorkloadReport{{Workload: "shop/web-1", Uid: "u2"}}})
	if err != nil { // it goes on, but that is not kept
		t.Fatal(err)
	}
	want("Report", "two", "shop/web-1", ReasonNode, context.Canceled)
	v := testView()
	v.Model = v.Model.WithQuarantines(testDomain, []authz.Quarantine{{Name: "cut", Nodes: []string{"two"}}})
	w.feed.Set(v)
	want("Issue", "two", "", ReasonQuarantine, issue("two", "shop/db-1", "", csr))
	w.feed.Set(nil)
	want("Issue", "one", "shop/web-1", ReasonStarting, issue("one", "shop/web-1", "", csr))

	for _, reason := range Reasons {
		if !seen[reason] && reason != ReasonAbove { // TestAboveSaysNo
			t.Errorf("nothing was refused because of %s", reason)
		}
	}
	// What is allowed is not told.
	w.feed.Set(testView())
	w.clock.advance(10 * time.Second)
	if err := issue("one", "shop/web-1", "", csr); err != nil || len(told) != 0 {
		t.Errorf("%v: told %+v", err, told)
	}
}

// Where from somebody called is told; a unix socket has no such place.
func TestRefusalSaysWhereFrom(t *testing.T) {
	var got Refusal
	w := newWorld(t, func(c *Config) { c.Refused = func(r Refusal) { got = r } })
	for _, tc := range []struct {
		addr net.Addr
		want string
	}{
		{&net.TCPAddr{IP: net.IPv4(10, 0, 0, 9), Port: 4711}, "10.0.0.9"},
		{&net.TCPAddr{IP: net.ParseIP("fd00::9"), Port: 4711}, "fd00::9"},
		{&net.UnixAddr{Name: "@"}, ""},
	} {
		ctx := peer.NewContext(t.Context(), &peer.Peer{Addr: tc.addr})
		err := w.server.refuse(ctx, "Issue", "one", ReasonNode, "no")
		wantCode(t, err, codes.PermissionDenied, "no")
		if got.From != tc.want {
			t.Errorf("from %q, want %q", got.From, tc.want)
		}
	}
	if !strings.Contains(w.logged.String(), "from=10.0.0.9") || !slices.Contains(Reasons, got.Reason) {
		t.Error("it is not in the log")
	}
}
