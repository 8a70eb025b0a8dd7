// Package kube tests the mesh on a real Kubernetes cluster of two nodes, as it
// is installed by users: images, manifests, kubectl, annotations. Run it with
// make test-cluster; it starts the cluster and removes it (KEEP=1: leaves it).
// SIGNET_TEST_PROXY=iptables has kube-proxy in that mode and not in nftables.
package kube

import (
	"context"
	"errors"
	"fmt"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"k8s.io/client-go/kubernetes"
	"k8s.io/client-go/tools/clientcmd"

	"github.com/signet-mesh/signet/test/cluster"
	"github.com/signet-mesh/signet/test/images/catalogue"
)

// The project's folder, and what make test-cluster made in it.
const (
	project = "../.."
	images  = project + "/.cache/images"
)

// trustDomain of the mesh that is tested.
const trustDomain = "mesh.example"

// env is what all tests share: the cluster, with the images on its nodes.
type env struct {
	cluster *cluster.Cluster
	client  kubernetes.Interface
	// version is the tag of the images; bin has signet and kubectl-signet.
	version, bin string
	// manifests is the release that is installed, for this trust domain.
	manifests string
}

var shared struct {
	once sync.Once
	env  *env
	err  error
}

func TestMain(m *testing.M) {
	code := m.Run()
	if shared.env != nil && os.Getenv("KEEP") != "1" {
		ctx, cancel := context.WithTimeout(context.Background(), 2*time.Minute)
		if err := shared.env.cluster.Down(ctx); err != nil {
			fmt.Fprintln(os.Stderr, "the cluster was not removed:", err)
			code = 1
		}
		cancel()
	}
	os.Exit(code)
}

// start starts the cluster once for all tests.
func start(ctx context.Context) (*env, error) {
	shared.once.Do(func() { shared.env, shared.err = newEnv(ctx) })
	return shared.env, shared.err
}

func newEnv(ctx context.Context) (_ *env, err error) {
	e := &env{version: os.Getenv("SIGNET_VERSION")}
	if e.version == "" {
		return nil, errors.New("SIGNET_VERSION, the tag of the images, is not set; run make test-cluster")
	}
	// Another folder leaves the one of make cluster alone.
	dir, err := filepath.Abs(project + "/.cache/cluster-test")
	if err != nil {
		return nil, err
	}
	if e.cluster, err = cluster.Start(context.WithoutCancel(ctx), cluster.Options{Dir: dir, ProxyMode: os.Getenv("SIGNET_TEST_PROXY"), Log: os.Stderr}); err != nil {
		return nil, err
	}
	defer func() {
		if err != nil && os.Getenv("KEEP") != "1" {
			end, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			err = errors.Join(err, e.cluster.Down(end))
		}
	}()
	config, err := clientcmd.BuildConfigFromFlags("", e.cluster.Kubeconfig())
	if err != nil {
		return nil, err
	}
	config.QPS, config.Burst = 200, 400
	if e.client, err = kubernetes.NewForConfig(config); err != nil {
		return nil, err
	}
	return e, e.prepare(ctx, dir)
}

// prepare puts the images on the nodes, and the programs and manifests beside.
func (e *env) prepare(ctx context.Context, dir string) error {
	archives, err := filepath.Glob(images + "/signet-*.tar")
	if err != nil {
		return err
	}
	if len(archives) != 3 {
		return fmt.Errorf("%s has the images %q, want three; run make test-cluster", images, archives)
	}
	fmt.Fprintln(os.Stderr, "cluster: building the tests' images and loading all")
	made, err := catalogue.Build(ctx, catalogue.Options{Log: os.Stderr})
	if err != nil {
		return err
	}
	for _, i := range made {
		archives = append(archives, i.Archive)
	}
	for _, a := range archives {
		if err := e.cluster.LoadImage(ctx, a); err != nil {
			return err
		}
	}
	e.bin = filepath.Join(dir, "bin")
	if err := cluster.BuildProgram(ctx, e.bin, "./cmd/signet"); err != nil {
		return err
	}
	plugin := filepath.Join(e.bin, "kubectl-signet")
	if err := os.Symlink("signet", plugin); err != nil && !errors.Is(err, os.ErrExist) {
		return err
	}
	text, err := os.ReadFile(project + "/deploy/manifests/signet.yaml")
	if err != nil {
		return err
	}
	e.manifests = filepath.Join(dir, "signet.yaml")
	release := strings.NewReplacer(":v0.1.0\n", ":"+e.version+"\n", "cluster.local", trustDomain).Replace(string(text))
	return os.WriteFile(e.manifests, []byte(release), 0o600)
}
