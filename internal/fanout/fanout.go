// Package fanout asks the agents of all nodes at once and makes one answer of
// theirs, for the operator of a cluster, who reaches the control plane alone. A
// node that does not answer in time is named in the answer and holds up nothing.
package fanout

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"maps"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync"
	"time"

	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Node is one node's agent.
type Node struct {
	Name string
	// Address is where the agent serves the operator's questions, "host:port".
	Address string
}

// Config says whom to ask and how.
type Config struct {
	// Nodes lists the nodes of the mesh, and is called at every question. It
	// must list those that are away, too: that they do not answer has to be
	// said. Required.
	Nodes func() []Node
	// TLS returns the client's side of TLS towards a node, which must make sure
	// that the server is that node; see NodeTLS. Required.
	TLS func(node string) (*tls.Config, error)
	// View returns the state in force, nil when there is none yet. Required.
	View func() *mesh.View
	// Timeout is how long a node may take for an answer to begin, and, within a
	// stream of records, for each next one. Zero means 5 s.
	Timeout time.Duration
	// VerifyTimeout is Timeout for reading a whole audit store. Zero means 25 s.
	VerifyTimeout time.Duration
}

// Fanout asks the nodes. It is safe for concurrent use.
type Fanout struct {
	cfg       Config
	transport *http.Transport
	mu        sync.Mutex
	addresses map[string]string // guarded by mu; of the newest list of nodes, by host
}

// maxParallel bounds the nodes that are asked at once for answers that end.
const maxParallel = 64

// New returns a Fanout; Close it after use.
func New(cfg Config) (*Fanout, error) {
	switch {
	case cfg.Nodes == nil:
		return nil, errors.New("fanout: Nodes is missing")
	case cfg.TLS == nil:
		return nil, errors.New("fanout: TLS is missing")
	case cfg.View == nil:
		return nil, errors.New("fanout: View is missing")
	}
	if cfg.Timeout == 0 {
		cfg.Timeout = 5 * time.Second
	}
	if cfg.VerifyTimeout == 0 {
		cfg.VerifyTimeout = 25 * time.Second
	}
	f := &Fanout{cfg: cfg}
	f.transport = &http.Transport{
		// To each its own connection and TLS: the URL's host is the node's name.
		DialTLSContext:  f.dial,
		IdleConnTimeout: 30 * time.Second,
		// An answer that is compressed would have no known bound.
		DisableCompression: true,
	}
	return f, nil
}

// Close gives up idle connections.
func (f *Fanout) Close() { f.transport.CloseIdleConnections() }

// dial connects to the node that a URL's host names.
func (f *Fanout) dial(ctx context.Context, network, host string) (net.Conn, error) {
	node, _, err := net.SplitHostPort(host)
	if err != nil {
		return nil, err
	}
	f.mu.Lock()
	address, ok := f.addresses[node]
	f.mu.Unlock()
	if !ok {
		return nil, fmt.Errorf("no node is called %q", node)
	}
	cfg, err := f.cfg.TLS(node)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithTimeout(ctx, f.cfg.Timeout)
	defer cancel()
	d := tls.Dialer{Config: cfg}
	return d.DialContext(ctx, network, address)
}

// nodes returns the nodes by name, or only the one that is asked for.
func (f *Fanout) nodes(only string) ([]Node, error) {
	all := slices.Clone(f.cfg.Nodes())
	slices.SortFunc(all, func(a, b Node) int { return strings.Compare(a.Name, b.Name) })
	all = slices.CompactFunc(all, func(a, b Node) bool { return a.Name == b.Name })
	addresses := map[string]string{}
	for _, n := range all {
		addresses[n.Name] = n.Address
	}
	f.mu.Lock()
	changed := !maps.Equal(f.addresses, addresses)
	f.addresses = addresses
	f.mu.Unlock()
	if changed { // an idle connection may lead to where a node was
		f.transport.CloseIdleConnections()
	}
	if only == "" {
		return all, nil
	}
	i := slices.IndexFunc(all, func(n Node) bool { return n.Name == only })
	if i < 0 {
		return nil, fmt.Errorf("node: %q is no node of this mesh", only)
	}
	return all[i : i+1], nil
}

// client returns a client of one node, whose Close would close those of all.
func (f *Fanout) client(node string) *adminclient.Client {
	return adminclient.NewAgent(node, node, https{f.transport})
}

// https has requests made over TLS, whose far end is then known.
type https struct{ *http.Transport }

// RoundTrip makes one request.
func (t https) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Scheme = "https"
	return t.Transport.RoundTrip(r)
}

// why writes an error without what the reader knows already.
func why(err error, timeout time.Duration) string {
	var down *adminclient.UnreachableError
	switch {
	case errors.Is(err, context.DeadlineExceeded):
		return fmt.Sprintf("no answer within %s", timeout)
	case errors.As(err, &down):
		err = down.Err
	}
	return strings.ReplaceAll(err.Error(), "\n", " ")
}
