package sdkapi

import (
	"context"
	"log/slog"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/refusal"
	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

var (
	td  = spiffeid.RequireTrustDomainFromString("mesh.test")
	web = spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/web")
)

// everyone is shop/web, in whatever process.
type everyone struct{}

func (everyone) Attest(context.Context, *attest.Process) ([]mesh.Workload, error) {
	return []mesh.Workload{{Namespace: "shop", Name: "web-1", ServiceAccount: "web", ID: web}}, nil
}
func (everyone) Changed() <-chan struct{} { return nil }

func newServer(store *audit.Store) *Server {
	return New(Config{
		Attestor: everyone{}, Caller: nobodysProcess,
		Rules: func() (Rules, bool) { return Rules{TrustDomain: td}, true },
		Store: store, Refused: func(refusal.Refusal) {}, Log: slog.New(slog.DiscardHandler),
	})
}

func newStore(t *testing.T) *audit.Store {
	t.Helper()
	store, err := audit.Open(t.TempDir(), "n1", slog.New(slog.DiscardHandler))
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { store.Close() })
	return store
}

func records(t *testing.T, store *audit.Store) (out []audit.Record) {
	t.Helper()
	if err := store.Query(t.Context(), audit.Filter{}, func(r audit.Record) error { out = append(out, r); return nil }); err != nil {
		t.Fatal(err)
	}
	return out
}

func report(first uint64, events ...*sdkv1.Event) *sdkv1.ReportRequest {
	return &sdkv1.ReportRequest{SpiffeId: web.String(), Session: make([]byte, sessionBytes), First: first, Events: events}
}

func good(connection uint64) *sdkv1.Event {
	now := time.Now().UnixNano()
	return &sdkv1.Event{Connection: connection, Final: true, Accepted: true, Start: now, End: now, Verdict: "allowed",
		Peer: "spiffe://mesh.test/ns/shop/sa/client", PeerSerial: "0a", PeerAddress: "10.0.0.1:4000", Serial: "0b", Address: "10.0.0.2:8443"}
}

// Defends the audit against a workload that reports what another one did: the
// reporter's own end is what the agent attests, whatever the report says.
func TestReportIsOfTheCaller(t *testing.T) {
	store := newStore(t)
	s := newServer(store)
	if _, err := s.Report(t.Context(), report(1, good(1))); err != nil {
		t.Fatal(err)
	}
	r := records(t, store)[0]
	if r.Destination.ID != web.String() || r.Destination.Workload != "shop/web-1" || r.Node != "n1" || r.Side != audit.Destination || !Owns(&r) || r.Proxy != reporter {
		t.Errorf("the record is %+v", r)
	}
	other := report(1, good(2))
	other.SpiffeId = "spiffe://mesh.test/ns/shop/sa/bank"
	if _, err := s.Report(t.Context(), other); status.Code(err) != codes.PermissionDenied {
		t.Errorf("a report about another workload: %v", err)
	}
}

// A report that is made again adds nothing: not when its answer was lost, and
// not when the agent was killed between storing it and answering.
//
// What it defends: one record for each connection.
func TestReportedOnce(t *testing.T) {
	store := newStore(t)
	s := newServer(store)
	e := []*sdkv1.Event{good(1), good(2), good(3), good(4)}
	for _, req := range []*sdkv1.ReportRequest{report(1, e[:2]...), report(1, e[:2]...), report(2, e[1:3]...)} {
		if _, err := s.Report(t.Context(), req); err != nil {
			t.Fatal(err)
		}
	}
	if _, err := newServer(store).Report(t.Context(), report(1, e...)); err != nil {
		t.Fatal(err)
	}
	if got := records(t, store); len(got) != 4 {
		t.Errorf("%d records, want 4: %+v", len(got), got)
	}
}

// Defends the agent and the audit's readers: what a workload reports is bounded,
// and what makes no sense is refused, with the field's name.
func TestReportIsChecked(t *testing.T) {
	for field, change := range map[string]func(*sdkv1.Event){
		"connection":   func(e *sdkv1.Event) { e.Connection = 0 },
		"start":        func(e *sdkv1.Event) { e.Start = time.Now().Add(time.Hour).UnixNano() },
		"end":          func(e *sdkv1.Event) { e.End = e.Start - 1 },
		"peer":         func(e *sdkv1.Event) { e.Peer = "nobody" },
		"peer_serial":  func(e *sdkv1.Event) { e.PeerSerial = "zz" },
		"peer_address": func(e *sdkv1.Event) { e.PeerAddress = "here" },
		"verdict":      func(e *sdkv1.Event) { e.Verdict = "fine" },
		"reason":       func(e *sdkv1.Event) { e.Reason = strings.Repeat("a", maxText+1) },
		"policy":       func(e *sdkv1.Event) { e.Policy = "\x1b[31m" },
	} {
		store := newStore(t)
		e := good(1)
		change(e)
		_, err := newServer(store).Report(t.Context(), report(1, e))
		if status.Code(err) != codes.InvalidArgument || !strings.Contains(err.Error(), "events[0]."+field+":") {
			t.Errorf("%s: %v", field, err)
		}
		if n := len(records(t, store)); n != 0 {
			t.Errorf("%s: %d records were stored", field, n)
		}
	}
	s := newServer(newStore(t))
	var many []*sdkv1.Event
	for i := range uint64(MaxEvents + 1) {
		many = append(many, good(i+1))
	}
	if _, err := s.Report(t.Context(), report(1, many...)); status.Code(err) != codes.InvalidArgument {
		t.Errorf("%d events: %v", len(many), err)
	}
	for i := range byte(maxSessions + 1) {
		req := report(1)
		req.Session = append([]byte{i}, make([]byte, sessionBytes-1)...)
		_, err := s.Report(t.Context(), req)
		if want := codes.OK; i == maxSessions {
			if status.Code(err) != codes.ResourceExhausted {
				t.Errorf("session %d: %v", i, err)
			}
		} else if status.Code(err) != want {
			t.Fatal(err)
		}
	}
}

// Defends the audit against connections that stay open for ever: those of a
// process that ended without a word are closed, and those of one that lives are
// not.
func TestLostWorkload(t *testing.T) {
	store := newStore(t)
	s := newServer(store)
	e := good(1)
	e.Final = false
	if _, err := s.Report(t.Context(), report(1, e)); err != nil {
		t.Fatal(err)
	}
	open, _, err := s.session("shop/web-1", make([]byte, sessionBytes), 1)
	if err != nil {
		t.Fatal(err)
	}
	var missing map[string]bool
	looks := func(n int) audit.Record {
		for range n {
			if missing, err = s.look(t.Context(), missing); err != nil {
				t.Fatal(err)
			}
		}
		return records(t, store)[0]
	}
	if r := looks(3); !r.End.IsZero() {
		t.Errorf("the process lives, and its connection was closed: %+v", r)
	}
	s.unwatch(open)
	if r := looks(1); !r.End.IsZero() {
		t.Errorf("closed at the first look, when the process may be coming back: %+v", r)
	}
	if r := looks(1); r.Ended != lostWorkload {
		t.Errorf("still open: %+v", r)
	}
	if looks(2); len(s.sessions) != 0 || len(s.workloads) != 0 {
		t.Errorf("the session is kept: %v %v", s.sessions, s.workloads)
	}
}

// Defends what others' policies say: a workload is told those that protect it.
func TestOwnRulesOnly(t *testing.T) {
	caller, err := authz.ParsePattern("spiffe://mesh.test/ns/shop/sa/client")
	if err != nil {
		t.Fatal(err)
	}
	model := authz.NewModel([]authz.Policy{
		{Namespace: "shop", Name: "mine", TargetServiceAccount: "web", Ports: []uint16{8443}, From: []authz.Pattern{caller}},
		{Namespace: "shop", Name: "ours"},
		{Namespace: "shop", Name: "theirs", TargetServiceAccount: "bank"},
		{Namespace: "bank", Name: "others"},
	}).WithQuarantines(td, []authz.Quarantine{{Name: "q", Identities: []authz.Pattern{caller}}, {Name: "nodes", Nodes: []string{"n2"}}})
	w := &mesh.Workload{Namespace: "shop", Name: "web-1", ServiceAccount: "web", ID: web}
	m := message(Rules{TrustDomain: td, Model: model, Mode: func(string) mesh.Mode { return mesh.ModeEnforce }}, w)
	var names []string
	for _, p := range m.GetPolicies() {
		names = append(names, p.GetName())
	}
	if got := strings.Join(names, " "); got != "mine ours" || len(m.GetQuarantined()) != 1 || m.GetMode() != "enforce" {
		t.Errorf("got %q and %v", got, m.GetQuarantined())
	}
}
