// Package agent composes what runs on a node: it holds the node's certificates,
// serves the SPIFFE Workload API and the proxy, keeps traffic captured, ends
// connections that are no longer allowed, and keeps the audit store.
package agent

import (
	"context"
	"crypto/sha256"
	"crypto/x509"
	"fmt"
	"log/slog"
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
	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/agent/csi"
	"github.com/signet-mesh/signet/agent/refusal"
	"github.com/signet-mesh/signet/agent/relay"
	"github.com/signet-mesh/signet/agent/sdkapi"
	"github.com/signet-mesh/signet/agent/svid"
	"github.com/signet-mesh/signet/agent/workloadapi"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/internal/adminserver"
	"github.com/signet-mesh/signet/internal/mesh"
	"github.com/signet-mesh/signet/internal/proxy/instance"
	"github.com/signet-mesh/signet/internal/unixsocket"
)

// Config says what an agent works with.
type Config struct {
	// Version of the program, to be told to who asks.
	Version     string
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
	// NoAudit keeps no audit; for measuring what it costs.
	NoAudit bool
	// Pods makes the agent the node's part in a Kubernetes cluster; nil: it is
	// not in one.
	Pods *PodConfig
	Log  *slog.Logger
}

// PodConfig is what an agent in a cluster needs beside.
type PodConfig struct {
	// Namespace is the release's own: its pods are never held back.
	Namespace string
	// Roots reads the roots that the control plane has published to the cluster,
	// in PEM; nil: nobody does.
	Roots func(ctx context.Context) ([]byte, error)
	// Kubelet is kubelet's directory, for pods that mount their certificates;
	// empty: no pod can.
	Kubelet string
	// Admin is the TCP address for the control plane's questions, Health that
	// for kubelet's and for metrics. Empty: not served.
	Admin, Health string
}

// Places below the directories.

// Spool is the file that the node's proxies append audit lines to.
func Spool(state string) string { return filepath.Join(state, "spool", "access.log") }

// ProxySocket is where the proxy gets its configuration.
func ProxySocket(run string) string { return filepath.Join(run, "ads.sock") }

// WorkloadSocket is the SPIFFE Workload API, open to every process.
func WorkloadSocket(run string) string { return filepath.Join(run, "api", "agent.sock") }

// AdminSocket is the operator's.
func AdminSocket(run string) string { return filepath.Join(run, "admin.sock") }

// agent is one running agent.
type agent struct {
	cfg        Config
	log        *slog.Logger
	node       *nodeIdentity
	svids      *svid.Manager
	relay      *relay.Relay
	attestor   *attest.Attestor
	store      *audit.Store
	tailer     *audit.Tailer
	refusals   *refusal.Book // nil: no audit is kept
	live       *live
	plain      *plaintext
	rules      capturing
	pods       *pods       // nil outside a cluster
	probes     *probes     // nil outside a cluster
	volumes    *csi.Driver // nil: none are served
	client     nodev1.NodeClient
	workloads  *workloadapi.Server
	roots      roots     // only reports uses it
	distrusted []string  // withdrawn roots whose tunnels were ended; nil: not read yet; only reports uses it
	rejoined   time.Time // when it was last tried; only watch uses it
	ipv6       bool      // the kernel has IPv6

	connected atomic.Bool   // the control plane's watch is open
	ready     atomic.Bool   // a state has been taken
	poke      chan struct{} // the state changed

	// giving is held while the state is replaced, and the proxy's configuration
	// built from it and handed on, so that an older one never follows a newer.
	giving sync.Mutex
	given  *nodeState // guarded by giving; what the proxy's configuration was built from
	// tunnels is when the proxy was last told to open new tunnels; zero: never.
	tunnels time.Time // guarded by giving

	mu       sync.Mutex
	state    *nodeState // guarded by mu; replaced whole
	reported reported   // guarded by mu; what the control plane was told last
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
	a := &agent{cfg: cfg, log: cfg.Log, node: node, live: newLive(cfg.Log), ipv6: hasIPv6(), poke: make(chan struct{}, 1)}
	node.issued = func(ctx context.Context, leaf *x509.Certificate) { a.issued(ctx, issuedCertificate("", leaf)) }
	a.plain = newPlaintext(cfg.Log, a.live.directs)
	a.rules.applied, a.rules.originals, a.rules.repaired = map[string]ruled{}, map[string]capture.Originals{}, map[string]time.Time{}
	if cfg.Pods != nil {
		if a.pods, err = openPods(cfg.RunDir, cfg.Log); err != nil {
			return err
		}
		a.probes = &probes{log: cfg.Log}
	}
	if a.store, err = audit.Open(filepath.Join(cfg.StateDir, "audit"), cfg.Node, cfg.Log); err != nil {
		return fmt.Errorf("audit store: %w", err)
	}
	defer a.store.Close()
	if err := a.live.load(ctx, a.store); err != nil {
		return fmt.Errorf("audit store: %w", err)
	}
	if a.tailer, err = audit.NewTailer(a.store, cfg.Log, audit.TailOptions{
		Path: Spool(cfg.StateDir), Decode: a.decode, Reopen: reopened, Poll: 10 * time.Millisecond,
	}); err != nil {
		return err
	}
	if !cfg.NoAudit {
		a.refusals = refusal.NewBook()
	}
	a.attestor = attest.New()
	a.svids = svid.New(svid.Config{Issuer: issuer{a}, JWTIssuer: issuer{a}, Dir: filepath.Join(cfg.StateDir, "svids"), Log: cfg.Log})
	a.relay = relay.New(relay.Config{Cache: filepath.Join(cfg.StateDir, "xds.pb"), Keys: a.svids, Draining: func(id string) bool { return instance.Draining(cfg.RunDir, id) }, Log: cfg.Log})
	if cfg.Pods != nil && cfg.Pods.Kubelet != "" {
		volumes := volumeConfig(cfg)
		volumes.Refused = a.refusals.Add
		a.volumes = csi.New(volumes, volumeAgent{a}, a.svids)
	}
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
	g, ctx := errgroup.WithContext(ctx)
	reports := a.store
	if a.cfg.NoAudit {
		reports = nil
	}
	sdks := sdkapi.New(sdkapi.Config{
		Attestor: a.attestor, Caller: workloadapi.Caller, Refused: a.refusals.Add, Rules: a.sdkRules, Store: reports, Stopping: ctx.Done(), Log: a.log,
	})
	a.workloads = workloadapi.New(workloadapi.Config{
		SVIDs: a.svids, Attestor: a.attestor, Ready: a.ready.Load, Beside: sdks.Register, Refused: a.refusals.Add, Log: a.log,
	})

	run := func(f func(context.Context)) {
		g.Go(func() error { f(ctx); return nil })
	}
	g.Go(func() error { return proxy.Serve(proxySocket) })
	run(func(ctx context.Context) { <-ctx.Done(); proxy.Stop() })
	g.Go(func() error { return adminserver.Serve(ctx, adminSocket, a.admin()) })
	if a.cfg.Pods != nil {
		if err := a.servePods(ctx, g); err != nil {
			return err
		}
	}
	g.Go(func() error { return a.workloads.Serve(ctx, workloadSocket) })
	run(sdks.Run)
	if a.refusals != nil {
		run(a.keepRefusals)
	}
	g.Go(func() error { return a.tailer.Run(ctx) })
	g.Go(func() error { return a.svids.Run(ctx) })
	run(a.relay.FollowKeys)
	run(a.capture)
	run(a.reports)
	run(a.followProxies)
	run(a.watchClock)
	run(a.watchRenewals)
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

// issuer asks the control plane; it implements svid.ManyIssuer and svid.JWTIssuer.
type issuer struct{ *agent }

func (i issuer) Issue(ctx context.Context, workload string, csr []byte) ([][]byte, error) {
	if i.client == nil {
		return nil, fmt.Errorf("not connected to the control plane yet")
	}
	resp, err := i.client.Issue(ctx, &nodev1.IssueRequest{Workload: workload, Csr: csr, Uid: i.uid(workload)})
	i.refusedBy("Issue", workload, err)
	i.issued(ctx, issuedChain(workload, resp.GetChain())...)
	return resp.GetChain(), err
}

func (i issuer) IssueMany(ctx context.Context, asks []svid.Ask) ([]svid.Answer, error) {
	if i.client == nil {
		return nil, fmt.Errorf("not connected to the control plane yet")
	}
	requests := make([]*nodev1.IssueRequest, len(asks))
	for n, a := range asks {
		requests[n] = &nodev1.IssueRequest{Workload: a.Workload, Csr: a.CSR, Uid: i.uid(a.Workload)}
	}
	answers, err := svid.AskMany(ctx, i.client, requests)
	var issued []audit.Record
	for n, a := range asks {
		if err != nil {
			i.refusedBy("Issue", a.Workload, err)
		} else if n < len(answers) {
			i.refusedBy("Issue", a.Workload, answers[n].Err)
			issued = append(issued, issuedChain(a.Workload, answers[n].Chain)...)
		}
	}
	i.issued(ctx, issued...)
	return answers, err
}

func (i issuer) IssueJWT(ctx context.Context, workload string, audience []string) (string, error) {
	if i.client == nil {
		return "", fmt.Errorf("not connected to the control plane yet")
	}
	resp, err := i.client.IssueJWT(ctx, &nodev1.IssueJWTRequest{Workload: workload, Uid: i.uid(workload), Audience: audience})
	i.refusedBy("IssueJWT", workload, err)
	if err == nil {
		i.issued(ctx, issuedToken(workload, audience, resp.GetToken())...)
	}
	return resp.GetToken(), err
}

// uid returns the UID of the pod that is a workload now.
func (a *agent) uid(workload string) string {
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	if s == nil {
		return ""
	}
	if w := s.workload(workload); w != nil {
		return w.UID
	}
	return ""
}

// sdkRules is what workloads that decide for themselves decide by.
func (a *agent) sdkRules() (sdkapi.Rules, bool) {
	a.mu.Lock()
	s := a.state
	a.mu.Unlock()
	if s == nil {
		return sdkapi.Rules{}, false
	}
	return sdkapi.Rules{TrustDomain: s.trustDomain, Model: s.model, Refused: s.refusedReasons(), Mode: func(namespace string) mesh.Mode { return s.modes[namespace] }}, true
}

func svidState(s *nodeState) svid.State {
	distrusted := make([][sha256.Size]byte, len(s.distrusted))
	for i, f := range s.distrusted {
		distrusted[i] = f
	}
	return svid.State{TrustDomain: s.trustDomain, Bundle: s.bundle, Distrusted: distrusted, Revoked: s.isRevoked, JWTKeys: s.jwtKeys, Foreign: s.foreign, Workloads: s.workloads, TTL: s.ttl, KeyType: s.keyType, Quarantined: s.model.Quarantined}
}
