package control

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"log/slog"
	"net"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

// One report of each node counts: that of the replica it is connected to, and
// of several the one that it came to last.
func TestMerged(t *testing.T) {
	at := func(n int) time.Time { return time.Unix(int64(n), 0) }
	var got []string
	for _, r := range merged([][]caserver.NodeReport{
		{{Node: "b", Connected: true, Since: at(1), Revision: "own"}, {Node: "a", Since: at(9), Revision: "own"}, {Node: "d", Since: at(2), Revision: "own"}},
		{{Node: "a", Connected: true, Since: at(3), Revision: "other"}, {Node: "c", Since: at(1), Revision: "other"}},
		{{Node: "b", Connected: true, Since: at(2), Revision: "third"}, {Node: "d", Since: at(5), Revision: "third"}},
	}) {
		got = append(got, r.Node+"="+r.Revision)
	}
	if want := []string{"a=other", "b=third", "c=other", "d=third"}; !slices.Equal(got, want) {
		t.Errorf("%s; want %s", got, want)
	}
}

// shopStep is what each replica of a test tells of its steps.
var shopStep = []caserver.Step{{Namespace: "shop", Number: 2, Taken: true}}

// replica is a control plane's server with an authority.
type replica struct {
	authority *ca.Authority
	server    *caserver.Server
	address   string
	stop      func()
}

func startReplica(t *testing.T, td spiffeid.TrustDomain, authority *ca.Authority, address string) *replica {
	t.Helper()
	r := &replica{authority: authority}
	tokens, err := caserver.OpenTokens(filepath.Join(t.TempDir(), "tokens"))
	if err != nil {
		t.Fatal(err)
	}
	feed := &mesh.Feed{}
	feed.Set(viewOf(td.Name(), "r1"))
	if r.server, err = caserver.New(caserver.Config{Authority: authority, Feed: feed, Tokens: tokens, Log: slog.New(slog.DiscardHandler)}); err != nil {
		t.Fatal(err)
	}
	l, err := net.Listen("tcp", address)
	if err != nil {
		t.Fatal(err)
	}
	r.address = l.Addr().String()
	s := grpc.NewServer(r.server.ServerOptions()...)
	nodev1.RegisterNodeServer(s, r.server)
	nodev1.RegisterReplicaServer(s, r.server.Replicas(func() []caserver.Step { return shopStep }))
	done := make(chan struct{})
	go func() { defer close(done); s.Serve(l) }()
	r.stop = func() { s.Stop(); <-done }
	return r
}

// certificate is for any identity of the replica's trust domain.
func (r *replica) certificate(t *testing.T, id spiffeid.ID) func() (*tls.Certificate, error) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	p, err := r.authority.Prepare(ca.Request{ID: id, CSR: csr, TTL: time.Hour})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := r.authority.Issue(p)
	if err != nil {
		t.Fatal(err)
	}
	return func() (*tls.Certificate, error) {
		return &tls.Certificate{Certificate: issued.Chain, PrivateKey: key}, nil
	}
}

func (r *replica) tls(t *testing.T, id spiffeid.ID) *tls.Config {
	t.Helper()
	cfg, err := caserver.ClientTLS(caserver.ClientConfig{TrustDomain: id.TrustDomain(), Bundle: roots{r.authority}, Certificate: r.certificate(t, id)})
	if err != nil {
		t.Fatal(err)
	}
	return cfg
}

// What nodes report to one replica, and which steps it has taken, every replica
// knows, until that one is gone.
// One that comes back is heard again; one that is no longer listed is not.
func TestPeers(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("mesh.example")
	authority, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: td, Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer authority.Close()
	other := startReplica(t, td, authority, "127.0.0.1:0")
	report := func(r *replica, node string) {
		t.Helper()
		id, err := ca.NodeID(td, node)
		if err != nil {
			t.Fatal(err)
		}
		conn, err := grpc.NewClient("passthrough:///"+r.address, grpc.WithTransportCredentials(credentials.NewTLS(r.tls(t, id))))
		if err != nil {
			t.Fatal(err)
		}
		defer conn.Close()
		if _, err := nodev1.NewNodeClient(conn).Report(t.Context(), &nodev1.ReportRequest{Revision: "r1"}); err != nil {
			t.Fatal(err)
		}
	}
	listed := make(chan []string, 1)
	listed <- []string{other.address}
	p := &peers{told: map[string]peer{}, log: slog.New(slog.DiscardHandler), tls: other.tls(t, ca.ControlID(td)),
		list: func() []string { now := <-listed; listed <- now; return now }}
	running := make(chan struct{})
	go func() { defer close(running); p.run(t.Context()) }()
	t.Cleanup(func() { <-running })
	own := []caserver.NodeReport{{Node: "mine", Connected: true}}
	wait := func(want string) {
		t.Helper()
		got := ""
		for deadline := time.Now().Add(15 * time.Second); time.Now().Before(deadline); time.Sleep(10 * time.Millisecond) {
			var names []string
			for _, r := range p.with(own) {
				names = append(names, r.Node)
			}
			if got = strings.Join(names, " "); got == want {
				return
			}
		}
		t.Fatalf("reports of %q, want %q", got, want)
	}
	wait("mine")
	report(other, "theirs")
	wait("mine theirs")
	if got := p.steps(); len(got) != 1 || !slices.Equal(got[0], shopStep) {
		t.Errorf("the other's steps are %v, want %v", got, shopStep)
	}
	other.stop()
	wait("mine")
	if got := p.steps(); len(got) != 0 {
		t.Errorf("one that is gone has steps: %v", got)
	}
	other = startReplica(t, td, authority, other.address)
	defer func() { other.stop() }()
	report(other, "theirs")
	wait("mine theirs")
	<-listed
	listed <- nil
	wait("mine")
}
