package certmanager_test

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"errors"
	"fmt"
	"log/slog"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	cmclient "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/kubernetes"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/certmanager"
	"github.com/signet-mesh/signet/internal/kube"
	"github.com/signet-mesh/signet/internal/x509check"
	controllers "github.com/signet-mesh/signet/test/certmanager"
	"github.com/signet-mesh/signet/test/kubeapiserver"
)

const (
	release = "signet-system"
	user    = "signet-control"
)

var (
	domain     = spiffeid.RequireTrustDomainFromString("mesh.example")
	eventually = kubeapiserver.Eventually
)

// world is a real API server, with a user who may do what the chart gives the control
// plane and nothing else.
type world struct {
	server *kubeapiserver.Server
	core   *kubernetes.Clientset
	admin  *cmclient.Clientset
	own    *cmclient.Clientset // as the control plane
}

func start(t *testing.T) *world {
	server := kubeapiserver.Start(t, user)
	w := &world{
		server: server, core: kubernetes.NewForConfigOrDie(server.Config(kubeapiserver.Admin)),
		admin: cmclient.NewForConfigOrDie(server.Config(kubeapiserver.Admin)), own: cmclient.NewForConfigOrDie(server.Config(user)),
	}
	for _, name := range []string{release, "cert-manager"} {
		must(t)(w.core.CoreV1().Namespaces().Create(t.Context(), &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name}}, metav1.CreateOptions{}))
	}
	meta := metav1.ObjectMeta{Name: user}
	must(t)(w.core.RbacV1().Roles(release).Create(t.Context(), &rbacv1.Role{ObjectMeta: meta, Rules: []rbacv1.PolicyRule{
		{APIGroups: []string{"cert-manager.io"}, Resources: []string{"certificaterequests"}, Verbs: []string{"create", "get", "list", "delete"}},
		{APIGroups: []string{""}, Resources: []string{"secrets"}, ResourceNames: []string{"signet-ca"}, Verbs: []string{"get", "update"}},
		{APIGroups: []string{""}, Resources: []string{"secrets"}, Verbs: []string{"create"}},
	}}, metav1.CreateOptions{}))
	must(t)(w.core.RbacV1().RoleBindings(release).Create(t.Context(), &rbacv1.RoleBinding{ObjectMeta: meta,
		Subjects: []rbacv1.Subject{{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: user}},
		RoleRef:  rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: user}}, metav1.CreateOptions{}))
	return w
}

func must(t *testing.T) func(any, error) {
	return func(_ any, err error) {
		t.Helper()
		if err != nil {
			t.Fatal(err)
		}
	}
}

func (w *world) upstream(t *testing.T, issuer certmanager.Issuer) *certmanager.Upstream {
	t.Helper()
	u, err := certmanager.New(w.own.CertmanagerV1(), release, issuer, slog.New(slog.NewTextHandler(t.Output(), nil)))
	if err != nil {
		t.Fatal(err)
	}
	return u
}

// selfSigned has cert-manager make a CA that signs itself, in a Secret.
func (w *world) selfSigned(t *testing.T, namespace, secret string) {
	t.Helper()
	issuer := cmmeta.IssuerReference{Name: "itself", Kind: "ClusterIssuer"}
	_, err := w.admin.CertmanagerV1().ClusterIssuers().Create(t.Context(), &cmv1.ClusterIssuer{
		ObjectMeta: metav1.ObjectMeta{Name: "itself"}, Spec: cmv1.IssuerSpec{IssuerConfig: cmv1.IssuerConfig{SelfSigned: &cmv1.SelfSignedIssuer{}}},
	}, metav1.CreateOptions{})
	if err != nil && !strings.Contains(err.Error(), "already exists") {
		t.Fatal(err)
	}
	must(t)(w.admin.CertmanagerV1().Certificates(namespace).Create(t.Context(), &cmv1.Certificate{
		ObjectMeta: metav1.ObjectMeta{Name: secret},
		Spec: cmv1.CertificateSpec{CommonName: secret, IsCA: true, SecretName: secret, IssuerRef: issuer,
			PrivateKey: &cmv1.CertificatePrivateKey{Algorithm: cmv1.ECDSAKeyAlgorithm, Size: 256, RotationPolicy: cmv1.RotationPolicyAlways}},
	}, metav1.CreateOptions{}))
	w.waitForSecret(t, namespace, secret, "")
}

// waitForSecret returns a Secret's certificate once it is another than was.
func (w *world) waitForSecret(t *testing.T, namespace, name, was string) string {
	t.Helper()
	var text string
	eventually(t, time.Minute, func() error {
		s, err := w.core.CoreV1().Secrets(namespace).Get(t.Context(), name, metav1.GetOptions{})
		if err == nil {
			if text = string(s.Data["tls.crt"]); text == "" || text == was {
				err = errors.New("no new certificate yet")
			}
		}
		return err
	})
	return text
}

func caIssuer(secret string) cmv1.IssuerSpec {
	return cmv1.IssuerSpec{IssuerConfig: cmv1.IssuerConfig{CA: &cmv1.CAIssuer{SecretName: secret}}}
}

// enrolment runs one until the test ends, or before.
func (w *world) enrolment(t *testing.T, u ca.Upstream, store ca.RootStore, due func(*x509.Certificate) string) (_ *ca.Enrolment, stop func()) {
	t.Helper()
	e, err := ca.NewEnrolment(ca.EnrolmentConfig{TrustDomain: domain, Store: store, Upstream: u, TTL: time.Hour, Due: due, Log: slog.New(slog.NewTextHandler(t.Output(), nil))})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { e.Run(ctx) })
	stop = func() { cancel(); running.Wait() }
	t.Cleanup(stop)
	return e, stop
}

// reaches waits until an Enrolment says a reason, with words in its message.
func reaches(t *testing.T, e *ca.Enrolment, reason ca.UpstreamReason, words ...string) ca.UpstreamStatus {
	t.Helper()
	var s ca.UpstreamStatus
	eventually(t, 30*time.Second, func() error {
		s, _ = e.Status()
		for _, word := range words {
			if !strings.Contains(s.Message, word) {
				return fmt.Errorf("want %s with %q: %+v", reason, words, s)
			}
		}
		if s.Reason != reason {
			return fmt.Errorf("want %s: %+v", reason, s)
		}
		return nil
	})
	return s
}

// signs issues a workload's certificate as the control plane would, has it verified as
// peers do, and returns its root.
func signs(t *testing.T, a *ca.Authority) *x509.Certificate {
	t.Helper()
	_, root := signsBelow(t, a)
	return root
}

// signsBelow is signs, with the chain that the workload gets.
func signsBelow(t *testing.T, a *ca.Authority) (chain []*x509.Certificate, root *x509.Certificate) {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
	if err != nil {
		t.Fatal(err)
	}
	p, err := a.Prepare(ca.Request{ID: spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/web"), CSR: csr})
	if err != nil {
		t.Fatal(err)
	}
	issued, err := a.Issue(p)
	if err != nil {
		t.Fatal(err)
	}
	for _, der := range issued.Chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			t.Fatal(err)
		}
		chain = append(chain, c)
	}
	_, root, err = x509check.VerifyRoot(chain, x509bundle.FromX509Authorities(domain, a.Bundle()), time.Now())
	if err != nil {
		t.Fatal(err)
	}
	return chain, root
}

func (w *world) store(t *testing.T) ca.RootStore {
	t.Helper()
	return kube.NewRoots(&kube.Client{Core: kubernetes.NewForConfigOrDie(w.server.Config(user))}, release)
}

func authority(t *testing.T, store ca.RootStore) *ca.Authority {
	t.Helper()
	return follower(t, store, nil)
}

// follower is an authority that follows what is stored, whose workloads an authority
// above certifies, or none does.
func follower(t *testing.T, store ca.RootStore, leaves ca.LeafSigner) *ca.Authority {
	t.Helper()
	a, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: domain, RootStore: store, Above: true, Leaves: leaves})
	if err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(t.Context())
	var running sync.WaitGroup
	running.Go(func() { a.FollowRoots(ctx) })
	t.Cleanup(func() { cancel(); running.Wait(); a.Close() })
	return a
}

func (w *world) requests(t *testing.T) []cmv1.CertificateRequest {
	t.Helper()
	list, err := w.admin.CertmanagerV1().CertificateRequests(release).List(t.Context(), metav1.ListOptions{LabelSelector: certmanager.LabelPurpose})
	if err != nil {
		t.Fatal(err)
	}
	return list.Items
}

// TestControllers is the life of an intermediate from cert-manager's real controllers
// on a real API server: nothing installed, nobody there, no issuer, certified; the
// issuer's CA replaced; cert-manager gone and back.
func TestControllers(t *testing.T) {
	w := start(t)
	store := w.store(t)
	u := w.upstream(t, certmanager.Issuer{Name: "mesh"})
	var mu sync.Mutex
	due := ""
	e, _ := w.enrolment(t, u, store, func(root *x509.Certificate) string {
		mu.Lock()
		defer mu.Unlock()
		return due
	})
	want := func(why string) { mu.Lock(); defer mu.Unlock(); due = why }

	reaches(t, e, ca.UpstreamUnreachable, "Issuer signet-system/mesh", "is cert-manager installed?")
	admin := w.server.Config(kubeapiserver.Admin)
	controllers.Install(t, admin)
	reaches(t, e, ca.UpstreamPending, "waits for approval", "cmctl approve -n signet-system signet-intermediate-")
	running := controllers.Start(t, admin)
	reaches(t, e, ca.UpstreamIssuerNotFound, `"mesh" not found`)
	w.selfSigned(t, release, "mesh-ca")
	must(t)(w.admin.CertmanagerV1().Issuers(release).Create(t.Context(), &cmv1.Issuer{ObjectMeta: metav1.ObjectMeta{Name: "mesh"}, Spec: caIssuer("mesh-ca")}, metav1.CreateOptions{}))
	s := reaches(t, e, ca.UpstreamReady)
	if left := time.Until(s.NotAfter); left > time.Hour || left < 50*time.Minute {
		t.Errorf("it ends in %s", left)
	}
	if n := len(w.requests(t)); n != 1 {
		t.Errorf("%d requests for one intermediate, across all that was in the way", n)
	}
	a := authority(t, store)
	first := signs(t, a)
	if first.Subject.CommonName != "mesh-ca" || len(a.Bundle()) != 1 {
		t.Errorf("below %s, %d roots", first.Subject, len(a.Bundle()))
	}

	// cert-manager is gone: what is there signs, and a request waits for its return.
	running.Stop()
	want("the test wants another")
	reaches(t, e, ca.UpstreamPending, "waits for approval")
	if !signs(t, a).Equal(first) {
		t.Error("another root signs")
	}

	// The issuer's CA is another when it comes back: nothing switches by itself.
	was := w.waitForSecret(t, release, "mesh-ca", "")
	if err := w.core.CoreV1().Secrets(release).Delete(t.Context(), "mesh-ca", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	controllers.Start(t, admin)
	w.waitForSecret(t, release, "mesh-ca", was)
	eventually(t, time.Minute, func() error {
		if n := len(a.Roots()); n != 2 {
			return fmt.Errorf("%d roots; %+v", n, a.Roots())
		}
		return nil
	})
	want("")
	roots := a.Roots()
	if roots[1].Role != ca.RootNext || !signs(t, a).Equal(first) {
		t.Errorf("roots are %+v, and %s signs", roots, signs(t, a).Subject)
	}
	reaches(t, e, ca.UpstreamReady, "another root is published")
	if err := a.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	if !signs(t, a).Equal(roots[1].Certificate) {
		t.Error("the next root does not sign")
	}
	if err := a.RetireRoots(); err != nil {
		t.Fatal(err)
	}
	reaches(t, e, ca.UpstreamReady)
}

// TestIssuers: a ClusterIssuer whose CA stands below another, and issuers that can
// certify no intermediate.
func TestIssuers(t *testing.T) {
	w := start(t)
	admin := w.server.Config(kubeapiserver.Admin)
	controllers.Install(t, admin)
	controllers.Start(t, admin)
	w.selfSigned(t, "cert-manager", "company")
	must(t)(w.admin.CertmanagerV1().ClusterIssuers().Create(t.Context(), &cmv1.ClusterIssuer{ObjectMeta: metav1.ObjectMeta{Name: "company"}, Spec: caIssuer("company")}, metav1.CreateOptions{}))
	must(t)(w.admin.CertmanagerV1().Certificates("cert-manager").Create(t.Context(), &cmv1.Certificate{
		ObjectMeta: metav1.ObjectMeta{Name: "department"},
		Spec:       cmv1.CertificateSpec{CommonName: "department", IsCA: true, SecretName: "department", IssuerRef: cmmeta.IssuerReference{Name: "company", Kind: "ClusterIssuer"}},
	}, metav1.CreateOptions{}))
	w.waitForSecret(t, "cert-manager", "department", "")
	must(t)(w.admin.CertmanagerV1().ClusterIssuers().Create(t.Context(), &cmv1.ClusterIssuer{ObjectMeta: metav1.ObjectMeta{Name: "department"}, Spec: caIssuer("department")}, metav1.CreateOptions{}))

	e, stop := w.enrolment(t, w.upstream(t, certmanager.Issuer{Name: "department", Kind: "ClusterIssuer"}), w.store(t), nil)
	reaches(t, e, ca.UpstreamReady, "ClusterIssuer department")
	if root := signs(t, authority(t, w.store(t))); root.Subject.CommonName != "company" {
		t.Errorf("the root is %s", root.Subject)
	}

	// cert-manager's self-signed issuer wants the key itself, which stays here.
	stop()
	e, _ = w.enrolment(t, w.upstream(t, certmanager.Issuer{Name: "itself", Kind: "ClusterIssuer"}), w.store(t), func(*x509.Certificate) string { return "test" })
	if s := reaches(t, e, ca.UpstreamFailed, "ClusterIssuer itself"); !s.Signs(time.Now()) || s.RetryAt.IsZero() {
		t.Errorf("%+v", s)
	}
}

// TestDenied: a policy says no. The request is not repeated at once, and no more than
// a few of those that were decided stay.
func TestDenied(t *testing.T) {
	w := start(t)
	admin := w.server.Config(kubeapiserver.Admin)
	controllers.Install(t, admin)
	controllers.Start(t, admin, controllers.NoApprover)
	u := w.upstream(t, certmanager.Issuer{Name: "mesh"})
	deny := func() {
		t.Helper()
		eventually(t, 20*time.Second, func() error {
			for _, r := range w.requests(t) {
				if len(r.Status.Conditions) == 0 {
					r.Status.Conditions = []cmv1.CertificateRequestCondition{{
						Type: cmv1.CertificateRequestConditionDenied, Status: cmmeta.ConditionTrue, Reason: "policy.cert-manager.io", Message: "isCA is not allowed"}}
					_, err := w.admin.CertmanagerV1().CertificateRequests(release).UpdateStatus(t.Context(), &r, metav1.UpdateOptions{})
					return err
				}
			}
			return errors.New("no request waits")
		})
	}
	e, _ := w.enrolment(t, u, w.store(t), nil)
	reaches(t, e, ca.UpstreamPending, "waits for approval")
	deny()
	s := reaches(t, e, ca.UpstreamDenied, "isCA is not allowed", "Issuer signet-system/mesh")
	if s.Signs(time.Now()) || time.Until(s.RetryAt) < 50*time.Second {
		t.Errorf("%+v", s)
	}
	time.Sleep(3 * time.Second)
	if n := len(w.requests(t)); n != 1 {
		t.Errorf("%d requests after one that was denied", n)
	}
	for range 7 {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{}, key)
		if err != nil {
			t.Fatal(err)
		}
		ask := func() *ca.UpstreamError {
			_, err := u.Ask(t.Context(), ca.UpstreamRequest{CSR: csr, TTL: time.Hour})
			var no *ca.UpstreamError
			if !errors.As(err, &no) {
				t.Fatalf("%v", err)
			}
			return no
		}
		ask()
		deny()
		if no := ask(); no.Reason != ca.UpstreamDenied {
			t.Errorf("%+v", no)
		}
	}
	if n := len(w.requests(t)); n != 5 {
		t.Errorf("%d requests stay", n)
	}
	// Approval is for others to give.
	if _, err := w.own.CertmanagerV1().CertificateRequests(release).UpdateStatus(t.Context(), &w.requests(t)[0], metav1.UpdateOptions{}); err == nil {
		t.Error("the control plane can approve its own requests")
	}
}
