package certmanager

import (
	"bytes"
	"context"
	"encoding/pem"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/test/kubeapiserver"
)

const (
	root    = "../.."
	release = "signet-system"
)

var eventually = kubeapiserver.Eventually

// world is an API server with cert-manager's kinds and what the chart makes, and a
// folder with the program.
type world struct {
	*testing.T
	admin, own *rest.Config // own: with the rights that the chart gives, and no other
	client     dynamic.Interface
	program    string
	webhook    *Controllers
	issuer     []string // flags that name it
	health     string   // host:port
	socket     string   // where nodes connect to the control plane that was started last
}

// newWorld has the chart's values as given beside its own.
func newWorld(t *testing.T, values ...string) *world {
	server := kubeapiserver.Start(t)
	w := &world{T: t, admin: server.Config(kubeapiserver.Admin), own: server.Config(kubeapiserver.Admin), program: filepath.Join(t.TempDir(), "signet-control")}
	w.own.Impersonate = rest.ImpersonationConfig{UserName: "system:serviceaccount:" + release + ":signet-control"}
	w.client, w.issuer = dynamic.NewForConfigOrDie(w.admin), []string{"--cert-manager-issuer=mesh", "--cert-manager-duration=1h"}
	w.run("go", "build", "-o", w.program, "./cmd/signet-control")
	Install(t, w.admin)
	files, err := filepath.Glob(root + "/deploy/crds/*.yaml")
	if err != nil || len(files) < 3 {
		t.Fatalf("%v, %v", files, err)
	}
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		w.create(string(text))
	}
	w.create("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + release + "}")
	w.create("apiVersion: v1\nkind: Namespace\nmetadata: {name: " + Namespace + "}")
	w.webhook = Webhook(t, w.admin)
	chart := w.run("go", "tool", "-modfile=test/tools/helm/go.mod", "helm", "template", "signet", "deploy/chart/signet", "--namespace", release,
		"--set", strings.Join(append([]string{"trustDomain=mesh.example,certManager.enabled=true,certManager.issuerRef.name=mesh,certManager.issuerRef.kind=Issuer,mesh.svidTTL=4s"}, values...), ",")) // a former root stays for half of it
	for doc := range strings.SplitSeq(chart, "\n---\n") {
		var o struct{ Kind string }
		if err := yaml.Unmarshal([]byte(doc), &o); err != nil {
			t.Fatal(err)
		}
		switch o.Kind {
		case "ClusterRole", "ClusterRoleBinding", "Role", "RoleBinding", "MeshConfig":
			w.create(doc)
		}
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	w.health = l.Addr().String()
	l.Close()
	return w
}

// run runs a program in the project's folder.
func (w *world) run(name string, args ...string) string {
	w.Helper()
	cmd := exec.CommandContext(w.Context(), name, args...)
	cmd.Dir = root
	var errs bytes.Buffer
	cmd.Stderr = &errs
	out, err := cmd.Output()
	if err != nil {
		w.Fatalf("%s %q: %v\n%s", name, args, err, errs.String())
	}
	return string(out)
}

var plurals = map[string]string{"MeshConfig": "meshconfigs", "CustomResourceDefinition": "customresourcedefinitions"}

func (w *world) resource(apiVersion, kind string) dynamic.NamespaceableResourceInterface {
	gv, err := schema.ParseGroupVersion(apiVersion)
	if err != nil {
		w.Fatal(err)
	}
	plural := plurals[kind]
	if plural == "" {
		plural = strings.ToLower(kind) + "s"
	}
	return w.client.Resource(gv.WithResource(plural))
}

// create makes the object of a document, as soon as its kind is served.
func (w *world) create(doc string) {
	w.Helper()
	var o unstructured.Unstructured
	if err := yaml.Unmarshal([]byte(doc), &o.Object); err != nil {
		w.Fatal(err)
	}
	eventually(w.T, 20*time.Second, func() error {
		_, err := w.resource(o.GetAPIVersion(), o.GetKind()).Namespace(o.GetNamespace()).Create(w.Context(), &o, metav1.CreateOptions{})
		return err
	})
}

// start runs the control plane until stop, which kills it.
func (w *world) start(name string, further ...string) (stop func()) {
	w.Helper()
	file, dir := kubeconfig(w.T, w.own), w.TempDir()
	w.socket = filepath.Join(dir, "nodes.sock")
	cmd := exec.CommandContext(context.Background(), w.program, append(append(w.issuer, further...), "--kubernetes", "--kubeconfig", file, "--namespace", release, "--replica", name,
		"--listen", w.socket, "--admin-listen", filepath.Join(dir, "admin.sock"), "--health-listen", w.health, "--state-dir", filepath.Join(dir, "state"))...)
	var out kubeapiserver.Output
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		w.Fatal(err)
	}
	done := false
	stop = func() {
		if !done {
			done = true
			_ = cmd.Process.Kill()
			_ = cmd.Wait() // it was killed
		}
	}
	w.Cleanup(func() {
		stop()
		if w.Failed() {
			w.Logf("%s:\n%s", name, out.Tail())
		}
	})
	return stop
}

// get asks the control plane's health port.
func (w *world) get(path string) (code int, body string) {
	r, err := http.Get("http://" + w.health + path) //nolint:noctx // a test's own program
	if err != nil {
		return 0, err.Error()
	}
	defer r.Body.Close()
	text, _ := io.ReadAll(r.Body)
	return r.StatusCode, string(text)
}

// says waits until the condition Authority begins so: its status, reason, message.
func (w *world) says(want string) {
	w.Helper()
	eventually(w.T, 40*time.Second, func() error {
		o, err := w.resource("signet.dev/v1alpha1", "MeshConfig").Get(w.Context(), "mesh", metav1.GetOptions{})
		if err != nil {
			return err
		}
		return conditionIs(o.Object, want)
	})
}

// conditionIs returns why a MeshConfig's condition Authority does not begin so.
func conditionIs(config map[string]any, want string) error {
	all, _, err := unstructured.NestedSlice(config, "status", "conditions")
	for _, c := range all {
		if c := c.(map[string]any); c["type"] == "Authority" {
			if got := fmt.Sprintf("%s %s: %s", c["status"], c["reason"], c["message"]); !strings.HasPrefix(got, want) {
				return fmt.Errorf("%q, want %q", got, want)
			}
			return nil
		}
	}
	return fmt.Errorf("no condition in %v, %w", all, err)
}

// published waits until the bundle that nodes join with has so many roots, none of
// which is one of those, and returns them.
func (w *world) published(n int, not ...string) []string {
	w.Helper()
	var roots []string
	eventually(w.T, 40*time.Second, func() error {
		o, err := w.resource("v1", "ConfigMap").Namespace(release).Get(w.Context(), "signet-bundle", metav1.GetOptions{})
		if err != nil {
			return err
		}
		text, _, err := unstructured.NestedString(o.Object, "data", "bundle.pem")
		roots = nil
		for rest := []byte(text); ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				break
			}
			roots = append(roots, string(block.Bytes))
		}
		if len(roots) != n {
			return fmt.Errorf("%d roots, want %d; %w", len(roots), n, err)
		}
		for _, one := range not {
			for _, r := range roots {
				if r == one {
					return fmt.Errorf("an old root is still published")
				}
			}
		}
		return nil
	})
	return roots
}

// wantAnother says in the MeshConfig that the root is to be replaced.
func (w *world) wantAnother() {
	w.Helper()
	patch := fmt.Sprintf(`{"spec":{"rootNotBefore":%q}}`, time.Now().UTC().Format(time.RFC3339))
	if _, err := w.resource("signet.dev/v1alpha1", "MeshConfig").Patch(w.Context(), "mesh", types.MergePatchType, []byte(patch), metav1.PatchOptions{}); err != nil {
		w.Fatal(err)
	}
}

// TestControlPlane runs signet-control, with the rights that the chart gives it, below
// cert-manager's real controllers: it says what it waits for and is not ready; is ready
// with the issuer's root published; outlives cert-manager, by a kill and a start of its
// own too; and follows the issuer to another CA.
func TestControlPlane(t *testing.T) {
	w := newWorld(t)
	kill := w.start("first")
	w.says("False Pending: CertificateRequest signet-system/signet-intermediate-")
	if code, body := w.get("/readyz"); code != http.StatusServiceUnavailable || !strings.Contains(body, "no intermediate to sign with: CertificateRequest") {
		t.Errorf("readyz: %d %s", code, body)
	}
	running := Start(t, w.admin)
	w.says("False IssuerNotFound: ")
	w.create("apiVersion: cert-manager.io/v1\nkind: ClusterIssuer\nmetadata: {name: itself}\nspec: {selfSigned: {}}")
	w.create(`
apiVersion: cert-manager.io/v1
kind: Certificate
metadata: {name: mesh-ca, namespace: signet-system}
spec: {commonName: mesh-ca, isCA: true, secretName: mesh-ca, privateKey: {algorithm: ECDSA, size: 256, rotationPolicy: Always}, issuerRef: {name: itself, kind: ClusterIssuer}}`)
	w.create("apiVersion: cert-manager.io/v1\nkind: Issuer\nmetadata: {name: mesh, namespace: signet-system}\nspec: {ca: {secretName: mesh-ca}}")
	w.says("True Ready: the intermediate is of Issuer signet-system/mesh")
	first := w.published(1)
	if code, body := w.get("/readyz"); code != http.StatusOK {
		t.Errorf("readyz: %d %s", code, body)
	}
	if _, body := w.get("/metrics"); !strings.Contains(body, "signet_control_upstream_ready 1") || strings.Contains(body, "signet_control_intermediate_not_after_seconds 0") {
		t.Errorf("metrics: %s", body)
	}

	running.Stop()
	kill()
	kill = w.start("second")
	eventually(t, 30*time.Second, func() error {
		if code, body := w.get("/readyz"); code != http.StatusOK {
			return fmt.Errorf("without cert-manager: %d %s", code, body)
		}
		return nil
	})
	w.wantAnother()
	w.says("True Pending: CertificateRequest signet-system/signet-intermediate-")
	if err := w.resource("v1", "Secret").Namespace(release).Delete(w.Context(), "mesh-ca", metav1.DeleteOptions{}); err != nil {
		t.Fatal(err)
	}
	kill() // with a request under way
	w.start("third")
	Start(t, w.admin)
	// The certificate of a control plane that nobody calls is the only one that is used.
	next := w.published(1, first...)
	w.says("True Ready: the intermediate is of Issuer signet-system/mesh")
	o, err := w.resource("v1", "Secret").Namespace(release).Get(w.Context(), "signet-ca", metav1.GetOptions{})
	if err != nil {
		t.Fatal(err)
	}
	data, _, err := unstructured.NestedMap(o.Object, "data")
	if err != nil || data["below-root.key"] == nil || data["root.key"] != nil || len(next) != 1 {
		t.Errorf("%v: the Secret holds %d entries", err, len(data))
	}
}
