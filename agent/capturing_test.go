package agent

import (
	"net/netip"
	"testing"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Defends: status tells the truth: a pod counts as captured only when the proxy
// listens on all three ports, for each of its families, and not only on some
// address.
func TestMissing(t *testing.T) {
	sockets := func(addrs ...string) (out []capture.Socket) {
		for _, a := range addrs {
			out = append(out, capture.Socket{Local: netip.MustParseAddrPort(a), State: capture.Listen})
		}
		return out
	}
	four := []string{"0.0.0.0:15001", "0.0.0.0:15006", "0.0.0.0:15008"}
	for _, c := range []struct {
		listeners []string
		six       bool
		want      string
	}{
		{four, false, ""},
		{four[:2], false, "the proxy does not listen on port 15008 yet"},
		{[]string{"127.0.0.1:15001", "0.0.0.0:15006", "0.0.0.0:15008"}, false, "the proxy does not listen on port 15001 yet"},
		{four, true, "the proxy does not listen on port 15001 of IPv6 yet"},
		{append([]string{"[::]:15001", "[::]:15008"}, four...), true, "the proxy does not listen on port 15006 of IPv6 yet"},
		{append([]string{"[::]:15001", "[::]:15006", "[::]:15008"}, four...), true, ""},
		{[]string{"[::]:15001", "[::]:15006", "[::]:15008"}, true, "the proxy does not listen on port 15001 yet"},
	} {
		if got := missing(sockets(c.listeners...), c.six); got != c.want {
			t.Errorf("listeners %v, IPv6 %t: %q, want %q", c.listeners, c.six, got, c.want)
		}
	}
}

// A look by an older state neither puts rules in place nor takes any away once a
// newer state is being taken.
//
// What it defends: a pod that has just left is not captured again, with nobody
// listening in it, by a look that began before.
func TestOlderStateWritesNoRules(t *testing.T) {
	a := &agent{}
	a.rules.applied = map[string]ruled{"/nowhere/left": {state: captures}}
	older, newer := &nodeState{}, &nodeState{}
	a.rules.begin(older)
	a.rules.begin(newer)
	w := &mesh.Workload{Namespace: "shop", Name: "one", Capture: &mesh.Capture{NetNS: "/nowhere/one"}}
	if why := a.hold(older, w); why != "not looked at yet: a newer state has come" {
		t.Errorf("hold: %q", why)
	}
	a.letGo(older)
	if a.rules.get("/nowhere/left") != captures || a.rules.get("/nowhere/one") != noRules {
		t.Error("an older state changed which namespaces have rules")
	}
}
