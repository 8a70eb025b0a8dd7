// Package certmanager runs cert-manager's real controllers and admission webhook, and
// approver-policy, as processes beside an API server, for tests.
package certmanager

import (
	"context"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"strings"
	"syscall"
	"testing"
	"time"

	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/apis/meta/v1/unstructured"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/client-go/dynamic"
	"k8s.io/client-go/rest"
	"k8s.io/client-go/tools/clientcmd"
	clientcmdapi "k8s.io/client-go/tools/clientcmd/api"
	"sigs.k8s.io/yaml"

	"github.com/signet-mesh/signet/test/kubeapiserver"
)

// NoApprover leaves the controller out that approves all requests.
const NoApprover = "certificaterequests-approver"

// Install gives an API server cert-manager's kinds, as its module brings them, and
// returns when they are served.
func Install(t *testing.T, config *rest.Config) {
	t.Helper()
	out, err := exec.CommandContext(t.Context(), "go", "list", "-m", "-f", "{{.Dir}}", "github.com/cert-manager/cert-manager").Output()
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob(filepath.Join(strings.TrimSpace(string(out)), "deploy", "crds", "*.yaml"))
	if err != nil || len(files) < 6 {
		t.Fatalf("CRDs of cert-manager: %v, %v", files, err)
	}
	client := dynamic.NewForConfigOrDie(config)
	crds := client.Resource(schema.GroupVersionResource{Group: "apiextensions.k8s.io", Version: "v1", Resource: "customresourcedefinitions"})
	for _, file := range files {
		data, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var crd unstructured.Unstructured
		if err := yaml.Unmarshal(data, &crd.Object); err != nil {
			t.Fatal(err)
		}
		if _, err := crds.Create(t.Context(), &crd, metav1.CreateOptions{}); err != nil && !apierrors.IsAlreadyExists(err) {
			t.Fatal(err)
		}
	}
	for _, resource := range []string{"certificaterequests", "certificates", "clusterissuers", "issuers"} {
		kubeapiserver.Eventually(t, time.Minute, func() error {
			_, err := client.Resource(schema.GroupVersionResource{Group: "cert-manager.io", Version: "v1", Resource: resource}).List(t.Context(), metav1.ListOptions{})
			return err
		})
	}
}

// Controllers are running controllers, or a webhook.
type Controllers struct {
	stop context.CancelFunc
	done chan struct{}
}

// Start starts all controllers but some. They end with the test, or before.
func Start(t *testing.T, config *rest.Config, without ...string) *Controllers {
	t.Helper()
	return run(t, "certmanager", "--kubeconfig", kubeconfig(t, config), "--without", strings.Join(without, ","))
}

// run starts a program of the folder where Kubernetes' are.
func run(t *testing.T, name string, args ...string) *Controllers {
	t.Helper()
	dir := os.Getenv("SIGNET_KUBE_BIN")
	if dir == "" {
		dir = filepath.Join("..", "..", ".tools", "kubernetes", "bin")
	}
	program, err := filepath.Abs(filepath.Join(dir, name))
	if err == nil {
		_, err = os.Stat(program)
	}
	if err != nil {
		t.Fatalf("%s is needed: run the tests with make test, or set SIGNET_KUBE_BIN to the folder that has it: %v", name, err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program, args...)
	var out kubeapiserver.Output
	cmd.Stdout, cmd.Stderr = &out, &out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	c := &Controllers{stop: cancel, done: make(chan struct{})}
	started := make(chan error, 1)
	go func() {
		defer close(c.done)
		// The kernel ends the program with the thread that started it. Others end with
		// the network namespace that they were in.
		runtime.LockOSThread()
		defer runtime.UnlockOSThread()
		err := cmd.Start()
		started <- err
		if err == nil {
			_ = cmd.Wait() // it was told to end; how does not matter
		}
	}()
	if err := <-started; err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		c.Stop()
		if t.Failed() {
			t.Logf("%s:\n%s", name, out.Tail())
		}
	})
	return c
}

// Stop ends them, as when cert-manager is gone.
func (c *Controllers) Stop() {
	c.stop()
	<-c.done
}

func kubeconfig(t *testing.T, c *rest.Config) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "kubeconfig")
	doc := clientcmdapi.NewConfig()
	doc.Clusters["test"] = &clientcmdapi.Cluster{Server: c.Host, CertificateAuthorityData: c.CAData, CertificateAuthority: c.CAFile}
	doc.AuthInfos["test"] = &clientcmdapi.AuthInfo{
		Impersonate: c.Impersonate.UserName, Token: c.BearerToken, ClientCertificate: c.CertFile, ClientCertificateData: c.CertData, ClientKey: c.KeyFile, ClientKeyData: c.KeyData,
	}
	doc.Contexts["test"] = &clientcmdapi.Context{Cluster: "test", AuthInfo: "test"}
	doc.CurrentContext = "test"
	if err := clientcmd.WriteToFile(*doc, file); err != nil {
		t.Fatal(err)
	}
	return file
}
