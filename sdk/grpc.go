package sdk

import (
	"context"
	"errors"
	"net"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/peer"
)

// http2 is what gRPC speaks in TLS.
var http2 = []string{"h2"}

// GRPCClient returns credentials for connections to servers that prove to be one
// of the given identities.
func (m *Mesh) GRPCClient(server spiffeid.ID, or ...spiffeid.ID) credentials.TransportCredentials {
	return &grpcCredentials{mesh: m, servers: append([]spiffeid.ID{server}, or...)}
}

// GRPCServer returns credentials for a server on an ordinary listener, whose port
// is the one that policies name. A caller that is refused gets no connection.
func (m *Mesh) GRPCServer() credentials.TransportCredentials { return &grpcCredentials{mesh: m} }

// AuthInfo is what a call's peer.AuthInfo holds.
type AuthInfo struct {
	credentials.CommonAuthInfo
	Peer spiffeid.ID
}

// AuthType implements credentials.AuthInfo.
func (AuthInfo) AuthType() string { return "signet" }

// PeerFromContext returns who makes a gRPC call, as its connection proved.
func PeerFromContext(ctx context.Context) (spiffeid.ID, bool) {
	if p, ok := peer.FromContext(ctx); ok {
		info, ok := p.AuthInfo.(AuthInfo)
		return info.Peer, ok
	}
	return spiffeid.ID{}, false
}

type grpcCredentials struct {
	mesh    *Mesh
	servers []spiffeid.ID // nil: for a server
}

func (g *grpcCredentials) ClientHandshake(ctx context.Context, _ string, raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	if len(g.servers) == 0 {
		return nil, nil, errors.New("sdk: these credentials are for a server; a client says whom it expects, with GRPCClient")
	}
	return authenticated(g.mesh.connect(ctx, raw, g.servers, http2))
}

func (g *grpcCredentials) ServerHandshake(raw net.Conn) (net.Conn, credentials.AuthInfo, error) {
	return authenticated(g.mesh.server(context.Background(), raw, http2))
}

func authenticated(c *Conn, err error) (net.Conn, credentials.AuthInfo, error) {
	if err != nil {
		return nil, nil, err
	}
	return c, AuthInfo{credentials.CommonAuthInfo{SecurityLevel: credentials.PrivacyAndIntegrity}, c.peer}, nil
}

func (g *grpcCredentials) Info() credentials.ProtocolInfo {
	return credentials.ProtocolInfo{SecurityProtocol: "tls"}
}

func (g *grpcCredentials) Clone() credentials.TransportCredentials { c := *g; return &c }

// OverrideServerName implements credentials.TransportCredentials; there is no
// server name.
func (g *grpcCredentials) OverrideServerName(string) error { return nil }
