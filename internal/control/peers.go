package control

import (
	"cmp"
	"context"
	"crypto/tls"
	"log/slog"
	"slices"
	"sync"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/keepalive"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca/caserver"
)

const (
	// findPeers is how often it is looked which other replicas there are.
	findPeers = time.Second
	// peerGrace is how long what a replica told counts when its stream ends:
	// streams end by themselves when certificates are renewed.
	peerGrace = 3 * time.Second
	// maxPeerMessage bounds what one replica tells, in bytes: some 100,000 pods.
	maxPeerMessage = 64 << 20
)

// peers learns from the other replicas what their nodes report, and which steps
// they have taken.
type peers struct {
	list func() []string // host:port of the other replicas
	tls  *tls.Config
	log  *slog.Logger

	mu   sync.Mutex
	told map[string]peer // guarded by mu; by address
}

// peer is what one replica has told.
type peer struct {
	reports []caserver.NodeReport
	steps   []caserver.Step
}

// run follows the replicas that there are until ctx ends.
func (p *peers) run(ctx context.Context) {
	var running sync.WaitGroup
	defer running.Wait()
	followed := map[string]context.CancelFunc{}
	tick := time.NewTicker(findPeers)
	defer tick.Stop()
	for {
		now := p.list()
		for address, stop := range followed {
			if !slices.Contains(now, address) {
				stop()
				delete(followed, address)
			}
		}
		for _, address := range now {
			if followed[address] != nil {
				continue
			}
			one, stop := context.WithCancel(ctx)
			followed[address] = stop
			running.Go(func() { p.follow(one, address) })
		}
		select {
		case <-tick.C:
		case <-ctx.Done():
			for _, stop := range followed {
				stop()
			}
			return
		}
	}
}

// follow listens to one replica until ctx ends. What one that cannot be reached
// has told is forgotten: nobody vouches for it any more.
func (p *peers) follow(ctx context.Context, address string) {
	defer p.forget(address)
	conn, err := grpc.NewClient("passthrough:///"+address,
		grpc.WithTransportCredentials(credentials.NewTLS(p.tls)),
		grpc.WithDefaultCallOptions(grpc.MaxCallRecvMsgSize(maxPeerMessage)),
		grpc.WithKeepaliveParams(keepalive.ClientParameters{Time: 10 * time.Second, Timeout: 5 * time.Second}))
	if err != nil {
		p.log.ErrorContext(ctx, "another replica's address", "replica", address, "error", err)
		return
	}
	defer conn.Close()
	heard, silent := time.Now(), false
	for ctx.Err() == nil {
		err := p.listen(ctx, conn, func(one peer) {
			if p.put(address, one); silent {
				p.log.InfoContext(ctx, "another replica answers again", "replica", address)
			}
			heard, silent = time.Now(), false
		})
		if age := time.Since(heard); age >= peerGrace && !silent && ctx.Err() == nil {
			silent = true
			p.forget(address)
			p.log.WarnContext(ctx, "another replica does not say what its nodes report; the status is without them", "replica", address, "error", err)
		}
		select {
		case <-time.After(peerGrace / 6):
		case <-ctx.Done():
		}
	}
}

// listen passes on what a replica says until its stream ends.
func (p *peers) listen(ctx context.Context, conn *grpc.ClientConn, tell func(peer)) error {
	stream, err := nodev1.NewReplicaClient(conn).Nodes(ctx, &nodev1.NodesRequest{})
	if err != nil {
		return err
	}
	for {
		m, err := stream.Recv()
		if err != nil {
			return err
		}
		tell(peer{caserver.ReportsOf(m), caserver.StepsOf(m)})
	}
}

func (p *peers) put(address string, one peer) {
	p.mu.Lock()
	defer p.mu.Unlock()
	p.told[address] = one
}

func (p *peers) forget(address string) {
	p.mu.Lock()
	defer p.mu.Unlock()
	delete(p.told, address)
}

// with adds what the other replicas told to this one's own reports.
func (p *peers) with(own []caserver.NodeReport) []caserver.NodeReport {
	if p == nil {
		return own
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	all := [][]caserver.NodeReport{own}
	for _, one := range p.told {
		all = append(all, one.reports)
	}
	return merged(all)
}

// steps says of each other replica which steps it has taken.
func (p *peers) steps() (out [][]caserver.Step) {
	if p == nil {
		return nil
	}
	p.mu.Lock()
	defer p.mu.Unlock()
	for _, one := range p.told {
		out = append(out, one.steps)
	}
	return out
}

// merged has one report of each node, sorted by name: that of the replica which
// the node is connected to, or was last.
func merged(all [][]caserver.NodeReport) []caserver.NodeReport {
	out := slices.Concat(all...)
	slices.SortStableFunc(out, func(a, b caserver.NodeReport) int {
		if a.Node == b.Node && a.Connected != b.Connected {
			if a.Connected {
				return -1
			}
			return 1
		}
		return cmp.Or(cmp.Compare(a.Node, b.Node), b.Since.Compare(a.Since))
	})
	return slices.CompactFunc(out, func(a, b caserver.NodeReport) bool { return a.Node == b.Node })
}
