package v1alpha1_test

import (
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/test/kubeapiserver"
)

// resources has the resource of each kind that the tests write.
var resources = map[string]schema.GroupVersionResource{
	"Namespace":                        {Version: "v1", Resource: "namespaces"},
	"Pod":                              {Version: "v1", Resource: "pods"},
	"ClusterRole":                      {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterroles"},
	"ClusterRoleBinding":               {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "clusterrolebindings"},
	"RoleBinding":                      {Group: "rbac.authorization.k8s.io", Version: "v1", Resource: "rolebindings"},
	"CustomResourceDefinition":         {Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"},
	"ValidatingAdmissionPolicy":        {Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicies"},
	"ValidatingAdmissionPolicyBinding": {Group: "admissionregistration.k8s.io", Version: "v1", Resource: "validatingadmissionpolicybindings"},
	v1alpha1.KindAllowPolicy:           v1alpha1.Resource("allowpolicies"),
	v1alpha1.KindQuarantine:            v1alpha1.Resource("quarantines"),
	v1alpha1.KindMeshConfig:            v1alpha1.Resource("meshconfigs"),
	v1alpha1.KindFederation:            v1alpha1.Resource("federations"),
}

// parse reads YAML documents.
func parse(t *testing.T, text string) []*unstructured.Unstructured {
	t.Helper()
	var out []*unstructured.Unstructured
	for _, doc := range strings.Split(text, "\n---\n") {
		o := &unstructured.Unstructured{}
		if err := yaml.UnmarshalStrict([]byte(doc), &o.Object); err != nil {
			t.Fatalf("%v in:\n%s", err, doc)
		}
		if o.Object != nil {
			out = append(out, o)
		}
	}
	return out
}

// of returns the client for the resource of an object.
func of(c dynamic.Interface, o *unstructured.Unstructured) dynamic.ResourceInterface {
	r := c.Resource(resources[o.GetKind()])
	if o.GetNamespace() != "" {
		return r.Namespace(o.GetNamespace())
	}
	return r
}

func create(t *testing.T, c dynamic.Interface, text string) {
	t.Helper()
	for _, o := range parse(t, text) {
		if _, err := of(c, o).Create(t.Context(), o, metav1.CreateOptions{}); err != nil {
			t.Fatalf("%s %s: %v", o.GetKind(), o.GetName(), err)
		}
	}
}

// try creates without keeping anything.
func try(t *testing.T, c dynamic.Interface, o *unstructured.Unstructured) error {
	t.Helper()
	_, err := of(c, o).Create(t.Context(), o, metav1.CreateOptions{
		DryRun: []string{metav1.DryRunAll}, FieldValidation: metav1.FieldValidationStrict,
	})
	return err
}

// chartFile reads a file of the chart as it is installed. Only the namespace
// of the release may be filled in: these files have to be readable as they are.
func chartFile(t *testing.T, name string) string {
	t.Helper()
	b, err := os.ReadFile(filepath.Join("..", "..", "deploy", "chart", "signet", "templates", name))
	if err != nil {
		t.Fatal(err)
	}
	text := strings.ReplaceAll(string(b), "{{ .Release.Namespace }}", "signet-system")
	if strings.Contains(text, "{{") {
		t.Fatalf("%s is a template", name)
	}
	return text
}

// Users of the API server.
const (
	developer    = "dana"
	controlPlane = "system:serviceaccount:signet-system:signet-control"
)

// as returns a client that is the given user.
func as(t *testing.T, server *kubeapiserver.Server, user string) dynamic.Interface {
	t.Helper()
	client, err := dynamic.NewForConfig(server.Config(user))
	if err != nil {
		t.Fatal(err)
	}
	return client
}

// TestCluster checks what an API server makes of the CustomResourceDefinitions,
// the admission policies and the roles, with a real one.
func TestCluster(t *testing.T) {
	server := kubeapiserver.Start(t, developer, controlPlane)
	admin := as(t, server, kubeapiserver.Admin)
	files, err := filepath.Glob("../../deploy/crds/*.yaml")
	if err != nil || len(files) != 4 {
		t.Fatalf("%v %v", files, err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		create(t, admin, strings.TrimPrefix(string(b), "---\n"))
	}
	create(t, admin, namespace("old", "signet.dev/mesh: yonder")) // from before there were rules for it
	create(t, admin, chartFile(t, "rbac-roles.yaml"))
	create(t, admin, chartFile(t, "admission.yaml"))
	create(t, admin, namespace("shop", ""))
	for _, kind := range []string{v1alpha1.KindAllowPolicy, v1alpha1.KindQuarantine, v1alpha1.KindMeshConfig, v1alpha1.KindFederation} {
		kubeapiserver.Eventually(t, 30*time.Second, func() error {
			_, err := admin.Resource(resources[kind]).List(t.Context(), metav1.ListOptions{})
			return err
		})
	}
	t.Run("documents", func(t *testing.T) { testDocuments(t, admin) })
	t.Run("mesh config", func(t *testing.T) { testMeshConfig(t, admin) })
	t.Run("federation", func(t *testing.T) { testFederation(t, admin) })
	t.Run("round trip", func(t *testing.T) { testRoundTrip(t, admin) })
	t.Run("admission", func(t *testing.T) { testAdmission(t, server) })
	t.Run("roles", func(t *testing.T) { testRoles(t, server) })
}

func policy(spec string) string {
	return "apiVersion: signet.dev/v1alpha1\nkind: AllowPolicy\nmetadata: {name: p, namespace: shop}\nspec: " + spec + "\n"
}

func quarantine(spec string) string {
	return "apiVersion: signet.dev/v1alpha1\nkind: Quarantine\nmetadata: {name: q}\nspec: " + spec + "\n"
}

func meshConfig(name, spec string) string {
	return "apiVersion: signet.dev/v1alpha1\nkind: MeshConfig\nmetadata: {name: " + name + "}\nspec: " + spec + "\n"
}

// testDocuments: what is refused, and in which words. An empty message means
// accepted. The API server must not be milder than the compiler: what it lets
// in compiles.
func testDocuments(t *testing.T, admin dynamic.Interface) {
	long := strings.Repeat("a", 254)
	for _, test := range []struct{ document, message string }{
		{policy(`{from: [{serviceAccount: client}]}`), ""},
		{policy(`{target: {serviceAccount: web.v2}, ports: [80, 443], from: [{serviceAccount: ops/backup}, {namespace: mon}, {spiffeID: "spiffe://td/ns/*/sa/x"}]}`), ""},
		{policy(`{from: [{spiffeID: "spiffe://td/*"}]}`), ""},
		{policy(`{from: []}`), "spec.from in body should have at least 1 items"},
		{policy(`{}`), "spec.from: Required value"},
		{policy(`{from: [{}]}`), "set exactly one of serviceAccount, namespace, spiffeID"},
		{policy(`{from: [{serviceAccount: a, namespace: b}]}`), "set exactly one of serviceAccount, namespace, spiffeID"},
		{policy(`{from: [{serviceAccount: a, namespace: b, spiffeID: "spiffe://td/x"}]}`), "set exactly one of"},
		{policy(`{from: [{serviceAccount: ""}]}`), "serviceAccount in body should be at least 1 chars long"},
		{policy(`{from: [{serviceAccount: a/b/c}]}`), "must be name or namespace/name"},
		{policy(`{from: [{serviceAccount: "*"}]}`), "must be name or namespace/name"},
		{policy(`{from: [{serviceAccount: /b}]}`), "must be name or namespace/name"},
		{policy(`{from: [{serviceAccount: a.b/c}]}`), "must be name or namespace/name"},
		{policy(`{from: [{serviceAccount: ` + long + `}]}`), "must be name or namespace/name"},
		{policy(`{from: [{serviceAccount: ` + long[:64] + `/a}]}`), "must be name or namespace/name"},
		{policy(`{from: [{namespace: a.b}]}`), "must be the name of a namespace"},
		{policy(`{from: [{namespace: "*"}]}`), "must be the name of a namespace"},
		{policy(`{from: [{namespace: ` + long[:64] + `}]}`), "Too long: may not be more than 63"},
		{policy(`{from: [{spiffeID: "https://td/x"}]}`), "must start with spiffe://"},
		{policy(`{from: [{spiffeID: "spiffe://td"}]}`), "must start with spiffe://"},
		{policy(`{from: [{spiffeID: "spiffe://*/ns/shop"}]}`), "a trust domain without a wildcard"},
		{policy(`{from: [{spiffeID: "spiffe://TD/ns/shop"}]}`), "must start with spiffe://"},
		{policy(`{from: [{spiffeID: "spiffe://td/ns/we*"}]}`), "a wildcard must be a whole segment"},
		{policy(`{from: [{spiffeID: "spiffe://td/ns/**"}]}`), "a wildcard must be a whole segment"},
		{policy(`{from: [{spiffeID: "spiffe://td/ns//x"}]}`), "each path segment must be"},
		{policy(`{from: [{spiffeID: "spiffe://td/ns/"}]}`), "each path segment must be"},
		{policy(`{from: [{spiffeID: "spiffe://td/a%2fb"}]}`), "each path segment must be"},
		{policy(`{from: [{spiffeID: "spiffe://td/x\n"}]}`), "each path segment must be"},
		{policy(`{from: [{spiffeID: "spiffe://td/ns/../x"}]}`), "must not be . or .."},
		{policy(`{from: [{spiffeID: "spiffe://td/ns/.."}]}`), "must not be . or .."},
		{policy(`{target: {serviceAccount: "*"}, from: [{namespace: a}]}`), "must be the name of a service account in the policy's namespace"},
		{policy(`{target: {serviceAccount: ops/web}, from: [{namespace: a}]}`), "must be the name of a service account in the policy's namespace"},
		{policy(`{target: {serviceAccount: ""}, from: [{namespace: a}]}`), "at least 1 chars long"},
		{policy(`{ports: [0], from: [{namespace: a}]}`), "should be greater than or equal to 1"},
		{policy(`{ports: [65536], from: [{namespace: a}]}`), "should be less than or equal to 65535"},
		{policy(`{ports: [80, 15001], from: [{namespace: a}]}`), "belong to the mesh itself"},
		{policy(`{ports: [15006], from: [{namespace: a}]}`), "belong to the mesh itself"},
		{policy(`{ports: [15008], from: [{namespace: a}]}`), "belong to the mesh itself"},
		{policy(`{ports: [80], tls: terminate, from: [{namespace: a}]}`), ""},
		{policy(`{tls: terminate, from: [{namespace: a}]}`), "tls needs ports"},
		{policy(`{ports: [80], tls: Terminate, from: [{namespace: a}]}`), `supported values: "terminate", "originate"`},
		{policy(`{ports: [80], tls: originate, alpn: http/1.1, from: [{namespace: a}]}`), ""},
		{policy(`{tls: originate, from: [{namespace: a}]}`), "tls needs ports"},
		{policy(`{ports: [80], alpn: h2, from: [{namespace: a}]}`), "alpn needs tls: originate"},
		{policy(`{ports: [80], tls: terminate, alpn: h2, from: [{namespace: a}]}`), "alpn needs tls: originate"},
		{policy(`{ports: [80], tls: originate, alpn: "h2,http/1.1", from: [{namespace: a}]}`), "spec.alpn in body should match"},
		{policy(`{ports: [80], tls: originate, alpn: "", from: [{namespace: a}]}`), "spec.alpn in body should be at least 1 chars long"},
		{policy(`{port: [80], from: [{namespace: a}]}`), `unknown field "spec.port"`},
		{policy(`{from: [` + strings.Repeat("{namespace: a}, ", 256) + `{namespace: a}]}`), "must have at most 256 items"},

		{quarantine(`{reason: leaked, identities: ["spiffe://td/ns/*/sa/x"], serviceAccounts: [shop/web], namespaces: [ops], nodes: [node-1.example]}`), ""},
		{quarantine(`{reason: leaked, nodes: [node-1]}`), ""},
		{quarantine(`{reason: leaked}`), "set at least one of identities, serviceAccounts, namespaces, nodes"},
		{quarantine(`{reason: leaked, namespaces: []}`), "should have at least 1 items"},
		{quarantine(`{namespaces: [shop]}`), "spec.reason: Required value"},
		{quarantine(`{reason: "", namespaces: [shop]}`), "spec.reason in body should be at least 1 chars long"},
		{quarantine(`{reason: ` + long + `aaa, namespaces: [shop]}`), "may not be more than 256"},
		{quarantine(`{reason: leaked, serviceAccounts: [web]}`), "must be namespace/name"},
		{quarantine(`{reason: leaked, serviceAccounts: [shop/*]}`), "must be namespace/name"},
		{quarantine(`{reason: leaked, namespaces: ["*"]}`), "must be the name of a namespace"},
		{quarantine(`{reason: leaked, nodes: ["*"]}`), "must be the name of a node"},
		{quarantine(`{reason: leaked, identities: ["spiffe://*/ns/a/sa/b"]}`), "must start with spiffe://"},
		{quarantine(`{reason: leaked, identities: ["spiffe://td/ns/w*"]}`), "a wildcard must be a whole segment"},
		{quarantine(`{reason: leaked, identities: ["spiffe://td/./x"]}`), "must not be . or .."},
	} {
		o := parse(t, test.document)[0]
		check(t, test.document, try(t, admin, o), test.message)
		if n := faults(t, o); test.message == "" && n != 0 {
			t.Errorf("the API server accepts what does not compile:\n%s", test.document)
		}
	}
}

func check(t *testing.T, what string, err error, message string) {
	t.Helper()
	switch {
	case message == "" && err != nil:
		t.Errorf("%s\nis refused: %v", what, err)
	case message != "" && err == nil:
		t.Errorf("%s\nis accepted, want %q", what, message)
	case message != "" && !strings.Contains(err.Error(), message):
		t.Errorf("%s\nis refused with\n%v\nwant %q", what, err, message)
	}
}

// faults counts what the compiler finds wrong.
func faults(t *testing.T, o *unstructured.Unstructured) int {
	t.Helper()
	td := spiffeid.RequireTrustDomainFromString("td")
	convert := runtime.DefaultUnstructuredConverter
	if o.GetKind() == v1alpha1.KindAllowPolicy {
		var p v1alpha1.AllowPolicy
		if err := convert.FromUnstructured(o.Object, &p); err != nil {
			t.Fatal(err)
		}
		_, diagnostics := authz.Compile(td, []v1alpha1.AllowPolicy{p})
		return len(diagnostics)
	}
	var q v1alpha1.Quarantine
	if err := convert.FromUnstructured(o.Object, &q); err != nil {
		t.Fatal(err)
	}
	_, diagnostics := authz.Compile(td, nil, q)
	return len(diagnostics)
}

// testMeshConfig: there is one, with bounds, and its trust domain stays.
func testMeshConfig(t *testing.T, admin dynamic.Interface) {
	for _, test := range []struct{ document, message string }{
		{meshConfig("mesh", `{trustDomain: mesh.example}`), ""},
		{meshConfig("mesh", `{trustDomain: mesh.example, svidTTL: 4s, unknownDestinations: refuse}`), ""},
		{meshConfig("mesh", `{trustDomain: mesh.example, svidTTL: 24h}`), ""},
		{meshConfig("mesh", `{trustDomain: mesh.example, rootNotBefore: "2026-01-02T03:04:05Z"}`), ""},
		{meshConfig("mesh", `{trustDomain: mesh.example, rootNotBefore: tomorrow}`), "rootNotBefore"},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [{serial: 0a1b, reason: stolen}, {serial: ff, reason: lost, id: "spiffe://mesh.example/x", since: "2026-01-02T03:04:05Z", notAfter: "2026-01-02T04:04:05Z"}]}`), ""},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [{serial: "0A", reason: x}]}`), "must be a serial number as"},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [{serial: "0a1", reason: x}]}`), "must be a serial number as"},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [{serial: "000a", reason: x}]}`), "must be a serial number as"},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [{serial: "0a:1b", reason: x}]}`), "must be a serial number as"},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [{serial: ff}]}`), "spec.revoked[0].reason: Required value"},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [{serial: ff, reason: x, since: now}]}`), "spec.revoked[0].since"},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [{serial: ff, reason: x}, {serial: ff, reason: x}]}`), "Duplicate value"},
		{meshConfig("mesh", `{trustDomain: mesh.example, revoked: [`+tooMany()+`]}`), "must have at most 256 items"},
		{meshConfig("second", `{trustDomain: mesh.example}`), "its name must be mesh"},
		{meshConfig("mesh", `{}`), "spec.trustDomain: Required value"},
		{meshConfig("mesh", `{trustDomain: "spiffe://mesh.example"}`), "must be a bare name"},
		{meshConfig("mesh", `{trustDomain: Mesh.example}`), "must be a bare name"},
		{meshConfig("mesh", `{trustDomain: mesh..example}`), "must be a bare name"},
		{meshConfig("mesh", `{trustDomain: mesh.example, svidTTL: 3s}`), "must be a duration from 4s to 24h"},
		{meshConfig("mesh", `{trustDomain: mesh.example, svidTTL: 24h1s}`), "must be a duration from 4s to 24h"},
		{meshConfig("mesh", `{trustDomain: mesh.example, svidTTL: forever}`), "must be a duration from 4s to 24h"},
		{meshConfig("mesh", `{trustDomain: mesh.example, svidTTL: -1h}`), "must be a duration from 4s to 24h"},
		{meshConfig("mesh", `{trustDomain: mesh.example, unknownDestinations: allow}`), `supported values: "plain", "refuse"`},
	} {
		check(t, test.document, try(t, admin, parse(t, test.document)[0]), test.message)
	}

	create(t, admin, meshConfig("mesh", `{trustDomain: mesh.example}`))
	configs := admin.Resource(resources[v1alpha1.KindMeshConfig])
	o, err := configs.Get(t.Context(), v1alpha1.MeshConfigName, metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	var c v1alpha1.MeshConfig
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &c); err != nil {
		t.Fatal(err)
	}
	if c.Spec.SVIDTTL == nil || c.Spec.SVIDTTL.Duration != time.Hour || c.Spec.UnknownDestinations != "plain" {
		t.Errorf("defaults: %+v", c.Spec)
	}
	if err := unstructured.SetNestedField(o.Object, "other.example", "spec", "trustDomain"); err != nil {
		t.Fatal(err)
	}
	_, err = configs.Update(t.Context(), o, metav1.UpdateOptions{})
	check(t, "an edit of the trust domain", err, "a trust domain cannot be edited")
}

// testFederation: what cannot be followed is refused, in words that name the fix.
func testFederation(t *testing.T, admin dynamic.Interface) {
	for spec, message := range map[string]string{
		`{trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle", profile: https_web}`:                                                                           "",
		`{trustDomain: partner.example, bundleEndpointURL: "https://10.0.0.1:8443/a?b=c", profile: https_spiffe, endpointSPIFFEID: "spiffe://partner.example/signet/bundle", bundle: "{}"}`: "",
		`{trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle", profile: https_spiffe, endpointSPIFFEID: "spiffe://third.example/bundle"}`:                     "",
		`{trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle", profile: https_spiffe, endpointSPIFFEID: "spiffe://partner.example/signet/bundle"}`:            "bundle is missing",
		`{trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle", profile: https_spiffe}`:                                                                        "endpointSPIFFEID is missing",
		`{trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle", profile: https_web, endpointSPIFFEID: "spiffe://partner.example/x"}`:                           "has no meaning with the profile https_web",
		`{trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle", profile: https_spiffe, endpointSPIFFEID: "spiffe://partner.example"}`:                          "must be a SPIFFE ID with a path",
		`{trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle", profile: http}`:                                                                                `supported values: "https_spiffe", "https_web"`,
		`{trustDomain: partner.example, bundleEndpointURL: "http://partner.example/bundle", profile: https_web}`:                                                                            "must be an https URL",
		`{trustDomain: partner.example, bundleEndpointURL: "https://me@partner.example/bundle", profile: https_web}`:                                                                        "must be an https URL",
		`{trustDomain: partner.example, bundleEndpointURL: "https://partner.example/bundle#x", profile: https_web}`:                                                                         "must be an https URL",
		`{trustDomain: partner.example, bundleEndpointURL: "https:///bundle", profile: https_web}`:                                                                                          "must be an https URL",
		`{trustDomain: "spiffe://partner.example", bundleEndpointURL: "https://partner.example/bundle", profile: https_web}`:                                                                "must be a bare name",
		`{bundleEndpointURL: "https://partner.example/bundle", profile: https_web}`:                                                                                                         "spec.trustDomain: Required value",
	} {
		document := "apiVersion: signet.dev/v1alpha1\nkind: Federation\nmetadata: {name: partner}\nspec: " + spec + "\n"
		check(t, document, try(t, admin, parse(t, document)[0]), message)
	}
}

// tooMany has one entry more than may be revoked at a time.
func tooMany() string {
	var out strings.Builder
	for i := range 257 {
		fmt.Fprintf(&out, "{serial: \"%04x\", reason: x},", 0x1000+i)
	}
	return out.String()
}

// testRoundTrip: a typed policy is what the server keeps, an edit of the spec
// does not touch the status, nor the other way round, and conditions are
// applied by type.
func testRoundTrip(t *testing.T, admin dynamic.Interface) {
	policies := admin.Resource(resources[v1alpha1.KindAllowPolicy]).Namespace("shop")
	in := v1alpha1.AllowPolicy{
		TypeMeta:   metav1.TypeMeta{APIVersion: v1alpha1.GroupVersion, Kind: v1alpha1.KindAllowPolicy},
		ObjectMeta: metav1.ObjectMeta{Name: "trip", Namespace: "shop"},
		Spec:       v1alpha1.AllowPolicySpec{Ports: []int32{80}, From: []v1alpha1.Peer{{Namespace: "ops"}}},
	}
	text, err := yaml.Marshal(in)
	if err != nil {
		t.Fatal(err)
	}
	if strings.Contains(string(text), "status") {
		t.Errorf("a document that a user reads has an empty status:\n%s", text)
	}
	create(t, admin, string(text))

	apply := func(manager, condition string) *unstructured.Unstructured {
		t.Helper()
		status := parse(t, fmt.Sprintf(`
apiVersion: signet.dev/v1alpha1
kind: AllowPolicy
metadata: {name: trip, namespace: shop}
spec: {from: [{namespace: everyone}]}
status:
  observedGeneration: 1
  programmedNodes: 0
  nodes: 2
  conditions:
  - {type: %s, status: "True", reason: Valid, message: "", lastTransitionTime: "2026-01-01T00:00:00Z"}
`, condition))[0]
		out, err := policies.Apply(t.Context(), "trip", status, metav1.ApplyOptions{FieldManager: manager}, "status")
		if err != nil {
			t.Fatal(err)
		}
		return out
	}
	apply("one", v1alpha1.ConditionAccepted)
	o := apply("two", v1alpha1.ConditionProgrammed)
	var out v1alpha1.AllowPolicy
	if err := runtime.DefaultUnstructuredConverter.FromUnstructured(o.Object, &out); err != nil {
		t.Fatal(err)
	}
	if len(out.Status.Conditions) != 2 || out.Status.Nodes != 2 || out.Status.ObservedGeneration != 1 {
		t.Errorf("status %+v", out.Status)
	}
	if out.Generation != 1 || out.Spec.From[0].Namespace != "ops" {
		t.Errorf("writing the status changed the policy: %+v", out)
	}
	scheme := runtime.NewScheme()
	if err := v1alpha1.AddToScheme(scheme); err != nil || !scheme.Recognizes(v1alpha1.Kind(v1alpha1.KindQuarantine)) {
		t.Errorf("scheme: %v", err)
	}
}

func forbidden(err error) bool { return apierrors.IsForbidden(err) }
