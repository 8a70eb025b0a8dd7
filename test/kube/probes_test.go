package kube

import (
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// probedPod declares a probe of every type, two of them on ports that are not
// among the container's; one port, 8085, has none.
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

// sidecar is a container that runs beside the main one from before it starts. Its
// own probes let the pod come up; the main container's handlers ask it.
const sidecar = `initContainers: [{name: side, image: "signet.example/testpod:1", imagePullPolicy: Never, restartPolicy: Always,
    args: [serve, --port=8090, --echo-port=8091, --grpc-port=8092], ports: [{name: side, containerPort: 8090}],
    startupProbe: {httpGet: {path: /healthz, port: side}, periodSeconds: 1, failureThreshold: 30},
    readinessProbe: {tcpSocket: {port: 8091}, periodSeconds: 1},
    livenessProbe: {grpc: {port: 8092}, periodSeconds: 1}}]`

// sidecarPod has probes in its sidecar, and handlers that ask over HTTP: one
// that asks in vain has its container killed.
func sidecarPod(namespace, name, node string) *pod {
	return &pod{
		namespace: namespace, name: name, account: name, node: node, args: []string{"serve"}, spec: []string{sidecar},
		more: []string{"lifecycle: {postStart: {httpGet: {path: /healthz, port: 8090}}, preStop: {httpGet: {path: /healthz, port: 8080}}}"},
	}
}

// restarts returns how often a pod's containers were started again, and whether
// it is ready.
func (b *bench) restarts(namespace, name string) (n int32, ready bool) {
	b.Helper()
	p, err := b.client.CoreV1().Pods(namespace).Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	for _, c := range slices.Concat(p.Status.InitContainerStatuses, p.Status.ContainerStatuses) {
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

// handlersFailed returns the events of a namespace which say that a handler was
// not answered.
func (b *bench) handlersFailed(namespace string) (out []string) {
	b.Helper()
	events, err := b.client.CoreV1().Events(namespace).List(b.Context(), metav1.ListOptions{})
	if err != nil {
		b.Fatal(err)
	}
	for i := range events.Items {
		if e := &events.Items[i]; e.Reason == "FailedPostStartHook" || e.Reason == "FailedPreStopHook" {
			out = append(out, e.InvolvedObject.Name+": "+e.Reason+": "+e.Message)
		}
	}
	return out
}

// Kubelet's probes and handlers of every type pass under enforce without any
// policy, on both nodes, over a restart of the agent too and after the node's
// rules were deleted.
func TestProbes(t *testing.T) {
	b := open(t)
	ns := b.namespace("enforce")
	names := []string{"one", "two", "side-one", "side-two"}
	var documents strings.Builder
	for i, name := range names[:2] {
		text := probedPod(ns, name, fmt.Sprintf("node%d", i+1)).yaml()
		documents.WriteString(strings.TrimSuffix(strings.TrimRight(text, "\n "), "---") + second)
		documents.WriteString(sidecarPod(ns, "side-"+name, fmt.Sprintf("node%d", i+1)).yaml())
	}
	b.apply(documents.String())
	for _, name := range names {
		b.kubectl("-n", ns, "wait", "pod", name, "--for=condition=Ready", "--timeout=1m")
	}
	b.waitStatus(ns, "enforce: 4 of 4 pods enrolled")
	b.stay(ns, names, 5*time.Second, "at rest")

	b.roll("agent")
	b.stay(ns, names, 5*time.Second, "after a restart of the agent")

	for _, table := range []string{"inet", "bridge"} {
		for _, n := range b.cluster.Nodes() {
			b.script(n, "nft delete table "+table+" signet")
		}
	}
	began := time.Now()
	b.eventually(5*time.Second, func() string {
		for _, n := range b.cluster.Nodes() {
			if out, err := n.Command(t.Context(), "bash", "-c", "nft list table inet signet && nft list table bridge signet").CombinedOutput(); err != nil {
				return string(out)
			}
		}
		return ""
	})
	t.Logf("deleted rules of the nodes were there again after %s", time.Since(began).Round(10*time.Millisecond))
	b.stay(ns, names, 3*time.Second, "after the nodes' rules were deleted")

	b.kubectl("-n", ns, "delete", "pod", "side-one", "side-two", "--wait=true")
	if failed := b.handlersFailed(ns); len(failed) > 0 {
		t.Errorf("handlers were not answered: %q", failed)
	}
}

// A probe that names another host is the one way to use kubelet: it then asks
// the ports that the other pod declared for its own probes, from any namespace
// of the same node, and no other port. Whoever writes such a pod learns whether
// the answer is a success. Pod Security "baseline" forbids the field from
// Kubernetes 1.34 on; this defends the border of what it can do.
func TestProbeOfAnotherHost(t *testing.T) {
	b := open(t)
	ns, out := b.namespace("enforce"), b.namespace("")
	text := probedPod(ns, "one", "node1").yaml()
	b.apply(strings.TrimSuffix(strings.TrimRight(text, "\n "), "---") + second)
	b.kubectl("-n", ns, "wait", "pod", "one", "--for=condition=Ready", "--timeout=1m")
	asker := func(name, node string, port int) *pod {
		return &pod{namespace: out, name: name, node: node, args: []string{"hold"},
			more: []string{fmt.Sprintf("readinessProbe: {httpGet: {host: %s, path: /healthz, port: %d}, periodSeconds: 1}", b.ip(ns, "one"), port)}}
	}
	b.apply(asker("declared", "node1", 8080).yaml() + asker("undeclared", "node1", 8085).yaml() + asker("far", "node2", 8080).yaml())
	b.kubectl("-n", out, "wait", "pod", "declared", "--for=condition=Ready", "--timeout=1m")
	for _, name := range []string{"undeclared", "far"} {
		b.kubectl("-n", out, "wait", "pod", name, "--for=jsonpath={.status.phase}=Running", "--timeout=1m")
	}
	for end := time.Now().Add(6 * time.Second); time.Now().Before(end); time.Sleep(200 * time.Millisecond) {
		for _, name := range []string{"undeclared", "far"} {
			if _, ready := b.restarts(out, name); ready {
				t.Fatalf("%s: a probe with another pod's address was answered", name)
			}
		}
	}
}
