package authz_test

import (
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
)

// TestForeignPatterns: documents may name identities of a trust domain that the
// mesh is federated with, in the form that a proxy can compare without knowing who
// exists there, and nobody of any other. A pattern that matched nobody at the
// proxy, and somebody in an explanation, would be two answers.
func TestForeignPatterns(t *testing.T) {
	own, partner := spiffeid.RequireTrustDomainFromString("td"), spiffeid.RequireTrustDomainFromString("partner.test")
	domains := authz.Domains{Own: own, Foreign: []spiffeid.TrustDomain{partner}}
	for pattern, want := range map[string]string{
		"spiffe://partner.test/ns/a/sa/b":   "",
		"spiffe://partner.test/ns/a/sa/*":   "",
		"spiffe://partner.test/ns/*/sa/b":   "another trust domain",
		"spiffe://partner.test/ns/*/sa/*":   "another trust domain",
		"spiffe://partner.test/ns/a/sa/b/c": "another trust domain",
		"spiffe://partner.test/*":           "another trust domain",
		"spiffe://partner.test/web":         "another trust domain",
		"spiffe://third.test/ns/a/sa/b":     "add a Federation",
		"spiffe://td/ns/*/sa/b":             "",
	} {
		policy := v1alpha1.AllowPolicy{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"},
			Spec:       v1alpha1.AllowPolicySpec{From: []v1alpha1.Peer{{SPIFFEID: pattern}}},
		}
		quarantine := v1alpha1.Quarantine{
			ObjectMeta: metav1.ObjectMeta{Name: "q"},
			Spec:       v1alpha1.QuarantineSpec{Reason: "test", Identities: []string{pattern}},
		}
		for kind, compile := range map[string]func() (*authz.Model, []authz.Diagnostic){
			"policy":     func() (*authz.Model, []authz.Diagnostic) { return domains.Compile([]v1alpha1.AllowPolicy{policy}) },
			"quarantine": func() (*authz.Model, []authz.Diagnostic) { return domains.Compile(nil, quarantine) },
		} {
			switch _, faults := compile(); {
			case want == "" && len(faults) > 0:
				t.Errorf("%s of %s: %v", kind, pattern, faults)
			case want != "" && (len(faults) != 1 || !strings.Contains(faults[0].Message, want)):
				t.Errorf("%s of %s: %v; want %q", kind, pattern, faults, want)
			}
		}
	}
	model, _ := domains.Compile([]v1alpha1.AllowPolicy{{
		ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"},
		Spec:       v1alpha1.AllowPolicySpec{From: []v1alpha1.Peer{{SPIFFEID: "spiffe://partner.test/ns/a/sa/*"}}},
	}})
	for caller, want := range map[string]authz.Verdict{
		"spiffe://partner.test/ns/a/sa/b": authz.Allow, "spiffe://td/ns/a/sa/b": authz.Deny, "spiffe://partner.test/ns/c/sa/b": authz.Deny, "spiffe://third.test/ns/a/sa/b": authz.Deny,
	} {
		got := model.Decide(authz.Request{From: spiffeid.RequireFromString(caller), Target: authz.Target{Namespace: "shop", ServiceAccount: "web"}, Port: 80})
		if got.Verdict != want {
			t.Errorf("%s: %s", caller, got.Reason)
		}
	}
}
