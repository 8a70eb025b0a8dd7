package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"regexp"
	"strings"
	"sync"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/kubeclient"
	"github.com/signet-mesh/signet/internal/output"
)

const (
	envKubeconfig = "KUBECONFIG"
	envNamespace  = "SIGNET_NAMESPACE"
)

// connectTime bounds the way to the control plane of a cluster, from the
// kubeconfig to the open tunnel.
const connectTime = 30 * time.Second

// clusterFlags choose a cluster.
type clusterFlags struct {
	kubeconfig, context, namespace string
}

// asks adds the flags of a command that asks a running mesh.
func (a *app) asks(cmd *cobra.Command) *cobra.Command {
	return a.reaches(cmd, "namespace", "n")
}

// reaches adds them with another name for the release's namespace.
func (a *app) reaches(cmd *cobra.Command, namespaceFlag, short string) *cobra.Command {
	return a.finds(a.answers(cmd), namespaceFlag, short)
}

// finds adds only those that say which mesh.
func (a *app) finds(cmd *cobra.Command, namespaceFlag, short string) *cobra.Command {
	flags := cmd.Flags()
	flags.StringVar(&a.cluster.kubeconfig, "kubeconfig", "", "file with the cluster to ask ($"+envKubeconfig+")")
	flags.StringVar(&a.cluster.context, "context", "", "context of the kubeconfig to use")
	flags.StringVarP(&a.cluster.namespace, namespaceFlag, short, a.env(envNamespace, kubeclient.DefaultNamespace), "namespace that Signet is installed in ($"+envNamespace+")")
	flags.Lookup(namespaceFlag).Annotations = map[string][]string{releaseFlag: nil}
	return cmd
}

// releaseFlag marks the flag of the release's namespace.
const releaseFlag = "signet-release"

// called reads the name that the program was called by: kubectl runs
// kubectl-signet for `kubectl signet`, and kubectl_complete-signet to complete
// its command line.
func (a *app) called(name string, argv []string) []string {
	switch strings.TrimSuffix(name, ".exe") {
	case "kubectl-signet":
		a.plugin = true
	case "kubectl_complete-signet":
		a.plugin = true
		return append([]string{cobra.ShellCompRequestCmd}, argv...)
	}
	return argv
}

// localOnly are commands about this machine, which is none of kubectl's
// business.
var localOnly = map[string]bool{"up": true, "release": true}

var callInExample = regexp.MustCompile(`(^|[\s(;&|])signet `)

// asPlugin gives the commands the name that they are called by.
func asPlugin(c *cobra.Command) {
	if !c.HasParent() {
		c.Annotations = map[string]string{cobra.CommandDisplayNameAnnotation: "kubectl signet"}
		c.Example = "  kubectl signet check\n  kubectl signet status\n  kubectl signet policy explain --from shop/web --to pay/ledger --port 8443"
	}
	c.Example = callInExample.ReplaceAllString(c.Example, "${1}kubectl signet ")
	c.Example = strings.ReplaceAll(c.Example, "kubectl kubectl", "kubectl")
	for _, sub := range c.Commands() {
		if localOnly[sub.Name()] && !c.HasParent() {
			sub.Hidden = true
		}
		asPlugin(sub)
	}
}

// wantsCluster reports whether flags, or the name of the program, choose a
// cluster.
func (a *app) wantsCluster(cmd *cobra.Command) (bool, error) {
	chosen := ""
	for _, name := range []string{"kubeconfig", "context", a.namespaceFlag(cmd)} {
		if f := cmd.Flags().Lookup(name); f != nil && f.Changed {
			chosen = name
		}
	}
	runDir := cmd.Flags().Changed("run-dir")
	switch {
	case chosen != "" && runDir:
		return false, usage(fmt.Errorf("--%s chooses a cluster and --run-dir a mesh on this machine; give one of them", chosen))
	case chosen != "":
		return true, nil
	}
	return a.plugin && !runDir, nil
}

func (a *app) namespaceFlag(cmd *cobra.Command) string {
	for _, name := range []string{"release-namespace", "namespace"} {
		if f := cmd.Flags().Lookup(name); f != nil {
			if _, ok := f.Annotations[releaseFlag]; ok {
				return name
			}
		}
	}
	return ""
}

// inCluster reports whether the mesh to ask is a cluster's.
func (a *app) inCluster(cmd *cobra.Command) (bool, error) {
	wants, err := a.wantsCluster(cmd)
	switch {
	case wants || err != nil:
		return wants, err
	case cmd.Flags().Changed("run-dir") || a.getenv(envRunDir) != "":
		return false, nil
	case a.meshListens():
		return false, nil
	}
	for _, path := range a.kubeconfigs() {
		if _, err := os.Stat(path); err == nil {
			return true, nil
		}
	}
	return false, nil
}

// meshListens reports whether anything listens on the sockets of this machine.
func (a *app) meshListens() bool {
	for _, name := range []string{adminclient.AgentSocket, adminclient.ControlSocket} {
		if c, err := net.DialTimeout("unix", filepath.Join(a.runDir, name), time.Second); err == nil {
			_ = c.Close()
			return true
		}
	}
	return false
}

// kubeconfigs are the files that kubectl would read.
func (a *app) kubeconfigs() []string {
	if v := a.getenv(envKubeconfig); v != "" {
		return filepath.SplitList(v)
	}
	if home := a.getenv("HOME"); home != "" {
		return []string{filepath.Join(home, ".kube", "config")}
	}
	return nil
}

// client returns a client of the mesh on this machine.
func (a *app) client() *adminclient.Client { return adminclient.New(a.runDir) }

// link is the way to a running mesh.
type link struct {
	*adminclient.Client
	// kube is nil where the mesh is on this machine.
	kube  *kubeclient.Cluster
	close []func()
}

// Close ends it.
func (l *link) Close() {
	for i := len(l.close) - 1; i >= 0; i-- {
		l.close[i]()
	}
}

// connect opens the way to the mesh that the command line chooses; Close it
// after use.
func (a *app) connect(ctx context.Context, cmd *cobra.Command) (*link, error) {
	cluster, err := a.inCluster(cmd)
	if err != nil {
		return nil, err
	}
	if !cluster {
		client := a.client()
		return &link{Client: client, close: []func(){client.Close}}, nil
	}
	kube, err := a.kube()
	if err != nil {
		return nil, err
	}
	l, err := a.reach(ctx, kube)
	if err != nil {
		kube.Close()
		return nil, err
	}
	return l, nil
}

// kube reads the kubeconfig.
func (a *app) kube() (*kubeclient.Cluster, error) {
	return kubeclient.Load(kubeclient.Options{Kubeconfig: a.cluster.kubeconfig, Paths: a.kubeconfigs(), Context: a.cluster.context, UserAgent: "signet"})
}

// maxTries bounds the pods of the control plane that are tried.
const maxTries = 3

// reach opens a tunnel to a ready pod of the control plane. The link owns kube.
func (a *app) reach(ctx context.Context, kube *kubeclient.Cluster) (*link, error) {
	ns := a.cluster.namespace
	p := &progress{out: a.err}
	soon, cancel := context.WithTimeout(ctx, connectTime)
	defer cancel()
	end := p.begin("looking for the control plane in namespace " + ns + " of " + kube.Server())
	pods, err := kube.ReadyControlPods(soon, ns)
	end()
	if err != nil {
		return nil, err
	}
	var tunnel *kubeclient.Tunnel
	var denied *kubeclient.DeniedError
	for _, pod := range pods[:min(len(pods), maxTries)] {
		end := p.begin("opening a port-forward to pod " + ns + "/" + pod)
		tunnel, err = kube.OpenTunnel(soon, ns, pod)
		end()
		if err == nil || errors.As(err, &denied) {
			break
		}
	}
	if err != nil {
		return nil, err
	}
	l := a.through(kube, tunnel)
	l.close = append([]func(){kube.Close}, l.close...)
	return l, nil
}

// through is the way through a tunnel. The link owns the tunnel, and not kube.
func (a *app) through(kube *kubeclient.Cluster, tunnel *kubeclient.Tunnel) *link {
	transport := tunnel.Transport(kubeclient.AdminPort)
	client := adminclient.NewCluster("pod "+tunnel.Pod+" of "+kube.Server(), &patient{transport, &progress{out: a.err}})
	return &link{Client: client, kube: kube, close: []func(){func() { _ = tunnel.Close() }, client.Close}}
}

// patient tells the user when an answer takes long.
type patient struct {
	*http.Transport
	progress *progress
}

// RoundTrip makes one request.
func (t *patient) RoundTrip(r *http.Request) (*http.Response, error) {
	defer t.progress.begin("waiting for the control plane to ask the nodes")()
	return t.Transport.RoundTrip(r)
}

// slow is how long nothing is said.
const slow = 2 * time.Second

// progress says on the side what takes long.
type progress struct{ out io.Writer }

// begin starts a step; the function that it returns ends it.
func (p *progress) begin(step string) (end func()) {
	var mu sync.Mutex
	ended := false
	timer := time.AfterFunc(slow, func() {
		mu.Lock()
		defer mu.Unlock()
		if !ended {
			_, _ = fmt.Fprintf(p.out, "signet: still %s\n", output.Clean(step))
		}
	})
	return func() {
		timer.Stop()
		mu.Lock()
		defer mu.Unlock()
		ended = true
	}
}

// missingNodes is the part of a document that says what is not in it.
type missingNodes struct {
	Missing []adminv1.MissingNode `json:"missing,omitempty"`
}

func (m *missingNodes) tell(t *output.Text) {
	for _, n := range m.Missing {
		t.Line(output.S(output.Bad, "SIG0306"), "  node ", n.Node, " did not answer, so this is not all: ", n.Error)
		t.Line("         fix: ", missingFix)
	}
}

const missingFix = "see whether the agent of that node is ready (kubectl get pods -o wide in Signet's namespace) and its port 9445 is open to the control plane"
