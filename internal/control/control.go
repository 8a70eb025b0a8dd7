// Package control composes the control plane: it follows a source of what the
// mesh is, owns the certificate authority, and serves nodes.
package control

import (
	"cmp"
	"context"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"net"
	"os"
	"path/filepath"
	"slices"
	"sync"
	"sync/atomic"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/fanout"
	"github.com/signet-mesh/signet/internal/federation"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/unixsocket"
	"github.com/signet-mesh/signet/xds"
	"github.com/signet-mesh/signet/xds/xdsserver"
)

// control is one running control plane.
type control struct {
	cfg       Config
	log       *slog.Logger
	feed      mesh.Feed
	started   chan struct{}                   // closed by the first view
	nodes     atomic.Pointer[caserver.Server] // nil until the authority is open
	authority atomic.Pointer[ca.Authority]    // nil until it is open
	above     atomic.Pointer[ca.Enrolment]    // nil: none, or the trust domain is not known yet
	built     builds
	refusals  *refusals
	peers     *peers                // nil: there are no other replicas
	rotation  *rotation             // set before anybody can ask
	follower  *federation.Follower  // likewise
	shown     *federation.Publisher // likewise; nil: nobody is shown the mesh's bundle
	setting   sync.Mutex            // held while a view is set; taken before mu
	mu        sync.Mutex
	trust     string    // guarded by mu; the trust domain, fixed by the first view
	since     time.Time // guarded by mu; when the view in force was set
	rejected  []string  // guarded by mu; why the newest edit is not in force
}

// drainTime is what calls in flight get at the end. Nodes hold streams for ever.
const drainTime = 2 * time.Second

// Run serves until ctx ends, then drains. It returns an error at once when the
// source cannot begin.
func Run(ctx context.Context, cfg Config) error {
	if cfg.Source == nil {
		return errors.New("control: config: Source is missing")
	}
	if err := cfg.Federation.Check(cfg.JWTKeyLife); err != nil {
		return err
	}
	c := &control{cfg: cfg, log: cfg.Log, started: make(chan struct{}), refusals: newRefusals()}
	if cfg.Replicas != nil {
		c.peers = &peers{list: cfg.Replicas, log: cfg.Log, told: map[string]peer{}}
	}
	g, ctx := errgroup.WithContext(ctx)
	if cfg.HealthListen != "" {
		l, err := listen(cfg.HealthListen)
		if err != nil {
			return err
		}
		g.Go(func() error { return c.serveHealth(ctx, l) })
	}
	g.Go(func() error { return cfg.Source.Run(ctx, c.accept, c.reject) })
	g.Go(func() error { return c.serve(ctx) })
	return g.Wait()
}

// serve waits for the first view, which names the trust domain, opens the
// authority and serves nodes.
func (c *control) serve(ctx context.Context) error {
	select {
	case <-c.started:
	case <-ctx.Done():
		return nil
	}
	first, _ := c.feed.Get()
	td := first.State.TrustDomain
	dir := AuthorityDir(c.cfg.StateDir)
	above, stop, err := c.enrol(ctx, td)
	if err != nil && ctx.Err() != nil {
		return nil // ended before it could begin
	}
	if err != nil {
		return err
	}
	defer stop()
	authority, err := ca.Open(ca.Options{Dir: dir, TrustDomain: td, RootStore: c.cfg.Roots, RootKeys: c.cfg.RootKeys, Above: above != nil, Leaves: c.cfg.Leaves, JWTKeyStore: c.cfg.JWTKeys, JWTKeyLife: c.cfg.JWTKeyLife, JWTIssuer: c.cfg.Federation.Issuer, Log: c.log})
	if err != nil {
		return err
	}
	defer authority.Close()
	tokens := c.cfg.Tokens
	if tokens == nil {
		if tokens, err = caserver.OpenTokens(TokenDir(c.cfg.StateDir)); err != nil {
			return err
		}
	}
	if err := os.MkdirAll(FederationDir(c.cfg.StateDir), 0o700); err != nil {
		return err
	}
	c.follower = c.newFollower(td)
	nodes, err := caserver.New(caserver.Config{
		Authority: authority, Feed: &c.feed, Tokens: tokens, Log: c.log,
		XDSVersion: c.xdsVersion, Foreign: c.follower.Bundles, Refused: c.refusals.add,
	})
	if err != nil {
		return err
	}
	server := grpc.NewServer(nodes.ServerOptions()...)
	nodev1.RegisterNodeServer(server, nodes)
	nodev1.RegisterReplicaServer(server, nodes.Replicas(c.cfg.Steps))
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(server, &xdsserver.Server{Open: c.open, Types: []string{xds.TypeCluster}, Log: c.log})
	listener, err := listen(c.cfg.Listen)
	if err != nil {
		return err
	}
	admin, err := listen(c.cfg.AdminListen)
	if err != nil {
		listener.Close()
		return err
	}
	c.hold(authority)
	c.nodes.Store(nodes)

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(listener) })
	g.Go(func() error { authority.KeepJWTKeys(ctx); return nil })
	g.Go(func() error { c.refusals.keep(ctx, authority, c.log); return nil })
	g.Go(func() error {
		<-ctx.Done()
		stopped := make(chan struct{})
		go func() { server.GracefulStop(); close(stopped) }()
		select {
		case <-stopped:
		case <-time.After(drainTime):
			server.Stop()
			<-stopped
		}
		return nil
	})
	all := func() []caserver.NodeReport { return c.peers.with(nodes.Reports()) }
	g.Go(func() error { c.follower.Run(ctx, &c.feed); return nil })
	if c.shown, err = c.publish(ctx, g, authority); err != nil {
		return err
	}
	c.rotation = &rotation{
		authority: authority, above: above, reports: all, log: c.log, now: time.Now,
		view:      c.view,
		outsiders: func(now time.Time) string { return outsiders(c.shown, authority.Bundle(), now) },
	}
	if c.cfg.Agents != nil {
		c.rotation.declared = true
		c.rotation.present = func() (names []string) {
			for _, n := range c.cfg.Agents() {
				names = append(names, n.Name)
			}
			return names
		}
	}
	if above != nil {
		above.SetDue(func(root *x509.Certificate) string {
			return cmp.Or(c.rotation.wanted(root), authority.LeavesElsewhere(root))
		})
		above.SetLeaves(authority.Leaves)
	}
	g.Go(func() error { c.rotation.run(ctx); return nil })
	if c.cfg.Roots != nil {
		g.Go(func() error { authority.FollowRoots(ctx); return nil })
	}
	own, err := authority.ServerCertificate(ca.ControlID(td), caserver.DefaultNodeTTL)
	if err != nil {
		return err
	}
	agents, err := c.fanout(authority, own)
	if err != nil {
		return err
	}
	if c.peers != nil {
		if c.peers.tls, err = caserver.ClientTLS(caserver.ClientConfig{TrustDomain: td, Bundle: roots{authority}, Certificate: own.Get}); err != nil {
			return err
		}
		g.Go(func() error { c.peers.run(ctx); return nil })
	}
	g.Go(func() error { return c.serveAdmin(ctx, admin, agents) })
	if c.cfg.Attend != nil {
		g.Go(func() error {
			return c.cfg.Attend(ctx, Facts{Reports: all, Own: nodes.Reports, Others: c.peers.steps, Federations: c.follower.Status, Bundle: authority.BundleUpdates})
		})
	}
	c.log.Info("control plane serves", "trustDomain", td.Name(), "revision", first.Revision)
	return g.Wait()
}

// view returns what is in force; nil: nothing is yet.
func (c *control) view() *mesh.View {
	v, _ := c.feed.Get()
	return v
}

// fanout asks the agents in the control plane's name; nil where there is nobody
// to ask.
func (c *control) fanout(authority *ca.Authority, own *ca.ServerCertificate) (*fanout.Fanout, error) {
	if c.cfg.Agents == nil {
		return nil, nil
	}
	towards, err := fanout.NodeTLS(fanout.Identity{
		Certificate: own.Get, Bundle: roots{authority},
		Node: func(name string) (spiffeid.ID, error) { return ca.NodeID(authority.TrustDomain(), name) },
	})
	if err != nil {
		return nil, err
	}
	return fanout.New(fanout.Config{
		Nodes: c.cfg.Agents, TLS: towards,
		View: c.view,
	})
}

// roots is the authority's bundle, as it is now.
type roots struct{ *ca.Authority }

// GetX509BundleForTrustDomain implements x509bundle.Source.
func (r roots) GetX509BundleForTrustDomain(td spiffeid.TrustDomain) (*x509bundle.Bundle, error) {
	if td != r.TrustDomain() {
		return nil, fmt.Errorf("no bundle for trust domain %q", td)
	}
	return x509bundle.FromX509Authorities(td, r.Bundle()), nil
}

// listen opens a TCP port, or the unix socket at an absolute path.
func listen(address string) (net.Listener, error) {
	if filepath.IsAbs(address) {
		return unixsocket.Listen(address, 0o600)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		return nil, fmt.Errorf("control: %w; give host:port, or the absolute path of a unix socket", err)
	}
	return l, nil
}

// accept puts a view in force. A trust domain cannot be edited.
func (c *control) accept(view *mesh.View) {
	td := view.State.TrustDomain.Name()
	c.mu.Lock()
	trust := cmp.Or(c.trust, td)
	c.mu.Unlock()
	if td != trust {
		c.reject(fmt.Sprintf("spec.trustDomain: the mesh runs as %q; a trust domain cannot be edited, start a new mesh for %q", trust, td))
		return
	}
	old, _ := c.feed.Get()
	c.mu.Lock()
	c.trust, c.rejected = trust, nil
	if old == nil || old.Revision != view.Revision {
		c.since = time.Now()
	}
	c.mu.Unlock()
	if old != nil && old.Revision == view.Revision {
		return
	}
	c.set(view)
	level := slog.LevelInfo
	if old != nil && len(old.State.Workloads) == len(view.State.Workloads) && old.Model == view.Model {
		level = slog.LevelDebug // one of many in a large mesh
	}
	c.log.Log(context.Background(), level, "state in force", "revision", view.Revision, "workloads", len(view.State.Workloads), "policies", len(view.Model.Policies()))
	if old == nil {
		close(c.started)
	}
}

func (c *control) reject(lines ...string) {
	c.mu.Lock()
	again := slices.Equal(c.rejected, lines)
	c.rejected = lines
	c.mu.Unlock()
	if !again {
		c.log.Error("edit refused; the last good state stays in force", "findings", lines)
	}
}
