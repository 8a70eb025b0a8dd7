package workloadapi

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"sync"

	"golang.org/x/time/rate"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/refusal"
)

// peerCreds takes the place of TLS: the "handshake" asks the kernel who
// connected. It implements credentials.TransportCredentials for servers.
type peerCreds struct {
	conns    *counter
	perUID   int
	refused  func(refusal.Refusal)
	log      *slog.Logger
	refusals *rate.Limiter // of log lines
}

// caller is what a connection's handshake found out.
type caller struct {
	credentials.CommonAuthInfo
	process *attest.Process
	err     error // why there is no process
}

// AuthType names how the caller is known.
func (*caller) AuthType() string { return "unix-peer" }

// conn closes the process with the connection.
type conn struct {
	net.Conn
	close func()
}

func (c *conn) Close() error {
	c.close()
	return c.Conn.Close()
}

func (p *peerCreds) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	uc, ok := raw.(*net.UnixConn)
	if !ok {
		return nil, nil, fmt.Errorf("workload api: connection is a %T; only unix sockets can be attested", raw)
	}
	// Nothing on this connection leaves the machine.
	info := &caller{CommonAuthInfo: credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}}
	info.process, info.err = attest.Peer(uc)
	if info.err != nil {
		if p.refusals.Allow() {
			p.log.Warn("a caller of the Workload API cannot be identified", "error", info.err)
		}
		p.refused(unidentified("connect", info.err))
		return raw, info, nil // the calls are answered, with a refusal
	}
	uid := info.process.UID
	if !p.conns.add(uid, p.perUID) {
		p.refused(refusal.Refusal{Kind: refusal.Limit, Call: "connect", Caller: refusal.Of(info.process), Reason: fmt.Sprintf("its user id has %d connections open", p.perUID)})
		info.process.Close()
		if p.refusals.Allow() {
			p.log.Warn("a user id has too many connections to the Workload API; refusing another", "uid", uid, "limit", p.perUID)
		}
		return nil, nil, fmt.Errorf("workload api: uid %d has %d connections open", uid, p.perUID)
	}
	return &conn{Conn: raw, close: sync.OnceFunc(func() {
		info.process.Close()
		p.conns.done(uid)
	})}, info, nil
}

// unidentified is the refusal of a caller of whom there is no process.
func unidentified(call string, err error) refusal.Refusal {
	r := refusal.Refusal{Kind: refusal.Unidentified, Call: call, Reason: err.Error()}
	var e *attest.PeerError
	if errors.As(err, &e) {
		r.Caller = refusal.Caller{PID: e.PID, UID: &e.UID}
	}
	return r
}

func (*peerCreds) ClientHandshake(context.Context, string, net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return nil, nil, errors.New("workload api: these credentials are for servers")
}

func (*peerCreds) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "unix-peer"}
}

func (p *peerCreds) Clone() credentials.TransportCredentials { c := *p; return &c }

// OverrideServerName implements credentials.TransportCredentials; there is no
// server name.
func (*peerCreds) OverrideServerName(string) error { return nil }

// Caller returns the process that a call on the server's socket comes from.
func Caller(ctx context.Context) (*attest.Process, error) { return process(ctx) }

// process returns the process that a call comes from.
func process(ctx context.Context) (*attest.Process, error) {
	p, ok := peer.FromContext(ctx)
	if !ok {
		return nil, errors.New("the call has no peer")
	}
	c, ok := p.AuthInfo.(*caller)
	switch {
	case !ok:
		return nil, errors.New("the call did not come over the agent's socket")
	case c.err != nil:
		return nil, c.err
	}
	return c.process, nil
}

// counter counts what each user id has open. The zero counter is ready and
// safe for concurrent use.
type counter struct {
	mu   sync.Mutex
	open map[uint32]int // guarded by mu
}

// add counts one more, and returns false when limit are open already.
func (c *counter) add(uid uint32, limit int) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open == nil {
		c.open = map[uint32]int{}
	}
	if c.open[uid] >= limit {
		return false
	}
	c.open[uid]++
	return true
}

func (c *counter) done(uid uint32) {
	c.mu.Lock()
	defer c.mu.Unlock()
	if c.open[uid]--; c.open[uid] == 0 {
		delete(c.open, uid)
	}
}
