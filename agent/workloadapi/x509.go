package workloadapi

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"slices"
	"time"

	"github.com/spiffe/go-spiffe/v2/proto/spiffe/workload"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	"google.golang.org/protobuf/proto"

	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/refusal"
)

// FetchX509SVID streams the caller's SVIDs. Each message is the full state,
// sorted by SPIFFE ID; one is sent at once and one on each change.
func (s *Server) FetchX509SVID(_ *workload.X509SVIDRequest, stream grpc.ServerStreamingServer[workload.X509SVIDResponse]) error {
	return follow(s, "FetchX509SVID", stream, s.svidResponse)
}

// FetchX509Bundles streams the trust bundle to callers that have an identity.
func (s *Server) FetchX509Bundles(_ *workload.X509BundlesRequest, stream grpc.ServerStreamingServer[workload.X509BundlesResponse]) error {
	return follow(s, "FetchX509Bundles", stream, s.bundlesResponse)
}

// errPending says that what the caller may have is not there: not issued yet,
// or expired without a successor.
var errPending = errors.New("not there")

// follow sends what build makes of the caller's identities, and again
// whenever that has changed, until the stream ends. The caller is attested
// anew before each message, and each time that something changes: an
// entitlement that is lost ends the stream.
func follow[T any, M interface {
	*T
	proto.Message
}](s *Server, method string, stream grpc.ServerStreamingServer[T], build func([]identity) (M, error)) error {
	ctx := stream.Context()
	p, err := process(ctx)
	if err != nil {
		return status.Error(codes.PermissionDenied, err.Error())
	}
	log := s.log.With("method", method, "pid", p.PID, "uid", p.UID)

	f := &follower{}
	defer s.ended(f)
	var (
		last     M           // nil before the first message
		patience *time.Timer // runs while a certificate is waited for
	)
	for {
		svids, rules := s.svids.Changed(), s.attestor.Changed()
		ids, err := s.identities(ctx, method, p)
		if err != nil {
			return err
		}
		msg, err := build(ids)
		if patience != nil && !errors.Is(err, errPending) {
			patience.Stop()
			patience = nil
		}
		var tired <-chan time.Time
		switch {
		case errors.Is(err, errPending):
			if patience == nil {
				patience = time.NewTimer(issueWait)
				defer patience.Stop()
			}
			tired = patience.C
		case err != nil:
			log.Error("a caller's certificate cannot be given out", "ids", ids, "error", err)
			return status.Error(codes.Internal, err.Error())
		case last == nil || !proto.Equal(last, msg):
			if err := stream.Send((*T)(msg)); err != nil {
				return err
			}
			log.Debug("sent an update", "ids", ids)
			last = msg
		}
		if last != nil {
			s.sent(f, svids)
		}
		select {
		case <-ctx.Done():
			return status.FromContextError(ctx.Err()).Err()
		case <-s.stopping:
			return unavailable("the agent is shutting down")
		case <-tired:
			log.Warn("a caller has an identity, but there is no valid certificate for it", "ids", ids, "error", err)
			s.refused(refusal.Refusal{Kind: refusal.NoSVID, Call: method, ID: ids[0].String(), Caller: refusal.Of(p), Reason: err.Error()})
			return unavailable("%v", err)
		case <-svids:
		case <-rules:
		}
	}
}

// identity is one that a caller has.
type identity struct {
	spiffeid.ID
	hint string // for the caller, which of several it is; empty: none
}

// identities attests the process and returns its identities, at least one, sorted
// by SPIFFE ID. A hint is given once. The error is a gRPC status.
func (s *Server) identities(ctx context.Context, call string, p *attest.Process) ([]identity, error) {
	if !s.ready() {
		return nil, unavailable("the agent is starting: it does not know this node's workloads yet")
	}
	workloads, err := s.attestor.Attest(ctx, p)
	if err != nil {
		if ctx.Err() != nil {
			return nil, status.FromContextError(ctx.Err()).Err()
		}
		if s.refusals.Allow() {
			s.log.Info("refused a caller of the Workload API", "pid", p.PID, "uid", p.UID, "error", err)
		}
		s.refused(refusal.Refusal{Kind: refusal.KindOf(err), Call: call, Caller: refusal.Of(p), Reason: err.Error()})
		// What differed goes to the operator only: it tells the rules.
		why := "no workload's attest rules match the calling process"
		if errors.Is(err, attest.ErrGone) {
			why = "the process that connected has exited or runs another program now"
		} else if errors.Is(err, attest.ErrMoved) {
			why = "the process was moved to another cgroup meanwhile"
		}
		return nil, status.Errorf(codes.PermissionDenied, "no identity issued to process %d of uid %d: %s; the agent's log says more", p.PID, p.UID, why)
	}
	ids := make([]identity, len(workloads))
	for i, w := range workloads {
		ids[i] = identity{w.ID, w.Hint}
	}
	slices.SortFunc(ids, func(a, b identity) int { // of one identity, what has a hint first
		return cmp.Or(cmp.Compare(a.String(), b.String()), cmp.Compare(b.hint, a.hint))
	})
	ids = slices.CompactFunc(ids, func(a, b identity) bool { return a.ID == b.ID })
	given := map[string]bool{}
	for i := range ids {
		if given[ids[i].hint] {
			ids[i].hint = ""
		}
		given[ids[i].hint] = true
	}
	if len(ids) == 0 { // an attestor never answers so; the specification forbids an empty message
		return nil, status.Error(codes.PermissionDenied, "no identity issued")
	}
	return ids, nil
}

func (s *Server) svidResponse(ids []identity) (*workload.X509SVIDResponse, error) {
	bundle := s.bundle()
	if len(bundle) == 0 {
		return nil, fmt.Errorf("the trust bundle is %w yet", errPending)
	}
	out := &workload.X509SVIDResponse{FederatedBundles: s.foreign()}
	for _, id := range ids {
		c, ok := s.svids.Get(id.ID)
		if !ok {
			continue
		}
		key, err := c.PKCS8()
		if err != nil {
			return nil, err
		}
		out.Svids = append(out.Svids, &workload.X509SVID{
			SpiffeId:    id.String(),
			X509Svid:    slices.Concat(c.Chain...),
			X509SvidKey: key,
			Bundle:      bundle,
			Hint:        id.hint,
		})
	}
	if len(out.Svids) == 0 {
		return nil, fmt.Errorf("the certificate of %s is %w (not issued yet, or expired); signet certs says why", ids[0], errPending)
	}
	return out, nil
}

func (s *Server) bundlesResponse(ids []identity) (*workload.X509BundlesResponse, error) {
	bundle := s.bundle()
	if len(bundle) == 0 {
		return nil, fmt.Errorf("the trust bundle is %w yet", errPending)
	}
	out := &workload.X509BundlesResponse{Bundles: s.foreign()}
	if out.Bundles == nil {
		out.Bundles = map[string][]byte{}
	}
	// Every identity on a node is of the one trust domain of its mesh, for which
	// nobody else speaks.
	out.Bundles[ids[0].TrustDomain().IDString()] = bundle
	return out, nil
}

// foreign returns the roots of the other trust domains that the mesh is
// federated with, each under its own name; nil: there are none. One without
// roots is left out: a message is the full state, so clients forget those that
// it had.
func (s *Server) foreign() map[string][]byte {
	var out map[string][]byte
	for _, b := range s.svids.Foreign() {
		if len(b.Roots) == 0 {
			continue
		}
		if out == nil {
			out = map[string][]byte{}
		}
		out[b.TrustDomain.IDString()] = concat(b.Roots)
	}
	return out
}

// bundle returns the roots, DER, one after the other.
func (s *Server) bundle() []byte { return concat(s.svids.Bundle()) }

func concat(certs []*x509.Certificate) []byte {
	var out []byte
	for _, c := range certs {
		out = append(out, c.Raw...)
	}
	return out
}
