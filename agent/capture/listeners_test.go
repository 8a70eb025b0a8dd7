package capture

import (
	"net"
	"testing"
)

// Defends: asking whether the proxy listens, twice a second in every captured
// namespace, does not walk through the connections there. Without the kernel's
// own choice by state the list holds the open one too.
func TestListeners(t *testing.T) {
	p := newPair(t)
	serve(t, p.b, "tcp", ":8080", "app")
	serve(t, p.b, "tcp4", ":8081", "app")
	connect(t, p.a, net.Dialer{}, "10.88.0.3:8080")
	all, err := Sockets(p.b.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	if len(all) != 3 {
		t.Fatalf("sockets %+v, want two that listen and one connection", all)
	}
	got, err := Listeners(p.b.NetNS)
	if err != nil {
		t.Fatal(err)
	}
	ports := map[uint16]bool{}
	for _, s := range got {
		if s.State != Listen {
			t.Errorf("%+v does not listen", s)
		}
		ports[s.Local.Port()] = true
	}
	if len(got) != 2 || !ports[8080] || !ports[8081] {
		t.Errorf("listeners on %v, want 8080 and 8081", ports)
	}
}
