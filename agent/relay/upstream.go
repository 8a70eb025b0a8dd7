package relay

import (
	"context"
	"maps"
	"math/rand/v2"
	"slices"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/xds"
)

// types are what the relay takes from the control plane.
var types = []string{xds.TypeCluster}

// Follow keeps the copy equal to the control plane's until ctx ends,
// reconnecting as often as needed.
//
// What is pushed and what was asked for by name come on streams of their own:
// on one, a cluster that was asked for first and is pushed later would not be
// sent again, and the copy would never be known to be whole.
func (r *Relay) Follow(ctx context.Context, conn grpc.ClientConnInterface) {
	var wait sync.WaitGroup
	wait.Go(func() { r.follow(ctx, conn, r.pushed) })
	wait.Go(func() { r.follow(ctx, conn, r.named) })
	wait.Wait()
}

// upstreamClient is the agent's end of a stream.
type upstreamClient = discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient

func (r *Relay) follow(ctx context.Context, conn grpc.ClientConnInterface, run func(context.Context, upstreamClient, <-chan *discoveryv3.DeltaDiscoveryResponse, <-chan error) error) {
	const first, most = 100 * time.Millisecond, 5 * time.Second
	wait := first
	for ctx.Err() == nil {
		began := time.Now()
		err := openStream(ctx, conn, run)
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

// openStream opens a stream and receives on it while run works.
func openStream(ctx context.Context, conn grpc.ClientConnInterface, run func(context.Context, upstreamClient, <-chan *discoveryv3.DeltaDiscoveryResponse, <-chan error) error) error {
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
	return run(ctx, stream, responses, failed)
}

// pushed takes what the control plane pushes, saying what is already here.
func (r *Relay) pushed(_ context.Context, stream upstreamClient, responses <-chan *discoveryv3.DeltaDiscoveryResponse, failed <-chan error) error {
	first := &discoveryv3.DeltaDiscoveryRequest{
		TypeUrl:                 xds.TypeCluster,
		ResourceNamesSubscribe:  []string{"*"},
		InitialResourceVersions: map[string]string{},
	}
	r.mu.Lock()
	for n, res := range r.upstream.Set[xds.TypeCluster] {
		first.InitialResourceVersions[n] = res.Version
	}
	r.mu.Unlock()
	if err := stream.Send(first); err != nil {
		return err
	}
	for {
		select {
		case err := <-failed:
			return err
		case resp := <-responses:
			r.apply(resp.GetTypeUrl(), added(resp), resp.GetRemovedResources())
			if err := acknowledge(stream, resp); err != nil {
				return err
			}
		}
	}
}

// named asks for the clusters that the proxy asked for, and takes the answers.
func (r *Relay) named(ctx context.Context, stream upstreamClient, responses <-chan *discoveryv3.DeltaDiscoveryResponse, failed <-chan error) error {
	told := map[string]bool{} // names that this stream asked for
	for {
		if names := r.newNames(told); len(names) > 0 {
			if err := stream.Send(&discoveryv3.DeltaDiscoveryRequest{
				TypeUrl: xds.TypeCluster, ResourceNamesSubscribe: names,
			}); err != nil {
				return err
			}
		}
		select {
		case <-ctx.Done():
			return ctx.Err()
		case err := <-failed:
			return err
		case <-r.asked:
		case resp := <-responses:
			r.answer(added(resp), resp.GetRemovedResources())
			if err := acknowledge(stream, resp); err != nil {
				return err
			}
		}
	}
}

func added(resp *discoveryv3.DeltaDiscoveryResponse) (out []xds.Resource) {
	for _, a := range resp.GetResources() {
		out = append(out, xds.Resource{Name: a.GetName(), Version: a.GetVersion(), Body: a.GetResource()})
	}
	return out
}

func acknowledge(stream upstreamClient, resp *discoveryv3.DeltaDiscoveryResponse) error {
	return stream.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()})
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
