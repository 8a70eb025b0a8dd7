//go:build chart

package chart

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/test/cluster"
)

// Files that make chart-test made, below the project's folder.
const (
	images = "../../.cache/images"
	charts = "../../.cache/chart"
	work   = "../../.cache/chart-test" // of this test
)

// bench is a cluster with a shop in it that knows nothing of a mesh.
type bench struct {
	*testing.T
	cluster *cluster.Cluster
	chart   string
	before  map[string]string // what the nodes had of Signet
}

func setUp(t *testing.T) *bench {
	ctx := t.Context()
	found, err := filepath.Glob(filepath.Join(charts, "signet-*.tgz"))
	if err != nil || len(found) != 1 {
		t.Fatalf("%s holds the charts %q (%v), want one; run make chart-test", charts, found, err)
	}
	dir, err := filepath.Abs(work)
	if err != nil {
		t.Fatal(err)
	}
	programs := t.TempDir()
	build := exec.CommandContext(ctx, "go", "build", "-o", programs, "./shop", "./token")
	build.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := build.CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	c, err := cluster.Start(ctx, cluster.Options{Dir: dir, Log: t.Output()})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		end, cancel := context.WithTimeout(context.Background(), time.Minute)
		defer cancel()
		if err := c.Down(end); err != nil {
			t.Error(err)
		}
	})
	archive := filepath.Join(programs, "shop.tar")
	files := map[string]string{"/shop": filepath.Join(programs, "shop"), "/token": filepath.Join(programs, "token")}
	if err := cluster.WriteImage(archive, cluster.Image{Name: "localhost/shop:test", Programs: files, Entrypoint: []string{"/shop"}}); err != nil {
		t.Fatal(err)
	}
	for _, a := range []string{archive, images + "/signet-control.tar", images + "/signet-agent.tar", images + "/signet-proxy.tar"} {
		if err := c.LoadImage(ctx, a); err != nil {
			t.Fatal(err)
		}
	}
	b := &bench{T: t, cluster: c, chart: found[0]}
	b.kubectl("apply", "-f", "shop.yaml")
	b.kubectl("-n", "shop", "rollout", "status", "deployment/web", "deployment/client", "--timeout=2m")
	b.before = b.inventory()
	return b
}

// kubectl fails the test when kubectl fails.
func (b *bench) kubectl(args ...string) string {
	b.Helper()
	out, err := b.cluster.Kubectl(b.Context(), args...).CombinedOutput()
	if err != nil {
		b.report()
		b.Fatalf("kubectl %q: %v\n%s", args, err, out)
	}
	return string(out)
}

func (b *bench) helm(args ...string) {
	b.Helper()
	home := b.TempDir()
	cmd := exec.CommandContext(b.Context(), "go", append([]string{"tool", "-modfile=../tools/helm/go.mod", "helm"}, args...)...)
	cmd.Env = append(os.Environ(), "KUBECONFIG="+b.cluster.Kubeconfig(), "HELM_CACHE_HOME="+home, "HELM_CONFIG_HOME="+home, "HELM_DATA_HOME="+home)
	if out, err := cmd.CombinedOutput(); err != nil {
		b.report()
		b.Fatalf("helm %q: %v\n%s", args, err, out)
	}
}

// report says what a person would look at first.
func (b *bench) report() {
	for _, args := range [][]string{
		{"get", "pods", "-A", "-o", "wide"},
		{"get", "events", "-A", "--field-selector=type=Warning"},
		{"-n", "signet-system", "logs", "-l", "app.kubernetes.io/part-of=signet", "--all-containers", "--prefix", "--tail=15"},
	} {
		out, err := b.cluster.Kubectl(b.Context(), args...).CombinedOutput()
		b.Logf("kubectl %q: %v\n%s", args, err, out)
	}
}

// eventually repeats a look until it finds nothing wrong.
func (b *bench) eventually(limit time.Duration, wrong func() string) {
	b.Helper()
	says := ""
	for end := time.Now().Add(limit); time.Now().Before(end); time.Sleep(250 * time.Millisecond) {
		if says = wrong(); says == "" {
			return
		}
	}
	b.report()
	b.Fatalf("after %s: %s", limit, says)
}

// call has the client ask the shop, and says whether it was served.
func (b *bench) call() (says string, ok bool) {
	out, err := b.cluster.Kubectl(b.Context(), "-n", "shop", "exec", "deployment/client", "--", "/shop", "get", "http://web.shop.svc.cluster.local/").CombinedOutput()
	return fmt.Sprintf("%s (%v)", out, err), err == nil && string(out) == "open\n"
}

func (b *bench) served() string {
	if says, ok := b.call(); !ok {
		return "the client is not served: " + says
	}
	return ""
}

func (b *bench) status(want string) {
	b.Helper()
	b.eventually(time.Minute, func() string {
		got := b.kubectl("get", "namespace", "shop", "-o", `jsonpath={.metadata.annotations.signet\.dev/status}`)
		if got != want {
			return fmt.Sprintf("status of the namespace is %q, want %q", got, want)
		}
		return ""
	})
}

// pods has each pod of the shop with its restarts.
func (b *bench) pods() string {
	return b.kubectl("-n", "shop", "get", "pods", "--sort-by=.metadata.name", "-o", `jsonpath={range .items[*]}{.metadata.name} {.metadata.uid} {.status.containerStatuses[*].restartCount}{"\n"}{end}`)
}

// inventory has, for each node, all that a release could leave on it: files,
// mounts, CNI plugins and configuration, packet rules of pods, processes.
func (b *bench) inventory() map[string]string {
	const look = `
for dir in /run/signet /var/lib/signet; do [ ! -e $dir ] || find $dir; done
ls /opt/cni/bin /etc/cni/net.d
for file in /etc/cni/net.d/*; do sha256sum "$file"; done
grep signet /proc/self/mountinfo || true
for ns in /run/netns/* /var/run/netns/*; do
  [ ! -e "$ns" ] || nsenter --net="$ns" nft list ruleset | grep -i signet || true
  [ ! -e "$ns" ] || nsenter --net="$ns" tc qdisc show | grep clsact || true
done
for p in /proc/[0-9]*; do grep -a signet "$p/comm" 2>/dev/null || true; done`
	all := map[string]string{}
	for _, n := range b.cluster.Nodes() {
		out, err := n.Command(b.Context(), "sh", "-c", look).CombinedOutput()
		if err != nil {
			b.Fatalf("%s: %v\n%s", n.Name(), err, out)
		}
		all[n.Name()] = string(out)
	}
	return all
}

// left fails the test unless the nodes are as they were before, the pods never
// stopped, they are served, and new ones start.
func (b *bench) left(pods string) {
	b.Helper()
	b.eventually(2*time.Minute, func() string {
		for node, now := range b.inventory() {
			if now != b.before[node] {
				return fmt.Sprintf("%s has\n%s\nand had before\n%s", node, now, b.before[node])
			}
		}
		return ""
	})
	if now := b.pods(); now != pods {
		b.Errorf("pods are\n%s\nand were\n%s", now, pods)
	}
	b.eventually(10*time.Second, b.served)
	b.kubectl("-n", "shop", "rollout", "restart", "deployment/web", "deployment/client")
	b.kubectl("-n", "shop", "rollout", "status", "deployment/web", "--timeout=1m")
	b.kubectl("-n", "shop", "rollout", "status", "deployment/client", "--timeout=1m")
	b.eventually(10*time.Second, b.served)
}

// makeNamespace does what the README tells users to do.
func (b *bench) makeNamespace() {
	b.kubectl("create", "namespace", "signet-system")
	b.kubectl("label", "namespace", "signet-system", "pod-security.kubernetes.io/enforce=privileged")
}

// enforce brings the shop into the mesh while it runs, and back into business.
func (b *bench) enforce() {
	b.Helper()
	b.kubectl("annotate", "--overwrite", "namespace", "shop", "signet.dev/mesh=enforce")
	b.status("enforce: 3 of 3 pods enrolled")
	b.eventually(10*time.Second, func() string {
		if says, ok := b.call(); ok {
			return "without a policy the client is served: " + says
		}
		return ""
	})
	b.kubectl("apply", "-f", "allow.yaml")
	b.eventually(10*time.Second, b.served)
}

// gone fails the test when the API server still has something of Signet.
func (b *bench) gone() {
	b.Helper()
	b.kubectl("delete", "crd", "allowpolicies.signet.dev", "federations.signet.dev", "meshconfigs.signet.dev", "quarantines.signet.dev", "--ignore-not-found")
	b.kubectl("delete", "namespace", "signet-system", "--ignore-not-found", "--timeout=2m")
	kinds := "clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings,customresourcedefinitions,namespaces"
	for line := range strings.Lines(b.kubectl("get", kinds, "-o", "name")) {
		if strings.Contains(line, "signet") {
			b.Errorf("the API server still has %s", line)
		}
	}
}

// A user installs with Helm, brings a running namespace in, upgrades, shows the mesh
// to the web, and uninstalls: pods run on, and nothing of it is left on a node.
func TestHelm(t *testing.T) {
	b := setUp(t)
	pods := b.pods()
	b.makeNamespace()
	settings := []string{b.chart, "--namespace", "signet-system", "--set", "trustDomain=mesh.example", "--set", "proxy.drainSeconds=20", "--wait", "--timeout", "5m"}
	b.helm(append([]string{"install", "signet"}, settings...)...)
	b.kubectl("wait", "--for=condition=Accepted", "meshconfig/mesh", "--timeout=1m")
	b.enforce()

	b.helm(append([]string{"upgrade", "signet", "--set", "control.replicas=2", "--set", "agent.podAnnotations.second=time", "--set", "proxy.podAnnotations.second=time"}, settings...)...)
	b.eventually(10*time.Second, b.served)
	b.status("enforce: 3 of 3 pods enrolled")
	company := newCompany(t)
	b.helm(slices.Concat([]string{"upgrade", "signet", "--set", "control.replicas=2"}, b.prepareWeb(company), settings)...)
	b.web(company)
	if now := b.pods(); now != pods {
		t.Errorf("enrolment and upgrade changed pods:\n%s\nwere\n%s", now, pods)
	}

	b.helm("uninstall", "signet", "--namespace", "signet-system", "--wait", "--timeout", "3m")
	b.left(pods)
	b.gone()
}

// A user without Helm does the same with kubectl and the plain manifests, by the
// commands in docs/kubernetes.md. Images are named by the release; the test gives
// them the tag of this tree.
func TestManifests(t *testing.T) {
	b := setUp(t)
	pods := b.pods()
	plain, err := os.ReadFile("../../deploy/manifests/signet.yaml")
	if err != nil {
		t.Fatal(err)
	}
	tag := os.Getenv("SIGNET_VERSION")
	if tag == "" {
		t.Fatal("SIGNET_VERSION is not set; run make chart-test")
	}
	manifests := filepath.Join(t.TempDir(), "signet.yaml")
	text := strings.NewReplacer(":v0.1.0\n", ":"+tag+"\n", "--drain-limit=3600s", "--drain-limit=20s").Replace(string(plain))
	if err := os.WriteFile(manifests, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
	install, remove := documented(t)
	run := func(lines []string) {
		for _, line := range lines {
			line = strings.NewReplacer("deploy/manifests/signet.yaml", manifests, "deploy/manifests/", "../../deploy/manifests/").Replace(line)
			b.kubectl(strings.Fields(line)[1:]...)
		}
	}
	run(install)
	b.enforce()
	run(remove)
	b.left(pods)
	b.gone()
}

// documented returns the lines of the two blocks of commands that users are told
// to install and to remove Signet with.
func documented(t *testing.T) (install, remove []string) {
	t.Helper()
	text, err := os.ReadFile("../../docs/kubernetes.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(text), "\n## Install and remove\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var blocks [][]string
	for i, block := range strings.Split(section, "```") {
		if i%2 == 1 {
			blocks = append(blocks, strings.Split(strings.TrimSpace(strings.TrimPrefix(block, "sh\n")), "\n"))
		}
	}
	if len(blocks) != 2 {
		t.Fatalf("docs/kubernetes.md has %d blocks of commands to install and remove, want 2", len(blocks))
	}
	for _, line := range slices.Concat(blocks...) {
		if !strings.HasPrefix(line, "kubectl ") {
			t.Fatalf("docs/kubernetes.md: %q is not kubectl", line)
		}
	}
	return blocks[0], blocks[1]
}
