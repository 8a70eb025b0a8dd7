package agent

import (
	"net/netip"
	"testing"

	"github.com/signet-mesh/signet/agent/capture"
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
