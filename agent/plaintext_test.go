package agent

import (
	"log/slog"
	"net/netip"
	"slices"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// TestPlaintextEndsWhenEnforcing: connections without a tunnel end when their
// namespace enforces, until the proxy's new listener is surely the only one;
// others, and those of observe mode, are left alone.
func TestPlaintextEndsWhenEnforcing(t *testing.T) {
	p := newPlaintext(slog.New(slog.DiscardHandler), func() map[string]bool { return nil })
	socket := func(port uint16, state capture.State, peer string) capture.Socket {
		return capture.Socket{
			Local:  netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port),
			Remote: netip.MustParseAddrPort(peer), State: state,
		}
	}
	p.sockets = func(string) ([]capture.Socket, error) {
		return []capture.Socket{
			socket(mesh.PortInbound, capture.Listen, "0.0.0.0:0"),
			socket(mesh.PortInbound, capture.Established, "10.0.0.9:1001"),
			socket(mesh.PortInbound, capture.TimeWait, "10.0.0.9:1002"),
			socket(mesh.PortTunnel, capture.Established, "10.0.0.9:1003"),
			socket(5432, capture.Established, "10.0.0.9:1004"),
		}, nil
	}
	var ended []string
	p.destroy = func(_ string, _, remote netip.AddrPort) error {
		ended = append(ended, remote.String())
		return nil
	}
	now := time.Now()
	want := func(when string, peers ...string) {
		t.Helper()
		if !slices.Equal(ended, peers) {
			t.Errorf("%s: ended %v, want %v", when, ended, peers)
		}
		ended = nil
	}
	p.look(stateWith(mesh.ModeObserve), true, now)
	want("observe")
	p.look(stateWith(mesh.ModeEnforce), false, now)
	want("enforce, the proxy is behind", "10.0.0.9:1001")
	p.look(stateWith(mesh.ModeEnforce), true, now.Add(time.Minute))
	want("enforce, the proxy has just followed", "10.0.0.9:1001")
	p.look(stateWith(mesh.ModeEnforce), true, now.Add(time.Minute+2*swapTime))
	want("enforce, long since")
	p.look(stateWith(mesh.ModeObserve), true, now.Add(2*time.Minute))
	p.look(stateWith(mesh.ModeEnforce), false, now.Add(3*time.Minute))
	want("enforce again", "10.0.0.9:1001")

	plain := func(peer string, verdict audit.Verdict) *audit.Event {
		return &audit.Event{Final: true, Record: audit.Record{
			Side: audit.Destination, Transport: "plaintext", Verdict: verdict, Start: now,
			Source: audit.Party{Address: peer}, Destination: audit.Party{Workload: "shop/db"},
		}}
	}
	for _, c := range []struct {
		e    *audit.Event
		want string
	}{
		{plain("10.0.0.9:1001", audit.Denied), ""},
		{plain("10.0.0.9:1005", audit.Observed), ""},
		{plain("10.0.0.9:1001", audit.Observed), "revoked"},
		{plain("10.0.0.9:1001", audit.Observed), ""}, // another one from the same address
	} {
		if p.see(c.e); c.e.Record.Ended != c.want {
			t.Errorf("%s, %s: ended %q, want %q", c.e.Record.Source.Address, c.e.Record.Verdict, c.e.Record.Ended, c.want)
		}
	}
}

// TestQuarantineEndsPlaintext: what a quarantined workload has open without a
// tunnel ends too, in an observed namespace as well, both what it accepted and
// what it opened itself; the audit says why.
func TestQuarantineEndsPlaintext(t *testing.T) {
	p := newPlaintext(slog.New(slog.DiscardHandler), func() map[string]bool { return nil })
	p.sockets = func(string) ([]capture.Socket, error) {
		var all []capture.Socket
		for i, port := range []uint16{mesh.PortInbound, mesh.PortOutbound, mesh.PortTunnel, 5432} {
			all = append(all, capture.Socket{
				Local:  netip.AddrPortFrom(netip.MustParseAddr("10.0.0.1"), port),
				Remote: netip.AddrPortFrom(netip.MustParseAddr("10.0.0.9"), uint16(1001+i)), State: capture.Established,
			})
		}
		return all, nil
	}
	var ended []string
	p.destroy = func(_ string, _, remote netip.AddrPort) error {
		ended = append(ended, remote.String())
		return nil
	}
	now := time.Now()
	s := stateWith(mesh.ModeObserve)
	p.look(s, true, now)
	if len(ended) > 0 {
		t.Fatalf("ended %v without a quarantine", ended)
	}
	cut, err := authz.ParsePattern("spiffe://mesh.test/ns/shop/sa/db")
	if err != nil {
		t.Fatal(err)
	}
	s.model = s.model.WithQuarantines(spiffeid.RequireTrustDomainFromString("mesh.test"), []authz.Quarantine{{Name: "leak", Identities: []authz.Pattern{cut}}})
	p.look(s, true, now)
	if want := []string{"10.0.0.9:1001", "10.0.0.9:1002"}; !slices.Equal(ended, want) {
		t.Errorf("ended %v, want %v", ended, want)
	}
	e := &audit.Event{Final: true, Record: audit.Record{
		Side: audit.Source, Transport: "plaintext", Verdict: audit.Allowed, Start: now.Add(-time.Second),
		Source: audit.Party{Workload: "shop/db", Address: "10.0.0.9:1002"},
	}}
	if p.see(e); e.Record.Ended != "revoked" {
		t.Errorf("the record says %+v", e.Record)
	}
}
