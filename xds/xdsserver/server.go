// Package xdsserver speaks delta ADS: it keeps one subscriber's view equal to
// a Source, sending what changed and nothing else. The control plane serves
// nodes with it, and a node's agent serves its proxy.
package xdsserver

import (
	"context"
	"errors"
	"io"
	"log/slog"
	"slices"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"

	"github.com/signet-mesh/signet/xds"
)

// Answer says what a Source knows about a name.
type Answer uint8

// The answers.
const (
	Absent  Answer = iota // there is no such resource
	Pending               // not known yet: say nothing
	Found
)

// Source holds what one subscriber may see. Implementations are safe for
// concurrent use.
type Source interface {
	// Resources returns the set that wildcard subscriptions see, nil while it
	// is not known yet, and a channel that is closed when it, or an answer
	// of Lookup, may have changed. The set is not edited afterwards.
	Resources() (xds.Set, <-chan struct{})
	// Lookup answers for a name that is not in the set.
	Lookup(typeURL, name string) (xds.Resource, Answer)
}

// Subscriber hears how far a stream's peer is. Methods are called from the
// stream's goroutine and must not block.
type Subscriber interface {
	// Settled: the peer has taken everything that it asked for out of this set.
	Settled(set xds.Set)
	// Nacked: the peer refused an update of this type and keeps the old one.
	Nacked(typeURL, message string)
	// Closed: the stream ended.
	Closed()
}

// Server is an AggregatedDiscoveryService that serves delta streams only.
type Server struct {
	discoveryv3.UnimplementedAggregatedDiscoveryServiceServer

	// Open names the source for a new stream, by its context (the client
	// certificate, say) and never by what the peer claims to be. The Source
	// is the stream's own until Close.
	Open func(ctx context.Context) (Source, Subscriber, error)
	// Types are those that are served, by URL; none: clusters, secrets,
	// listeners and routes.
	Types []string
	Log   *slog.Logger
}

// order is the order in which types are sent: what is referred to first.
var order = []string{xds.TypeCluster, xds.TypeSecret, xds.TypeListener, xds.TypeRoute}

// DeltaAggregatedResources serves one stream until it ends.
func (s *Server) DeltaAggregatedResources(stream discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesServer) error {
	ctx := stream.Context()
	source, sub, err := s.Open(ctx)
	if err != nil {
		return err
	}
	if sub != nil {
		defer sub.Closed()
	}
	requests := make(chan *discoveryv3.DeltaDiscoveryRequest)
	failed := make(chan error, 1)
	// Ends when the stream does, which is when this handler returns.
	go func() {
		for {
			req, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case requests <- req:
			case <-ctx.Done():
				return
			}
		}
	}()

	types := map[string]*subscription{}
	for {
		set, changed := source.Resources()
		for _, t := range order {
			if known := types[t]; known != nil {
				if resp := known.update(t, set, source); resp != nil {
					if err := stream.Send(resp); err != nil {
						return err
					}
				}
			}
		}
		if sub != nil && set != nil && settled(types) {
			sub.Settled(set)
		}
		select {
		case <-ctx.Done():
			return nil
		case err := <-failed:
			if errors.Is(err, io.EOF) {
				return nil
			}
			return err
		case <-changed:
		case req := <-requests:
			known := types[req.GetTypeUrl()]
			if known == nil {
				if !s.serves(req.GetTypeUrl()) {
					return status.Errorf(codes.InvalidArgument, "type %q is not served here", req.GetTypeUrl())
				}
				known = newSubscription(req)
				types[req.GetTypeUrl()] = known
			} else {
				known.amend(req)
			}
			s.acknowledge(req, known, sub)
		}
	}
}

func (s *Server) acknowledge(req *discoveryv3.DeltaDiscoveryRequest, known *subscription, sub Subscriber) {
	if req.GetResponseNonce() == "" {
		return
	}
	if e := req.GetErrorDetail(); e != nil {
		s.Log.Error("proxy configuration refused", "type", req.GetTypeUrl(), "error", e.GetMessage())
		if sub != nil {
			sub.Nacked(req.GetTypeUrl(), e.GetMessage())
		}
		return
	}
	if req.GetResponseNonce() == known.nonceString() {
		known.acked = known.nonce
	}
}

// settled reports whether the peer took the last response of every type.
func settled(types map[string]*subscription) bool {
	for _, t := range types {
		if t.acked != t.nonce {
			return false
		}
	}
	return len(types) > 0
}

func (s *Server) serves(typeURL string) bool {
	return slices.Contains(order, typeURL) && (len(s.Types) == 0 || slices.Contains(s.Types, typeURL))
}
