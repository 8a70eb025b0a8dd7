package agent

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
)

// Whoever is cut off must be so on the node too, where open connections are
// judged; a state with a quarantine that cannot be read is not taken, so that
// it is not taken without it.
func TestStateHasQuarantines(t *testing.T) {
	state := &nodev1.NodeState{
		TrustDomain: "mesh.test",
		Policies:    []*nodev1.Policy{{Namespace: "shop", Name: "p", From: []string{"spiffe://mesh.test/ns/shop/sa/*"}}},
		Quarantined: []*nodev1.Quarantined{{Name: "incident-7", Identities: []string{web}}},
	}
	s, err := parseState(state, "node-1")
	if err != nil {
		t.Fatal(err)
	}
	webID, batchID := spiffeid.RequireFromString(web), spiffeid.RequireFromString(batch)
	for _, r := range []authz.Request{
		{From: webID, Target: authz.Target{Namespace: "shop", ServiceAccount: "db"}, Port: 80},
		{From: batchID, Target: authz.Target{Namespace: "shop", ServiceAccount: "web"}, Port: 80},
	} {
		if d := s.model.Decide(r); d.Verdict != authz.Deny || d.Quarantine != "incident-7" {
			t.Errorf("%+v: %+v", r, d)
		}
	}
	if d := s.model.Decide(authz.Request{From: batchID, Target: authz.Target{Namespace: "shop", ServiceAccount: "db"}, Port: 80}); d.Verdict != authz.Allow {
		t.Errorf("a neighbour is cut off: %+v", d)
	}
	state.Quarantined[0].Identities = []string{"spiffe://mesh.test/we*"}
	if _, err := parseState(state, "node-1"); err == nil || !strings.Contains(err.Error(), `quarantine "incident-7"`) {
		t.Errorf("err = %v", err)
	}
}
