// Package agent composes what runs on a node: it holds the node's certificates,
// serves the SPIFFE Workload API and the proxy, keeps traffic captured, ends
// connections that are no longer allowed, and keeps the audit store.
package agent

import (
	"context"
	"fmt"
	"log/slog"
	"net/http"
	"os"
	"path/filepath"
	"sync"
	"sync/atomic"
	"time"

	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	"golang.org/x/sync/errgroup"
	"google.golang.org/grpc"

	"github.com/signet-mesh/signet/agent/accesslog"
	"github.com/signet-mesh/signet/agent/attest"
	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/agent/relay"
	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/agent/workloadapi"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/internal/unixsocket"
)

// Config says what an agent works with.
type Config struct {
	Node        string
	TrustDomain string
	// Control is the control plane's address as gRPC takes it, such as
	// "unix:///run/signet/control.sock".
	Control string
	// Bundle is a PEM file with the roots to trust before the first Join.
	Bundle string
	// JoinToken is a file with a one-use token; read only to join.
	JoinToken string
	// StateDir keeps keys, the last known state and the audit store.
	StateDir string
	// RunDir holds the sockets.
	RunDir string
	Log    *slog.Logger
}

// Places below the directories.

// Spool is the file that the proxy appends audit lines to.
func Spool(state string) string { return filepath.Join(state, "spool", "access.log") }

// ProxySocket is where the proxy gets its configuration.
func ProxySocket(run string) string { return filepath.Join(run, "ads.sock") }

// ProxyAdmin is the proxy's own admin socket.
func ProxyAdmin(run string) string { return filepath.Join(run, "envoy.sock") }

// ProxyEpoch is a file that is written anew before each start of the proxy:
// what was open before its modification time is gone.
func ProxyEpoch(run string) string { return filepath.Join(run, "proxy.epoch") }

// WorkloadSocket is the SPIFFE Workload API, open to every process.
func WorkloadSocket(run string) string { return filepath.Join(run, "api", "agent.sock") }

// AdminSocket is the operator's.
func AdminSocket(run string) string { return filepath.Join(run, "admin.sock") }

// agent is one running agent.
type agent struct {
	cfg      Config
	log      *slog.Logger
	node     *nodeIdentity
	svids    *svid.Manager
	relay    *relay.Relay
	attestor *attest.Attestor
	store    *audit.Store
	tailer   *audit.Tailer
	live     *live
	plain    *plaintext
	rules    capturing
	client   nodev1.NodeClient

	connected atomic.Bool   // the control plane's watch is open
	ready     atomic.Bool   // a state has been taken
	poke      chan struct{} // the state changed

	mu          sync.Mutex
	state       *nodeState // guarded by mu; replaced whole
	reportedRev string     // guarded by mu; last revision the proxy had in full
}

// Run joins the mesh if this node has not yet, and serves until ctx ends.
// Capture rules stay in place then: what is closed stays closed.
func Run(ctx context.Context, cfg Config) error {
	for _, dir := range []string{cfg.StateDir, filepath.Dir(Spool(cfg.StateDir)), cfg.RunDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return err
		}
	}
	node, err := openNode(cfg)
	if err != nil {
		return err
	}
	a := &agent{cfg: cfg, log: cfg.Log, node: node, live: newLive(cfg.Log), plain: newPlaintext(cfg.Log), poke: make(chan struct{}, 1)}
	a.rules.applied = map[string]bool{}
	if a.store, err = audit.Open(filepath.Join(cfg.StateDir, "audit"), cfg.Node, cfg.Log); err != nil {
		return fmt.Errorf("audit store: %w", err)
	}
	defer a.store.Close()
	if err := a.live.load(ctx, a.store); err != nil {
		return fmt.Errorf("audit store: %w", err)
	}
	if a.tailer, err = audit.NewTailer(a.store, cfg.Log, audit.TailOptions{
		Path: Spool(cfg.StateDir), Decode: a.decode, Reopen: a.reopenLog, Poll: 10 * time.Millisecond,
	}); err != nil {
		return err
	}
	a.attestor = attest.New()
	a.svids = svid.New(svid.Config{Issuer: issuer{a}, Dir: filepath.Join(cfg.StateDir, "svids"), Log: cfg.Log})
	a.relay = relay.New(relay.Config{Cache: filepath.Join(cfg.StateDir, "xds.pb"), Keys: a.svids, Log: cfg.Log})
	a.loadState()
	return a.serve(ctx)
}

func (a *agent) serve(ctx context.Context) error {
	proxySocket, err := unixsocket.Listen(ProxySocket(a.cfg.RunDir), 0o600)
	if err != nil {
		return err
	}
	adminSocket, err := unixsocket.Listen(AdminSocket(a.cfg.RunDir), 0o600)
	if err != nil {
		return err
	}
	workloadSocket, err := unixsocket.Listen(WorkloadSocket(a.cfg.RunDir), 0o666)
	if err != nil {
		return err
	}
	conn, err := a.node.dial(true)
	if err != nil {
		return err
	}
	defer conn.Close()
	a.client = nodev1.NewNodeClient(conn)
	proxy := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(proxy, a.relay.Server())
	workloads := workloadapi.New(workloadapi.Config{
		SVIDs: a.svids, Attestor: a.attestor, Ready: a.ready.Load, Log: a.log,
	})

	g, ctx := errgroup.WithContext(ctx)
	run := func(f func(context.Context)) {
		g.Go(func() error { f(ctx); return nil })
	}
	g.Go(func() error { return proxy.Serve(proxySocket) })
	run(func(ctx context.Context) { <-ctx.Done(); proxy.Stop() })
	g.Go(func() error { return a.serveAdmin(ctx, adminSocket) })
	g.Go(func() error { return workloads.Serve(ctx, workloadSocket) })
	g.Go(func() error { return a.tailer.Run(ctx) })
	g.Go(func() error { return a.svids.Run(ctx) })
	run(a.relay.FollowKeys)
	run(a.capture)
	run(a.followEpoch)
	// The rest needs the node's certificate. What is above works without the
	// control plane on what an earlier run left.
	g.Go(func() error {
		if !a.node.join(ctx) {
			return nil
		}
		a.log.Info("node joined", "node", a.cfg.Node)
		var inner errgroup.Group
		for _, f := range []func(){
			func() { a.node.keep(ctx, a.client) },
			func() { a.relay.Follow(ctx, conn) },
			func() { a.watch(ctx, a.client) },
		} {
			inner.Go(func() error { f(); return nil })
		}
		return inner.Wait()
	})
	return g.Wait()
}

// decode reads an audit line and lets live see it before it is stored.
func (a *agent) decode(line []byte) (audit.Event, bool, error) {
	e, ok, err := accesslog.Decode(line)
	if ok {
		a.live.see(&e)
		a.plain.see(&e)
	}
	return e, ok, err
}

// issuer asks the control plane; it implements svid.Issuer.
type issuer struct{ *agent }

func (i issuer) Issue(ctx context.Context, workload string, csr []byte) ([][]byte, error) {
	if i.client == nil {
		return nil, fmt.Errorf("not connected to the control plane yet")
	}
	resp, err := i.client.Issue(ctx, &nodev1.IssueRequest{Workload: workload, Csr: csr})
	return resp.GetChain(), err
}

func svidState(s *nodeState) svid.State {
	return svid.State{TrustDomain: s.trustDomain, Bundle: s.bundle, Workloads: s.workloads, TTL: s.ttl}
}

// report tells the control plane when the proxy has taken a revision in full.
func (a *agent) report(ctx context.Context, s *nodeState) {
	_, current, _ := a.relay.Proxy()
	if !current || !a.connected.Load() || a.relay.Version() != s.xdsVersion || a.reported() == s.revision {
		return
	}
	ctx, cancel := context.WithTimeout(ctx, time.Second)
	defer cancel()
	if _, err := a.client.Report(ctx, &nodev1.ReportRequest{Revision: s.revision}); err != nil {
		a.log.Warn("reporting the revision in force", "error", err)
		return
	}
	a.mu.Lock()
	defer a.mu.Unlock()
	a.reportedRev = s.revision
}

func (a *agent) reported() string {
	a.mu.Lock()
	defer a.mu.Unlock()
	return a.reportedRev
}

// reopenLog makes the proxy close the spool and open it anew.
func (a *agent) reopenLog(ctx context.Context) error {
	client := &http.Client{Transport: &http.Transport{DialContext: unixsocket.Dialer(ProxyAdmin(a.cfg.RunDir)), DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(ctx, http.MethodPost, "http://proxy/reopen_logs", nil)
	if err != nil {
		return err
	}
	resp, err := client.Do(req)
	if err != nil {
		return err
	}
	defer resp.Body.Close()
	if resp.StatusCode != http.StatusOK {
		return fmt.Errorf("proxy: %s", resp.Status)
	}
	return nil
}

// followEpoch closes the records of connections that a dead proxy had open.
func (a *agent) followEpoch(ctx context.Context) {
	var handled time.Time
	for {
		if info, err := os.Stat(ProxyEpoch(a.cfg.RunDir)); err == nil && info.ModTime().After(handled) {
			epoch := info.ModTime()
			if err := a.tailer.Sync(ctx); err == nil {
				n, err := a.store.CloseOpen(ctx, "proxy-lost", epoch, func(r audit.Record) bool { return r.Start.Before(epoch) })
				if err != nil {
					a.log.Error("closing the records of a dead proxy", "error", err)
				} else {
					handled = epoch
					if n > 0 {
						a.live.forget(epoch)
						a.log.Warn("a proxy died; its open connections were closed in the audit", "count", n)
					}
				}
			}
		}
		select {
		case <-ctx.Done():
			return
		case <-time.After(200 * time.Millisecond):
		}
	}
}
