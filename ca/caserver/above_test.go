package caserver

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"maps"
	"math/big"
	"net/url"
	"path/filepath"
	"strconv"
	"sync"
	"testing"
	"time"

	"google.golang.org/grpc/codes"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca"
)

// memory is a store of roots.
type memory struct {
	mu    sync.Mutex
	files map[string][]byte // guarded by mu
	n     int               // guarded by mu
}

func (m *memory) String() string { return "memory" }

func (m *memory) Load(context.Context) (map[string][]byte, string, error) {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.n == 0 {
		return nil, "", nil
	}
	return maps.Clone(m.files), strconv.Itoa(m.n), nil
}

func (m *memory) Save(_ context.Context, files map[string][]byte, version string) error {
	m.mu.Lock()
	defer m.mu.Unlock()
	if m.n > 0 && version != strconv.Itoa(m.n) {
		return ca.ErrRootsChanged
	}
	m.files, m.n = files, m.n+1
	return nil
}

// above certifies an intermediate, and says of workloads what the test wants.
type above struct {
	root *x509.Certificate
	key  crypto.Signer
	no   error
}

func newAbove(t *testing.T) *above {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "above"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(1000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	root, err := x509.ParseCertificate(der)
	if err != nil {
		t.Fatal(err)
	}
	return &above{root: root, key: key}
}

func (u *above) String() string { return "above" }

func (u *above) certify(der []byte, tmpl *x509.Certificate) (*ca.UpstreamAnswer, error) {
	csr, err := x509.ParseCertificateRequest(der)
	if err != nil {
		return nil, err
	}
	tmpl.SerialNumber, tmpl.Subject, tmpl.URIs = big.NewInt(time.Now().UnixNano()), csr.Subject, csr.URIs
	tmpl.NotBefore, tmpl.BasicConstraintsValid = time.Now().Add(-time.Second), true
	made, err := x509.CreateCertificate(rand.Reader, tmpl, u.root, csr.PublicKey, u.key)
	if err != nil {
		return nil, err
	}
	cert, err := x509.ParseCertificate(made)
	return &ca.UpstreamAnswer{Chain: []*x509.Certificate{cert}, Roots: []*x509.Certificate{u.root}}, err
}

func (u *above) Ask(_ context.Context, req ca.UpstreamRequest) (*ca.UpstreamAnswer, error) {
	return u.certify(req.CSR, &x509.Certificate{NotAfter: time.Now().Add(req.TTL), IsCA: true, KeyUsage: x509.KeyUsageCertSign})
}

func (u *above) CertifyLeaf(_ context.Context, req ca.LeafRequest) (*ca.UpstreamAnswer, error) {
	if u.no != nil {
		return nil, u.no
	}
	if err := req.Record(); err != nil {
		return nil, err
	}
	return u.certify(req.CSR, &x509.Certificate{NotAfter: time.Now().Add(req.TTL), KeyUsage: x509.KeyUsageDigitalSignature,
		ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth, x509.ExtKeyUsageClientAuth}})
}

// Where the authority above certifies each workload, a node is told in its words why
// there is no certificate: a no is a refusal, and what is not decided is none. A
// request that names nobody, as older agents send it, is wrong in itself.
func TestAboveSaysNo(t *testing.T) {
	u, store := newAbove(t), &memory{}
	enrolment, err := ca.NewEnrolment(ca.EnrolmentConfig{TrustDomain: testDomain, Store: store, Upstream: u})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { enrolment.Run(ctx) })
	defer running.Wait()
	defer cancel()
	if err := enrolment.Ready(ctx); err != nil {
		t.Fatal(err)
	}
	var refusals []Refusal
	w := newWorld(t, func(c *Config) {
		c.Authority, err = ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: testDomain, RootStore: store, Above: true, Leaves: u})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { c.Authority.Close() })
		c.Refused = func(r Refusal) { refusals = append(refusals, r) }
		c.Now = nil
	})
	w.authority = w.server.authority
	ask := func(workload string, id *url.URL) error {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id}}, key)
		if err != nil {
			t.Fatal(err)
		}
		_, err = w.asNode("one").Issue(t.Context(), &nodev1.IssueRequest{Workload: workload, Csr: csr})
		return err
	}
	// One that waits would keep the others of a batch waiting.
	_, err = w.asNode("one").IssueMany(t.Context(), &nodev1.IssueManyRequest{Requests: []*nodev1.IssueRequest{{Workload: "shop/web-1"}}})
	wantCode(t, err, codes.Unimplemented, "by Issue")
	u.no = &ca.UpstreamError{Reason: ca.UpstreamPending, Message: "waits for approval"}
	wantCode(t, ask("shop/web-1", webID.URL()), codes.Unavailable, "waits for approval")
	if len(refusals) != 0 {
		t.Errorf("%+v", refusals)
	}
	_, old := newKey(t)
	_, err = w.asNode("one").Issue(t.Context(), &nodev1.IssueRequest{Workload: "shop/web-1", Csr: old})
	wantCode(t, err, codes.InvalidArgument, "update signet-agent")
	u.no = nil
	if err := ask("shop/web-1", webID.URL()); err != nil {
		t.Error(err)
	}
	u.no = &ca.UpstreamError{Reason: ca.UpstreamDenied, Message: "a policy says no"}
	refusals = nil
	wantCode(t, ask("shop/web-1", webID.URL()), codes.FailedPrecondition, "a policy says no")
	if len(refusals) != 1 || refusals[0].Reason != ReasonAbove || refusals[0].Node != "one" {
		t.Errorf("%+v", refusals)
	}
}
