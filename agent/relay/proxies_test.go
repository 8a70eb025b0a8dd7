package relay

import (
	"context"
	"fmt"
	"io"
	"log/slog"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	corev3 "github.com/envoyproxy/go-control-plane/envoy/config/core/v3"
	listenerv3 "github.com/envoyproxy/go-control-plane/envoy/config/listener/v3"
	tcpv3 "github.com/envoyproxy/go-control-plane/envoy/extensions/filters/network/tcp_proxy/v3"
	discoveryv3 "github.com/envoyproxy/go-control-plane/envoy/service/discovery/v3"
	statuspb "google.golang.org/genproto/googleapis/rpc/status"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	"google.golang.org/grpc/metadata"
	"google.golang.org/protobuf/proto"
	"google.golang.org/protobuf/types/known/anypb"

	"github.com/signet-mesh/signet/internal/unixsocket"
	"github.com/signet-mesh/signet/xds"
)

// node runs a relay's server on a unix socket, for ordinary streams and real
// Envoys.
type node struct {
	*Relay
	dir, socket string

	mu       sync.Mutex
	draining map[string]bool // guarded by mu
}

func startNode(t *testing.T) *node {
	t.Helper()
	// Not t.TempDir: socket paths have a small maximum length.
	dir, err := os.MkdirTemp("", "relay-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	n := &node{dir: dir, socket: filepath.Join(dir, "ads.sock"), draining: map[string]bool{}}
	n.Relay = New(Config{Keys: noKeys{}, Log: slog.New(slog.DiscardHandler), Draining: func(id string) bool {
		n.mu.Lock()
		defer n.mu.Unlock()
		return n.draining[id]
	}})
	n.SetNamespaces(map[string]uint64{})
	n.apply(xds.TypeCluster, nil, nil)
	l, err := unixsocket.Listen(n.socket, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	g := grpc.NewServer()
	discoveryv3.RegisterAggregatedDiscoveryServiceServer(g, n.Server())
	done := make(chan struct{})
	go func() { defer close(done); _ = g.Serve(l) }()
	t.Cleanup(func() { g.Stop(); <-done })
	return n
}

func (n *node) drain(id string) {
	n.mu.Lock()
	defer n.mu.Unlock()
	n.draining[id] = true
}

// is fails the test unless Proxy answers this within some seconds.
func (n *node) is(t *testing.T, what string, connected, current bool, refused string) {
	t.Helper()
	eventually(t, fmt.Sprintf("%s: connected %v, current %v, refused %q", what, connected, current, refused), func() bool {
		c, cur, ref := n.Proxy()
		return c == connected && cur == current && strings.Contains(ref, refused) && (ref == "") == (refused == "")
	})
}

// taken fails the test unless Held says, within some seconds, that all proxies
// have taken the certificates and roots. Without a proxy nobody has older ones.
func (n *node) taken(t *testing.T, want bool) {
	t.Helper()
	eventually(t, fmt.Sprintf("taken %v", want), func() bool { _, taken := n.Held(); return taken == want })
}

// stream is a proxy that answers when the test says so.
type stream struct {
	discoveryv3.AggregatedDiscoveryService_DeltaAggregatedResourcesClient
	stop func()
}

func (n *node) stream(t *testing.T, instance string) *stream {
	t.Helper()
	conn := dial(t, n.socket)
	ctx, cancel := context.WithCancel(metadata.AppendToOutgoingContext(context.Background(), xds.HeaderProxy, instance))
	s, err := discoveryv3.NewAggregatedDiscoveryServiceClient(conn).DeltaAggregatedResources(ctx)
	if err == nil {
		err = s.Send(&discoveryv3.DeltaDiscoveryRequest{TypeUrl: xds.TypeListener})
	}
	if err != nil {
		t.Fatal(err)
	}
	stop := sync.OnceFunc(func() { cancel(); conn.Close() })
	t.Cleanup(stop)
	return &stream{s, stop}
}

// answer takes the next response, or refuses it.
func (s *stream) answer(t *testing.T, refusal string) {
	t.Helper()
	resp, err := s.Recv()
	if err != nil {
		t.Fatal(err)
	}
	req := &discoveryv3.DeltaDiscoveryRequest{TypeUrl: resp.GetTypeUrl(), ResponseNonce: resp.GetNonce()}
	if refusal != "" {
		req.ErrorDetail = &statuspb.Status{Message: refusal}
	}
	if err := s.Send(req); err != nil {
		t.Fatal(err)
	}
}

// TestTwoProxies: while one proxy takes over from another, both get
// connections, so a state is in force only when both have it; if one were
// enough, an edit would be reported as in force while half of the connections
// are still decided by the old one. A proxy that drains is not one that the
// node works with, and what it refuses holds nothing up.
func TestTwoProxies(t *testing.T) {
	n := startNode(t)
	n.SetLocal(setOf(listener(t, "a", "")))
	n.is(t, "no proxy", false, false, "")
	n.taken(t, true)
	first := n.stream(t, "1")
	first.answer(t, "")
	n.is(t, "one proxy", true, true, "")
	n.taken(t, true)

	second := n.stream(t, "2")
	n.is(t, "the second has taken nothing yet", true, false, "")
	n.taken(t, false)
	second.answer(t, "")
	n.is(t, "both have everything", true, true, "")
	n.taken(t, true)

	n.SetLocal(setOf(listener(t, "b", "")))
	second.answer(t, "")
	n.is(t, "the first is behind", true, false, "")
	n.taken(t, false)
	first.answer(t, "too new")
	n.is(t, "the first refuses", true, false, "too new")
	n.taken(t, false)
	n.drain("1")
	n.is(t, "the first refuses and drains", true, true, "")
	n.taken(t, true)

	n.SetLocal(setOf(listener(t, "c", "")))
	second.answer(t, "too old")
	n.is(t, "the one that stays refuses", true, false, "too old")
	n.taken(t, false)
	second.stop()
	n.is(t, "only one that drains is left", false, false, "")
	first.stop()
	eventually(t, "both to be gone", func() bool {
		n.Relay.mu.Lock()
		defer n.Relay.mu.Unlock()
		return len(n.proxies) == 0
	})
}

// TestNewestProxyIsAsked: an agent that starts again hears from the proxies in
// any order. The newest proxy is known by its name, not by when it called.
func TestNewestProxyIsAsked(t *testing.T) {
	n := startNode(t)
	n.SetLocal(setOf(listener(t, "a", "")))
	newest, older := n.stream(t, "2"), n.stream(t, "1")
	newest.answer(t, "of the newest")
	older.answer(t, "of the older")
	n.is(t, "both refuse", true, false, "of the newest")
}

// TestTwoEnvoys: two real proxies on one relay have the same resources, follow
// the same edits, and the end of one changes nothing for the other.
func TestTwoEnvoys(t *testing.T) {
	n := startNode(t)
	n.SetLocal(setOf(passing(t, "one", "first")))
	envoys := []*envoy{n.envoy(t, "1"), n.envoy(t, "2")}
	n.is(t, "both proxies", true, true, "")
	for i, e := range envoys {
		if got := e.listeners(t); !strings.Contains(got, "one::") {
			t.Errorf("proxy %d has the listeners %q", i, got)
		}
	}
	n.SetLocal(setOf(passing(t, "two", "second")))
	n.is(t, "both proxies after an edit", true, true, "")
	for i, e := range envoys {
		if got := e.listeners(t); !strings.Contains(got, "two::") || strings.Contains(got, "one::") {
			t.Errorf("proxy %d has the listeners %q", i, got)
		}
	}
	envoys[0].end()
	n.SetLocal(setOf(passing(t, "three", "third")))
	n.is(t, "the proxy that is left", true, true, "")
	if got := envoys[1].listeners(t); !strings.Contains(got, "three::") {
		t.Errorf("the proxy that is left has the listeners %q", got)
	}
}

// passing is a listener that a real proxy takes.
func passing(t *testing.T, name, stat string) xds.Resource {
	t.Helper()
	proxying := &tcpv3.TcpProxy{StatPrefix: stat, ClusterSpecifier: &tcpv3.TcpProxy_Cluster{Cluster: "agent"}}
	r, err := xds.NewResource(name, &listenerv3.Listener{
		Name: name,
		Address: &corev3.Address{Address: &corev3.Address_SocketAddress{SocketAddress: &corev3.SocketAddress{
			Address: "127.0.0.1", PortSpecifier: &corev3.SocketAddress_PortValue{PortValue: 0},
		}}},
		FilterChains: []*listenerv3.FilterChain{{Filters: []*listenerv3.Filter{{
			Name: "tcp", ConfigType: &listenerv3.Filter_TypedConfig{TypedConfig: pack(t, proxying)},
		}}}},
	})
	if err != nil {
		t.Fatal(err)
	}
	return r
}

func pack(t *testing.T, m proto.Message) *anypb.Any {
	t.Helper()
	a, err := anypb.New(m)
	if err != nil {
		t.Fatal(err)
	}
	return a
}

// envoy is a real proxy.
type envoy struct {
	admin string
	end   func()
}

func (n *node) envoy(t *testing.T, instance string) *envoy {
	t.Helper()
	program := os.Getenv("SIGNET_ENVOY")
	if program == "" {
		program = filepath.Join("..", "..", ".tools", "envoy", "bin", "envoy")
	}
	dir := filepath.Join(n.dir, instance)
	haste := filepath.Join(dir, "haste", "value")
	if err := os.MkdirAll(filepath.Dir(haste), 0o700); err != nil {
		t.Fatal(err)
	}
	e := &envoy{admin: filepath.Join(dir, "admin.sock")}
	config, err := xds.Bootstrap(xds.Proxy{Node: "n1", Instance: instance, ADS: n.socket, Admin: e.admin, Haste: haste})
	if err != nil {
		t.Fatal(err)
	}
	for path, b := range map[string][]byte{filepath.Join(dir, "envoy.json"): config, haste: []byte("0")} {
		if err := os.WriteFile(path, b, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program, "--config-path", filepath.Join(dir, "envoy.json"),
		"--disable-hot-restart", "--concurrency", "1", "--log-level", "error")
	var out strings.Builder
	cmd.Stderr = &out
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatalf("%v: run `make tools`, or set SIGNET_ENVOY", err)
	}
	e.end = sync.OnceFunc(func() {
		cancel()
		_ = cmd.Wait() // it was killed
		if t.Failed() {
			t.Logf("proxy %s: %s", instance, out.String())
		}
	})
	t.Cleanup(e.end)
	eventually(t, "proxy "+instance+" to be there", func() bool {
		c, err := net.DialTimeout("unix", e.admin, time.Second)
		if err == nil {
			c.Close()
		}
		return err == nil
	})
	eventually(t, "proxy "+instance+" to be connected", func() bool {
		n.Relay.mu.Lock()
		defer n.Relay.mu.Unlock()
		for p := range n.proxies {
			if p.instance == instance {
				return true
			}
		}
		return false
	})
	return e
}

// listeners returns the listeners that the proxy has, as it says them.
func (e *envoy) listeners(t *testing.T) string {
	t.Helper()
	client := &http.Client{Transport: &http.Transport{DialContext: unixsocket.Dialer(e.admin), DisableKeepAlives: true}}
	req, err := http.NewRequestWithContext(t.Context(), http.MethodGet, "http://envoy/listeners", nil)
	if err != nil {
		t.Fatal(err)
	}
	resp, err := client.Do(req)
	if err != nil {
		t.Fatal(err)
	}
	defer resp.Body.Close()
	body, err := io.ReadAll(resp.Body)
	if err != nil {
		t.Fatal(err)
	}
	return string(body)
}

func dial(t *testing.T, socket string) *grpc.ClientConn {
	t.Helper()
	conn, err := grpc.NewClient("unix://"+socket, grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	return conn
}
