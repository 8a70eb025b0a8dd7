package main

import (
	"context"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"io"
	"log/slog"
	"path/filepath"
	"slices"
	"sync"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	"github.com/signet-mesh/signet/agent/svid"
	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// node is an agent as the control plane sees it.
type node struct {
	name   string
	bundle *x509bundle.Bundle
	cert   *tls.Certificate
	at     string
	conn   *grpc.ClientConn
	client nodev1.NodeClient
}

// joinNode joins with a token, and connects with what it got.
func joinNode(ctx context.Context, c *control, i int) (*node, error) {
	root, err := x509.ParseCertificate(c.Root)
	if err != nil {
		return nil, err
	}
	n := &node{name: nodeName(i), bundle: x509bundle.FromX509Authorities(domain, []*x509.Certificate{root}), at: c.Address}
	if err := n.connect(); err != nil {
		return nil, err
	}
	key, csr, err := newRequest()
	if err != nil {
		return nil, err
	}
	joined, err := n.client.Join(ctx, &nodev1.JoinRequest{Token: c.Tokens[i], Csr: csr})
	_ = n.conn.Close()
	if err != nil {
		return nil, fmt.Errorf("join %s: %w", n.name, err)
	}
	n.cert = &tls.Certificate{Certificate: joined.GetChain(), PrivateKey: key}
	return n, n.connect()
}

func (n *node) connect() error {
	cfg := caserver.ClientConfig{TrustDomain: domain, Bundle: n.bundle}
	if n.cert != nil {
		cfg.Certificate = func() (*tls.Certificate, error) { return n.cert, nil }
	}
	tlsConfig, err := caserver.ClientTLS(cfg)
	if err != nil {
		return err
	}
	if n.conn, err = grpc.NewClient(n.at, grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig))); err != nil {
		return err
	}
	n.client = nodev1.NewNodeClient(n.conn)
	return nil
}

// Issue implements svid.Issuer, as the agent does.
func (n *node) Issue(ctx context.Context, workload string, csr []byte) ([][]byte, error) {
	resp, err := n.client.Issue(ctx, &nodev1.IssueRequest{Workload: workload, Uid: "uid-" + workload[len("bench/"):], Csr: csr})
	return resp.GetChain(), err
}

// IssueMany implements svid.ManyIssuer, as the agent does.
func (n *node) IssueMany(ctx context.Context, asks []svid.Ask) ([]svid.Answer, error) {
	requests := make([]*nodev1.IssueRequest, len(asks))
	for i, a := range asks {
		requests[i] = &nodev1.IssueRequest{Workload: a.Workload, Uid: "uid-" + a.Workload[len("bench/"):], Csr: a.CSR}
	}
	return svid.AskMany(ctx, n.client, requests)
}

// start is an agent's start: connect, hear the node's state, and have the manager
// of package svid, which is the agent's own, get a certificate for each pod. It
// notes when each is there.
func (n *node) start(ctx context.Context, pods int, held func(time.Time)) error {
	if err := n.connect(); err != nil {
		return err
	}
	defer func() { _ = n.conn.Close() }()
	ctx, cancel := context.WithCancel(ctx)
	stream, err := n.client.Watch(ctx, &nodev1.WatchRequest{})
	if err != nil {
		cancel()
		return err
	}
	state, err := stream.Recv()
	if err != nil {
		cancel()
		return err
	}
	m := svid.New(svid.Config{Issuer: n, Log: slog.New(slog.NewTextHandler(io.Discard, nil))}) //nolint:sloglint // lines are made as in a program that logs, and go nowhere
	of := svid.State{TrustDomain: domain, Bundle: n.bundle.X509Authorities(), TTL: time.Duration(state.GetSvidTtlSeconds()) * time.Second}
	for _, w := range state.GetWorkloads() {
		id, err := spiffeid.FromString(w.GetSpiffeId())
		if err != nil {
			cancel()
			return err
		}
		of.Workloads = append(of.Workloads, mesh.Workload{Namespace: w.GetNamespace(), Name: w.GetName(), ServiceAccount: w.GetServiceAccount(), ID: id, Node: n.name, UID: w.GetUid()})
	}
	if len(of.Workloads) != pods {
		cancel()
		return fmt.Errorf("%s: told of %d pods, want %d", n.name, len(of.Workloads), pods)
	}
	m.Update(of)
	var wg sync.WaitGroup
	wg.Go(func() { _ = m.Run(ctx) }) // it ends with ctx
	defer wg.Wait()
	defer cancel()
	for seen := 0; seen < pods; {
		changed := m.Changed()
		if now := len(m.All()); now > seen {
			for at := time.Now(); seen < now; seen++ {
				held(at)
			}
			continue
		}
		select {
		case <-changed:
		case <-ctx.Done():
			return ctx.Err()
		}
	}
	return nil
}

// reissue has all agents start at once, with a certificate of their node and none
// of a pod.
func reissue(ctx context.Context, o *options, dir string, out io.Writer) error {
	ctx, cancel := context.WithTimeout(ctx, 15*time.Minute)
	defer cancel()
	c, err := startControl(ctx, filepath.Join(dir, "reissue"), 0, o.nodes, o.pods)
	if err != nil {
		return err
	}
	defer func() { _ = c.stop() }()
	var nodes []*node
	for i := range o.nodes {
		n, err := joinNode(ctx, c, i)
		if err != nil {
			return err
		}
		_ = n.conn.Close()
		nodes = append(nodes, n)
	}
	before, err := c.cpu()
	if err != nil {
		return err
	}
	ownBefore, err := cpuOf("self")
	if err != nil {
		return err
	}
	var mu sync.Mutex
	var took []time.Duration
	var failed error
	began := time.Now()
	var wg sync.WaitGroup
	for _, n := range nodes {
		wg.Go(func() {
			err := n.start(ctx, o.pods, func(at time.Time) {
				mu.Lock()
				defer mu.Unlock()
				took = append(took, at.Sub(began))
			})
			if err != nil {
				mu.Lock()
				defer mu.Unlock()
				failed = fmt.Errorf("%s: %w", n.name, err)
			}
		})
	}
	wg.Wait()
	if failed != nil {
		return failed
	}
	after, err := c.cpu()
	if err != nil {
		return err
	}
	own, err := cpuOf("self")
	if err != nil {
		return err
	}
	slices.Sort(took)
	all, spent, agents := took[len(took)-1], after-before, own-ownBefore
	fmt.Fprintf(out, "\nAll %d agents start at once, each with its node's certificate and none of its %d pods': %d pods had a certificate after **%.1f s** (half of them after %.1f s, 99 %% after %.1f s), %.0f a second. "+
		"The control plane worked for %.1f s of that (%.0f µs a certificate, with %d handshakes and node states), the agents, which make and check the keys, for %.1f s on the same processors.\n",
		o.nodes, o.pods, len(took), all.Seconds(), quantile(took, 0.5).Seconds(), quantile(took, 0.99).Seconds(), float64(len(took))/all.Seconds(),
		spent.Seconds(), float64(spent.Microseconds())/float64(len(took)), o.nodes, agents.Seconds())
	return nil
}
