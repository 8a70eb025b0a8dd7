package fanout

import (
	"context"
	"crypto/tls"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"go.uber.org/goleak"

	"github.com/signet-mesh/signet/agent/audit"
	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/adminserver"
	"github.com/signet-mesh/signet/internal/mesh"
)

func TestMain(m *testing.M) { goleak.VerifyTestMain(m) }

var (
	td  = spiffeid.RequireTrustDomainFromString("mesh.example")
	now = time.Date(2026, 11, 23, 9, 0, 0, 0, time.UTC)
)

// testMesh has an authority and the nodes that were added to it.
type testMesh struct {
	t         *testing.T
	authority *ca.Authority
	nodes     []Node
	view      *mesh.View
}

func newMesh(t *testing.T) *testMesh {
	t.Helper()
	a, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: td})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = a.Close() })
	return &testMesh{t: t, authority: a}
}

func (m *testMesh) certificate(id spiffeid.ID) func() (*tls.Certificate, error) {
	m.t.Helper()
	c, err := m.authority.ServerCertificate(id, time.Hour)
	if err != nil {
		m.t.Fatal(err)
	}
	return c.Get
}

// serve adds a node whose agent answers with h, and proves to be the node
// called proves.
func (m *testMesh) serve(name, proves string, h http.Handler) {
	m.t.Helper()
	id, err := ca.NodeID(td, proves)
	if err != nil {
		m.t.Fatal(err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		m.t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(m.t.Context())
	done := make(chan error, 1)
	go func() {
		done <- adminserver.ServeTLS(ctx, l, h, adminserver.TLS{Certificate: m.certificate(id), Bundle: m.authority, Client: ca.ControlID(td)})
	}()
	m.t.Cleanup(func() {
		cancel()
		if err := <-done; err != nil {
			m.t.Error(err)
		}
	})
	m.nodes = append(m.nodes, Node{Name: name, Address: l.Addr().String()})
}

// agent answers as an agent does, with what it holds.
type agent struct {
	status  adminv1.AgentStatus
	certs   []adminv1.Certificate
	records []audit.Record
	// stall holds back everything after this many records, when above zero.
	stall int
}

func (a *agent) ServeHTTP(w http.ResponseWriter, r *http.Request) {
	switch r.URL.Path {
	case "/v1/status":
		adminserver.Answer(w, a.status, nil)
	case "/v1/certificates":
		adminserver.Answer(w, a.certs, nil)
	case "/v1/audit/verify":
		adminserver.Answer(w, adminv1.AuditVerification{Records: uint64(len(a.records))}, nil)
	case "/v1/audit":
		from := a.records
		var limit int
		if _, err := fmt.Sscan(r.FormValue("limit"), &limit); err == nil && limit < len(from) {
			from = from[len(from)-limit:]
		}
		for i, rec := range from {
			if a.stall > 0 && i == a.stall {
				w.(http.Flusher).Flush()
				<-r.Context().Done()
				return
			}
			_ = json.NewEncoder(w).Encode(rec)
		}
	default:
		http.NotFound(w, r)
	}
}

func (m *testMesh) fanout(timeout time.Duration) *Fanout {
	m.t.Helper()
	toNode, err := NodeTLS(Identity{
		Certificate: m.certificate(ca.ControlID(td)), Bundle: m.authority,
		Node: func(name string) (spiffeid.ID, error) { return ca.NodeID(td, name) },
	})
	if err != nil {
		m.t.Fatal(err)
	}
	f, err := New(Config{Nodes: func() []Node { return m.nodes }, TLS: toNode, View: func() *mesh.View { return m.view }, Timeout: timeout, VerifyTimeout: timeout})
	if err != nil {
		m.t.Fatal(err)
	}
	m.t.Cleanup(f.Close)
	return f
}

func record(node string, seq uint64, second int) audit.Record {
	return audit.Record{Node: node, Seq: seq, ID: fmt.Sprintf("%s-%d", node, seq), Start: now.Add(time.Duration(second) * time.Second), Verdict: audit.Allowed}
}

// hang accepts connections and never says a word.
func hang(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { _ = l.Close() })
	return l.Addr().String()
}

func TestStatusOfEveryNode(t *testing.T) {
	m := newMesh(t)
	m.serve("n2", "n2", &agent{status: adminv1.AgentStatus{Node: "n2"}, certs: []adminv1.Certificate{{Serial: "2"}}})
	m.serve("n1", "n1", &agent{status: adminv1.AgentStatus{Node: "n1", ControlConnected: true}, certs: []adminv1.Certificate{{Serial: "1"}, {Serial: "0"}}})
	f := m.fanout(5 * time.Second)
	s, err := f.Status(t.Context())
	if err != nil || len(s.Missing) > 0 || len(s.Agents) != 2 || s.Agents[0].Node != "n1" || !s.Agents[0].ControlConnected || s.Agents[1].Node != "n2" {
		t.Errorf("%+v, %v", s, err)
	}
	c, err := f.Certificates(t.Context(), "")
	var got []string
	for _, cert := range c.Certificates {
		got = append(got, cert.Node+":"+cert.Serial)
	}
	if err != nil || strings.Join(got, " ") != "n1:1 n1:0 n2:2" {
		t.Errorf("certificates %v, %v", got, err)
	}
	if c, err := f.Certificates(t.Context(), "n2"); err != nil || len(c.Certificates) != 1 {
		t.Errorf("of n2: %+v, %v", c, err)
	}
	if _, err := f.Certificates(t.Context(), "n9"); err == nil || !strings.Contains(err.Error(), `"n9" is no node`) {
		t.Errorf("of n9: %v", err)
	}
	if v, err := f.VerifyAudit(t.Context(), ""); err != nil || len(v.Nodes) != 2 || v.Nodes[0].Node != "n1" {
		t.Errorf("verify: %+v, %v", v, err)
	}
}

// A mesh is looked at when something is wrong, so one dead or silent node must
// neither hold up the answer nor be left out of it in silence.
func TestNodesThatDoNotAnswerAreNamed(t *testing.T) {
	m := newMesh(t)
	m.serve("n1", "n1", &agent{status: adminv1.AgentStatus{Node: "n1"}, records: []audit.Record{record("n1", 1, 0)}})
	m.nodes = append(m.nodes, Node{"silent", hang(t)}, Node{"silent2", hang(t)}, Node{"dead", "127.0.0.1:1"}, Node{"lost", ""})
	f := m.fanout(time.Second)
	start := time.Now()
	s, err := f.Status(t.Context())
	if err != nil || len(s.Agents) != 1 || len(s.Missing) != 4 {
		t.Fatalf("%+v, %v", s, err)
	}
	n := 0
	missing, err := f.Audit(t.Context(), adminclient.AuditQuery{}, func(audit.Record) error { n++; return nil })
	if err != nil || n != 1 || len(missing) != 4 {
		t.Errorf("audit: %d records, %+v, %v", n, missing, err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
	for _, missing := range [][]adminv1.MissingNode{s.Missing, missing} {
		for i, want := range []string{"dead: dial tcp 127.0.0.1:1: connect: connection refused", "lost: dial tcp: missing address", "silent: no answer within 1s", "silent2: no answer within 1s"} {
			if got := missing[i].Node + ": " + missing[i].Error; got != want && !strings.HasPrefix(got, "lost: ") && !strings.Contains(got, "deadline exceeded") {
				t.Errorf("missing %q, want %q", got, want)
			}
		}
	}
}

// Defends what is told of a node against the other nodes: with the key of n2,
// which is a good certificate of the mesh, nobody can answer at n1's address
// or in n1's name.
func TestOneNodeCannotAnswerForAnother(t *testing.T) {
	m := newMesh(t)
	m.serve("n1", "n2", &agent{status: adminv1.AgentStatus{Node: "n1"}, records: []audit.Record{record("n1", 1, 0)}})
	m.serve("n3", "n3", &agent{status: adminv1.AgentStatus{Node: "n1"}, records: []audit.Record{record("n3", 1, 0), record("n1", 2, 0)}})
	f := m.fanout(5 * time.Second)
	s, err := f.Status(t.Context())
	if err != nil || len(s.Agents) != 0 || len(s.Missing) != 2 {
		t.Fatalf("%+v, %v", s, err)
	}
	for i, want := range []string{`the server is "spiffe://mesh.example/signet/node/n2", not "spiffe://mesh.example/signet/node/n1"`, `it answers as node "n1"`} {
		if !strings.Contains(s.Missing[i].Error, want) {
			t.Errorf("missing: %+v, want %s", s.Missing[i], want)
		}
	}
	var got []string
	missing, err := f.Audit(t.Context(), adminclient.AuditQuery{}, func(r audit.Record) error { got = append(got, r.ID); return nil })
	if err != nil || strings.Join(got, " ") != "n3-1" || len(missing) != 2 || missing[1].Error != `the answer broke off after 1 records: it answers with a record of node "n1"` {
		t.Errorf("records %v, missing %+v, %v", got, missing, err)
	}
}

// The records of three nodes come in one order, and the newest of all are what
// a limit keeps, not the newest of each.
func TestAuditMergesByTime(t *testing.T) {
	m := newMesh(t)
	m.serve("n1", "n1", &agent{records: []audit.Record{record("n1", 1, 0), record("n1", 2, 30), record("n1", 3, 31)}})
	// Its second record was written late; nothing overtakes what came before it.
	m.serve("n2", "n2", &agent{records: []audit.Record{record("n2", 1, 10), record("n2", 2, 5), record("n2", 3, 40)}})
	m.serve("n3", "n3", &agent{records: nil})
	f := m.fanout(5 * time.Second)
	for limit, want := range map[int]string{
		0: "n1-1 n2-1 n2-2 n1-2 n1-3 n2-3",
		2: "n1-3 n2-3",
		4: "n2-2 n1-2 n1-3 n2-3",
		9: "n1-1 n2-1 n2-2 n1-2 n1-3 n2-3",
	} {
		var got []string
		missing, err := f.Audit(t.Context(), adminclient.AuditQuery{Limit: limit}, func(r audit.Record) error { got = append(got, r.ID); return nil })
		if strings.Join(got, " ") != want || len(missing) > 0 || err != nil {
			t.Errorf("limit %d: %v, %v, %v; want %s", limit, got, missing, err, want)
		}
	}
	var got []string
	if _, err := f.Audit(t.Context(), adminclient.AuditQuery{Node: "n2"}, func(r audit.Record) error { got = append(got, r.ID); return nil }); err != nil || len(got) != 3 {
		t.Errorf("of n2: %v, %v", got, err)
	}
}

// A node that stalls in the middle of its answer must not stall the mesh's.
func TestStalledStreamIsCut(t *testing.T) {
	m := newMesh(t)
	m.serve("n1", "n1", &agent{records: []audit.Record{record("n1", 1, 0), record("n1", 2, 20)}, stall: 1})
	m.serve("n2", "n2", &agent{records: []audit.Record{record("n2", 1, 10), record("n2", 2, 30)}})
	n := 0
	missing, err := m.fanout(500*time.Millisecond).Audit(t.Context(), adminclient.AuditQuery{}, func(audit.Record) error { n++; return nil })
	if err != nil || n != 3 || len(missing) != 1 || missing[0].Error != "the answer broke off after 1 records: no answer within 500ms" {
		t.Errorf("%d records, %+v, %v", n, missing, err)
	}
}

// The whole way of an answer: nodes, control plane, client; what is missing
// arrives, and an answer that was cut on the way is not taken for a whole one.
func TestServed(t *testing.T) {
	m := newMesh(t)
	m.serve("n1", "n1", &agent{status: adminv1.AgentStatus{Node: "n1"}, records: []audit.Record{record("n1", 1, 0), record("n1", 2, 1)}})
	m.nodes = append(m.nodes, Node{"n2", "127.0.0.1:1"})
	web := spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/web")
	m.view = &mesh.View{State: &mesh.State{
		Namespaces: map[string]mesh.Mode{"shop": mesh.ModeEnforce},
		Workloads:  []mesh.Workload{{Namespace: "shop", Name: "web-1", ID: web, Node: "n1", Capture: &mesh.Capture{}}},
	}}
	mux := http.NewServeMux()
	m.fanout(time.Second).Register(mux)
	cut := false
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		if !cut {
			mux.ServeHTTP(w, r)
			return
		}
		rec := httptest.NewRecorder()
		mux.ServeHTTP(rec, r)
		lines := strings.SplitAfter(rec.Body.String(), "\n")
		_, _ = io.WriteString(w, strings.Join(lines[:len(lines)-2], ""))
	}))
	defer server.Close()
	tr := &http.Transport{}
	defer tr.CloseIdleConnections()
	c := adminclient.NewCluster("the test", redirect{tr, server.Listener.Addr().String()})

	s, err := c.MeshStatus(t.Context())
	if err != nil || len(s.Agents) != 1 || len(s.Missing) != 1 || len(s.Namespaces) != 1 || s.Namespaces[0].Problems[0].Problem != "the agent of node n1 does not know it yet" {
		t.Errorf("status %+v, %v", s, err)
	}
	if w, err := c.Workload(t.Context(), "shop/web-1"); err != nil || w.ID != web.String() || w.Mode != "enforce" {
		t.Errorf("workload %+v, %v", w, err)
	}
	if _, err := c.Workload(t.Context(), "shop/web-2"); err == nil || !strings.Contains(err.Error(), "is no workload of this mesh") {
		t.Errorf("unknown workload: %v", err)
	}
	if _, err := c.AgentStatus(t.Context()); err == nil {
		t.Error("a question to one agent was answered by a cluster")
	}
	read := func(q adminclient.AuditQuery) (n int, missing []adminv1.MissingNode, err error) {
		for _, e := range c.MeshAudit(t.Context(), q, &missing) {
			if e != nil {
				return n, missing, e
			}
			n++
		}
		return n, missing, nil
	}
	if n, missing, err := read(adminclient.AuditQuery{}); n != 2 || len(missing) != 1 || missing[0].Node != "n2" || err != nil {
		t.Errorf("audit: %d, %v, %v", n, missing, err)
	}
	if _, _, err := read(adminclient.AuditQuery{Node: "n9"}); err == nil || !strings.Contains(err.Error(), "no node") {
		t.Errorf("audit of an unknown node: %v", err)
	}
	cut = true
	if n, _, err := read(adminclient.AuditQuery{}); n != 2 || err == nil || !strings.Contains(err.Error(), "broke off after 2") {
		t.Errorf("cut answer: %d, %v", n, err)
	}
}

// redirect has every request made to one address.
type redirect struct {
	*http.Transport
	address string
}

func (d redirect) RoundTrip(r *http.Request) (*http.Response, error) {
	r = r.Clone(r.Context())
	r.URL.Host = d.address
	return d.Transport.RoundTrip(r)
}
