package agent

import (
	"context"
	"errors"
	"log/slog"
	"maps"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/agent/svid"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/internal/mesh"
)

// refusing is a control plane that answers everything with an error.
type refusing struct {
	nodev1.NodeClient
	err error
}

func (r refusing) Issue(context.Context, *nodev1.IssueRequest, ...grpc.CallOption) (*nodev1.IssueResponse, error) {
	return nil, r.err
}

func (r refusing) IssueMany(_ context.Context, req *nodev1.IssueManyRequest, _ ...grpc.CallOption) (*nodev1.IssueManyResponse, error) {
	if code := status.Code(r.err); code == codes.Unimplemented || code == codes.Unauthenticated {
		return nil, r.err
	}
	out := new(nodev1.IssueManyResponse)
	for _, one := range req.GetRequests() {
		result := &nodev1.IssueResult{Chain: [][]byte{one.GetCsr()}}
		if one.GetWorkload() != "shop/good" {
			result = &nodev1.IssueResult{Code: uint32(status.Code(r.err)), Message: status.Convert(r.err).Message()}
		}
		out.Results = append(out.Results, result)
	}
	return out, nil
}

func (r refusing) IssueJWT(context.Context, *nodev1.IssueJWTRequest, ...grpc.CallOption) (*nodev1.IssueJWTResponse, error) {
	return nil, r.err
}

// kinds counts what the metric has.
func kinds(t *testing.T, a *agent) int {
	t.Helper()
	r := prometheus.NewRegistry()
	r.MustRegister(refused{a.refusals})
	families, err := r.Gather()
	if err != nil {
		t.Fatal(err)
	}
	n := 0
	for _, f := range families {
		n += len(f.GetMetric())
	}
	return n
}

// withRefusals returns an agent that keeps them, and what ends it.
func withRefusals(t *testing.T) (*agent, func() []audit.Record) {
	t.Helper()
	log := slog.New(slog.DiscardHandler)
	store, err := audit.Open(t.TempDir(), "n1", log)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	a := &agent{log: log, store: store, refusals: refusal.NewBook()}
	ctx, cancel := context.WithCancel(t.Context())
	done := make(chan struct{})
	go func() { defer close(done); a.keepRefusals(ctx) }()
	t.Cleanup(func() { cancel(); <-done })
	return a, func() (out []audit.Record) {
		cancel()
		<-done
		if err := store.Query(t.Context(), audit.Filter{Verdicts: []audit.Verdict{audit.Refused}}, func(r audit.Record) error { out = append(out, r); return nil }); err != nil {
			t.Fatal(err)
		}
		v, err := store.Verify(t.Context())
		if err != nil || v.Fault != "" || v.Records != uint64(len(out)) {
			t.Errorf("the chain: %+v, %v", v, err)
		}
		return out
	}
}

// Defends: a caller in a loop does not fill the store, and is counted; callers
// that differ are told apart; and the chain of the store holds.
func TestRefusedCallerInALoop(t *testing.T) {
	a, records := withRefusals(t)
	const pod = "0b8d5a2e-6c1f-4f3e-9c55-2f0a6a4f1d77"
	a.state = &nodeState{workloads: []mesh.Workload{{Namespace: "shop", Name: "web-1", UID: pod}}}
	uid := uint32(1000)
	caller := refusal.Caller{UID: &uid, Executable: "/bin/loop\n\x1b[2J" + strings.Repeat("x", 5000)}
	const loops = 10000
	for i := range loops {
		caller.PID = i // it forks
		a.refusals.Add(refusal.Refusal{Kind: refusal.Stranger, Call: "FetchX509SVID", Caller: caller, Reason: "process " + strings.Repeat("long ", 1000)})
	}
	a.refusals.Add(refusal.Refusal{Kind: refusal.NotItsOwn, Call: "FetchJWTSVID", ID: "spiffe://mesh.test/ns/pay/sa/ledger", Caller: refusal.Caller{PID: 7, UID: &uid, Executable: "/bin/other", PodUID: pod}, Reason: "no"})
	// Another run of the agent numbers its records anew; see keepRefusals.
	got := records()
	var counted uint64
	for _, r := range got {
		if r.Side != "" || r.Refusal == nil || r.End.IsZero() || r.Node != "n1" {
			t.Fatalf("%+v", r)
		}
		if r.Refusal.Call == "FetchX509SVID" {
			counted += r.Refusal.Count
			if len(r.Reason) > 1100 || len(r.Refusal.Executable) > 1100 || *r.Refusal.UID != uid {
				t.Errorf("a record of %d bytes of reason: %+v", len(r.Reason), r.Refusal)
			}
		}
	}
	if counted != loops || len(got) > 4 {
		t.Errorf("%d refusals in %d records, want %d", counted, len(got), loops)
	}
	last := got[len(got)-1]
	for _, r := range got {
		if r.Refusal.Call == "FetchJWTSVID" {
			last = r
		}
	}
	if last.Source.Workload != "shop/web-1" || last.Refusal.PodUID != pod || last.Refusal.ID != "spiffe://mesh.test/ns/pay/sa/ledger" || last.Refusal.Kind != "not-its-own" || last.Refusal.PID != 7 {
		t.Errorf("%+v of %+v", last.Refusal, last.Source)
	}
	if n := kinds(t, a); n != 2 {
		t.Errorf("%d kinds are counted", n)
	}
}

// Defends: what the control plane refuses a workload of this node is written
// down with its reason; that it is away, or busy, is not.
func TestRefusedByControlPlane(t *testing.T) {
	a, records := withRefusals(t)
	for _, err := range []error{nil, errors.New("not connected"), status.Error(codes.Unavailable, "away"), status.Error(codes.DeadlineExceeded, "slow"), status.Error(codes.Canceled, "over")} {
		a.client = refusing{err: err}
		_, _ = issuer{a}.Issue(t.Context(), "shop/web-1", nil)
	}
	a.client = refusing{err: status.Error(codes.PermissionDenied, `workload "shop/web-1" is not on node "n1"`)}
	for range 3 {
		if _, err := (issuer{a}).Issue(t.Context(), "shop/web-1", nil); err == nil {
			t.Fatal("not refused")
		}
	}
	a.client = refusing{err: status.Error(codes.ResourceExhausted, "too many")}
	_, _ = issuer{a}.IssueJWT(t.Context(), "shop/web-1", nil)
	time.Sleep(10 * time.Millisecond)
	got := map[string]uint64{}
	for _, r := range records() {
		if r.Source.Workload != "shop/web-1" || r.Refusal.Kind != "control-plane" || r.Refusal.UID != nil {
			t.Errorf("%+v", r)
		}
		got[r.Refusal.Call+" "+r.Reason] += r.Refusal.Count
	}
	if len(got) != 2 || got[`Issue PermissionDenied: workload "shop/web-1" is not on node "n1"`] != 3 || got["IssueJWT ResourceExhausted: too many"] != 1 {
		t.Errorf("%v", got)
	}
}

// Defends: of a batch, what is refused to each workload is written down as if it had
// been asked for by itself. An older control plane, which knows no batch, refuses
// nothing by that.
func TestRefusedOfMany(t *testing.T) {
	a, records := withRefusals(t)
	a.state = &nodeState{workloads: []mesh.Workload{{Namespace: "shop", Name: "web-1", UID: "u1"}}}
	asks := []svid.Ask{{Workload: "shop/web-1", CSR: []byte("a")}, {Workload: "shop/good", CSR: []byte("b")}, {Workload: "shop/web-2", CSR: []byte("c")}}
	if _, err := (issuer{a}).IssueMany(t.Context(), asks); err == nil {
		t.Error("asked nobody")
	}
	a.client = refusing{err: status.Error(codes.Unimplemented, "unknown method IssueMany")}
	if _, err := (issuer{a}).IssueMany(t.Context(), asks); !errors.Is(err, svid.ErrSingly) {
		t.Errorf("an older control plane: %v", err)
	}
	a.client = refusing{err: status.Error(codes.PermissionDenied, "not here")}
	answers, err := issuer{a}.IssueMany(t.Context(), asks)
	if err != nil || len(answers) != 3 || status.Code(answers[0].Err) != codes.PermissionDenied || answers[0].Chain != nil ||
		answers[1].Err != nil || string(answers[1].Chain[0]) != "b" || status.Code(answers[2].Err) != codes.PermissionDenied {
		t.Errorf("%+v, %v", answers, err)
	}
	told := func(records func() []audit.Record) map[string]uint64 {
		time.Sleep(10 * time.Millisecond)
		out := map[string]uint64{}
		for _, r := range records() {
			out[r.Source.Workload+" "+r.Refusal.Call+" "+r.Reason] += r.Refusal.Count
		}
		return out
	}
	if got, want := told(records), (map[string]uint64{"shop/web-1 Issue PermissionDenied: not here": 1, "shop/web-2 Issue PermissionDenied: not here": 1}); !maps.Equal(got, want) {
		t.Errorf("%v; want %v", got, want)
	}
	b, records := withRefusals(t)
	b.client = refusing{err: status.Error(codes.Unauthenticated, "revoked")}
	if _, err := (issuer{b}).IssueMany(t.Context(), asks); status.Code(err) != codes.Unauthenticated {
		t.Error(err)
	}
	if got, want := told(records), (map[string]uint64{
		"shop/web-1 Issue Unauthenticated: revoked": 1, "shop/good Issue Unauthenticated: revoked": 1, "shop/web-2 Issue Unauthenticated: revoked": 1,
	}); !maps.Equal(got, want) {
		t.Errorf("%v; want %v", got, want)
	}
}

// Without an audit there is none of refusals.
func TestNoAuditOfRefusals(t *testing.T) {
	a := &agent{}
	a.client = refusing{err: status.Error(codes.PermissionDenied, "no")}
	a.refusals.Add(refusal.Refusal{Kind: refusal.Stranger})
	_, _ = issuer{a}.Issue(t.Context(), "shop/web-1", nil)
	if n := kinds(t, a); n != 0 {
		t.Errorf("%d kinds are counted", n)
	}
}
