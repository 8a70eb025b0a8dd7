package certmanager

import (
	"context"
	"crypto"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"math/big"
	"net/url"
	"os"
	"strings"
	"testing"
	"time"

	cmv1 "github.com/cert-manager/cert-manager/pkg/apis/certmanager/v1"
	cmmeta "github.com/cert-manager/cert-manager/pkg/apis/meta/v1"
	cmclient "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned/typed/certmanager/v1"
	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/internal/x509check"
)

// documented are the blocks of docs/cert-manager.md that have a policy: for the
// intermediate and for workloads, each after what gives the right to use it.
func documented(t *testing.T) (intermediate, workload []*unstructured.Unstructured) {
	t.Helper()
	text, err := os.ReadFile(root + "/docs/cert-manager.md")
	if err != nil {
		t.Fatal(err)
	}
	var blocks [][]*unstructured.Unstructured
	for _, block := range strings.Split(string(text), "\n```yaml\n")[1:] {
		block, _, _ = strings.Cut(block, "\n```\n")
		if !strings.Contains(block, "kind: CertificateRequestPolicy") {
			continue
		}
		var objects []*unstructured.Unstructured
		for doc := range strings.SplitSeq(block, "\n---\n") {
			o := &unstructured.Unstructured{}
			if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
				t.Fatalf("docs/cert-manager.md: %v in\n%s", err, doc)
			}
			objects = append(objects, o)
		}
		blocks = append(blocks, objects)
	}
	if len(blocks) != 2 || len(blocks[0]) != 3 || len(blocks[1]) != 3 || blocks[0][2].GetKind() != "CertificateRequestPolicy" || blocks[1][2].GetKind() != "CertificateRequestPolicy" {
		t.Fatalf("docs/cert-manager.md has %d blocks with policies, want two, each a Role, a RoleBinding and a policy", len(blocks))
	}
	return blocks[0], blocks[1]
}

// company makes a CA, as an operator has it, and the ClusterIssuer company of it.
func (w *world) company(core kubernetes.Interface) {
	w.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.Fatal(err)
	}
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "company"}, NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(3000 * time.Hour),
		IsCA: true, BasicConstraintsValid: true, KeyUsage: x509.KeyUsageCertSign | x509.KeyUsageCRLSign,
	}
	der, err := x509.CreateCertificate(rand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		w.Fatal(err)
	}
	private, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		w.Fatal(err)
	}
	_, err = core.CoreV1().Secrets(Namespace).Create(w.Context(), &corev1.Secret{ObjectMeta: metav1.ObjectMeta{Name: "company"}, Type: corev1.SecretTypeTLS, Data: map[string][]byte{
		corev1.TLSCertKey:       pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}),
		corev1.TLSPrivateKeyKey: pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: private}),
	}}, metav1.CreateOptions{})
	if err != nil {
		w.Fatal(err)
	}
	w.create("apiVersion: cert-manager.io/v1\nkind: ClusterIssuer\nmetadata: {name: company}\nspec: {ca: {secretName: company}}")
}

// allow applies what is documented, in its order; a policy when the API server knows
// that it may be used: approver-policy asks that once.
func (w *world) allow(core kubernetes.Interface, documents []*unstructured.Unstructured) {
	w.Helper()
	for _, o := range documents[:2] {
		apply(w.T, w.admin, o)
	}
	policy := documents[2]
	eventually(w.T, 20*time.Second, func() error {
		r, err := core.AuthorizationV1().SubjectAccessReviews().Create(w.Context(), &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User:               w.own.Impersonate.UserName,
			ResourceAttributes: &authorizationv1.ResourceAttributes{Group: "policy.cert-manager.io", Resource: "certificaterequestpolicies", Name: policy.GetName(), Namespace: release, Verb: "use"},
		}}, metav1.CreateOptions{})
		if err == nil && !r.Status.Allowed {
			err = fmt.Errorf("the control plane may not use %s", policy.GetName())
		}
		return err
	})
	apply(w.T, w.admin, policy)
}

// asked is a CertificateRequest that differs in one thing from what the control plane
// asks for.
type asked struct {
	name    string
	uri     string
	key     crypto.Signer // nil: ECDSA P-256
	subject pkix.Name
	dns     []string
	spec    func(*cmv1.CertificateRequestSpec)
	want    string // the condition: how its message goes on after the policy's name; empty: nobody decides
}

// judged makes the request as somebody, and returns what was decided of it: the
// condition's type and message; nothing when no policy is for it.
func (w *world) judged(as *rest.Config, a asked, spec cmv1.CertificateRequestSpec) string {
	w.Helper()
	if a.key == nil {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			w.Fatal(err)
		}
		a.key = key
	}
	uri, err := url.Parse(a.uri)
	if err != nil {
		w.Fatal(err)
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{Subject: a.subject, URIs: []*url.URL{uri}, DNSNames: a.dns}, a.key)
	if err != nil {
		w.Fatal(err)
	}
	spec.Request = pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: csr})
	if a.spec != nil {
		a.spec(&spec)
	}
	requests := cmclient.NewForConfigOrDie(as).CertificateRequests(release)
	made, err := requests.Create(w.Context(), &cmv1.CertificateRequest{ObjectMeta: metav1.ObjectMeta{GenerateName: "asked-"}, Spec: spec}, metav1.CreateOptions{})
	if err != nil {
		w.Fatalf("%s: %v", a.name, err)
	}
	events := kubernetes.NewForConfigOrDie(w.admin).EventsV1().Events(release)
	var decided string
	eventually(w.T, 20*time.Second, func() error {
		got, err := requests.Get(w.Context(), made.Name, metav1.GetOptions{})
		if err != nil {
			return err
		}
		for _, c := range got.Status.Conditions {
			if c.Type == cmv1.CertificateRequestConditionApproved || c.Type == cmv1.CertificateRequestConditionDenied {
				decided = fmt.Sprintf("%s: %s", c.Type, c.Message)
				return nil
			}
		}
		list, err := events.List(w.Context(), metav1.ListOptions{FieldSelector: "regarding.uid=" + string(made.UID)})
		if err != nil {
			return err
		}
		for _, e := range list.Items {
			if e.Reason == "Unprocessed" {
				return nil
			}
		}
		return errors.New(a.name + ": nobody has looked at it")
	})
	return decided
}

// TestApproverPolicy runs signet-control in mode per-workload below cert-manager's real
// controllers without their approver, its admission webhook, and approver-policy's real
// controller, under the policies that docs/cert-manager.md has, word for word. Without
// them, or without the right to use them, nothing is approved, and the condition says
// what is waited for; with them the mesh has its intermediate and a workload its
// certificate; and what differs in one thing from what the mesh asks for is denied.
// Without the webhook nothing is asked for, and that is said.
func TestApproverPolicy(t *testing.T) {
	intermediate, workload := documented(t)
	w := newWorld(t, "certManager.issuerRef.name=company", "certManager.issuerRef.kind=ClusterIssuer", "mesh.svidTTL=1h") // the longest that the policy allows
	core := kubernetes.NewForConfigOrDie(w.admin)
	Start(t, w.admin, NoApprover)
	Approver(t, w.admin)
	w.company(core)
	w.create("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: signet-agent, namespace: signet-system}")
	w.create("apiVersion: v1\nkind: Node\nmetadata: {name: one}")
	w.create("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, annotations: {signet.dev/mesh: observe}}")
	agent := w.pod(core, release, "signet-agent-a", "signet-agent", "192.168.0.1")
	pods := map[string]*corev1.Pod{"web": w.pod(core, "shop", "web-1", "web", "10.0.0.1"), "api": w.pod(core, "shop", "api-1", "api", "10.0.0.2")}

	w.issuer = []string{"--cert-manager-issuer=company", "--cert-manager-issuer-kind=ClusterIssuer"} // 168h: the longest that the policy allows
	w.start("first", "--cert-manager-mode=per-workload")
	const waits = "False Pending: CertificateRequest signet-system/signet-intermediate-"
	w.says(waits)
	apply(t, w.admin, intermediate[2])
	eventually(t, 20*time.Second, func() error {
		o, err := resource(w.admin, intermediate[2]).Get(t.Context(), intermediate[2].GetName(), metav1.GetOptions{})
		if err != nil {
			return err
		}
		if got := fmt.Sprint(o.Object["status"]); !strings.Contains(got, "reason:Ready status:True") {
			return errors.New(got)
		}
		return nil
	})
	w.says(waits)                                                        // nobody may use it
	intermediate[2].SetAnnotations(map[string]string{"looked": "again"}) // as the document says
	w.allow(core, intermediate)
	w.says("True Ready: the intermediate is of ClusterIssuer company")
	requests := cmclient.NewForConfigOrDie(w.admin).CertificateRequests(release)
	list, err := requests.List(t.Context(), metav1.ListOptions{LabelSelector: "signet.dev/purpose=intermediate"})
	if err != nil || len(list.Items) != 1 {
		t.Fatalf("%d requests, %v", len(list.Items), err)
	}
	// The webhook says who asked, on which the right to use a policy hangs.
	if r := list.Items[0]; r.Spec.Username != w.own.Impersonate.UserName || !strings.Contains(fmt.Sprint(r.Status.Conditions), `Approved by CertificateRequestPolicy: "signet-intermediate"`) {
		t.Errorf("asked by %q: %v", r.Spec.Username, r.Status.Conditions)
	}

	td := spiffeid.RequireTrustDomainFromString("mesh.example")
	roots := w.roots()
	node := w.join(core, td, roots, agent)
	issue := func(name string, csr []byte) ([][]byte, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // as agents give it
		defer cancel()
		r, err := node.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/" + pods[name].Name, Uid: string(pods[name].UID), Csr: csr})
		return r.GetChain(), err
	}
	id := func(name string) spiffeid.ID { return spiffeid.RequireFromPath(td, "/ns/shop/sa/"+name) }
	_, csr := w.request(id("web"))
	eventually(t, 20*time.Second, func() error { // the pod is seen
		_, err := issue("web", csr)
		if status.Code(err) != codes.FailedPrecondition || !strings.Contains(err.Error(), "signet-intermediate: ") {
			return fmt.Errorf("no policy allows it: %w", err)
		}
		return nil
	})
	eventually(t, 40*time.Second, func() error {
		_, _ = issue("web", csr) // as an agent goes on
		o, err := w.resource("signet.dev/v1alpha1", "MeshConfig").Get(w.Context(), "mesh", metav1.GetOptions{})
		if err != nil {
			return err
		}
		return conditionIs(o.Object, "False Denied: workloads' certificates do not come: ")
	})
	w.allow(core, workload)
	eventually(t, 20*time.Second, func() error { // the policy is seen
		_, csr := w.request(id("api"))
		chain, err := issue("api", csr)
		if err != nil {
			return err
		}
		certs := w.parse(chain)
		got, err := x509check.Verify(certs, x509bundle.FromX509Authorities(td, roots), time.Now())
		if err == nil && (got != id("api") || len(certs) != 1 || certs[0].Issuer.CommonName != "company" || certs[0].NotAfter.Sub(certs[0].NotBefore) != time.Hour) {
			t.Errorf("%s of %s, for %s, a chain of %d", got, certs[0].Issuer, certs[0].NotAfter.Sub(certs[0].NotBefore), len(certs))
		}
		return err
	})
	w.says("True Ready: ")

	// What the mesh asks for, and what differs from it in one thing.
	p384, err := ecdsa.GenerateKey(elliptic.P384(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	ref := cmmeta.IssuerReference{Name: "company", Kind: "ClusterIssuer", Group: "cert-manager.io"}
	lives := func(d time.Duration) func(*cmv1.CertificateRequestSpec) {
		return func(s *cmv1.CertificateRequestSpec) { s.Duration = &metav1.Duration{Duration: d} }
	}
	leaf := cmv1.CertificateRequestSpec{IssuerRef: ref, Duration: &metav1.Duration{Duration: time.Hour}, Usages: []cmv1.KeyUsage{cmv1.UsageDigitalSignature, cmv1.UsageServerAuth, cmv1.UsageClientAuth}}
	authority := cmv1.CertificateRequestSpec{IssuerRef: ref, Duration: &metav1.Duration{Duration: 168 * time.Hour}, Usages: []cmv1.KeyUsage{cmv1.UsageCertSign, cmv1.UsageCRLSign}, IsCA: true}
	name := pkix.Name{CommonName: "signet intermediate"}
	const who, mesh = "spiffe://mesh.example/ns/shop/sa/web", "spiffe://mesh.example"
	for _, c := range []struct {
		policy string
		spec   cmv1.CertificateRequestSpec
		asked
	}{
		{"signet-workload", leaf, asked{name: "a workload", uri: who, want: "Approved"}},
		{"signet-workload", leaf, asked{name: "another trust domain", uri: "spiffe://other.example/ns/shop/sa/web", want: "spec.allowed.uris.values"}},
		{"signet-workload", leaf, asked{name: "a longer trust domain", uri: "spiffe://mesh.example.net/ns/shop/sa/web", want: "spec.allowed.uris.values"}},
		{"signet-workload", leaf, asked{name: "a node", uri: "spiffe://mesh.example/signet/node/one/more", want: "spec.allowed.uris.values"}},
		{"signet-workload", leaf, asked{name: "a longer path", uri: who + "/admin", want: "spec.allowed.uris.validations"}},
		{"signet-workload", leaf, asked{name: "a DNS name beside it", uri: who, dns: []string{"api.example.com"}, want: "spec.allowed.dnsNames"}},
		{"signet-workload", leaf, asked{name: "a subject", uri: who, subject: pkix.Name{CommonName: "root"}, want: "spec.allowed.commonName"}},
		{"signet-workload", leaf, asked{name: "a longer life", uri: who, spec: lives(time.Hour + time.Second), want: "spec.constraints.maxDuration"}},
		{"signet-workload", leaf, asked{name: "no lifetime", uri: who, spec: func(s *cmv1.CertificateRequestSpec) { s.Duration = nil }, want: "spec.constraints.maxDuration"}},
		{"signet-workload", leaf, asked{name: "a larger key", uri: who, key: p384, want: "spec.constraints.privateKey.maxSize"}},
		{"signet-workload", leaf, asked{name: "isCA", uri: who, spec: func(s *cmv1.CertificateRequestSpec) { s.IsCA = true }, want: "spec.allowed.isCA"}},
		{"signet-workload", leaf, asked{name: "the usage cert sign", uri: who, spec: func(s *cmv1.CertificateRequestSpec) { s.Usages = append(s.Usages, cmv1.UsageCertSign) }, want: "spec.allowed.usages"}},
		{"signet-workload", leaf, asked{name: "another issuer", uri: who, spec: func(s *cmv1.CertificateRequestSpec) { s.IssuerRef.Name = "other" }}},
		{"signet-intermediate", authority, asked{name: "an intermediate", uri: mesh, subject: name, want: "Approved"}},
		{"signet-intermediate", authority, asked{name: "an intermediate of another mesh", uri: "spiffe://other.example", subject: name, want: "spec.allowed.uris.values"}},
		{"signet-intermediate", authority, asked{name: "an intermediate of another name", uri: mesh, subject: pkix.Name{CommonName: "company"}, want: "spec.allowed.commonName"}},
		{"signet-intermediate", authority, asked{name: "an intermediate with a larger key", uri: mesh, subject: name, key: p384, want: "spec.constraints.privateKey.maxSize"}},
		{"signet-intermediate", authority, asked{name: "an intermediate that lives longer", uri: mesh, subject: name, spec: lives(168*time.Hour + time.Second), want: "spec.constraints.maxDuration"}},
		{"signet-intermediate", authority, asked{name: "an intermediate that is a server", uri: mesh, subject: name, spec: func(s *cmv1.CertificateRequestSpec) { s.Usages = append(s.Usages, cmv1.UsageServerAuth) }, want: "spec.allowed.usages"}},
	} {
		got := w.judged(w.own, c.asked, c.spec)
		switch c.want {
		case "":
			if got != "" {
				t.Errorf("%s: %s", c.name, got)
			}
		case "Approved":
			if want := fmt.Sprintf("Approved: Approved by CertificateRequestPolicy: %q", c.policy); got != want {
				t.Errorf("%s: %s", c.name, got)
			}
		default:
			_, why, of := strings.Cut(got, "["+c.policy+": ")
			why, _, _ = strings.Cut(why, " [signet-")
			if !strings.HasPrefix(got, "Denied: No policy approved this request: ") || !of || strings.Count(why, "spec.") != 1 || !strings.Contains(why, c.want) {
				t.Errorf("%s is not denied for %s alone: %s", c.name, c.want, got)
			}
		}
	}

	// Others who may ask in the mesh's namespace may not use its policies, nor may the
	// control plane approve.
	if got := w.judged(w.admin, asked{name: "somebody else", uri: who}, leaf); got == "" {
		t.Error("somebody who may do everything may not use the policy")
	}
	other := rest.CopyConfig(w.admin)
	other.Impersonate.UserName = "somebody"
	w.create("apiVersion: rbac.authorization.k8s.io/v1\nkind: RoleBinding\nmetadata: {name: somebody, namespace: signet-system}\nroleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: somebody}\nsubjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: somebody}]")
	w.create("apiVersion: rbac.authorization.k8s.io/v1\nkind: ClusterRole\nmetadata: {name: somebody}\nrules: [{apiGroups: [cert-manager.io], resources: [certificaterequests, certificaterequests/status], verbs: ['*']}]")
	if got := w.judged(other, asked{name: "somebody else", uri: who}, leaf); got != "" {
		t.Errorf("somebody else: %s", got)
	}
	approve := func(as *rest.Config) error {
		requests := cmclient.NewForConfigOrDie(as).CertificateRequests(release)
		list, err := requests.List(t.Context(), metav1.ListOptions{})
		for i := range list.Items {
			if r := &list.Items[i]; len(r.Status.Conditions) == 0 {
				r.Status.Conditions = []cmv1.CertificateRequestCondition{{Type: cmv1.CertificateRequestConditionApproved, Status: cmmeta.ConditionTrue, Reason: "Self", Message: "x"}}
				_, err := requests.UpdateStatus(t.Context(), r, metav1.UpdateOptions{})
				return err
			}
		}
		return fmt.Errorf("of %d requests none waits; %w", len(list.Items), err)
	}
	for who, config := range map[string]*rest.Config{"the control plane": w.own, "who may not approve for the issuer": other} {
		if err := approve(config); !apierrors.IsForbidden(err) && !strings.Contains(fmt.Sprint(err), "does not have permissions to set approved/denied conditions") {
			t.Errorf("%s approves: %v", who, err)
		}
	}

	w.webhook.Stop()
	_, csr = w.request(id("api"))
	if _, err := issue("api", csr); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "failed calling webhook") {
		t.Errorf("without cert-manager's webhook: %v", err)
	}
}
