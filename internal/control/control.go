// Package control composes the control plane: it reads the documents, owns the
// certificate authority, compiles policies, and serves nodes.
package control

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"sync"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/unixsocket"
	"github.com/signet-mesh/signet/xds"
	"github.com/signet-mesh/signet/xds/xdsserver"
)

// Config says what a control plane works with.
type Config struct {
	// Documents is the file or directory of YAML.
	Documents string
	// Node is the machine that workloads without a node run on.
	Node string
	// StateDir keeps the authority and the join tokens.
	StateDir string
	// Listen is the unix socket for nodes, AdminSocket the operator's.
	Listen, AdminSocket string
	// AccessLog is the proxies' audit spool; empty turns audit off.
	AccessLog string
	Log       *slog.Logger
}

// The places below a state directory.

// AuthorityDir holds the root and the intermediate.
func AuthorityDir(state string) string { return filepath.Join(state, "ca") }

// TokenDir holds the join tokens.
func TokenDir(state string) string { return filepath.Join(state, "tokens") }

// RootFile is the root certificate, which nodes need before they join.
func RootFile(state string) string { return filepath.Join(AuthorityDir(state), "root.crt") }

// control is one running control plane.
type control struct {
	cfg      Config
	log      *slog.Logger
	feed     mesh.Feed
	nodes    *caserver.Server
	trust    string // the trust domain, fixed at the start
	built    builds
	mu       sync.Mutex
	since    time.Time // guarded by mu; when the view in force was set
	rejected []string  // guarded by mu; why the newest edit is not in force
}

// Run serves until ctx ends, then drains. It returns an error at once when the
// documents it starts with are not valid.
func Run(ctx context.Context, cfg Config) error {
	first, err := manifest.Load(cfg.Documents, cfg.Node)
	if err != nil {
		return err
	}
	authority, err := ca.Open(ca.Options{
		Dir: AuthorityDir(cfg.StateDir), TrustDomain: first.State.TrustDomain, Log: cfg.Log,
	})
	if err != nil {
		return err
	}
	defer authority.Close()
	tokens, err := caserver.OpenTokens(TokenDir(cfg.StateDir))
	if err != nil {
		return err
	}
	c := &control{cfg: cfg, log: cfg.Log, trust: first.State.TrustDomain.Name()}
	c.accept(first)
	c.nodes, err = caserver.New(caserver.Config{
		Authority: authority, Feed: &c.feed, Tokens: tokens, Log: cfg.Log,
		XDSVersion: c.xdsVersion,
	})
	if err != nil {
		return err
	}

	server := grpc.NewServer(c.nodes.ServerOptions()...)
	nodev1.RegisterNodeServer(server, c.nodes)
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(server, &xdsserver.Server{Open: c.open, Log: cfg.Log})
	listener, err := unixsocket.Listen(cfg.Listen, 0o600)
	if err != nil {
		return err
	}
	admin, err := unixsocket.Listen(cfg.AdminSocket, 0o600)
	if err != nil {
		listener.Close()
		return err
	}

	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Serve(listener) })
	g.Go(func() error {
		<-ctx.Done()
		stopped := make(chan struct{})
		go func() { server.GracefulStop(); close(stopped) }()
		select {
		case <-stopped:
		case <-time.After(2 * time.Second): // nodes hold streams for ever
			server.Stop()
			<-stopped
		}
		return nil
	})
	g.Go(func() error { return c.serveAdmin(ctx, admin) })
	g.Go(func() error {
		manifest.Watch(ctx, cfg.Documents, cfg.Node, cfg.Log, c.edited)
		return nil
	})
	cfg.Log.Info("control plane serves", "trustDomain", c.trust, "revision", first.Revision)
	return g.Wait()
}

// edited takes the result of reading the documents again. What is wrong leaves
// the last good state in force.
func (c *control) edited(m *manifest.Manifest, err error) {
	var bad *manifest.Error
	switch {
	case errors.As(err, &bad):
		var lines []string
		for _, f := range bad.Findings {
			lines = append(lines, f.String())
		}
		c.reject(lines...)
	case err != nil:
		c.reject(err.Error())
	case m.State.TrustDomain.Name() != c.trust:
		c.reject(fmt.Sprintf("spec.trustDomain: the mesh runs as %q; a trust domain cannot be edited, start a new mesh for %q",
			c.trust, m.State.TrustDomain.Name()))
	default:
		c.accept(m)
	}
}

func (c *control) reject(lines ...string) {
	c.mu.Lock()
	c.rejected = lines
	c.mu.Unlock()
	c.log.Error("edit refused; the last good state stays in force", "findings", lines)
}

func (c *control) accept(m *manifest.Manifest) {
	model, diagnostics := authz.Compile(m.State.TrustDomain, m.Policies)
	for _, d := range diagnostics { // Load refuses these; a policy that slips by grants nothing
		c.log.Error("policy is not valid and grants nothing", "policy", d.Policy, "field", d.Field, "message", d.Message)
	}
	c.mu.Lock()
	c.rejected = nil
	old, _ := c.feed.Get()
	if old == nil || old.Revision != m.Revision {
		c.since = time.Now()
	}
	c.mu.Unlock()
	if old != nil && old.Revision == m.Revision {
		return
	}
	c.feed.Set(&mesh.View{Revision: m.Revision, State: m.State, Model: model})
	c.log.Info("state in force", "revision", m.Revision, "workloads", len(m.State.Workloads), "policies", len(m.Policies))
}

// xdsVersion is the hash of what a node's proxy gets in a view.
func (c *control) xdsVersion(v *mesh.View, node string) string {
	set, err := c.built.get(v, node, xds.Options{AccessLog: c.cfg.AccessLog})
	if err != nil {
		return ""
	}
	return set.Version()
}

// open names the source of a node's stream by its certificate.
func (c *control) open(ctx context.Context) (xdsserver.Source, xdsserver.Subscriber, error) {
	node, ok := caserver.NodeFromContext(ctx)
	if !ok {
		return nil, nil, errors.New("no node certificate")
	}
	return &source{control: c, node: node}, nil, nil
}
