package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/test/cluster"
)

// probedPod declares a probe of every type; one port, 8085, has none.
func probedPod(namespace, name, node string) *pod {
	return &pod{
		namespace: namespace, name: name, account: name, node: node, args: []string{"serve"},
		more: []string{
			"ports: [{name: web, containerPort: 8080}]",
			"startupProbe: {grpc: {port: 8082}, periodSeconds: 1, failureThreshold: 30}",
			"readinessProbe: {httpGet: {path: /healthz, port: web}, periodSeconds: 1, failureThreshold: 3}",
			"livenessProbe: {tcpSocket: {port: 8081}, periodSeconds: 1, failureThreshold: 3}",
			"lifecycle: {preStop: {exec: {command: [busybox, 'true']}}}",
		},
	}
}

// second is a container whose probe is a command, and which serves a port that
// nobody probes.
const second = `    - name: second
      image: signet.example/testpod:1
      imagePullPolicy: Never
      args: [serve, --port=8085, --echo-port=8086, --grpc-port=8087]
      readinessProbe: {exec: {command: [busybox, 'true']}, periodSeconds: 1}
---
`

// restarts returns how often a pod's containers were started again, and whether
// it is ready.
func (b *bench) restarts(namespace, name string) (n int32, ready bool) {
	b.Helper()
	p, err := b.client.CoreV1().Pods(namespace).Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range p.Status.ContainerStatuses {
		n += c.RestartCount
	}
	for _, c := range p.Status.Conditions {
		ready = ready || c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
	}
	return n, ready
}

// stay fails the test if a pod is not ready all the while.
func (b *bench) stay(namespace string, names []string, while time.Duration, what string) {
	b.Helper()
	for end := time.Now().Add(while); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		for _, name := range names {
			if n, ready := b.restarts(namespace, name); n > 0 || !ready {
				b.Fatalf("%s: %s: ready %v, %d restarts; kubelet's probes do not pass", what, name, ready, n)
			}
		}
	}
}

// reach has a node's process, in a network namespace of the node or in the
// node's own (""), call an address, from a source address or whichever (""), a
// number of times, and returns how often it was served.
func reach(ctx context.Context, n *cluster.Node, netns, source, address string, times int) (served int, says string) {
	enter := ""
	if netns != "" {
		enter = "nsenter --net=" + netns
	}
	bind := ""
	if source != "" {
		bind = "--interface " + source
	}
	script := fmt.Sprintf("for i in $(seq %d); do %s curl -sS --max-time 1 %s http://%s/id && echo SERVED & done 2>&1; wait", times, enter, bind, address)
	out, err := n.Command(ctx, "bash", "-c", script).CombinedOutput()
	if err != nil {
		says = err.Error()
	}
	return strings.Count(string(out), "SERVED"), says + string(tail(out, 200))
}

// netnsOf returns the path on the node of the network namespace with an address.
func (b *bench) netnsOf(n *cluster.Node, address string) string {
	b.Helper()
	out, err := n.Command(b.Context(), "bash", "-c", fmt.Sprintf("for ns in /run/netns/*; do nsenter --net=$ns ip -4 -o addr | grep -q ' %s/' && echo $ns; done; true", address)).Output()
	if path := strings.TrimSpace(string(out)); err == nil && path != "" && !strings.Contains(path, "\n") {
		return path
	}
	b.Fatalf("%s has no network namespace with %s: %v\n%s", n.Name(), address, err, out)
	return ""
}

// Kubelet's probes of every type pass under enforce without any policy, over a
// restart of the agent too and after the node's rules were deleted; and what
// lets them in lets nobody else in: it defends the probed ports from whoever
// takes kubelet's place, its address, or the source that pods see.
func TestProbes(t *testing.T) {
	b := open(t)
	ns, out := b.namespace("enforce"), b.namespace("")
	names := []string{"one", "two"}
	var documents strings.Builder
	for i, name := range names {
		text := probedPod(ns, name, fmt.Sprintf("node%d", i+1)).yaml()
		documents.WriteString(strings.TrimSuffix(strings.TrimRight(text, "\n "), "---") + second)
	}
	b.apply(documents.String())
	for _, name := range names {
		b.kubectl("-n", ns, "wait", "pod", name, "--for=condition=Ready", "--timeout=1m")
	}
	b.waitStatus(ns, "enforce: 2 of 2 pods enrolled")
	b.stay(ns, names, 5*time.Second, "at rest")

	b.roll("agent")
	b.stay(ns, names, 5*time.Second, "after a restart of the agent")

	node1, node2 := b.cluster.Node("node1"), b.cluster.Node("node2")
	for _, n := range []*cluster.Node{node1, node2} {
		if out, err := n.Command(t.Context(), "nft", "delete", "table", "inet", "signet").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	}
	began := time.Now()
	b.eventually(5*time.Second, func() string {
		for _, n := range []*cluster.Node{node1, node2} {
			if out, err := n.Command(t.Context(), "nft", "list", "table", "inet", "signet").CombinedOutput(); err != nil {
				return string(out)
			}
		}
		return ""
	})
	t.Logf("deleted rules of the node were there again after %s", time.Since(began).Round(10*time.Millisecond))
	b.stay(ns, names, 3*time.Second, "after the node's rules were deleted")

	// Attackers: pods outside of the mesh, which may do anything in their own
	// network namespaces (more than NET_RAW), on both nodes; a pod in the
	// node's own network namespace; the nodes' own root.
	root := "securityContext: {runAsUser: 0, capabilities: {add: [NET_RAW, NET_ADMIN]}}"
	b.startPods(
		&pod{namespace: out, name: "near", node: "node1", args: []string{"hold"}, more: []string{root}},
		&pod{namespace: out, name: "far", node: "node2", args: []string{"hold"}, more: []string{root}},
		&pod{namespace: out, name: "host", node: "node1", args: []string{"hold"}, spec: []string{"hostNetwork: true", "hostPID: true"}, more: []string{root}},
	)
	one, neighbour := b.ip(ns, "one"), b.ip(out, "near")
	near, far := b.netnsOf(node1, neighbour), b.netnsOf(node2, b.ip(out, "far"))
	probe, kubelet := capture.ProbeSource.String(), node1.Addr().String()
	for _, c := range []struct {
		n     *cluster.Node
		netns string
	}{{node1, near}, {node2, far}} {
		for _, a := range []string{probe, kubelet, one} {
			if out, err := c.n.Command(t.Context(), "nsenter", "--net="+c.netns, "ip", "addr", "add", a+"/32", "dev", "eth0").CombinedOutput(); err != nil {
				t.Fatalf("%v\n%s", err, out)
			}
		}
	}
	const times = 10
	attempts := 0
	for _, c := range []struct {
		what          string
		n             *cluster.Node
		netns, source string
	}{
		{"a pod of the same node", node1, near, ""},
		{"a pod of the same node with the source of probes", node1, near, probe},
		{"a pod of the same node with the node's address", node1, near, kubelet},
		{"a pod of the other node", node2, far, ""},
		{"a pod of the other node with the source of probes", node2, far, probe},
		{"a pod of the other node with the first node's address", node2, far, kubelet},
		{"root on the node, outside of kubelet", node1, "", ""},
		{"root on the node, with the source of probes", node1, "", probe},
		{"root on the other node", node2, "", ""},
	} {
		for _, port := range []string{"8080", "8081", "8085"} {
			n, says := reach(t.Context(), c.n, c.netns, c.source, one+":"+port, times)
			attempts += times
			if n > 0 {
				t.Errorf("%s was served %d times of %d by port %s: %s", c.what, n, times, port, says)
			}
		}
	}
	for range times {
		attempts++
		if a := b.dial(out, "host", one+":8080"); a.OK {
			t.Errorf("a pod with the node's network was served: %+v", a)
		}
	}
	t.Logf("%d attempts to reach probed and other ports, none served", attempts)
	b.stay(ns, names, 2*time.Second, "after the attacks")

	// The control of all this: a process that is kubelet's own, by its control
	// group, is served on a probed port, and on no other one.
	if n, says := b.asKubelet(node1, one+":8080", times); n != times {
		t.Errorf("kubelet's own process was served %d times of %d: %s", n, times, says)
	}
	if n, says := b.asKubelet(node1, one+":8085", times); n > 0 {
		t.Errorf("kubelet's own process was served %d times of %d by a port that is not probed: %s", n, times, says)
	}
	records := b.audit("--since", "2m", "--to", ns+"/one", "--verdict", "denied")
	t.Logf("%d records of refusals", len(records))
	if len(records) == 0 {
		t.Error("refused callers left no record")
	}
}

// asKubelet is reach from within kubelet's control group.
func (b *bench) asKubelet(n *cluster.Node, address string, times int) (served int, says string) {
	b.Helper()
	script := fmt.Sprintf(`set -e
mkdir -p /tmp/cgroup2; mount -t cgroup2 none /tmp/cgroup2
path=$(sed -n 's/^0:://p' /proc/$(pidof kubelet)/cgroup)
echo $$ > /tmp/cgroup2$path/cgroup.procs
umount /tmp/cgroup2
for i in $(seq %d); do curl -sS --max-time 1 http://%s/id && echo SERVED || true; done 2>&1`, times, address)
	out, err := n.Command(b.Context(), "bash", "-c", script).CombinedOutput()
	if err != nil {
		says = err.Error()
	}
	return strings.Count(string(out), "SERVED"), says + string(tail(out, 300))
}
