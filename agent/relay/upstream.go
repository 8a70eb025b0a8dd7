package relay

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/xds"
)

// types are what the relay takes from the control plane.
var types = []string{xds.TypeCluster}

// Follow keeps the copy equal to the control plane's until ctx ends,
// reconnecting as often as needed.
func (r *Relay) Follow(ctx context.Context, conn grpc.ClientConnInterface) {
	const first, most = 100 * time.Millisecond, 5 * time.Second
	wait := first
	for ctx.Err() == nil {
		began := time.Now()
		err := r.stream(ctx, conn)
		if ctx.Err() != nil {
			return
		}
		if time.Since(began) > most {
			wait = first
		}
		r.log.Warn("configuration stream to the control plane ended; the last good copy stays in force", "error", err, "retry", wait)
		select {
		case <-ctx.Done():
			return
		case <-time.After(wait/2 + rand.N(wait/2)):
		}
		wait = min(wait*2, most)
	}
}

func (r *Relay) stream(ctx context.Context, conn grpc.ClientConnInterface) error {
	ctx, cancel := context.WithCancel(ctx)
	stream, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err != nil {
		cancel()
		return err
	}
	responses := make(chan *discoveryv3.DeltaDiscoveryResponse)
	failed := make(chan error, 1)
	done := make(chan struct{})
	defer func() { cancel(); <-done }()
	go func() {
		defer close(done)
		for {
			resp, err := stream.Recv()
			if err != nil {
				failed <- err
				return
			}
			select {
			case responses <- resp:
			case <-ctx.Done():
				return
			}
		}
	}()

	told := map[string]bool{} // on-demand names that this stream asked for
	for _, t := range types {
		if err := stream.Send(r.subscribe(t, told)); err != nil {
			return err
		}
	}
	for {
		select {
		case err := <-failed:
			return err
		case <-r.asked:
			if names := r.newNames(told); len(names) > 0 {
				if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{
					TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: names,
				}); err != nil {
					return err
				}
			}
		case resp := <-responses:
			var added []xds.Resource
			for _, a := range resp.GetResources() {
				added = append(added, xds.Resource{Name: a.GetName(), Version: a.GetVersion(), Body: a.GetResource()})
			}
			r.apply(resp.GetTypeUrl(), added, resp.GetRemovedResources())
			if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{
				TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce(),
			}); err != nil {
				return err
			}
		}
	}
}

// subscribe is a stream's first request for a type: everything by wildcard,
// and the clusters that the proxy asked for, saying what is already here.
func (r *Relay) subscribe(typeURL string, told map[string]bool) *discoveryv3.DeltaDiscoveryRequest {
	req := &discoveryv3.DeltaDiscoveryRequest{
		TypeUrl:                 typeURL,
		ResourceNamesSubscribe:  []string{"*"},
		InitialResourceVersions: map[string]string{},
	}
	if typeURL == xds.TypeCluster {
		req.ResourceNamesSubscribe = append(req.ResourceNamesSubscribe, r.newNames(told)...)
	}
	r.mu.Lock()
	defer r.mu.Unlock()
	for n, res := range r.upstream.Set[typeURL] {
		req.InitialResourceVersions[n] = res.Version
	}
	return req
}

func (r *Relay) newNames(told map[string]bool) []string {
	r.mu.Lock()
	defer r.mu.Unlock()
	var out []string
	for _, n := range slices.Sorted(maps.Keys(r.onDemand)) {
		if !told[n] {
			told[n] = true
			out = append(out, n)
		}
	}
	return out
}
