package workloadapi

import (
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/jwtbundle"
	"github.com/spiffe/go-spiffe/v2/bundle/spiffebundle"
	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/types/known/structpb"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/internal/jwtcheck"
)

// FetchJWTSVID returns a token for each of the caller's identities, sorted by
// SPIFFE ID, or for the one that it names. The caller is attested once more
// before the tokens are given out: asking for them takes time.
func (s *Server) FetchJWTSVID(ctx context.Context, req *workload.JWTSVIDRequest) (*workload.JWTSVIDResponse, error) {
	if len(req.GetAudience()) == 0 || slices.Contains(req.GetAudience(), "") {
		return nil, status.Error(codes.InvalidArgument, "audience: empty; name who the token is for")
	}
	audience := slices.Clone(req.GetAudience())
	for i := len(audience) - 1; i > 0; i-- { // one value twice means no more than once
		if slices.Contains(audience[:i], audience[i]) {
			audience = slices.Delete(audience, i, i+1)
		}
	}
	p, err := process(ctx)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	ids, err := s.wanted(ctx, p, req.GetSpiffeId())
	if err != nil {
		return nil, err
	}
	out := &workload.JWTSVIDResponse{}
	for _, id := range ids {
		token, err := s.token(ctx, id.ID, audience)
		if err != nil {
			return nil, s.tokenError(ctx, p, id.ID, err)
		}
		out.Svids = append(out.Svids, &workload.JWTSVID{SpiffeId: id.String(), Svid: token.Token, Hint: id.hint})
	}
	still, err := s.identities(ctx, "FetchJWTSVID", p)
	if err != nil {
		return nil, err
	}
	if slices.ContainsFunc(ids, func(id identity) bool {
		return !slices.ContainsFunc(still, func(other identity) bool { return other.ID == id.ID })
	}) {
		s.refused(refusal.Refusal{Kind: refusal.NotItsOwn, Call: "FetchJWTSVID", ID: ids[0].String(), Caller: refusal.Of(p), Reason: "an identity of the calling process was taken away while its token was made"})
		return nil, status.Error(codes.PermissionDenied, "an identity of the calling process was taken away meanwhile")
	}
	s.log.Debug("gave out tokens", "method", "FetchJWTSVID", "pid", p.PID, "uid", p.UID, "ids", ids, "audience", audience)
	return out, nil
}

// wanted returns the caller's identities, or the one that it names if it is one
// of them. The error is a gRPC status.
func (s *Server) wanted(ctx context.Context, p *attest.Process, name string) ([]identity, error) {
	var only spiffeid.ID
	if name != "" {
		var err error
		if only, err = spiffeid.FromString(name); err != nil {
			return nil, status.Errorf(codes.InvalidArgument, "spiffe_id: %v", err)
		}
	}
	ids, err := s.identities(ctx, "FetchJWTSVID", p)
	if err != nil || name == "" {
		return ids, err
	}
	i := slices.IndexFunc(ids, func(id identity) bool { return id.ID == only })
	if i < 0 {
		s.refused(refusal.Refusal{Kind: refusal.NotItsOwn, Call: "FetchJWTSVID", ID: only.String(), Caller: refusal.Of(p), Reason: "it is not an identity of the calling process"})
		return nil, status.Errorf(codes.PermissionDenied, "spiffe_id: %s is not an identity of the calling process", only)
	}
	return ids[i : i+1], nil
}

// token waits a moment for an identity that svid does not hold yet.
func (s *Server) token(ctx context.Context, id spiffeid.ID, audience []string) (*svid.JWT, error) {
	patience := time.NewTimer(issueWait)
	defer patience.Stop()
	for {
		changed := s.svids.Changed()
		token, err := s.svids.JWT(ctx, id, audience)
		if !errors.Is(err, svid.ErrNotHeld) {
			return token, err
		}
		select {
		case <-changed:
		case <-patience.C:
			return nil, err
		case <-s.stopping:
			return nil, err
		case <-ctx.Done():
			return nil, ctx.Err()
		}
	}
}

// tokenError says why there is no token, in a gRPC status.
func (s *Server) tokenError(ctx context.Context, p *attest.Process, id spiffeid.ID, err error) error {
	if ctx.Err() != nil {
		return status.FromContextError(ctx.Err()).Err()
	}
	if s.refusals.Allow() {
		s.log.Warn("a caller gets no token", "pid", p.PID, "uid", p.UID, "id", id, "error", err)
	}
	refused := func(kind refusal.Kind) {
		s.refused(refusal.Refusal{Kind: kind, Call: "FetchJWTSVID", ID: id.String(), Caller: refusal.Of(p), Reason: err.Error()})
	}
	var answer interface{ GRPCStatus() *status.Status }
	switch {
	case errors.As(err, &answer) && answer.GRPCStatus().Code() == codes.InvalidArgument: // the audience, as the authority sees it
		return answer.GRPCStatus().Err()
	case errors.Is(err, svid.ErrQuarantined):
		refused(refusal.Quarantined)
		return status.Errorf(codes.PermissionDenied, "%s is quarantined", id)
	case errors.Is(err, svid.ErrTooMany):
		refused(refusal.Limit)
		return unavailable("%s has asked for too many tokens; keep those that are valid, and try again", id)
	}
	refused(refusal.NoSVID)
	return unavailable("no token can be had for %s now; the agent's log says why", id)
}

// FetchJWTBundles streams the keys that verify tokens, to callers that have an
// identity. Each message is the full state.
func (s *Server) FetchJWTBundles(_ *workload.JWTBundlesRequest, stream grpc.ServerStreamingServer[workload.JWTBundlesResponse]) error {
	return follow(s, "FetchJWTBundles", stream, s.jwtBundlesResponse)
}

func (s *Server) jwtBundlesResponse([]identity) (*workload.JWTBundlesResponse, error) {
	bundle := s.svids.JWTBundle()
	if bundle.Empty() {
		return nil, fmt.Errorf("the JWT bundle is %w yet", errPending)
	}
	out := &workload.JWTBundlesResponse{Bundles: map[string][]byte{}}
	for _, b := range s.svids.JWTBundles().Bundles() { // of every trust domain, each under its own name
		if b.Empty() {
			continue
		}
		keys, err := marshalKeys(b)
		if err != nil {
			return nil, err
		}
		out.Bundles[b.TrustDomain().IDString()] = keys
	}
	return out, nil
}

// marshalKeys writes a bundle as a JWK set whose keys have the use jwt-svid,
// sorted, so that the same keys are the same bytes.
func marshalKeys(bundle *jwtbundle.Bundle) ([]byte, error) {
	raw, err := spiffebundle.FromJWTAuthorities(bundle.TrustDomain(), bundle.JWTAuthorities()).Marshal()
	if err != nil {
		return nil, err
	}
	var set struct {
		Keys []json.RawMessage `json:"keys"`
	}
	if err := json.Unmarshal(raw, &set); err != nil {
		return nil, err
	}
	slices.SortFunc(set.Keys, func(a, b json.RawMessage) int { return bytes.Compare(a, b) })
	return json.Marshal(set)
}

// ValidateJWTSVID verifies a token for a caller that has an identity. A token
// that is not good is the request's fault, and the answer says what is wrong.
func (s *Server) ValidateJWTSVID(ctx context.Context, req *workload.ValidateJWTSVIDRequest) (*workload.ValidateJWTSVIDResponse, error) {
	switch {
	case req.GetAudience() == "":
		return nil, status.Error(codes.InvalidArgument, "audience: empty; say by which name the token should call you")
	case req.GetSvid() == "":
		return nil, status.Error(codes.InvalidArgument, "svid: empty; give the token")
	}
	p, err := process(ctx)
	if err != nil {
		return nil, status.Error(codes.PermissionDenied, err.Error())
	}
	if _, err := s.identities(ctx, "ValidateJWTSVID", p); err != nil {
		return nil, err
	}
	bundle := s.svids.JWTBundle()
	if bundle.Empty() {
		return nil, unavailable("the keys that verify tokens are not known yet")
	}
	token, err := jwtcheck.Validate(req.GetSvid(), req.GetAudience(), s.svids.JWTBundles())
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "svid: %v", err)
	}
	// A verifier knows nothing of a quarantine; the tokens from before it are
	// good by themselves.
	if s.svids.Quarantined(token.ID) {
		return nil, status.Errorf(codes.InvalidArgument, "svid: sub: %s is quarantined", token.ID)
	}
	if s.svids.RevokedToken(token.Claims) {
		return nil, status.Error(codes.InvalidArgument, "svid: jti: the token is revoked")
	}
	claims, err := structpb.NewStruct(token.Claims)
	if err != nil {
		return nil, status.Errorf(codes.InvalidArgument, "svid: its claims: %v", err)
	}
	return &workload.ValidateJWTSVIDResponse{SpiffeId: token.ID.String(), Claims: claims}, nil
}
