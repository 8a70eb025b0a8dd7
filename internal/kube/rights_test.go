package kube

import (
	"os"
	"testing"

	authenticationv1 "k8s.io/api/authentication/v1"
	rbacv1 "k8s.io/api/rbac/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/test/kubeapiserver"
)

// controlPlane returns a client that is the control plane's service account,
// with the rights in testdata and no other: what the tests do with it works
// with these.
func controlPlane(t *testing.T, server *kubeapiserver.Server, admin *Client) *Client {
	t.Helper()
	data, err := os.ReadFile("testdata/rights.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var rights struct {
		Cluster []rbacv1.PolicyRule `json:"cluster"`
		Release []rbacv1.PolicyRule `json:"release"`
	}
	if err := yaml.UnmarshalStrict(data, &rights); err != nil {
		t.Fatal(err)
	}
	ctx, meta := t.Context(), metav1.ObjectMeta{Name: "signet-control"}
	user := rbacv1.Subject{Kind: rbacv1.UserKind, APIGroup: rbacv1.GroupName, Name: "system:serviceaccount:" + release + ":signet-control"}
	r := admin.Core.RbacV1()
	if _, err := r.ClusterRoles().Create(ctx, &rbacv1.ClusterRole{ObjectMeta: meta, Rules: rights.Cluster}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.ClusterRoleBindings().Create(ctx, &rbacv1.ClusterRoleBinding{ObjectMeta: meta, Subjects: []rbacv1.Subject{user},
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "ClusterRole", Name: meta.Name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.Roles(release).Create(ctx, &rbacv1.Role{ObjectMeta: meta, Rules: rights.Release}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	if _, err := r.RoleBindings(release).Create(ctx, &rbacv1.RoleBinding{ObjectMeta: meta, Subjects: []rbacv1.Subject{user},
		RoleRef: rbacv1.RoleRef{APIGroup: rbacv1.GroupName, Kind: "Role", Name: meta.Name}}, metav1.CreateOptions{}); err != nil {
		t.Fatal(err)
	}
	config := server.Config(kubeapiserver.Admin)
	config.Impersonate = rest.ImpersonationConfig{UserName: user.Name}
	return connect(t, config)
}

// The control plane reads no Secret but its own, and changes no policy.
func testRights(t *testing.T, as *Client) {
	ctx := t.Context()
	refused := func(what string, err error) {
		t.Helper()
		if !apierrors.IsForbidden(err) {
			t.Errorf("%s: %v; want Forbidden", what, err)
		}
	}
	_, err := as.Core.CoreV1().Secrets(release).Get(ctx, "other", metav1.GetOptions{})
	refused("another Secret", err)
	_, err = as.Core.CoreV1().Secrets(release).List(ctx, metav1.ListOptions{})
	refused("listing Secrets", err)
	_, err = as.Core.CoreV1().Secrets("shop").Get(ctx, rootSecret, metav1.GetOptions{})
	refused("a Secret elsewhere", err)
	_, err = as.Core.CoreV1().ConfigMaps("shop").List(ctx, metav1.ListOptions{})
	refused("ConfigMaps elsewhere", err)
	refused("deleting a pod", as.Core.CoreV1().Pods("shop").Delete(ctx, "web-1", metav1.DeleteOptions{}))
	refused("deleting a policy", as.Objects.Resource(v1alpha1.Resource("allowpolicies")).Namespace("shop").Delete(ctx, "good", metav1.DeleteOptions{}))
	_, err = as.Core.CoreV1().ServiceAccounts(release).CreateToken(ctx, agentServiceAccount,
		&authenticationv1.TokenRequest{Spec: authenticationv1.TokenRequestSpec{Audiences: []string{joinAudience}}}, metav1.CreateOptions{})
	refused("making the agents' tokens", err)
}
