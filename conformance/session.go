package conformance

import (
	"context"
	"fmt"
	"maps"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"google.golang.org/grpc"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
)

// header is the metadata that each call must have.
const header = "workload.spiffe.io"

// Names of the specifications.
const (
	docAPI        = "Workload API"
	docEndpoint   = "Workload Endpoint"
	docID         = "SPIFFE-ID"
	docX509       = "X509-SVID"
	docJWT        = "JWT-SVID"
	docBundle     = "Trust Domain and Bundle"
	docFederation = "Federation"
)

// session is one run: the connections, and what was seen in it so far. Checks run
// one after another.
type session struct {
	Options
	conn, stranger *grpc.ClientConn // nil: not given

	x509    once[*workload.X509SVIDResponse]
	bundles once[*workload.X509BundlesResponse]
	jwts    once[*workload.JWTSVIDResponse]
	keys    once[*workload.JWTBundlesResponse]
	fetched once[*fetched]
	update  once[*update]
}

// once is something that is asked for when it is first needed.
type once[T any] struct {
	done  bool
	value T
	err   error
}

func (o *once[T]) get(ask func() (T, error)) (T, error) {
	if !o.done {
		o.value, o.err = ask()
		o.done = true
	}
	return o.value, o.err
}

func (s *session) close() {
	for _, c := range []*grpc.ClientConn{s.conn, s.stranger} {
		if c != nil {
			_ = c.Close() // only waited for answers
		}
	}
}

// proper is the context of a call that a conforming client makes.
func (s *session) proper(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithTimeout(ctx, s.Timeout)
	return metadata.AppendToOutgoingContext(ctx, header, "true"), cancel
}

// first opens a stream and returns its first message, and how long that took.
func first[T any](ctx context.Context, open func(context.Context) (grpc.ServerStreamingClient[T], error)) (*T, time.Duration, error) {
	began := time.Now()
	stream, err := open(ctx)
	if err != nil {
		return nil, 0, err
	}
	m, err := stream.Recv()
	return m, time.Since(began), err
}

// message returns the first message of a stream.
func message[T any](ctx context.Context, s *session, open func(context.Context) (grpc.ServerStreamingClient[T], error)) (*T, error) {
	ctx, cancel := s.proper(ctx)
	defer cancel()
	m, _, err := first(ctx, open)
	return m, err
}

func openX509(c grpc.ClientConnInterface) func(context.Context) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
	return func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509SVIDResponse], error) {
		return workload.NewSpiffeWorkloadAPIClient(c).FetchX509SVID(ctx, &workload.X509SVIDRequest{})
	}
}

func openX509Bundles(c grpc.ClientConnInterface) func(context.Context) (grpc.ServerStreamingClient[workload.X509BundlesResponse], error) {
	return func(ctx context.Context) (grpc.ServerStreamingClient[workload.X509BundlesResponse], error) {
		return workload.NewSpiffeWorkloadAPIClient(c).FetchX509Bundles(ctx, &workload.X509BundlesRequest{})
	}
}

func openJWTBundles(c grpc.ClientConnInterface) func(context.Context) (grpc.ServerStreamingClient[workload.JWTBundlesResponse], error) {
	return func(ctx context.Context) (grpc.ServerStreamingClient[workload.JWTBundlesResponse], error) {
		return workload.NewSpiffeWorkloadAPIClient(c).FetchJWTBundles(ctx, &workload.JWTBundlesRequest{})
	}
}

// served returns the caller's X509-SVIDs, at least one, or says why a check that
// is about them has nothing to judge.
func (s *session) served(ctx context.Context) ([]*workload.X509SVID, error) {
	m, err := s.fetchX509(ctx)
	if err != nil || len(m.GetSvids()) == 0 {
		return nil, skip("no X509-SVID was served; see x509-served")
	}
	return m.GetSvids(), nil
}

// fetchX509 returns the first message of FetchX509SVID.
func (s *session) fetchX509(ctx context.Context) (*workload.X509SVIDResponse, error) {
	if s.conn == nil {
		return nil, errNoEndpoint
	}
	return s.x509.get(func() (*workload.X509SVIDResponse, error) { return message(ctx, s, openX509(s.conn)) })
}

// fetchBundles returns the first message of FetchX509Bundles.
func (s *session) fetchBundles(ctx context.Context) (*workload.X509BundlesResponse, error) {
	if s.conn == nil {
		return nil, errNoEndpoint
	}
	return s.bundles.get(func() (*workload.X509BundlesResponse, error) { return message(ctx, s, openX509Bundles(s.conn)) })
}

// fetchKeys returns the first message of FetchJWTBundles.
func (s *session) fetchKeys(ctx context.Context) (*workload.JWTBundlesResponse, error) {
	if err := s.hasJWT(); err != nil {
		return nil, err
	}
	return s.keys.get(func() (*workload.JWTBundlesResponse, error) { return message(ctx, s, openJWTBundles(s.conn)) })
}

// fetchJWT returns tokens of all identities.
func (s *session) fetchJWT(ctx context.Context) (*workload.JWTSVIDResponse, error) {
	if err := s.hasJWT(); err != nil {
		return nil, err
	}
	return s.jwts.get(func() (*workload.JWTSVIDResponse, error) {
		ctx, cancel := s.proper(ctx)
		defer cancel()
		return workload.NewSpiffeWorkloadAPIClient(s.conn).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{s.Audience}})
	})
}

var errNoEndpoint = skip("no endpoint is given at which the caller has an identity")

// hasEndpoint is nil if there is an endpoint.
func (s *session) hasEndpoint() error {
	if s.conn == nil {
		return errNoEndpoint
	}
	return nil
}

// hasJWT is nil if tokens are to be had.
func (s *session) hasJWT() error {
	switch {
	case s.conn == nil:
		return errNoEndpoint
	case s.NoJWT:
		return skip("the JWT-SVID profile is switched off, as the options say")
	}
	return nil
}

// domain is the server's trust domain.
func (s *session) domain(ctx context.Context) (string, error) {
	if s.TrustDomain != "" {
		return s.TrustDomain, nil
	}
	svids, err := s.served(ctx)
	if err != nil {
		return "", err
	}
	id, err := parseID(svids[0].GetSpiffeId())
	if err != nil {
		return "", skip("the trust domain is not known: the first identity is no SPIFFE ID")
	}
	return id.domain, nil
}

// call is one procedure of the API, called in a proper way but for its context.
type call struct {
	name string
	do   func(context.Context, grpc.ClientConnInterface) (proto.Message, error)
}

func streamed[M proto.Message, T any](name string, open func(grpc.ClientConnInterface) func(context.Context) (grpc.ServerStreamingClient[T], error), as func(*T) M) call {
	return call{name, func(ctx context.Context, c grpc.ClientConnInterface) (proto.Message, error) {
		m, _, err := first(ctx, open(c))
		return as(m), err
	}}
}

// calls are the procedures that are served here.
func (s *session) calls() []call {
	out := []call{
		streamed("FetchX509SVID", openX509, func(m *workload.X509SVIDResponse) *workload.X509SVIDResponse { return m }),
		streamed("FetchX509Bundles", openX509Bundles, func(m *workload.X509BundlesResponse) *workload.X509BundlesResponse { return m }),
	}
	if s.NoJWT {
		return out
	}
	return append(out,
		call{"FetchJWTSVID", func(ctx context.Context, c grpc.ClientConnInterface) (proto.Message, error) {
			return workload.NewSpiffeWorkloadAPIClient(c).FetchJWTSVID(ctx, &workload.JWTSVIDRequest{Audience: []string{s.Audience}})
		}},
		streamed("FetchJWTBundles", openJWTBundles, func(m *workload.JWTBundlesResponse) *workload.JWTBundlesResponse { return m }))
}

// validate asks the server for a verdict on a token.
func (s *session) validate(ctx context.Context, token, audience string) (*workload.ValidateJWTSVIDResponse, error) {
	ctx, cancel := s.proper(ctx)
	defer cancel()
	return workload.NewSpiffeWorkloadAPIClient(s.conn).ValidateJWTSVID(ctx, &workload.ValidateJWTSVIDRequest{Audience: audience, Svid: token})
}

// ids returns the SPIFFE IDs of X509-SVIDs, sorted.
func ids(svids []*workload.X509SVID) []string {
	seen := map[string]bool{}
	for _, svid := range svids {
		seen[svid.GetSpiffeId()] = true
	}
	return slices.Sorted(maps.Keys(seen))
}

// each asks a question about each of several things, and names the first that is
// not as it should be.
func each[T any](all []T, name func(T) string, ask func(T) error) error {
	for _, v := range all {
		if err := ask(v); err != nil {
			return fmt.Errorf("%s: %w", name(v), err)
		}
	}
	return nil
}
