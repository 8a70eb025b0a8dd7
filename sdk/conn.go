package sdk

import (
	"crypto/tls"
	"errors"
	"net"
	"sync"
	"sync/atomic"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/protobuf/proto"

	sdkv1 "github.com/signet-mesh/signet/api/sdk/v1"
)

// openAfter is how long a connection lasts before the audit has it as open. What
// ends sooner is one event and not two; and a caller that is refused hears so
// after its own end of the handshake is over.
const openAfter = 250 * time.Millisecond

// Conn is a connection whose peer has proved who it is. It is a *tls.Conn in
// everything, and ends when the policies refuse it.
type Conn struct {
	*tls.Conn
	mesh     *Mesh
	peer     spiffeid.ID
	accepted bool
	port     uint16 // of the destination

	read, written atomic.Uint64

	mu      sync.Mutex
	event   *sdkv1.Event  // guarded by mu; the latest
	opened  bool          // guarded by mu; the audit has it as open
	done    bool          // guarded by mu
	revoked *RefusedError // guarded by mu; why it was ended from here
	timer   *time.Timer
}

// PeerID is the identity that the peer has proved.
func (c *Conn) PeerID() spiffeid.ID { return c.peer }

// newEvent is what can be said of any connection.
func (m *Mesh) newEvent(raw net.Conn, accepted bool) *sdkv1.Event {
	m.mu.Lock()
	m.last++
	e := &sdkv1.Event{Connection: m.last, Accepted: accepted, Start: time.Now().UnixNano()}
	m.mu.Unlock()
	if raw != nil {
		e.Address, e.PeerAddress = address(raw.LocalAddr()), address(raw.RemoteAddr())
	}
	return e
}

// address is an address as the audit has it; "" for one that is no ip:port.
func address(a net.Addr) string {
	if t, ok := a.(*net.TCPAddr); ok && t != nil {
		ap := t.AddrPort()
		return net.JoinHostPort(ap.Addr().Unmap().WithZone("").String(), portText(ap.Port()))
	}
	return ""
}

// refused reports a connection that came to nothing.
func (m *Mesh) refused(e *sdkv1.Event, verdict verdict, reason string) {
	e.Final, e.End, e.Verdict, e.Reason = true, time.Now().UnixNano(), string(verdict), clean(reason)
	m.reports.add(e)
}

// admit makes a connection of one whose handshake is over, and looks at it once
// more: the rules may be others than those that let it through.
func (m *Mesh) admit(raw *tls.Conn, e *sdkv1.Event, accepted bool, peer spiffeid.ID, port uint16, d decision) (*Conn, error) {
	c := &Conn{Conn: raw, mesh: m, peer: peer, accepted: accepted, port: port, event: e}
	e.Verdict, e.Reason, e.Policy, e.Revision = string(d.verdict), d.reason, d.policy, d.revision
	state := raw.ConnectionState()
	e.TlsVersion, e.TlsCipher, e.TlsGroup = "TLSv1.3", tls.CipherSuiteName(state.CipherSuite), state.CurveID.String()
	m.mu.Lock()
	if m.closed {
		m.mu.Unlock()
		m.refused(e, failed, "the program stops")
		return nil, errors.Join(ErrClosed, raw.Close())
	}
	m.open[c] = true
	m.mu.Unlock()
	c.mu.Lock()
	c.timer = time.AfterFunc(openAfter, c.isOpen)
	c.mu.Unlock()
	if err := c.judge(); err != nil {
		return nil, err
	}
	return c, nil
}

// judge ends the connection if the rules in force refuse it.
func (c *Conn) judge() error {
	d := c.mesh.decide(c.accepted, c.peer, c.event.PeerSerial, c.port)
	if !d.refuses() {
		return nil
	}
	c.mu.Lock()
	if c.done {
		c.mu.Unlock()
		return nil
	}
	why := &RefusedError{d.reason}
	c.revoked = why
	c.mu.Unlock()
	raw := c.NetConn()
	if t, ok := raw.(*net.TCPConn); ok {
		_ = t.SetLinger(0) // at once, whatever is still to be sent
	}
	_ = raw.Close()
	c.finish()
	return why
}

// Read implements net.Conn.
func (c *Conn) Read(b []byte) (int, error) {
	n, err := c.Conn.Read(b)
	if c.read.Add(uint64(n)) == uint64(n) && n > 0 {
		c.isOpen()
	}
	return n, c.because(err, true)
}

// Write implements net.Conn.
func (c *Conn) Write(b []byte) (int, error) {
	n, err := c.Conn.Write(b)
	c.written.Add(uint64(n))
	return n, c.because(err, false)
}

// because says why a connection ended, if that is known.
func (c *Conn) because(err error, reading bool) error {
	if err == nil {
		return nil
	}
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.revoked != nil {
		return c.revoked
	}
	var op *net.OpError
	if reading && !c.accepted && !c.done && c.read.Load() == 0 && errors.As(err, &op) && op.Op == "remote error" {
		// The destination looked at the certificate after this end of the
		// handshake was over.
		c.event.Verdict, c.event.Reason = string(denied), "refused by the destination"
		return errors.Join(&RefusedError{c.event.Reason}, err)
	}
	return err
}

// isOpen tells the audit that the connection is open.
func (c *Conn) isOpen() {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done || c.opened {
		return
	}
	c.opened = true
	c.mesh.reports.add(proto.CloneOf(c.event))
}

// Close implements net.Conn.
func (c *Conn) Close() error {
	err := c.Conn.Close()
	c.finish()
	return err
}

// finish tells the audit how it ended, once.
func (c *Conn) finish() {
	c.mesh.mu.Lock()
	delete(c.mesh.open, c)
	c.mesh.mu.Unlock()
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.done {
		return
	}
	c.done = true
	c.timer.Stop()
	e := c.event
	e.Final, e.End = true, time.Now().UnixNano()
	e.Sent, e.Received = c.written.Load(), c.read.Load()
	if c.accepted {
		e.Sent, e.Received = e.Received, e.Sent
	}
	if c.revoked != nil {
		e.Ended = "revoked"
		e.Reason = clean(e.Reason + "; revoked: " + c.revoked.Reason)
	}
	c.mesh.reports.add(e)
}
