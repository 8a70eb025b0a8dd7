package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// Pods that are more than one process from start to end: all of their calls are
// captured and served, from the init containers' to the last in preStop, and a
// pod with the node's network is a stranger.
func TestAwkwardPods(t *testing.T) {
	b := open(t)
	in := b.namespace("enforce")
	address := "server." + in + ":8080"
	call := fmt.Sprintf(`["/usr/bin/testpod", "dial", %q]`, address)
	image := `image: "signet.example/testpod:1", imagePullPolicy: Never`
	b.apply(service(in, "server", "server") + allow(in, "server", "client"))
	b.startPods(&pod{namespace: in, name: "server", account: "server", node: "node1", args: []string{"serve"}})
	began := time.Now()
	b.startPods(
		&pod{namespace: in, name: "init", account: "client", node: "node2", args: []string{"hold"},
			spec: []string{fmt.Sprintf("initContainers: [{name: first, %s, args: [dial, %q]}]", image, address)}},
		&pod{namespace: in, name: "sidecar", account: "server", node: "node2", args: []string{"hold"},
			spec: []string{fmt.Sprintf(`initContainers: [{name: beside, %s, restartPolicy: Always, args: [serve, --port, "9000"]}]`, image)}},
		&pod{namespace: in, name: "handlers", account: "client", node: "node2", args: []string{"hold"},
			more: []string{fmt.Sprintf("lifecycle: {postStart: {exec: {command: %s}}, preStop: {exec: {command: %s}}}", call, call)}},
		&pod{namespace: in, name: "host", account: "client", node: "node2", args: []string{"hold"}, spec: []string{"hostNetwork: true", "dnsPolicy: ClusterFirstWithHostNet"}},
		&pod{namespace: in, name: "nearhost", account: "client", node: "node1", args: []string{"hold"}, spec: []string{"hostNetwork: true", "dnsPolicy: ClusterFirstWithHostNet"}},
	)
	b.served(in, "init", b.ip(in, "sidecar")+":9000", "sidecar")
	for _, host := range []string{"host", "nearhost"} {
		for _, to := range []string{address, b.ip(in, "server") + ":8080"} {
			b.refused(in, host, to)
			for range 5 {
				if a := b.dial(in, host, to); a.OK {
					t.Errorf("a pod with the node's network calls %s: %+v", to, a)
				}
			}
		}
	}
	b.apply(fmt.Sprintf(`apiVersion: batch/v1
kind: Job
metadata: {name: job, namespace: %s}
spec:
  backoffLimit: 0
  template:
    spec:
      serviceAccountName: client
      restartPolicy: Never
      containers: [{name: main, %s, args: [dial, %q]}]
---
`, in, image, address))
	b.kubectl("-n", in, "wait", "job/job", "--for=condition=Complete", "--timeout=1m")
	job := strings.TrimSpace(b.kubectl("-n", in, "get", "pods", "-l", "job-name=job", "-o", "jsonpath={.items[0].metadata.name}"))

	before := b.recorded(in, "handlers", began)
	b.kubectl("-n", in, "delete", "pod", "handlers", "--grace-period=20")
	if failed := b.handlersFailed(in); len(failed) > 0 {
		t.Errorf("handlers failed: %v", failed)
	}
	b.eventually(20*time.Second, func() string {
		if n := b.recorded(in, "handlers", began); n != before+1 {
			return fmt.Sprintf("the call of preStop is not recorded: %d records, %d before", n, before)
		}
		for _, name := range []string{"init", job} {
			if n := b.recorded(in, name, began); n == 0 {
				return "no call of " + name + " is recorded"
			}
		}
		return ""
	})
	b.waitStatus(in, "enforce: 3 of 3 pods enrolled") // the job's has ended, and two are the node's
}

// recorded counts the allowed calls of a pod to the server that its node has
// recorded.
func (b *bench) recorded(namespace, name string, since time.Time) (n int) {
	b.Helper()
	for _, r := range b.audit("--since", since.UTC().Format(time.RFC3339)) {
		if r.Side == "source" && r.Source.Workload == namespace+"/"+name && r.Destination.Workload == namespace+"/server" && r.Verdict == "allowed" && r.Transport == "mtls" {
			n++
		}
	}
	return n
}

// A Deployment goes from one replica to four and back under load, in the mesh and
// outside of it: where no call fails without the mesh, none fails with it.
func TestScaleUnderLoad(t *testing.T) {
	b := open(t)
	in, out := b.namespace("enforce"), b.namespace("")
	for _, ns := range []string{in, out} {
		// Pods serve on for the time in which callers learn that they end.
		b.apply(service(ns, "server", "server") + fmt.Sprintf(`apiVersion: apps/v1
kind: Deployment
metadata: {name: server, namespace: %s}
spec:
  replicas: 1
  selector: {matchLabels: {app: server}}
  template:
    metadata: {labels: {app: server}}
    spec:
      terminationGracePeriodSeconds: 10
      containers:
        - name: main
          image: signet.example/testpod:1
          imagePullPolicy: Never
          args: [serve]
          readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}
          lifecycle: {preStop: {sleep: {seconds: 5}}}
---
`, ns))
	}
	b.apply(allow(in, "default", "client"))
	for _, ns := range []string{in, out} {
		b.kubectl("-n", ns, "rollout", "status", "deployment/server", "--timeout=1m")
		b.startPods(&pod{namespace: ns, name: "client", account: "client", node: "node2", args: []string{"load", "server." + ns + ":8080", "--rate=30", "--want=server-"}})
	}
	b.waitStatus(in, "enforce: 2 of 2 pods enrolled")
	b.eventually(20*time.Second, func() string {
		if _, c := b.loads(in, "client", time.Now().Add(-1500*time.Millisecond)); c.OK == 0 || c.Failed > 0 {
			return fmt.Sprintf("%+v", c)
		}
		return ""
	})
	since := time.Now()
	for range 3 {
		for _, replicas := range []int32{4, 1} {
			for _, ns := range []string{in, out} {
				b.scale(ns, replicas)
			}
			for _, ns := range []string{in, out} {
				b.kubectl("-n", ns, "rollout", "status", "deployment/server", "--timeout=1m")
			}
			time.Sleep(7 * time.Second) // those that end have ended
		}
	}
	_, with := b.loads(in, "client", since)
	_, without := b.loads(out, "client", since)
	t.Logf("three times from 1 replica to 4 and back: in the mesh %d of %d calls failed %v, outside %d of %d %v", with.Failed, with.OK+with.Failed, with.Errors,
		without.Failed, without.OK+without.Failed, without.Errors)
	if with.OK == 0 || with.Wrong > 0 || with.Failed > without.Failed {
		t.Errorf("in the mesh %+v, outside %+v", with, without)
	}
}

// scale sets how many replicas the server of a namespace has.
func (b *bench) scale(namespace string, replicas int32) {
	b.Helper()
	ctx, cancel := context.WithTimeout(b.Context(), 30*time.Second)
	defer cancel()
	s, err := b.client.AppsV1().Deployments(namespace).GetScale(ctx, "server", metav1.GetOptions{})
	if err == nil {
		s.Spec.Replicas = replicas
		_, err = b.client.AppsV1().Deployments(namespace).UpdateScale(ctx, "server", s, metav1.UpdateOptions{})
	}
	if err != nil {
		b.Fatal(err)
	}
}
