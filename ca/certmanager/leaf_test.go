package certmanager_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"net/url"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"testing"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	cmclient "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/certmanager"
	"github.com/signet-mesh/signet/internal/x509check"
	controllers "github.com/signet-mesh/signet/test/certmanager"
	"github.com/signet-mesh/signet/test/kubeapiserver"
)

// wholeCSR is a request as agents make it.
func wholeCSR(t *testing.T, id spiffeid.ID) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{URIs: []*url.URL{id.URL()}}, key)
	if err != nil {
		t.Fatal(err)
	}
	return csr
}

func workload(t *testing.T, n int) spiffeid.ID {
	t.Helper()
	id, err := spiffeid.FromSegments(domain, "ns", "shop", "sa", fmt.Sprintf("web-%d", n))
	if err != nil {
		t.Fatal(err)
	}
	return id
}

// strict is an authority whose workloads an Upstream certifies.
func (w *world) strict(t *testing.T, u *certmanager.Upstream) *ca.Authority {
	t.Helper()
	store := w.store(t)
	e, _ := w.enrolment(t, u, store, nil)
	reaches(t, e, ca.UpstreamReady)
	a, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: domain, RootStore: store, Above: true, Leaves: u})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { a.Close() })
	return a
}

// issueLeaf issues a workload's certificate as the control plane would, and has it
// verified as peers do.
func issueLeaf(ctx context.Context, a *ca.Authority, id spiffeid.ID, csr []byte) ([]*x509.Certificate, error) {
	p, err := a.Prepare(ca.Request{ID: id, CSR: csr, TTL: time.Hour, Node: "one", Workload: "shop/web"})
	if err != nil {
		return nil, err
	}
	issued, err := a.IssueContext(ctx, p)
	if err != nil {
		return nil, err
	}
	var chain []*x509.Certificate
	for _, der := range issued.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			return nil, err
		}
		chain = append(chain, c)
	}
	got, err := x509check.Verify(chain, x509bundle.FromX509Authorities(domain, a.Bundle()), time.Now())
	if err == nil && got != id {
		err = fmt.Errorf("%s, want %s", got, id)
	}
	return chain, err
}

func (w *world) workloadRequests(t *testing.T) (out []cmv1.CertificateRequest) {
	t.Helper()
	for _, r := range w.requests(t) {
		if r.Labels[certmanager.LabelPurpose] == certmanager.PurposeWorkload {
			out = append(out, r)
		}
	}
	return out
}

// TestLeaves: cert-manager's real CA issuers certify each workload, below a root and
// below an authority between, as X509-SVIDs that are what this authority signs itself;
// nothing is left behind. It tells how many a second.
func TestLeaves(t *testing.T) {
	w := start(t)
	admin := w.server.Config(kubeapiserver.Admin)
	controllers.Install(t, admin)
	running := controllers.Start(t, admin)
	w.selfSigned(t, release, "mesh-ca")
	must(t)(w.admin.CertmanagerV1().Issuers(release).Create(t.Context(), &cmv1.Issuer{ObjectMeta: metav1.ObjectMeta{Name: "mesh"}, Spec: caIssuer("mesh-ca")}, metav1.CreateOptions{}))
	fast := w.server.Config(user)
	fast.QPS, fast.Burst = certmanager.QPS, certmanager.Burst
	w.own = cmclient.NewForConfigOrDie(fast)
	a := w.strict(t, w.upstream(t, certmanager.Issuer{Name: "mesh"}))

	const many = 60
	begin := time.Now()
	var waits sync.WaitGroup
	var mu sync.Mutex
	var took []time.Duration
	for i := range many {
		id := workload(t, i)
		csr := wholeCSR(t, id)
		waits.Go(func() {
			for range 10 { // as agents do
				at := time.Now()
				chain, err := issueLeaf(t.Context(), a, id, csr)
				if err != nil {
					t.Log(err)
					continue
				}
				mu.Lock()
				took = append(took, time.Since(at))
				mu.Unlock()
				if len(chain) != 1 || chain[0].Issuer.CommonName != "mesh-ca" {
					t.Errorf("a chain of %d, of %s", len(chain), chain[0].Issuer)
				}
				return
			}
			t.Errorf("%s got none", id)
		})
	}
	waits.Wait()
	all := time.Since(begin)
	slices.Sort(took)
	t.Logf("%d certificates in %s: %.1f a second; from asking to having, the middle one %s, the last %s", many, all.Round(time.Millisecond), many/all.Seconds(), took[len(took)/2].Round(time.Millisecond), took[len(took)-1].Round(time.Millisecond))
	if all > 2*time.Minute {
		t.Error("that is too slow for anybody")
	}
	if left := w.workloadRequests(t); len(left) != 0 {
		t.Errorf("%d requests are left", len(left))
	}
	entries, err := a.IssuanceLog().Entries(time.Time{})
	if err != nil || len(entries) != many {
		t.Errorf("%d entries, %v", len(entries), err)
	}
	for _, e := range entries {
		if e.Outcome != ca.OutcomeIssued || e.Kind != "" {
			t.Errorf("%+v", e)
		}
	}
	at := time.Now()
	for i := range 5 {
		if _, err := issueLeaf(t.Context(), a, workload(t, i), wholeCSR(t, workload(t, i))); err != nil {
			t.Error(err)
		}
	}
	t.Logf("alone, one takes %s", (time.Since(at) / 5).Round(time.Millisecond))

	// cert-manager is gone: nothing is certified, the same request waits for its return,
	// however often it is asked for, and then is the one that is certified.
	running.Stop()
	id := workload(t, 1000)
	csr := wholeCSR(t, id)
	for range 3 {
		ctx, cancel := context.WithTimeout(t.Context(), time.Second)
		_, err := issueLeaf(ctx, a, id, csr)
		cancel()
		var no *ca.UpstreamError
		if !errors.As(err, &no) || no.Reason != ca.UpstreamPending || !strings.Contains(err.Error(), "waits for approval") {
			t.Errorf("without cert-manager: %v", err)
		}
	}
	if left := w.workloadRequests(t); len(left) != 1 || left[0].Annotations["signet.dev/spiffe-id"] != id.String() {
		t.Errorf("%d requests wait", len(left))
	}
	controllers.Start(t, admin)
	eventually(t, 30*time.Second, func() error {
		_, err := issueLeaf(t.Context(), a, id, csr)
		return err
	})
	if left := w.workloadRequests(t); len(left) != 0 {
		t.Errorf("%d requests are left", len(left))
	}

	// An authority between the issuer and the root stands in the chain. What the issuer
	// adds to certificates, revocation lists for one, is refused: peers do not look there.
	must(t)(w.admin.CertmanagerV1().Certificates(release).Create(t.Context(), &cmv1.Certificate{
		ObjectMeta: metav1.ObjectMeta{Name: "department"},
		Spec:       cmv1.CertificateSpec{CommonName: "department", IsCA: true, SecretName: "department", IssuerRef: cmmeta.IssuerReference{Name: "mesh"}},
	}, metav1.CreateOptions{}))
	w.waitForSecret(t, release, "department", "")
	must(t)(w.admin.CertmanagerV1().Issuers(release).Create(t.Context(), &cmv1.Issuer{ObjectMeta: metav1.ObjectMeta{Name: "department"}, Spec: caIssuer("department")}, metav1.CreateOptions{}))
	lists := caIssuer("department")
	lists.CA.CRLDistributionPoints = []string{"http://crl.example"}
	must(t)(w.admin.CertmanagerV1().Issuers(release).Create(t.Context(), &cmv1.Issuer{ObjectMeta: metav1.ObjectMeta{Name: "lists"}, Spec: lists}, metav1.CreateOptions{}))
	b := w.strict(t, w.upstream(t, certmanager.Issuer{Name: "department"}))
	if chain, err := issueLeaf(t.Context(), b, id, wholeCSR(t, id)); err != nil || len(chain) != 2 || chain[1].Subject.CommonName != "department" {
		t.Errorf("a chain of %d: %v", len(chain), err)
	}
	c := w.strict(t, w.upstream(t, certmanager.Issuer{Name: "lists"}))
	if _, err := issueLeaf(t.Context(), c, id, wholeCSR(t, id)); err == nil || !strings.Contains(err.Error(), "does not belong in an SVID") {
		t.Errorf("with a revocation list: %v", err)
	}
}

// TestLeafDecided: what others decide of a workload's request, and objects that others
// made under its name, on a real API server. A no stays to be looked at, and the next
// request replaces it.
func TestLeafDecided(t *testing.T) {
	w := start(t)
	controllers.Install(t, w.server.Config(kubeapiserver.Admin))
	u := w.upstream(t, certmanager.Issuer{Name: "mesh"})
	id := workload(t, 1)
	csr := wholeCSR(t, id)
	recorded := 0
	ask := func(csr []byte) error {
		t.Helper()
		ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
		defer cancel()
		_, err := u.CertifyLeaf(ctx, ca.LeafRequest{ID: id, CSR: csr, TTL: time.Hour, Record: func() error { recorded++; return nil }})
		return err
	}
	reason := func(err error) ca.UpstreamReason {
		var no *ca.UpstreamError
		errors.As(err, &no)
		if no == nil {
			return ""
		}
		return no.Reason
	}
	if err := ask(csr); reason(err) != ca.UpstreamPending || recorded != 1 {
		t.Errorf("%v, recorded %d times", err, recorded)
	}
	r := w.workloadRequests(t)[0]
	if !slices.Equal(r.Spec.Usages, []cmv1.KeyUsage{"digital signature", "server auth", "client auth"}) || r.Spec.IsCA || r.Spec.Duration.Duration != time.Hour || r.Spec.IssuerRef.Name != "mesh" {
		t.Errorf("asked for %+v", r.Spec)
	}
	r.Status.Conditions = []cmv1.CertificateRequestCondition{{
		Type: cmv1.CertificateRequestConditionDenied, Status: cmmeta.ConditionTrue, Reason: "policy.cert-manager.io", Message: "the uri is not allowed"}}
	must(t)(w.admin.CertmanagerV1().CertificateRequests(release).UpdateStatus(t.Context(), &r, metav1.UpdateOptions{}))
	// Whoever waits is told; here the next who asks makes it anew, which is recorded.
	var told error
	var waits sync.WaitGroup
	other := wholeCSR(t, id)
	waits.Go(func() { told = ask(other) })
	eventually(t, 5*time.Second, func() error {
		for _, r := range w.workloadRequests(t) {
			if len(r.Status.Conditions) == 0 {
				r.Status.Conditions = []cmv1.CertificateRequestCondition{{
					Type: cmv1.CertificateRequestConditionDenied, Status: cmmeta.ConditionTrue, Reason: "policy.cert-manager.io", Message: "the uri is not allowed"}}
				_, err := w.admin.CertmanagerV1().CertificateRequests(release).UpdateStatus(t.Context(), &r, metav1.UpdateOptions{})
				return err
			}
		}
		return errors.New("no request waits")
	})
	waits.Wait()
	if reason(told) != ca.UpstreamDenied || !strings.Contains(told.Error(), "the uri is not allowed") || len(w.workloadRequests(t)) != 2 {
		t.Errorf("%v, %d requests", told, len(w.workloadRequests(t)))
	}
	if err := ask(csr); reason(err) != ca.UpstreamPending || recorded != 3 {
		t.Errorf("%v, recorded %d times", err, recorded)
	}
	made := w.workloadRequests(t)
	i := slices.IndexFunc(made, func(one cmv1.CertificateRequest) bool { return one.Name == r.Name })
	if len(made) != 2 || i < 0 || made[i].UID == r.UID {
		t.Errorf("it was not made anew: %d", len(made))
	}

	// Nothing is asked for that could not be recorded.
	third := wholeCSR(t, id)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	_, err := u.CertifyLeaf(ctx, ca.LeafRequest{ID: id, CSR: third, TTL: time.Hour, Record: func() error { return errors.New("disk full") }})
	if err == nil || len(w.workloadRequests(t)) != 2 {
		t.Errorf("%v, %d requests", err, len(w.workloadRequests(t)))
	}

	// An object that somebody else made is neither believed nor removed.
	old := made[i]
	must(t)(nil, w.admin.CertmanagerV1().CertificateRequests(release).Delete(t.Context(), old.Name, metav1.DeleteOptions{}))
	isCA := &cmv1.CertificateRequest{ObjectMeta: metav1.ObjectMeta{Name: old.Name}, Spec: old.Spec}
	isCA.Spec.IsCA = true
	must(t)(w.admin.CertmanagerV1().CertificateRequests(release).Create(t.Context(), isCA, metav1.CreateOptions{}))
	if err := ask(csr); reason(err) != ca.UpstreamFailed || !strings.Contains(err.Error(), "somebody else made it") {
		t.Errorf("%v", err)
	}
	if _, err := w.admin.CertmanagerV1().CertificateRequests(release).Get(t.Context(), old.Name, metav1.GetOptions{}); err != nil {
		t.Error(err)
	}
}
