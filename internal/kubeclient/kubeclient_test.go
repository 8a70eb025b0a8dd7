package kubeclient

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/test/apiserver"
)

// Paths of the objects of a release.
const (
	deploymentPath = "/apis/apps/v1/namespaces/signet-system/deployments/signet-control"
	podsPath       = "/api/v1/namespaces/signet-system/pods"
)

func pod(name string, age time.Duration, ready bool) corev1.Pod {
	p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: name, CreationTimestamp: metav1.NewTime(time.Unix(1e9, 0).Add(-age))}}
	status := corev1.ConditionFalse
	if ready {
		status = corev1.ConditionTrue
	}
	p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodReady, Status: status}}
	return p
}

// start returns a server with an installed release whose control plane answers
// HTTP with h.
func start(t *testing.T, h http.Handler) (*apiserver.Server, *Cluster) {
	t.Helper()
	control := httptest.NewServer(h)
	s := apiserver.Start()
	s.Objects[deploymentPath] = appsv1.Deployment{Spec: appsv1.DeploymentSpec{Selector: &metav1.LabelSelector{MatchLabels: map[string]string{"app": "control"}}}}
	s.Objects[podsPath] = corev1.PodList{Items: []corev1.Pod{pod("control-young", 0, true), pod("control-old", time.Hour, true), pod("control-ill", 2*time.Hour, false)}}
	s.Dial = func(ctx context.Context, ns, pod, port string) (net.Conn, error) {
		if ns != "signet-system" || pod != "control-old" || port != "9441" {
			return nil, fmt.Errorf("connect: connection refused")
		}
		var d net.Dialer
		return d.DialContext(ctx, "tcp", control.Listener.Addr().String())
	}
	t.Cleanup(func() { s.Stop(); control.CloseClientConnections(); control.Close() })
	return s, load(t, s, "")
}

func load(t *testing.T, s *apiserver.Server, context string) *Cluster {
	t.Helper()
	file := filepath.Join(t.TempDir(), "config")
	if err := os.WriteFile(file, []byte(s.Kubeconfig()), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(Options{Kubeconfig: file, Context: context, Timeout: 5 * time.Second})
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(c.Close)
	return c
}

// The way of every question: find the oldest ready pod, forward a port, speak
// HTTP, by both protocols that API servers have for it.
func TestTunnel(t *testing.T) {
	big := strings.Repeat("0123456789abcdef", 1<<16) // more than any window
	s, c := start(t, http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) { _, _ = io.WriteString(w, r.URL.Path+big) }))
	for _, old := range []bool{false, true} {
		s.NoWebSocket = old
		pods, err := c.ReadyControlPods(t.Context(), DefaultNamespace)
		if err != nil || strings.Join(pods, " ") != "control-old control-young" {
			t.Fatalf("pods %v, %v", pods, err)
		}
		tunnel, err := c.OpenTunnel(t.Context(), DefaultNamespace, pods[0])
		if err != nil {
			t.Fatal(err)
		}
		tr := tunnel.Transport(AdminPort)
		client := &http.Client{Transport: tr, Timeout: 20 * time.Second}
		for _, path := range []string{"/a", "/b"} {
			res, err := client.Get("http://control" + path)
			if err != nil {
				t.Fatalf("NoWebSocket %v: %v", old, err)
			}
			b, err := io.ReadAll(res.Body)
			_ = res.Body.Close()
			if err != nil || string(b) != path+big {
				t.Errorf("NoWebSocket %v: %d bytes, %v", old, len(b), err)
			}
		}
		tr.CloseIdleConnections()
		// A port on which nobody listens.
		res, err := (&http.Client{Transport: tunnel.Transport(1), Timeout: 20 * time.Second}).Get("http://control/")
		if err == nil {
			_ = res.Body.Close()
		}
		if err == nil || !strings.Contains(err.Error(), "port 1 of pod signet-system/control-old: connection refused") {
			t.Errorf("closed port: %v", err)
		}
		if err := tunnel.Close(); err != nil {
			t.Error(err)
		}
	}
}

// A role may allow one of the two verbs only: "create" is what SPDY needs.
func TestTunnelWithCreateAlone(t *testing.T) {
	s, c := start(t, http.NotFoundHandler())
	s.Deny = func(r apiserver.Request) bool { return r.Resource == "pods/portforward" && r.Verb == "get" }
	tunnel, err := c.OpenTunnel(t.Context(), DefaultNamespace, "control-old")
	if err != nil {
		t.Fatal(err)
	}
	_ = tunnel.Close()
}

// Whoever may not, or finds nothing, is told what is missing and what to do.
func TestErrorsSayWhatToDo(t *testing.T) {
	refuse := func(verb, resource string) func(*apiserver.Server) {
		return func(s *apiserver.Server) {
			s.Deny = func(r apiserver.Request) bool { return r.Resource == resource && (verb == "" || r.Verb == verb) }
		}
	}
	for name, c := range map[string]struct {
		change func(*apiserver.Server)
		want   []string
	}{
		"deployments": {refuse("get", "deployments"), []string{"you may not get deployments.apps in namespace signet-system", `a Role in namespace signet-system that allows it: {apiGroups: ["apps"], resources: [deployments], verbs: [get]}`}},
		"pods":        {refuse("list", "pods"), []string{"you may not list pods in namespace signet-system"}},
		"portforward": {refuse("", "pods/portforward"), []string{"you may not get and create pods/portforward in namespace signet-system", `{apiGroups: [""], resources: [pods/portforward], verbs: [get, create]}`}},
		"not installed": {func(s *apiserver.Server) { delete(s.Objects, deploymentPath) },
			[]string{"signet is not installed in namespace signet-system of https://127.0.0.1", "no Deployment signet-control", "name the release's namespace with -n"}},
		"none ready": {func(s *apiserver.Server) {
			p := pod("control-1", 0, false)
			p.Status.ContainerStatuses = []corev1.ContainerStatus{{Name: "control", State: corev1.ContainerState{Waiting: &corev1.ContainerStateWaiting{Reason: "CrashLoopBackOff", Message: "back-off 10s"}}}}
			s.Objects[podsPath] = corev1.PodList{Items: []corev1.Pod{p}}
		}, []string{"no pod of the control plane is ready (control-1: container control waits: CrashLoopBackOff: back-off 10s)", "kubectl -n signet-system describe pods"}},
		"no node": {func(s *apiserver.Server) {
			p := corev1.Pod{ObjectMeta: metav1.ObjectMeta{Name: "control-1"}}
			p.Status.Conditions = []corev1.PodCondition{{Type: corev1.PodScheduled, Status: corev1.ConditionFalse, Message: "0/1 nodes are available"}}
			s.Objects[podsPath] = corev1.PodList{Items: []corev1.Pod{p}}
		}, []string{"control-1: has no node: 0/1 nodes are available"}},
		"scaled down": {func(s *apiserver.Server) {
			s.Objects[podsPath] = corev1.PodList{}
			d := s.Objects[deploymentPath].(appsv1.Deployment)
			d.Spec.Replicas = new(int32)
			s.Objects[deploymentPath] = d
		}, []string{"scaled to 0 replicas: kubectl -n signet-system scale deployment signet-control --replicas=1"}},
	} {
		t.Run(name, func(t *testing.T) {
			s, cluster := start(t, http.NotFoundHandler())
			c.change(s)
			pods, err := cluster.ReadyControlPods(t.Context(), DefaultNamespace)
			if err == nil {
				var tunnel *Tunnel
				if tunnel, err = cluster.OpenTunnel(t.Context(), DefaultNamespace, pods[0]); err == nil {
					_ = tunnel.Close()
				}
			}
			for _, want := range c.want {
				if err == nil || !strings.Contains(err.Error(), want) {
					t.Errorf("%v\nwant %s", err, want)
				}
			}
			if errors.Is(err, ErrNotInstalled) != (name == "not installed") {
				t.Errorf("%v: ErrNotInstalled is wrong", err)
			}
		})
	}
}

func TestServerErrors(t *testing.T) {
	s, _ := start(t, http.NotFoundHandler())
	var v any
	err := load(t, s, "stranger").Get(t.Context(), "/version", nil, &v)
	if err == nil || !strings.Contains(err.Error(), "does not know who you are: renew the credentials") {
		t.Errorf("stranger: %v", err)
	}
	c := load(t, s, "")
	s.Stop()
	if err := c.Get(t.Context(), "/version", nil, &v); err == nil || !strings.Contains(err.Error(), "connection refused; look at the network, or choose another cluster") {
		t.Errorf("dead: %v", err)
	}
	// Some other web server.
	other := httptest.NewServer(http.NotFoundHandler())
	defer other.Close()
	file := filepath.Join(t.TempDir(), "config")
	config := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c}}]\n", other.URL)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err = Load(Options{Paths: []string{file}})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	if err := c.Get(t.Context(), "/version", nil, &v); err == nil || !strings.Contains(err.Error(), "which is not how an API server does") {
		t.Errorf("another server: %v", err)
	}
	for want, o := range map[string]Options{
		"no cluster is configured":        {Paths: []string{filepath.Join(t.TempDir(), "none")}},
		`context "absent" does not exist`: {Kubeconfig: file, Context: "absent"},
		"no such file":                    {Kubeconfig: "/nowhere/config"},
	} {
		if _, err := Load(o); err == nil || !strings.Contains(err.Error(), want) {
			t.Errorf("%+v: %v, want %s", o, err, want)
		}
	}
}

// An API server that accepts and then says nothing must not hold the operator.
func TestSilentServer(t *testing.T) {
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	defer func() { _ = l.Close() }()
	file := filepath.Join(t.TempDir(), "config")
	config := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c}}]\n", "http://"+l.Addr().String())
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(Options{Kubeconfig: file, Timeout: 300 * time.Millisecond})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	start := time.Now()
	var v any
	if err := c.Get(t.Context(), "/version", nil, &v); err == nil || !strings.Contains(err.Error(), "no answer in time") {
		t.Error(err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 300*time.Millisecond)
	defer cancel()
	if _, err := c.OpenTunnel(ctx, DefaultNamespace, "p"); err == nil || !strings.Contains(err.Error(), "does not answer") {
		t.Error(err)
	}
	if took := time.Since(start); took > 5*time.Second {
		t.Errorf("took %s", took)
	}
}

func TestMayI(t *testing.T) {
	s, c := start(t, http.NotFoundHandler())
	s.Deny = func(r apiserver.Request) bool {
		return r.Verb == "create" && r.Resource == "daemonsets" && r.Group == "apps" && r.Namespace == "x" || r.Resource == "pods/exec"
	}
	ds := Access{Verb: "create", Group: "apps", Resource: "daemonsets", Namespace: "x"}
	exec := Access{Verb: "create", Resource: "pods/exec"}
	not, err := c.MayI(t.Context(), []Access{{Verb: "get", Resource: "pods"}, ds, {Verb: "list", Resource: "nodes"}, exec})
	if err != nil || len(not) != 2 || not[0] != ds || not[1] != exec || ds.String() != "create daemonsets.apps in x" {
		t.Errorf("%v, %v", not, err)
	}
}

// Lists come in pages; a page that is left out is a node that nobody looks at.
func TestListReadsEveryPage(t *testing.T) {
	asked := 0
	server := httptest.NewServer(http.HandlerFunc(func(w http.ResponseWriter, r *http.Request) {
		asked++
		if r.FormValue("limit") != "500" {
			t.Errorf("asked %s", r.URL)
		}
		if r.FormValue("continue") == "" {
			_, _ = io.WriteString(w, `{"metadata":{"continue":"next"},"items":[{"metadata":{"name":"a"}}]}`)
			return
		}
		_, _ = io.WriteString(w, `{"metadata":{},"items":[{"metadata":{"name":"b"}}]}`)
	}))
	defer server.Close()
	file := filepath.Join(t.TempDir(), "config")
	config := fmt.Sprintf("apiVersion: v1\nkind: Config\ncurrent-context: c\nclusters: [{name: c, cluster: {server: %q}}]\ncontexts: [{name: c, context: {cluster: c}}]\n", server.URL)
	if err := os.WriteFile(file, []byte(config), 0o600); err != nil {
		t.Fatal(err)
	}
	c, err := Load(Options{Kubeconfig: file})
	if err != nil {
		t.Fatal(err)
	}
	defer c.Close()
	nodes, err := ListOf[corev1.Node](t.Context(), c, "/api/v1/nodes")
	if err != nil || asked != 2 || len(nodes) != 2 || nodes[1].Name != "b" {
		t.Errorf("%d nodes of %d pages, %v", len(nodes), asked, err)
	}
}
