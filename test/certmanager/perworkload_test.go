package certmanager

import (
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/tls"
	"crypto/x509"
	"fmt"
	"net/http"
	"net/url"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/bundle/x509bundle"
	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"google.golang.org/grpc"
	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/credentials"
	"google.golang.org/grpc/status"
	authenticationv1 "k8s.io/api/authentication/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/kubernetes"

	nodev1 "github.com/signet-mesh/signet/api/node/v1"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/x509check"
)

// pod makes one that runs on node one.
func (w *world) pod(core kubernetes.Interface, namespace, name, account, ip string) *corev1.Pod {
	w.Helper()
	p, err := core.CoreV1().Pods(namespace).Create(w.Context(), &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec:       corev1.PodSpec{NodeName: "one", ServiceAccountName: account, Containers: []corev1.Container{{Name: "c", Image: "i"}}},
	}, metav1.CreateOptions{})
	if err != nil {
		w.Fatal(err)
	}
	p.Status.Phase, p.Status.PodIPs, p.Status.PodIP = corev1.PodRunning, []corev1.PodIP{{IP: ip}}, ip
	if p, err = core.CoreV1().Pods(namespace).UpdateStatus(w.Context(), p, metav1.UpdateOptions{}); err != nil {
		w.Fatal(err)
	}
	return p
}

// request makes a key and a request for it, that names id or, when that is zero, nobody.
func (w *world) request(id spiffeid.ID) (*ecdsa.PrivateKey, []byte) {
	w.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		w.Fatal(err)
	}
	tmpl := &x509.CertificateRequest{}
	if !id.IsZero() {
		tmpl.URIs = []*url.URL{id.URL()}
	}
	csr, err := x509.CreateCertificateRequest(rand.Reader, tmpl, key)
	if err != nil {
		w.Fatal(err)
	}
	return key, csr
}

func (w *world) parse(chain [][]byte) (out []*x509.Certificate) {
	w.Helper()
	for _, der := range chain {
		c, err := x509.ParseCertificate(der)
		if err != nil {
			w.Fatal(err)
		}
		out = append(out, c)
	}
	return out
}

// dial connects to the control plane as a node does.
func (w *world) dial(td spiffeid.TrustDomain, roots []*x509.Certificate, cert *tls.Certificate) nodev1.NodeClient {
	w.Helper()
	cfg := caserver.ClientConfig{TrustDomain: td, Bundle: x509bundle.FromX509Authorities(td, roots)}
	if cert != nil {
		cfg.Certificate = func() (*tls.Certificate, error) { return cert, nil }
	}
	tlsConfig, err := caserver.ClientTLS(cfg)
	if err != nil {
		w.Fatal(err)
	}
	conn, err := grpc.NewClient("unix:"+w.socket, grpc.WithTransportCredentials(credentials.NewTLS(tlsConfig)))
	if err != nil {
		w.Fatal(err)
	}
	w.Cleanup(func() { conn.Close() })
	return nodev1.NewNodeClient(conn)
}

// workloadRequests returns which issuers workloads' requests wait for.
func (w *world) workloadRequests() (issuers []string) {
	w.Helper()
	list, err := w.resource("cert-manager.io/v1", "CertificateRequest").Namespace(release).List(w.Context(), metav1.ListOptions{LabelSelector: "signet.dev/purpose=workload"})
	if err != nil {
		w.Fatal(err)
	}
	for _, o := range list.Items {
		name, _, err := unstructured.NestedString(o.Object, "spec", "issuerRef", "name")
		if err != nil {
			w.Fatal(err)
		}
		issuers = append(issuers, name)
	}
	return issuers
}

// roots are those that nodes are told, of which there has to be one.
func (w *world) roots() []*x509.Certificate {
	w.Helper()
	var published [][]byte
	for _, der := range w.published(1) {
		published = append(published, []byte(der))
	}
	return w.parse(published)
}

// join has an agent's pod join, whose certificate has to be below the intermediate.
func (w *world) join(core kubernetes.Interface, td spiffeid.TrustDomain, roots []*x509.Certificate, agent *corev1.Pod) nodev1.NodeClient {
	w.Helper()
	seconds := int64(600)
	token, err := core.CoreV1().ServiceAccounts(release).CreateToken(w.Context(), "signet-agent", &authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{
		Audiences: []string{"signet-control"}, ExpirationSeconds: &seconds,
		BoundObjectRef: &authenticationv1.BoundObjectReference{Kind: "Pod", APIVersion: "v1", Name: agent.Name, UID: agent.UID},
	}}, metav1.CreateOptions{})
	if err != nil {
		w.Fatal(err)
	}
	key, csr := w.request(spiffeid.ID{})
	joined, err := w.dial(td, roots, nil).Join(w.Context(), &nodev1.JoinRequest{Token: token.Status.Token, Csr: csr})
	if err != nil {
		w.Fatal(err)
	}
	if c := w.parse(joined.GetChain()); c[0].Issuer.CommonName != "signet intermediate" {
		w.Errorf("the node's certificate is of %s", c[0].Issuer)
	}
	return w.dial(td, roots, &tls.Certificate{Certificate: joined.GetChain(), PrivateKey: key})
}

// TestPerWorkload runs signet-control in mode per-workload, with the rights that the
// chart gives it, below cert-manager's real controllers. A node joins, with a
// certificate below the intermediate, and gets a workload's, which is another issuer's own;
// both are believed by who trusts the one root. An older agent's request is refused.
// While cert-manager is gone nobody new is certified, the condition says so, and nodes
// stay served; when it is back all goes on. Another CA of the issuer is noticed.
func TestPerWorkload(t *testing.T) {
	w := newWorld(t)
	core := kubernetes.NewForConfigOrDie(w.admin)
	running := Start(t, w.admin)
	w.create("apiVersion: cert-manager.io/v1\nkind: ClusterIssuer\nmetadata: {name: itself}\nspec: {selfSigned: {}}")
	w.create(`
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: mesh-ca, namespace: signet-system}
spec: {commonName: mesh-ca, isCA: true, secretName: mesh-ca, privateKey: {algorithm: ECDSA, size: 256, rotationPolicy: Always}, issuerRef: {name: itself, kind: ClusterIssuer}}`)
	w.create("apiVersion: cert-manager.io/v1\nkind: Issuer\nmetadata: {name: mesh, namespace: signet-system}\nspec: {ca: {secretName: mesh-ca}}")
	w.create("apiVersion: cert-manager.io/v1\nkind: Issuer\nmetadata: {name: workloads, namespace: signet-system}\nspec: {ca: {secretName: mesh-ca}}")
	w.create("apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: signet-agent, namespace: signet-system}")
	w.create("apiVersion: v1\nkind: Node\nmetadata: {name: one}")
	w.create("apiVersion: v1\nkind: Namespace\nmetadata: {name: shop, annotations: {signet.dev/mesh: observe}}")
	agent := w.pod(core, release, "signet-agent-a", "signet-agent", "192.168.0.1")
	pod := w.pod(core, "shop", "web-1", "web", "10.0.0.1")
	w.start("first", "--cert-manager-mode=per-workload", "--cert-manager-workload-issuer=workloads")
	w.says("True Ready: ")

	td := spiffeid.RequireTrustDomainFromString("mesh.example")
	web := spiffeid.RequireFromString("spiffe://mesh.example/ns/shop/sa/web")
	roots := w.roots()
	node := w.join(core, td, roots, agent)
	issue := func(csr []byte) ([][]byte, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 10*time.Second) // as agents give it
		defer cancel()
		r, err := node.Issue(ctx, &nodev1.IssueRequest{Workload: "shop/web-1", Uid: string(pod.UID), Csr: csr})
		return r.GetChain(), err
	}
	_, csr := w.request(web)
	eventually(t, 20*time.Second, func() error { // the pod is seen
		chain, err := issue(csr)
		if err != nil {
			return err
		}
		certs := w.parse(chain)
		id, err := x509check.Verify(certs, x509bundle.FromX509Authorities(td, roots), time.Now())
		if err == nil && (id != web || len(certs) != 1 || certs[0].Issuer.CommonName != "mesh-ca" || certs[0].NotAfter.Sub(certs[0].NotBefore) != 4*time.Second) {
			t.Errorf("%s of %s, for %s, a chain of %d", id, certs[0].Issuer, certs[0].NotAfter.Sub(certs[0].NotBefore), len(certs))
		}
		return err
	})
	_, old := w.request(spiffeid.ID{})
	if _, err := issue(old); status.Code(err) != codes.InvalidArgument {
		t.Errorf("an older agent: %v", err)
	}

	running.Stop()
	waiting, csr := w.request(web)
	if _, err := issue(csr); status.Code(err) != codes.Unavailable || !strings.Contains(err.Error(), "waits for approval") { // which the agent's log has
		t.Errorf("without cert-manager: %v", err)
	}
	if asked := w.workloadRequests(); len(asked) != 1 || asked[0] != "workloads" {
		t.Errorf("workloads are asked for at %q", asked)
	}
	eventually(t, 40*time.Second, func() error {
		_, _ = issue(csr) // as an agent goes on
		o, err := w.resource("signet.dev/v1alpha1", "MeshConfig").Get(w.Context(), "mesh", metav1.GetOptions{})
		if err != nil {
			return err
		}
		return conditionIs(o.Object, "False Pending: workloads' certificates do not come: ")
	})
	if code, body := w.get("/readyz"); code != http.StatusOK {
		t.Errorf("readyz: %d %s", code, body)
	}
	Start(t, w.admin)
	eventually(t, 40*time.Second, func() error {
		chain, err := issue(csr)
		if err == nil && !waiting.PublicKey.Equal(w.parse(chain)[0].PublicKey) {
			err = fmt.Errorf("another key")
		}
		return err
	})
	w.says("True Ready: ")
	if left := w.workloadRequests(); len(left) != 0 {
		t.Errorf("%d requests are left", len(left))
	}

	// The issuer has another CA: what it certifies is refused, and its root is published
	// long before the intermediate is due.
	if err := w.resource("v1", "Secret").Namespace(release).Delete(w.Context(), "mesh-ca", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	eventually(t, 40*time.Second, func() error {
		_, csr := w.request(web)
		chain, err := issue(csr)
		if status.Code(err) == codes.FailedPrecondition {
			return nil
		}
		if err == nil {
			if _, err := x509check.Verify(w.parse(chain), x509bundle.FromX509Authorities(td, roots), time.Now()); err != nil {
				t.Errorf("handed out and not believed: %v", err)
			}
		}
		return fmt.Errorf("the issuer still has its CA: %w", err)
	})
	w.published(2)
}
