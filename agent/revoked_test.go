package agent

import (
	"fmt"
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
)

// TestRevokedTunnels: when a certificate is refused, the connections and tunnels
// that it opened end, and no others; while its holder has time to renew, nothing
// does. A tunnel that was not known ends at the first that is heard of it.
func TestRevokedTunnels(t *testing.T) {
	l, ended := testLive(t)
	record := func(id, serial, peer string, verdict audit.Verdict) *audit.Event {
		return &audit.Event{Record: audit.Record{
			ID: id, Side: audit.Destination, Transport: "mtls", Start: time.Now(), Verdict: verdict,
			Source:      audit.Party{ID: "spiffe://mesh.test/ns/shop/sa/web", Address: peer, Serial: serial},
			Destination: audit.Party{Workload: "shop/server", Address: "10.88.0.12:8080", Via: "10.88.0.12:4711"},
		}}
	}
	l.update(revokedState(t, nil))
	l.see(record("a", "0a", "10.88.0.10:1000", audit.Allowed))
	l.see(record("b", "0b", "10.88.0.11:1000", audit.Allowed))
	if l.revoke(revokedState(t, []*nodev1.Revoked{{Serial: "0a", Reason: "lost"}})); len(*ended) != 0 {
		t.Fatalf("ended before the holder had its time: %v", *ended)
	}
	refused := revokedState(t, []*nodev1.Revoked{{Serial: "0a", Reason: "lost", Refused: true}})
	l.revoke(refused)
	l.update(refused)
	want := []string{"10.88.0.12:4711 10.88.0.12:8080", "10.88.0.12:15008 10.88.0.10:1000"}
	if !slices.Equal(*ended, want) {
		t.Fatalf("ended %v, want %v", *ended, want)
	}
	last := record("a", "0a", "10.88.0.10:1000", audit.Allowed)
	last.Final = true
	if l.see(last); last.Record.Ended != "revoked" || !strings.Contains(last.Record.Reason, "lost") {
		t.Errorf("the audit says %q, %q", last.Record.Ended, last.Record.Reason)
	}
	*ended = nil
	denied := record("c", "0a", "10.88.0.20:2000", audit.Denied)
	denied.Final = true
	if l.see(denied); !slices.Equal(*ended, []string{"10.88.0.12:15008 10.88.0.20:2000"}) {
		t.Errorf("an unknown tunnel with the certificate: ended %v", *ended)
	}
}

// TestRevokedServers: when a server's certificate is refused, the tunnels that lead to
// it end, with what is open in them, and so do connections with an application that
// showed it; a tunnel to another certificate stays. One that is heard of later ends at
// once. What is open in them is told to have ended from here.
//
// What it defends: judgeLeaving, and what makes it look: when a state comes, and when
// a connection does.
func TestRevokedServers(t *testing.T) {
	l, ended := testLive(t)
	record := func(id, serial, local, transport string) *audit.Event {
		return &audit.Event{Record: audit.Record{
			ID: id, Side: audit.Source, Transport: transport, Start: time.Now(), Verdict: audit.Allowed,
			Source:      audit.Party{ID: "spiffe://mesh.test/ns/shop/sa/server", Workload: "shop/server", Address: "10.88.0.12:1000", Via: local},
			Destination: audit.Party{ID: "spiffe://mesh.test/ns/shop/sa/db", Address: "10.88.0.50:80", Via: "10.88.0.13:8080", Serial: serial},
		}}
	}
	l.update(revokedState(t, nil))
	for _, e := range []*audit.Event{
		record("a", "0a", "10.88.0.12:4001", "mtls"), record("b", "0a", "10.88.0.12:4001", "mtls"), record("c", "0b", "10.88.0.12:4002", "mtls"),
		record("d", "0a", "10.88.0.12:4003", audit.Direct), record("e", "0b", "10.88.0.12:4004", audit.Direct),
	} {
		l.see(e)
	}
	if l.revoke(revokedState(t, []*nodev1.Revoked{{Serial: "0a", Reason: "lost"}})); len(*ended) != 0 {
		t.Fatalf("ended before the holder had its time: %v", *ended)
	}
	refused := revokedState(t, []*nodev1.Revoked{{Serial: "0a", Reason: "lost", Refused: true}})
	l.revoke(refused)
	l.update(refused)
	want := []string{"10.88.0.12:4001 10.88.0.13:15008", "10.88.0.12:4003 10.88.0.13:8080"}
	if slices.Sort(*ended); !slices.Equal(*ended, want) {
		t.Fatalf("ended %v, want %v", *ended, want)
	}
	for id, revoked := range map[string]bool{"a": true, "b": true, "c": false, "d": true, "e": false} {
		transport, serial := "mtls", "0a"
		if id >= "d" {
			transport = audit.Direct
		}
		if !revoked {
			serial = "0b"
		}
		last := record(id, serial, "10.88.0.12:4005", transport)
		last.Final = true
		*ended = nil
		if l.see(last); (last.Record.Ended == "revoked") != revoked || strings.Contains(last.Record.Reason, authz.ServerRevoked+": lost") != revoked {
			t.Errorf("%s: the audit says %q, %q", id, last.Record.Ended, last.Record.Reason)
		}
	}
	*ended = nil
	if l.see(record("f", "0a", "10.88.0.12:4006", "mtls")); !slices.Equal(*ended, []string{"10.88.0.12:4006 10.88.0.13:15008"}) {
		t.Errorf("an unknown tunnel to the certificate: ended %v", *ended)
	}
	before := len(l.leaving)
	nowhere := record("g", "", "", "mtls") // one that was refused, or did not get there
	nowhere.Final = true
	if l.see(nowhere); len(l.leaving) != before {
		t.Error("what came to no tunnel is kept")
	}
	l.forget(map[string]bool{"c": true})
	for i := range 2 * maxTunnels {
		l.see(record("x", fmt.Sprintf("%06x", i), "10.88.0.12:"+fmt.Sprint(1024+i), "mtls"))
	}
	if len(l.leaving) > maxTunnels {
		t.Errorf("%d tunnels are kept, more than %d", len(l.leaving), maxTunnels)
	}
}

// testLive says what it would end.
func testLive(t *testing.T) (*live, *[]string) {
	t.Helper()
	ended := &[]string{}
	l := newLive(slog.New(slog.DiscardHandler))
	l.destroy = func(_ string, local, remote netip.AddrPort) error {
		*ended = append(*ended, local.String()+" "+remote.String())
		return nil
	}
	return l, ended
}

func revokedState(t *testing.T, revoked []*nodev1.Revoked) *nodeState {
	t.Helper()
	s, err := parseState(&nodev1.NodeState{
		TrustDomain: "mesh.test", Revoked: revoked,
		Workloads: []*nodev1.Workload{{
			Namespace: "shop", Name: "server", ServiceAccount: "server", SpiffeId: "spiffe://mesh.test/ns/shop/sa/server", Mode: "observe",
			Capture: &nodev1.Capture{Netns: "/run/netns/server", Addresses: []string{"10.88.0.12"}},
		}},
	}, "n1")
	if err != nil {
		t.Fatal(err)
	}
	return s
}

// TestBadRevocations: a state with what is no serial number is not taken.
func TestBadRevocations(t *testing.T) {
	for _, bad := range []string{"", "0", "0A", "zz", strings.Repeat("0", 42)} {
		if _, err := parseRevoked([]*nodev1.Revoked{{Serial: bad}}); err == nil {
			t.Errorf("serial %q is taken", bad)
		}
	}
	if _, err := parseRevoked(make([]*nodev1.Revoked, maxRevoked+1)); err == nil {
		t.Error("more than a node keeps are taken")
	}
}
