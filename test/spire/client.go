package spire

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/svid/x509svid"
	agentv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/agent/v1"
	entryv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/entry/v1"
	svidv1 "github.com/spiffe/spire-api-sdk/proto/spire/api/server/svid/v1"
	"github.com/spiffe/spire-api-sdk/proto/spire/api/types"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
)

// Client is an agent that only asks for certificates: it speaks to a server as
// spire-agent does, over a connection of its own, and serves nobody.
type Client struct {
	conn *grpc.ClientConn
	id   spiffeid.ID
}

// Attest joins an agent by a token. The caller closes the client.
func (s *Server) Attest(ctx context.Context) (*Client, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	roots, err := s.roots(ctx)
	if err != nil {
		return nil, err
	}
	token, id, err := s.JoinToken(ctx)
	if err != nil {
		return nil, err
	}
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		return nil, err
	}
	svid, err := s.attest(ctx, token, key, roots)
	if err != nil {
		return nil, err
	}
	if svid.ID != id {
		return nil, fmt.Errorf("attested as %s, want %s", svid.ID, id)
	}
	conn, err := s.dial(tlsconfig.MTLSClientConfig(svid, roots, tlsconfig.AuthorizeID(s.BundleEndpointID())))
	if err != nil {
		return nil, err
	}
	return &Client{conn: conn, id: id}, nil
}

// roots are the server's, as an agent has them before it joins.
func (s *Server) roots(ctx context.Context) (*x509bundle.Bundle, error) {
	out, err := s.Command(ctx, nil, "bundle show")
	if err != nil {
		return nil, err
	}
	bundle := x509bundle.New(s.options.TrustDomain)
	for block, rest := pem.Decode(out); block != nil; block, rest = pem.Decode(rest) {
		root, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			return nil, err
		}
		bundle.AddX509Authority(root)
	}
	return bundle, nil
}

func (s *Server) dial(config *tls.Config) (*grpc.ClientConn, error) {
	return grpc.NewClient(s.options.Address.String(), grpc.WithTransportCredentials(credentials.NewTLS(config)))
}

// attest trades a token for an agent's certificate.
func (s *Server) attest(ctx context.Context, token string, key crypto.Signer, roots *x509bundle.Bundle) (*x509svid.SVID, error) {
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		return nil, err
	}
	conn, err := s.dial(tlsconfig.TLSClientConfig(roots, tlsconfig.AuthorizeID(s.BundleEndpointID())))
	if err != nil {
		return nil, err
	}
	defer conn.Close()
	stream, err := agentv1.NewAgentClient(conn).AttestAgent(ctx)
	if err != nil {
		return nil, err
	}
	if err := stream.Send(&agentv1.AttestAgentRequest{Step: &agentv1.AttestAgentRequest_Params_{Params: &agentv1.AttestAgentRequest_Params{
		Data:   &types.AttestationData{Type: "join_token", Payload: []byte(token)},
		Params: &agentv1.AgentX509SVIDParams{Csr: csr},
	}}}); err != nil {
		return nil, err
	}
	resp, err := stream.Recv()
	if err != nil {
		return nil, err
	}
	chain := resp.GetResult().GetSvid().GetCertChain()
	if len(chain) == 0 {
		return nil, errors.New("no certificate in the answer")
	}
	var der []byte
	for _, c := range chain {
		der = append(der, c...)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		return nil, err
	}
	return x509svid.ParseRaw(der, pkcs8)
}

// ID is the agent's identity.
func (c *Client) ID() spiffeid.ID { return c.id }

// Close ends the connection.
func (c *Client) Close() error { return c.conn.Close() }

// Entries waits until the server has at least n workloads for this agent, and
// returns their entries' IDs.
func (c *Client) Entries(ctx context.Context, n int) ([]string, error) {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		resp, err := entryv1.NewEntryClient(c.conn).GetAuthorizedEntries(ctx, &entryv1.GetAuthorizedEntriesRequest{})
		if err != nil {
			return nil, err
		}
		if len(resp.GetEntries()) >= n {
			ids := make([]string, 0, len(resp.GetEntries()))
			for _, e := range resp.GetEntries() {
				ids = append(ids, e.GetId())
			}
			return ids, nil
		}
		select {
		case <-ctx.Done():
			return nil, fmt.Errorf("%d of %d entries: %w", len(resp.GetEntries()), n, ctx.Err())
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// NewX509SVIDs asks for the certificates of entries in one call, each for the
// same certificate request, and returns the leaves.
func (c *Client) NewX509SVIDs(ctx context.Context, entries []string, csr []byte) ([][]byte, error) {
	req := &svidv1.BatchNewX509SVIDRequest{}
	for _, id := range entries {
		req.Params = append(req.Params, &svidv1.NewX509SVIDParams{EntryId: id, Csr: csr})
	}
	resp, err := svidv1.NewSVIDClient(c.conn).BatchNewX509SVID(ctx, req)
	if err != nil {
		return nil, err
	}
	leaves := make([][]byte, 0, len(entries))
	for i, r := range resp.GetResults() {
		if code := codes.Code(r.GetStatus().GetCode()); code != codes.OK {
			return nil, fmt.Errorf("entry %s: %s: %s", entries[i], code, r.GetStatus().GetMessage())
		}
		leaves = append(leaves, r.GetSvid().GetCertChain()[0])
	}
	if len(leaves) != len(entries) {
		return nil, fmt.Errorf("%d certificates for %d entries", len(leaves), len(entries))
	}
	return leaves, nil
}
