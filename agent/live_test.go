package agent

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// stateWith is a state with one enforcing workload, shop/db, and a policy that
// admits the given callers to port 5432.
func stateWith(mode mesh.Mode, callers ...string) *nodeState {
	var from []authz.Pattern
	for _, c := range callers {
		p, err := authz.ParsePattern(c)
		if err != nil {
			panic(err)
		}
		from = append(from, p)
	}
	return &nodeState{
		workloads: []mesh.Workload{{
			Namespace: "shop", Name: "db", ServiceAccount: "db",
			ID:      spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/db"),
			Capture: &mesh.Capture{NetNS: "/run/netns/db"},
		}},
		modes: map[string]mesh.Mode{"shop": mode},
		model: authz.NewModel([]authz.Policy{{Namespace: "shop", Name: "p", Ports: []uint16{5432}, From: from}}),
	}
}

const web, batch = "spiffe://mesh.test/ns/shop/sa/web", "spiffe://mesh.test/ns/shop/sa/batch"

func opened(id, from, authority string) *audit.Event {
	return &audit.Event{Record: audit.Record{
		ID: id, Side: audit.Destination, Transport: "mtls", Reason: "allowed by shop/p",
		Source:      audit.Party{ID: from},
		Destination: audit.Party{Workload: "shop/db", Address: authority, Via: "10.0.0.1:" + id},
	}}
}

// TestLiveEndsExactlyWhatIsRefused: an edit that removes a grant ends its open
// connections and no others.
func TestLiveEndsExactlyWhatIsRefused(t *testing.T) {
	l := newLive(slog.New(slog.DiscardHandler))
	var ended []string
	l.destroy = func(netns string, local, remote netip.AddrPort) error {
		ended = append(ended, netns+" "+local.String()+" "+remote.String())
		return nil
	}
	l.update(stateWith(mesh.ModeEnforce, web, batch))
	l.see(opened("1001", web, "10.0.0.1:5432"))
	l.see(opened("1002", batch, "10.0.0.1:5432"))
	if len(ended) != 0 {
		t.Fatalf("allowed connections were ended: %v", ended)
	}
	l.update(stateWith(mesh.ModeEnforce, web))
	if len(ended) != 1 || ended[0] != "/run/netns/db 10.0.0.1:1002 10.0.0.1:5432" {
		t.Fatalf("ended %v, want the one of batch", ended)
	}
	last := opened("1002", batch, "10.0.0.1:5432")
	last.Final = true
	l.see(last)
	if last.Record.Ended != "revoked" || !strings.Contains(last.Record.Reason, "default deny") {
		t.Errorf("the record says %q, %q; want revoked and why", last.Record.Ended, last.Record.Reason)
	}
	if l.count("shop/db") != 1 {
		t.Errorf("%d open connections, want 1", l.count("shop/db"))
	}
}

// TestLiveJudgesLateNews: a connection that was admitted just before an edit
// is heard of after it, and must not slip through between the two.
func TestLiveJudgesLateNews(t *testing.T) {
	l := newLive(slog.New(slog.DiscardHandler))
	ended := 0
	l.destroy = func(string, netip.AddrPort, netip.AddrPort) error { ended++; return nil }
	l.update(stateWith(mesh.ModeEnforce, web))
	l.see(opened("1", batch, "10.0.0.1:5432"))
	l.see(opened("2", web, "10.0.0.1:9999")) // a port that no policy names
	if ended != 2 {
		t.Errorf("%d ended, want 2", ended)
	}
}

// TestLiveObserveEndsNothing: observe mode records and lets flow.
func TestLiveObserveEndsNothing(t *testing.T) {
	l := newLive(slog.New(slog.DiscardHandler))
	l.destroy = func(string, netip.AddrPort, netip.AddrPort) error { t.Error("ended in observe mode"); return nil }
	l.update(stateWith(mesh.ModeObserve))
	l.see(opened("1", batch, "10.0.0.1:5432"))
	l.destroy = func(string, netip.AddrPort, netip.AddrPort) error { return capture.ErrNotFound }
	l.update(stateWith(mesh.ModeEnforce)) // from observe to enforce: now it is ended
	if l.count("shop/db") != 0 {
		t.Error("still counted after the switch to enforce")
	}
}

// TestLiveForgetsOnlyTheDeadProxy: a proxy died and the next one has
// connections already when the agent clears up. Those must still be ended by
// an edit; if all were forgotten, they would outlive their grant.
func TestLiveForgetsOnlyTheDeadProxy(t *testing.T) {
	l := newLive(slog.New(slog.DiscardHandler))
	ended := 0
	l.destroy = func(string, netip.AddrPort, netip.AddrPort) error { ended++; return nil }
	l.update(stateWith(mesh.ModeEnforce, web))
	l.see(opened("1", web, "10.0.0.1:5432"))
	l.see(opened("2", web, "10.0.0.1:5432"))
	l.forget(map[string]bool{"1": true})
	if n := l.count("shop/db"); n != 1 {
		t.Fatalf("%d open connections, want the one of the new proxy", n)
	}
	l.update(stateWith(mesh.ModeEnforce))
	if ended != 1 {
		t.Errorf("%d ended by the edit, want 1", ended)
	}
}

// TestLiveQuarantineEndsInObserveToo: a quarantine is not a policy; it cuts
// off what an observed namespace lets through, and nobody else.
func TestLiveQuarantineEndsInObserveToo(t *testing.T) {
	l := newLive(slog.New(slog.DiscardHandler))
	var ended []netip.AddrPort
	l.destroy = func(_ string, local, _ netip.AddrPort) error { ended = append(ended, local); return nil }
	l.update(stateWith(mesh.ModeObserve))
	l.see(opened("1001", web, "10.0.0.1:5432"))
	l.see(opened("1002", batch, "10.0.0.1:5432"))
	s := stateWith(mesh.ModeObserve)
	pattern, err := authz.ParsePattern(web)
	if err != nil {
		t.Fatal(err)
	}
	s.model = s.model.WithQuarantines(spiffeid.RequireTrustDomainFromString("mesh.test"), []authz.Quarantine{{Name: "incident-7", Identities: []authz.Pattern{pattern}}})
	l.update(s)
	if len(ended) != 1 || ended[0].Port() != 1001 {
		t.Fatalf("ended %v, want the connection of %s only", ended, web)
	}
}

// TestLiveFollowsDirect: a connection that came without a tunnel, whose caller
// proved an identity, is ended as others are, is no tunnel, and is known by its
// caller's address so that it is not taken for plaintext.
func TestLiveFollowsDirect(t *testing.T) {
	l := newLive(slog.New(slog.DiscardHandler))
	var ended []string
	l.destroy = func(_ string, local, remote netip.AddrPort) error {
		ended = append(ended, local.String()+" "+remote.String())
		return nil
	}
	direct := func(id, from, address string) *audit.Event {
		e := opened(id, from, "10.0.0.1:5432")
		e.Record.Transport, e.Record.Source.Address, e.Record.Source.Serial = audit.Direct, address, "0a"
		return e
	}
	l.update(stateWith(mesh.ModeEnforce, web, batch))
	l.see(direct("1001", web, "10.0.0.9:4001"))
	l.see(direct("1002", batch, "10.0.0.9:4002"))
	tunnelled := opened("1003", batch, "10.0.0.1:5432")
	tunnelled.Record.Source.Address = "10.0.0.9:4003"
	l.see(tunnelled)
	if len(l.tunnels) != 0 {
		t.Errorf("tunnels: %v", l.tunnels)
	}
	known := l.directs()
	if len(known) != 2 || !known["shop/db 10.0.0.9:4001"] || !known["shop/db 10.0.0.9:4002"] {
		t.Errorf("known: %v", known)
	}

	p := newPlaintext(slog.New(slog.DiscardHandler), l.directs)
	p.sockets = func(string) ([]capture.Socket, error) {
		var all []capture.Socket
		for _, peer := range []string{"10.0.0.9:4001", "10.0.0.9:4444"} {
			all = append(all, capture.Socket{Local: netip.MustParseAddrPort("10.0.0.1:15006"), Remote: netip.MustParseAddrPort(peer), State: capture.Established})
		}
		return all, nil
	}
	var plain []string
	p.destroy = func(_ string, _, remote netip.AddrPort) error { plain = append(plain, remote.String()); return nil }
	now := time.Now()
	p.look(stateWith(mesh.ModeEnforce, web, batch), false, now)
	if want := []string{"10.0.0.9:4444"}; !slices.Equal(plain, want) {
		t.Errorf("ended as plaintext: %v, want %v", plain, want)
	}
	// Where TLS is ended, a new connection has a moment to prove an identity.
	terminates := stateWith(mesh.ModeEnforce, web, batch)
	terminates.model = authz.NewModel([]authz.Policy{{Namespace: "shop", Name: "p", Ports: []uint16{5432}, Terminate: true}})
	plain = nil
	p.look(terminates, true, now)
	p.look(terminates, true, now.Add(proveTime/2))
	if len(plain) > 0 {
		t.Errorf("ended before they could prove anything: %v", plain)
	}
	p.look(terminates, true, now.Add(swapTime+proveTime))
	if want := []string{"10.0.0.9:4444"}; !slices.Equal(plain, want) {
		t.Errorf("ended as plaintext: %v, want %v", plain, want)
	}

	l.update(stateWith(mesh.ModeEnforce, batch))
	if want := []string{"10.0.0.1:1001 10.0.0.1:5432"}; !slices.Equal(ended, want) {
		t.Errorf("ended %v, want %v", ended, want)
	}
	if n := l.endDirects(stateWith(mesh.ModeEnforce, batch), "gone"); n != 1 || len(ended) != 2 || ended[1] != "10.0.0.1:1002 10.0.0.1:5432" {
		t.Errorf("ended %d, %v", n, ended)
	}
}

// A connection that the proxy made by mutual TLS with an application ends when either
// end is quarantined, and no policy of the caller's own namespace ends it.
func TestLiveLeaving(t *testing.T) {
	const app = "spiffe://partner.test/ns/pay/sa/ledger"
	leaving := func(id string) *audit.Event {
		return &audit.Event{Record: audit.Record{
			ID: id, Side: audit.Source, Transport: audit.Direct, Reason: "it proved who it is",
			Source:      audit.Party{ID: web, Workload: "shop/db", Address: "10.0.0.1:40000", Via: "10.0.0.1:" + id},
			Destination: audit.Party{ID: app, Address: "10.96.0.1:80", Via: "10.9.0.1:8443"},
		}}
	}
	for _, cut := range []string{web, app} {
		l := newLive(slog.New(slog.DiscardHandler))
		var ended []string
		l.destroy = func(netns string, local, remote netip.AddrPort) error {
			ended = append(ended, netns+" "+local.String()+" "+remote.String())
			return nil
		}
		s := stateWith(mesh.ModeEnforce)
		l.update(s)
		l.see(leaving("1001"))
		l.see(opened("1002", batch, "10.0.0.1:9999")) // no policy admits it
		if len(ended) != 1 || !strings.Contains(ended[0], ":1002") || l.count("shop/db") != 0 || len(l.directs()) != 0 {
			t.Fatalf("ended %v, counted %d, direct %v", ended, l.count("shop/db"), l.directs())
		}
		p, err := authz.ParsePattern(cut)
		if err != nil {
			t.Fatal(err)
		}
		s = stateWith(mesh.ModeEnforce)
		s.model = s.model.WithQuarantines(spiffeid.RequireTrustDomainFromString("mesh.test"), []authz.Quarantine{{Name: "incident", Identities: []authz.Pattern{p}}})
		l.update(s)
		if len(ended) != 2 || ended[1] != "/run/netns/db 10.0.0.1:1001 10.9.0.1:8443" {
			t.Fatalf("%s is cut off: ended %v", cut, ended)
		}
		last := leaving("1001")
		last.Final = true
		l.see(last)
		if last.Record.Ended != "revoked" || !strings.Contains(last.Record.Reason, `revoked: quarantined by "incident"`) {
			t.Errorf("the record says %q, %q", last.Record.Ended, last.Record.Reason)
		}
		l.update(stateWith(mesh.ModeEnforce))
		l.see(leaving("1003"))
		if n := l.endDirects(l.state, "distrusted"); n != 1 || len(ended) != 3 {
			t.Errorf("with a distrusted root %d end: %v", n, ended)
		}
	}
}
