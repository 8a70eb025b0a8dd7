//go:build interop

package certmanager_test

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"fmt"
	"net/url"
	"strings"
	"sync/atomic"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/certmanager"
)

// vaultLeaves is a world whose workloads a role of Vault certifies, beside an issuer of
// intermediates, as docs/cert-manager.md says. due wants another intermediate.
func vaultLeaves(t *testing.T) (v *vault, a *ca.Authority, due *atomic.Bool) {
	t.Helper()
	w, v := underVault(t)
	v.shell(examples(t, "sh")[2])
	w.apply(t, instead(t, examples(t, "yaml")[1], "https://vault.vault.svc:8200", v.address))
	store := w.store(t)
	due = &atomic.Bool{}
	e, _ := w.enrolment(t, w.upstream(t, certmanager.Issuer{Name: "mesh"}), store, func(*x509.Certificate) string {
		if due.Load() {
			return "the test wants another"
		}
		return ""
	})
	reaches(t, e, ca.UpstreamReady)
	return v, follower(t, store, w.upstream(t, certmanager.Issuer{Name: "workloads"})), due
}

// TestVaultWorkloads: a role of Vault certifies each workload, below the root that an
// intermediate comes from. When that is replaced workloads go on below the old one, and
// go over with the role. What the role must say is needed: without, what comes is refused.
func TestVaultWorkloads(t *testing.T) {
	v, a, due := vaultLeaves(t)
	n := 0
	issue := func() ([]*x509.Certificate, error) {
		n++ // who was refused is not asked for again at once
		return issueLeaf(t.Context(), a, workload(t, n), wholeCSR(t, workload(t, n)))
	}
	good := func(by string) {
		t.Helper()
		chain, err := issue()
		if err != nil {
			t.Error(err)
			return
		}
		leaf := chain[0]
		if len(chain) != 1 || leaf.Issuer.CommonName != by || len(leaf.SubjectKeyId) != 20 || leaf.NotAfter.Sub(leaf.NotBefore) != time.Hour+10*time.Second {
			t.Errorf("a chain of %d by %s, for %s, key %x", len(chain), leaf.Issuer, leaf.NotAfter.Sub(leaf.NotBefore), leaf.SubjectKeyId)
		}
	}
	refused := func(name, want string) {
		t.Helper()
		_, err := issue()
		var no *ca.UpstreamError
		if !errors.As(err, &no) || no.Reason != ca.UpstreamUnusable || !strings.Contains(no.Message, want) {
			t.Errorf("%s: %v, want %q", name, err, want)
		}
	}
	at := time.Now()
	for range 5 {
		good("company")
	}
	t.Logf("alone, one takes %s", (time.Since(at) / 5).Round(time.Millisecond))
	if entries, err := a.IssuanceLog().Entries(time.Time{}); err != nil || len(entries) != 5 || entries[0].Outcome != ca.OutcomeIssued {
		t.Errorf("logged %+v, %v", entries, err)
	}

	for setting, want := range map[string]string{
		"basic_constraints_valid_for_non_ca=false": "basic constraints must be there",
		"key_usage=DigitalSignature,KeyAgreement":  "key usage",
		"server_flag=false":                        "extended key usage",
		"client_flag=false":                        "extended key usage",
		"ou=shop":                                  "subject",
	} {
		name, _, _ := strings.Cut(setting, "=")
		was := v.do("pki/roles/signet-workload", nil)[name]
		v.shell("vault patch pki/roles/signet-workload " + setting)
		refused(setting, want)
		v.shell(fmt.Sprintf("vault patch pki/roles/signet-workload %s=%s", name, strings.Trim(fmt.Sprint(was), "[]")))
	}
	v.do("pki/config/urls", map[string]any{"issuing_certificates": "http://vault.example/ca"})
	refused("addresses", "does not belong in an SVID")
	v.do("pki/config/urls", map[string]any{"issuing_certificates": ""})
	good("company")

	v.secondRoot(a, due)
	good("company")
	if err := a.SwitchRoot(); err != nil {
		t.Fatal(err)
	}
	refused("the old root", "it is from below the root")
	v.shell(examples(t, "sh")[3])
	good("company 2")
}

// TestVaultRole: the role and the policy that docs/cert-manager.md gives for workloads
// certify workloads of that trust domain and nothing else.
func TestVaultRole(t *testing.T) {
	v, _, _ := vaultLeaves(t)
	token := v.token("signet-workload")
	ask := func(path string, csr *x509.CertificateRequest, common string) error {
		key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
		if err != nil {
			t.Fatal(err)
		}
		der, err := x509.CreateCertificateRequest(rand.Reader, csr, key)
		if err != nil {
			t.Fatal(err)
		}
		var uris []string
		for _, u := range csr.URIs {
			uris = append(uris, u.String())
		}
		_, err = v.try(token, path, map[string]any{ // as cert-manager writes it
			"csr": string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE REQUEST", Bytes: der})), "common_name": common, "ttl": "1h0m0s",
			"uri_sans": strings.Join(uris, ","), "alt_names": strings.Join(csr.DNSNames, ","), "ip_sans": "", "exclude_cn_from_sans": "true",
		})
		return err
	}
	named := func(uris ...string) *x509.CertificateRequest {
		csr := &x509.CertificateRequest{}
		for _, text := range uris {
			u, err := url.Parse(text)
			if err != nil {
				t.Fatal(err)
			}
			csr.URIs = append(csr.URIs, u)
		}
		return csr
	}
	const path, id = "pki/sign/signet-workload", "spiffe://mesh.example/ns/shop/sa/web"
	if err := ask(path, named(id), ""); err != nil {
		t.Fatal(err)
	}
	host := named(id)
	host.DNSNames = []string{"bank.example"}
	for name, csr := range map[string]*x509.CertificateRequest{
		"another trust domain": named("spiffe://other.example/ns/shop/sa/web"), "the mesh itself": named("spiffe://mesh.example"),
		"a node": named("spiffe://mesh.example/node/one"), "one more": named(id, "spiffe://other.example/ns/shop/sa/web"), "a host": host,
	} {
		if err := ask(path, csr, ""); err == nil || !strings.Contains(err.Error(), "400 Bad Request") || !strings.Contains(err.Error(), "this role") {
			t.Errorf("%s: %v", name, err)
		}
	}
	if err := ask(path, named(id), "bank.example"); err == nil || !strings.Contains(err.Error(), "not allowed by this role") {
		t.Errorf("a common name: %v", err)
	}
	for _, path := range []string{"pki/root/sign-intermediate", "pki/sign-verbatim", "pki/roles/signet-workload", "pki/issuer/first/sign/signet-workload"} {
		if err := ask(path, named(id), ""); err == nil || !strings.Contains(err.Error(), "permission denied") {
			t.Errorf("%s: %v", path, err)
		}
	}
}
