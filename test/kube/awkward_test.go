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
		&pod{namespace: in, name: "host", account: "client", node: "node2", args: []string{"serve", "--port=18080"}, spec: []string{"hostNetwork: true", "dnsPolicy: ClusterFirstWithHostNet"}},
		&pod{namespace: in, name: "nearhost", account: "client", node: "node1", args: []string{"serve", "--port=18080"}, spec: []string{"hostNetwork: true", "dnsPolicy: ClusterFirstWithHostNet"}},
	)
	t.Run("native sidecar", func(t *testing.T) {
		b := b.at(t)
		b.served(in, "init", b.ip(in, "sidecar")+":9000", "sidecar")
	})
	t.Run("hostNetwork", func(t *testing.T) { b.at(t).hosts(in, began) })
	t.Run("Job, init container, postStart, preStop", func(t *testing.T) {
		b := b.at(t)
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
		b.eventually(20*time.Second, func() string {
			if n := b.calls(in, "handlers", began); n != 1 {
				return fmt.Sprintf("%d calls of postStart are recorded, want 1", n)
			}
			return ""
		})
		b.kubectl("-n", in, "delete", "pod", "handlers", "--grace-period=20")
		if failed := b.handlersFailed(in); len(failed) > 0 {
			t.Errorf("handlers failed: %v", failed)
		}
		b.eventually(20*time.Second, func() string {
			for name, want := range map[string]int{"handlers": 2, "init": 1, job: 1} {
				if n := b.calls(in, name, began); n != want {
					return fmt.Sprintf("%d calls of %s are recorded, want %d", n, name, want)
				}
			}
			return ""
		})
		b.waitStatus(in, "enforce: 3 of 3 pods enrolled") // the job's has ended, and two are the node's
	})
}

// hosts: pods with the node's network are strangers, whatever service account
// they have, on the same node too: they are refused under enforce, recorded
// without an identity, and let in where the namespace is observed. Called they
// are in plain.
func (b *bench) hosts(in string, began time.Time) {
	b.Helper()
	watched := b.namespace("observe")
	b.startPods(&pod{namespace: watched, name: "server", account: "server", node: "node1", args: []string{"serve"}})
	b.waitStatus(watched, "observe: 1 of 1 pods enrolled")
	for _, host := range []string{"host", "nearhost"} {
		for _, to := range []string{"server." + in + ":8080", b.ip(in, "server") + ":8080"} {
			b.refused(in, host, to)
			for range 3 {
				if a := b.dial(in, host, to); a.OK {
					b.Errorf("a pod with the node's network calls %s: %+v", to, a)
				}
			}
		}
		b.served(in, host, b.ip(watched, "server")+":8080", "server")
		b.served(in, "init", b.ip(in, host)+":18080", host)
	}
	b.eventually(20*time.Second, func() string {
		denied, allowed, called := 0, 0, 0
		for _, r := range b.audit("--since", began.UTC().Format(time.RFC3339)) {
			switch {
			case r.Side == "destination" && r.Destination.Workload == in+"/server" && r.Source.ID == "" && r.Transport == "plaintext":
				if r.Verdict != "denied" {
					b.Fatalf("a call without an identity is recorded as %+v", r)
				}
				denied++
			case r.Side == "destination" && r.Destination.Workload == watched+"/server":
				if r.Source.ID != "" || r.Transport != "plaintext" {
					b.Fatalf("a call of a pod with the node's network is recorded as %+v", r)
				}
				allowed++
			case r.Source.Workload == in+"/init" && strings.HasSuffix(r.Destination.Address, ":18080"):
				if r.Destination.ID != "" || r.Transport != "plaintext" {
					b.Fatalf("a call to a pod with the node's network is recorded as %+v", r)
				}
				called++
			}
		}
		if denied < 16 || allowed < 2 || called < 2 {
			return fmt.Sprintf("%d refused calls of pods with the node's network are recorded, want 16 and more; %d to an observed one and %d to them, want 2 of each", denied, allowed, called)
		}
		return ""
	})
}

// calls counts the calls of a pod to the server that its node has recorded as
// allowed, with the identities of both.
func (b *bench) calls(namespace, name string, since time.Time) (n int) {
	b.Helper()
	for _, r := range b.audit("--since", since.UTC().Format(time.RFC3339)) {
		if r.Side == "source" && r.Source.Workload == namespace+"/"+name && r.Destination.Workload == namespace+"/server" && r.Verdict == "allowed" && r.Transport == "mtls" &&
			r.Source.ID == id(namespace, "client") && r.Destination.ID == id(namespace, "server") {
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
