package agent

import (
	"log/slog"
	"net/netip"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
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
