//go:build interop

package certmanager_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	authenticationv1 "k8s.io/api/authentication/v1"
	authorizationv1 "k8s.io/api/authorization/v1"
	corev1 "k8s.io/api/core/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/certmanager"
	controllers "github.com/signet-mesh/signet/test/certmanager"
	"github.com/signet-mesh/signet/test/kubeapiserver"
)

// apply creates objects of a file.
func (w *world) apply(t *testing.T, text string) {
	t.Helper()
	client := dynamic.NewForConfigOrDie(w.server.Config(kubeapiserver.Admin))
	for doc := range strings.SplitSeq(text, "\n---\n") {
		var o unstructured.Unstructured
		if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
			t.Fatal(err)
		}
		plural, _ := meta.UnsafeGuessKindToResource(o.GroupVersionKind())
		must(t)(client.Resource(plural).Namespace(o.GetNamespace()).Create(t.Context(), &o, metav1.CreateOptions{}))
	}
}

// secret creates one with a single entry.
func (w *world) secret(t *testing.T, name, key, value string) {
	t.Helper()
	must(t)(w.core.CoreV1().Secrets(release).Create(t.Context(), &corev1.Secret{
		ObjectMeta: metav1.ObjectMeta{Name: name}, StringData: map[string]string{key: value},
	}, metav1.CreateOptions{}))
}

// know has Vault ask the API server who its callers are.
func (v *vault) know(w *world) {
	v.t.Helper()
	accounts := w.core.CoreV1().ServiceAccounts("cert-manager")
	must(v.t)(accounts.Create(v.t.Context(), &corev1.ServiceAccount{ObjectMeta: metav1.ObjectMeta{Name: "vault"}}, metav1.CreateOptions{}))
	must(v.t)(w.core.RbacV1().ClusterRoleBindings().Create(v.t.Context(), &rbacv1.ClusterRoleBinding{
		ObjectMeta: metav1.ObjectMeta{Name: "vault"},
		RoleRef:    rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: "system:auth-delegator"},
		Subjects:   []rbacv1.Subject{{Kind: rbacv1.ServiceAccountKind, Name: "vault", Namespace: "cert-manager"}},
	}, metav1.CreateOptions{}))
	token, err := accounts.CreateToken(v.t.Context(), "vault", &authenticationv1.TokenRequest{}, metav1.CreateOptions{})
	if err != nil {
		v.t.Fatal(err)
	}
	server := w.server.Config(kubeapiserver.Admin)
	v.do("sys/auth/kubernetes", map[string]any{"type": "kubernetes"})
	v.do("auth/kubernetes/config", map[string]any{
		"kubernetes_host": server.Host, "kubernetes_ca_cert": string(server.CAData), "token_reviewer_jwt": token.Status.Token,
	})
}

// underVault is a world with cert-manager's controllers and a Vault, for which what
// docs/cert-manager.md says was done.
func underVault(t *testing.T) (*world, *vault) {
	t.Helper()
	v := startVault(t)
	w := start(t)
	admin := w.server.Config(kubeapiserver.Admin)
	controllers.Install(t, admin)
	controllers.Start(t, admin)
	v.know(w)
	commands, objects := examples(t, "sh"), examples(t, "yaml")
	v.shell(instead(t, commands[0], "168h0m0s", "1h0m0s")) // what an enrolment here asks for
	w.secret(t, "vault-tls", "ca.crt", string(v.ca))
	w.apply(t, instead(t, objects[0], "https://vault.vault.svc:8200", v.address))
	return w, v
}

// TestVault has a Vault issuer of cert-manager certify the intermediate, by a policy
// that allows that alone. When Vault's root is replaced, the next one is published
// first, and signs when it is switched. While Vault is away what is there signs.
func TestVault(t *testing.T) {
	w, v := underVault(t)
	v.do("pki/config/urls", map[string]any{"issuing_certificates": "http://vault.example/ca", "crl_distribution_points": "http://vault.example/crl"})
	store := w.store(t)
	var due atomic.Bool
	wanted := func(*x509.Certificate) string {
		if due.Load() {
			return "the test wants another"
		}
		return ""
	}
	e, stop := w.enrolment(t, w.upstream(t, certmanager.Issuer{Name: "mesh"}), store, wanted)
	s := reaches(t, e, ca.UpstreamReady)
	if left := time.Until(s.NotAfter); left > time.Hour || left < 50*time.Minute {
		t.Errorf("it ends in %s", left)
	}
	a := authority(t, store)
	chain, first := signsBelow(t, a)
	if first.Subject.CommonName != "company" || len(a.Bundle()) != 1 || len(chain) != 2 || len(chain[1].CRLDistributionPoints) != 1 {
		t.Errorf("below %s, %d roots, a chain of %d", first.Subject, len(a.Bundle()), len(chain))
	}

	v.secondRoot(a, &due)
	if next := a.Roots()[1]; next.Role != ca.RootNext || next.Certificate.Subject.CommonName != "company 2" || !signs(t, a).Equal(first) {
		t.Errorf("the next root is %+v, and %s signs", next, signs(t, a).Subject)
	}
	reaches(t, e, ca.UpstreamReady, "another root is published")
	if err := a.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	second := signs(t, a)
	if second.Subject.CommonName != "company 2" {
		t.Errorf("%s signs after the switch", second.Subject)
	}
	if err := a.RetireRoots(); err != nil {
		t.Fatal(err)
	}
	reaches(t, e, ca.UpstreamReady)

	// A mount whose own CA stands below that root, asked with a token from a Secret.
	stop()
	v.department()
	w.secret(t, "vault-token", "token", v.token("department"))
	w.apply(t, fmt.Sprintf(`
apiVersion: cert-manager.io/v1
kind: Issuer
metadata: {name: department, namespace: signet-system}
spec:
  vault:
    server: %s
    caBundleSecretRef: {name: vault-tls, key: ca.crt}
    path: department/root/sign-intermediate
    auth: {tokenSecretRef: {name: vault-token, key: token}}`, v.address))
	due.Store(true)
	e, stop = w.enrolment(t, w.upstream(t, certmanager.Issuer{Name: "department"}), store, wanted)
	eventually(t, time.Minute, func() error {
		if chain, root := signsBelow(t, a); len(chain) != 3 || chain[2].Subject.CommonName != "department" || !root.Equal(second) {
			s, _ := e.Status()
			return fmt.Errorf("a chain of %d, below %s; %+v", len(chain), root.Subject, s)
		}
		return nil
	})

	// Without Vault, a log-in is tried again by cert-manager, and a token's request fails.
	stop()
	v.stop()
	for issuer, reason := range map[string]ca.UpstreamReason{"mesh": ca.UpstreamPending, "department": ca.UpstreamFailed} {
		e, stop := w.enrolment(t, w.upstream(t, certmanager.Issuer{Name: issuer}), store, func(*x509.Certificate) string { return "test" })
		if s := reaches(t, e, reason, "connection refused"); !s.Signs(time.Now()) || s.RetryAt.IsZero() != (reason == ca.UpstreamPending) {
			t.Errorf("%+v", s)
		}
		stop()
	}
	if !signs(t, a).Equal(second) {
		t.Error("nothing signs without Vault")
	}
}

// department makes a mount whose CA the other one has certified, and a policy for it.
func (v *vault) department() {
	v.t.Helper()
	v.do("sys/mounts/department", map[string]any{"type": "pki"})
	csr := v.do("department/intermediate/generate/internal", map[string]any{"common_name": "department", "key_type": "ec", "key_bits": 256})["csr"]
	signed := v.do("pki/root/sign-intermediate", map[string]any{"csr": csr, "common_name": "department", "ttl": "720h", "format": "pem_bundle"})["certificate"]
	v.do("department/intermediate/set-signed", map[string]any{"certificate": signed})
	v.do("sys/policies/acl/department", map[string]any{"policy": `path "department/root/sign-intermediate" { capabilities = ["update"] }`})
}

// TestVaultPolicy: the policy that docs/cert-manager.md gives for the intermediate
// allows what cert-manager asks, and not another name or trust domain, a longer life,
// the request's own values, a further parameter, or another path. cert-manager may
// make tokens for one ServiceAccount.
func TestVaultPolicy(t *testing.T) {
	w, v := underVault(t)
	token := v.token("signet-intermediate")
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	der, err := x509.CreateCertificateRequest(rand.Reader, &x509.CertificateRequest{
		Subject: pkix.Name{CommonName: "signet intermediate"}, URIs: []*url.URL{domain.ID().URL()},
	}, key)
	if err != nil {
		t.Fatal(err)
	}
	csr := string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der}))
	ask := func(path string, change map[string]any) error {
		body := map[string]any{ // as cert-manager writes it
			"csr": csr, "common_name": "signet intermediate", "uri_sans": "spiffe://mesh.example", "ttl": "1h0m0s",
			"alt_names": "", "ip_sans": "", "exclude_cn_from_sans": "true",
		}
		for name, value := range change {
			body[name] = value
		}
		_, err := v.try(token, path, body)
		return err
	}
	const path = "pki/root/sign-intermediate"
	if err := ask(path, nil); err != nil {
		t.Fatal(err)
	}
	for name, change := range map[string]map[string]any{
		"another name":              {"common_name": "another"},
		"another trust domain":      {"uri_sans": "spiffe://other.example"},
		"one more trust domain":     {"uri_sans": "spiffe://mesh.example,spiffe://other.example"},
		"a DNS name":                {"alt_names": "bank.example"},
		"an address":                {"ip_sans": "192.0.2.1"},
		"a longer life":             {"ttl": "8760h0m0s"},
		"an end of its own":         {"not_after": "2099-01-01T00:00:00Z"},
		"the request's own values":  {"use_csr_values": true},
		"another issuer of the CAs": {"issuer_ref": "first"},
	} {
		if err := ask(path, change); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("%s: %v", name, err)
		}
	}
	for _, path := range []string{"pki/root/generate/internal", "pki/root/rotate/internal", "pki/issuer/default/sign-intermediate", "pki/sign-verbatim", "auth/token/create"} {
		if err := ask(path, nil); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("%s: %v", path, err)
		}
	}

	// What does not fit the policy is said, with what Vault answered.
	u := w.upstream(t, certmanager.Issuer{Name: "mesh"})
	var no *ca.UpstreamError
	eventually(t, 20*time.Second, func() error {
		if _, err = u.Ask(t.Context(), ca.UpstreamRequest{CSR: der, TTL: 2 * time.Hour}); errors.As(err, &no) && no.Final() {
			return nil
		}
		return fmt.Errorf("a lifetime that the policy has not: %w", err)
	})
	if no.Reason != ca.UpstreamFailed || !strings.Contains(no.Message, "403") {
		t.Errorf("%+v", no)
	}

	for name, want := range map[string]bool{"vault-issuer": true, "signet-control": false} {
		review, err := w.core.AuthorizationV1().SubjectAccessReviews().Create(t.Context(), &authorizationv1.SubjectAccessReview{Spec: authorizationv1.SubjectAccessReviewSpec{
			User: "system:serviceaccount:cert-manager:cert-manager",
			ResourceAttributes: &authorizationv1.ResourceAttributes{
				Namespace: release, Verb: "create", Resource: "serviceaccounts", Subresource: "token", Name: name},
		}}, metav1.CreateOptions{})
		if err != nil || review.Status.Allowed != want {
			t.Errorf("a token for %s: %v, %t", name, err, review.Status.Allowed)
		}
	}
}
