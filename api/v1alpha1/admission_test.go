package v1alpha1_test

import (
	"errors"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"

	"github.com/signet-mesh/signet/test/kubeapiserver"
)

func namespace(name, annotations string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Namespace\nmetadata: {name: %s, annotations: {%s}}\n", name, annotations)
}

func pod(namespace, name, annotations string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Pod\nmetadata: {name: %s, namespace: %s, annotations: {%s}}\nspec: {containers: [{name: c, image: i}]}\n",
		name, namespace, annotations)
}

// annotate merges one annotation into an object, of a subresource if it is
// given; null removes it.
func annotate(t *testing.T, c dynamic.ResourceInterface, name, key, value string, subresources ...string) error {
	t.Helper()
	if value != "null" {
		value = fmt.Sprintf("%q", value)
	}
	patch := fmt.Sprintf(`{"metadata":{"annotations":{%q:%s}}}`, key, value)
	_, err := c.Patch(t.Context(), name, types.MergePatchType, []byte(patch), metav1.PatchOptions{}, subresources...)
	return err
}

// testAdmission: an annotation that would be misread is refused, and nobody
// takes a pod out of the mesh, or says that one is in it, who may not.
func testAdmission(t *testing.T, server *kubeapiserver.Server) {
	admin := as(t, server, kubeapiserver.Admin)
	create(t, admin, controlPlaneRole)
	for _, bad := range []string{namespace("x", "signet.dev/mesh: yonder"), pod("shop", "x", "signet.dev/mesh: yonder")} {
		kubeapiserver.Eventually(t, 30*time.Second, func() error { // policies come into force a moment after they are written
			switch err := try(t, admin, parse(t, bad)[0]); {
			case err == nil:
				return errors.New("no admission policy is in force")
			case !strings.Contains(err.Error(), "ValidatingAdmissionPolicy"):
				return fmt.Errorf("no admission policy is in force: %w", err)
			}
			return nil
		})
	}
	create(t, admin, namespace("optional", `signet.dev/allow-opt-out: "true"`))
	create(t, admin, namespace("fixed", `signet.dev/allow-opt-out: "false"`))

	const statusWords = "signet.dev/status is written by Signet's control plane alone"
	for _, test := range []struct{ document, message string }{
		{namespace("x", "signet.dev/mesh: enforce"), ""},
		{namespace("x", "signet.dev/mesh: observe"), ""},
		{namespace("x", `signet.dev/mesh: "off"`), ""},
		{namespace("x", "other.example/mesh: x"), ""},
		{namespace("x", "signet.dev/mesh: enforced"), `annotation signet.dev/mesh is "enforced"; use enforce, observe or off`},
		{namespace("x", "signet.dev/mesh: Enforce"), "use enforce, observe or off"},
		{namespace("x", `signet.dev/mesh: ""`), "use enforce, observe or off"},
		{namespace("x", `signet.dev/mesh: "true"`), "use enforce, observe or off"},
		{namespace("x", `signet.dev/allow-opt-out: "yes"`), `must be "true" or "false"`},
		{namespace("x", `signet.dev/status: "enforce: 5 of 5 pods enrolled"`), statusWords},
		{pod("shop", "x", ""), ""},
		{pod("shop", "x", `signet.dev/mesh: "off"`), "a pod may opt out only where its namespace has the annotation signet.dev/allow-opt-out"},
		{pod("fixed", "x", `signet.dev/mesh: "off"`), "a pod may opt out only where"},
		{pod("optional", "x", `signet.dev/mesh: "off"`), ""},
		{pod("optional", "x", `signet.dev/mesh: enforce`), "on a pod can only be off"},
		{pod("optional", "x", `signet.dev/mesh: "false"`), "on a pod can only be off"},
	} {
		check(t, test.document, try(t, admin, parse(t, test.document)[0]), test.message)
	}

	namespaces, control := admin.Resource(resources["Namespace"]), as(t, server, controlPlane).Resource(resources["Namespace"])
	create(t, admin, pod("shop", "running", ""))
	pods := admin.Resource(resources["Pod"]).Namespace("shop")
	binding := parse(t, `apiVersion: v1
kind: Binding
metadata: {name: running, namespace: shop, annotations: {signet.dev/mesh: "off"}}
target: {apiVersion: v1, kind: Node, name: node-1}
`)[0] // its annotations become the pod's
	_, err := pods.Create(t.Context(), binding, metav1.CreateOptions{DryRun: []string{metav1.DryRunAll}}, "binding")
	check(t, "a pod opts out as it is bound", err, "a pod may opt out only where")
	for _, sub := range [][]string{nil, {"status"}} {
		check(t, fmt.Sprint("a running pod opts out ", sub), annotate(t, pods, "running", "signet.dev/mesh", "off", sub...), "a pod may opt out only where")
		check(t, fmt.Sprint("an administrator writes the status ", sub), annotate(t, namespaces, "shop", "signet.dev/status", "x", sub...), statusWords)
	}
	check(t, "the control plane writes the status", annotate(t, control, "shop", "signet.dev/status", "enforce: 1 of 1 pods enrolled"), "")
	check(t, "somebody removes the status", annotate(t, namespaces, "shop", "signet.dev/status", "null"), statusWords)
	check(t, "an edit beside the status", annotate(t, namespaces, "shop", "signet.dev/mesh", "observe"), "")
	check(t, "an edit beside a value that was wrong before", annotate(t, namespaces, "old", "other.example/x", "y"), "")
	check(t, "a wrong value for another", annotate(t, namespaces, "old", "signet.dev/mesh", "yes"), "use enforce, observe or off")
	check(t, "a wrong edit", annotate(t, namespaces, "shop", "signet.dev/mesh", "audit"), "use enforce, observe or off")

	// A pod that opted out while it was allowed to can still be edited.
	create(t, admin, pod("optional", "out", `signet.dev/mesh: "off"`))
	check(t, "opting out is forbidden again", annotate(t, namespaces, "optional", "signet.dev/allow-opt-out", "null"), "")
	outside := admin.Resource(resources["Pod"]).Namespace("optional")
	check(t, "an edit beside the old annotation", annotate(t, outside, "out", "other.example/x", "y"), "")
	check(t, "the pod comes back", annotate(t, outside, "out", "signet.dev/mesh", "null"), "")
	check(t, "and may not leave again", annotate(t, outside, "out", "signet.dev/mesh", "off"), "a pod may opt out only where")
}

// controlPlaneRole lets the control plane's account write namespaces.
const controlPlaneRole = `apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRole
metadata: {name: test-control}
rules: [{apiGroups: [""], resources: [namespaces], verbs: [get, patch, update]}]
---
apiVersion: rbac.authorization.k8s.io/v1
kind: ClusterRoleBinding
metadata: {name: test-control}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: test-control}
subjects: [{kind: ServiceAccount, name: signet-control, namespace: signet-system}]
`

// testRoles: who may edit a namespace may write its policies and nothing else
// of the mesh.
func testRoles(t *testing.T, server *kubeapiserver.Server) {
	admin, dana := as(t, server, kubeapiserver.Admin), as(t, server, developer)
	create(t, admin, namespace("other", ""))
	bind := func(role string) {
		create(t, admin, fmt.Sprintf(`apiVersion: rbac.authorization.k8s.io/v1
kind: RoleBinding
metadata: {name: %s, namespace: shop}
roleRef: {apiGroup: rbac.authorization.k8s.io, kind: ClusterRole, name: %s}
subjects: [{apiGroup: rbac.authorization.k8s.io, kind: User, name: %s}]
`, role, role, developer))
	}
	mine := parse(t, policy(`{from: [{namespace: ops}]}`))[0]
	theirs := mine.DeepCopy()
	theirs.SetNamespace("other")
	policies := dana.Resource(resources["AllowPolicy"])
	list := func() error {
		_, err := policies.Namespace("shop").List(t.Context(), metav1.ListOptions{})
		return err
	}

	if err := list(); !forbidden(err) {
		t.Errorf("a stranger reads policies: %v", err)
	}
	bind("signet-view")
	kubeapiserver.Eventually(t, 10*time.Second, list)
	if err := try(t, dana, mine); !forbidden(err) {
		t.Errorf("a reader writes policies: %v", err)
	}
	bind("signet-edit")
	kubeapiserver.Eventually(t, 10*time.Second, func() error { return try(t, dana, mine) })
	for what, err := range map[string]error{
		"a policy of another namespace": try(t, dana, theirs),
		"a Quarantine":                  try(t, dana, parse(t, quarantine(`{reason: x, namespaces: [other]}`))[0]),
		"a MeshConfig":                  try(t, dana, parse(t, meshConfig("mesh", `{trustDomain: x}`))[0]),
		"all policies at once":          policies.Namespace("shop").DeleteCollection(t.Context(), metav1.DeleteOptions{}, metav1.ListOptions{}),
		"a status":                      annotate(t, policies.Namespace("shop"), "trip", "x", "y", "status"),
	} {
		if !forbidden(err) {
			t.Errorf("an editor may write %s: %v", what, err)
		}
	}

	// A controller that does not run here adds them to the built-in roles, by
	// their labels.
	const prefix = "rbac.authorization.k8s.io/aggregate-to-"
	for _, role := range parse(t, chartFile(t, "rbac-roles.yaml")) {
		var to []string
		for _, builtin := range []string{"view", "edit", "admin"} {
			if role.GetLabels()[prefix+builtin] == "true" {
				to = append(to, builtin)
			}
		}
		want := map[string]string{"signet-view": "view edit admin", "signet-edit": "edit admin", "signet-admin": "admin"}[role.GetName()]
		if got := strings.Join(to, " "); got != want {
			t.Errorf("%s is added to %q, want %q", role.GetName(), got, want)
		}
	}
}
