package certmanager

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	"k8s.io/apimachinery/pkg/api/meta"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/test/kubeapiserver"
)

// Namespace is where cert-manager is, and approver-policy.
const Namespace = "cert-manager"

// Webhook starts cert-manager's real admission webhook, and has the API server, on
// this machine, ask it as cert-manager's chart says. It notes in each CertificateRequest
// who made it. It ends with the test, or before.
func Webhook(t *testing.T, config *rest.Config) *Controllers {
	t.Helper()
	port := freePort(t)
	objects := chart(t, "../tools/certmanager", "github.com/cert-manager/cert-manager", "cert-manager")
	running := run(t, "certmanager", "--kubeconfig", kubeconfig(t, config), "--admission", port)
	hook(t, config, objects, "cert-manager-webhook", port)
	return running
}

// Approver starts approver-policy's real controller with its webhook, kinds and rights
// as its chart has them. It ends with the test.
func Approver(t *testing.T, config *rest.Config) {
	t.Helper()
	const name = "cert-manager-approver-policy"
	port := freePort(t)
	objects := chart(t, "../tools/approverpolicy", "github.com/cert-manager/approver-policy", "approver-policy")
	for _, kind := range []string{"CustomResourceDefinition", "ServiceAccount", "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "Secret"} {
		for _, o := range objects {
			if o.GetKind() == kind {
				apply(t, config, o)
			}
		}
	}
	own := rest.CopyConfig(config)
	own.Impersonate.UserName = "system:serviceaccount:" + Namespace + ":" + name
	run(t, "approverpolicy", "--kubeconfig", kubeconfig(t, own), "--leader-election-namespace", Namespace, "--metrics-bind-address", "0", "--readiness-probe-bind-address", "0",
		"--webhook-host", "127.0.0.1", "--webhook-port", port, "--webhook-service-name", name, "--webhook-ca-secret-namespace", Namespace, "--webhook-ca-secret-name", name+"-tls", "--log-level=2")
	hook(t, config, objects, name, port)
}

// chart renders the chart that a module of another's module brings along.
func chart(t *testing.T, in, module, name string) (out []*unstructured.Unstructured) {
	t.Helper()
	cmd := exec.CommandContext(t.Context(), "go", "-C", in, "mod", "download", "-json", module)
	text, err := cmd.Output()
	if err != nil {
		t.Fatalf("%s: %v\n%s", module, err, text)
	}
	var is struct{ Dir string }
	if err := json.Unmarshal(text, &is); err != nil {
		t.Fatal(err)
	}
	helm := exec.CommandContext(t.Context(), "go", "tool", "-modfile=../tools/helm/go.mod", "helm", "template", name, filepath.Join(is.Dir, "deploy", "charts", name), "--namespace", Namespace)
	if text, err = helm.Output(); err != nil {
		t.Fatalf("the chart %s: %v\n%s", name, err, text)
	}
	for doc := range strings.SplitSeq(string(text), "\n---\n") {
		o := &unstructured.Unstructured{}
		if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
			t.Fatal(err)
		}
		if o.GetKind() != "" {
			out = append(out, o)
		}
	}
	return out
}

// hook has the API server ask the webhooks of a chart at a port of this machine, and
// returns when it knows their CA. Without the test nobody is asked.
func hook(t *testing.T, config *rest.Config, objects []*unstructured.Unstructured, service, port string) {
	t.Helper()
	apply(t, config, &unstructured.Unstructured{Object: map[string]any{
		"apiVersion": "v1", "kind": "Service", "metadata": map[string]any{"namespace": Namespace, "name": service},
		"spec": map[string]any{"type": "ExternalName", "externalName": "localhost"},
	}})
	n := 0
	for _, o := range objects {
		if !strings.HasSuffix(o.GetKind(), "WebhookConfiguration") || o.GetName() != service {
			continue
		}
		n++
		hooks, _, err := unstructured.NestedSlice(o.Object, "webhooks")
		for _, h := range hooks {
			number, portErr := strconv.ParseInt(port, 10, 32)
			if err := unstructured.SetNestedField(h.(map[string]any), number, "clientConfig", "service", "port"); err != nil || portErr != nil {
				t.Fatal(err, portErr)
			}
		}
		if err == nil {
			err = unstructured.SetNestedSlice(o.Object, hooks, "webhooks")
		}
		if err != nil || len(hooks) == 0 {
			t.Fatalf("%d webhooks, %v", len(hooks), err)
		}
		apply(t, config, o)
		one := resource(config, o)
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.Background(), 10*time.Second)
			defer cancel()
			_ = one.Delete(ctx, o.GetName(), metav1.DeleteOptions{}) // the API server may be gone before
		})
		kubeapiserver.Eventually(t, time.Minute, func() error {
			got, err := one.Get(t.Context(), o.GetName(), metav1.GetOptions{})
			if err != nil {
				return err
			}
			hooks, _, err := unstructured.NestedSlice(got.Object, "webhooks")
			known := func(h any) bool {
				ca, _, err := unstructured.NestedString(h.(map[string]any), "clientConfig", "caBundle")
				return err == nil && ca != ""
			}
			if i := slices.IndexFunc(hooks, func(h any) bool { return !known(h) }); err != nil || i >= 0 {
				return fmt.Errorf("nobody has said what the CA of %v is: %w", hooks, err)
			}
			return nil
		})
	}
	if n == 0 {
		t.Fatalf("the chart has no webhook %s", service)
	}
}

func resource(config *rest.Config, o *unstructured.Unstructured) dynamic.ResourceInterface {
	plural, _ := meta.UnsafeGuessKindToResource(o.GroupVersionKind())
	r := dynamic.NewForConfigOrDie(config).Resource(plural)
	if o.GetNamespace() != "" {
		return r.Namespace(o.GetNamespace())
	}
	return r
}

// apply makes an object, or makes it so, as soon as its kind is served.
func apply(t *testing.T, config *rest.Config, o *unstructured.Unstructured) {
	t.Helper()
	kubeapiserver.Eventually(t, 20*time.Second, func() error {
		_, err := resource(config, o).Apply(t.Context(), o.GetName(), o, metav1.ApplyOptions{FieldManager: "test", Force: true})
		return err
	})
}

func freePort(t *testing.T) string {
	t.Helper()
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer l.Close()
	_, port, err := net.SplitHostPort(l.Addr().String())
	if err != nil {
		t.Fatal(err)
	}
	return port
}
