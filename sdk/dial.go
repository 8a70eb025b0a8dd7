package sdk

import (
	"context"
	"fmt"
	"net/netip"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
)

// Dial connects to a server that proves to be one of the given identities:
// nobody else at the address is spoken to. Refusals of this side (a quarantine)
// are a *RefusedError. The server's own refusal is seen at the first Read: a
// TLS 1.3 server looks at the caller when the caller's handshake is over.
func (m *Mesh) Dial(ctx context.Context, network, address string, server spiffeid.ID, or ...spiffeid.ID) (*Conn, error) {
	return m.dialAs(ctx, network, address, append([]spiffeid.ID{server}, or...), nil)
}

func (m *Mesh) dialAs(ctx context.Context, network, address string, servers []spiffeid.ID, protocols []string) (*Conn, error) {
	for _, id := range servers {
		if id.Path() == "" {
			return nil, fmt.Errorf("sdk: dial %s: %q is nobody's SPIFFE ID; say whom you expect there, such as spiffe://mesh.example/ns/pay/sa/ledger", address, id)
		}
	}
	fail := func(verdict verdict, reason string) {
		e := m.newEvent(nil, false)
		if to, err := netip.ParseAddrPort(address); err == nil {
			e.PeerAddress = to.String()
		}
		m.refused(e, verdict, reason)
	}
	if d := m.decide(false, spiffeid.ID{}, "", 0); d.refuses() {
		fail(denied, d.reason)
		return nil, &RefusedError{d.reason}
	}
	raw, err := m.dial(ctx, network, address)
	if err != nil {
		fail(failed, "the destination could not be reached: "+err.Error())
		return nil, err
	}
	return m.connect(ctx, raw, servers, protocols)
}
