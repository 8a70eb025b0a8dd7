package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"slices"
	"strings"
	"testing"
	"time"
)

// authority is what of `kubectl signet ca status -o json` these tests look at.
type authority struct {
	Stage string
	Roots []struct{ Fingerprint, Role string }
	Nodes []struct {
		Name, Waits   string
		Trusted, Used []string
	}
}

// ca runs `kubectl signet ca`.
func (b *bench) ca(args ...string) (s authority) {
	b.Helper()
	out, err := b.command(b.Context(), "kubectl", append([]string{"signet", "ca"}, append(args, "-o", "json")...)...).Output()
	if err != nil {
		b.Fatalf("kubectl signet ca %q: %v\n%s", args, err, out)
	}
	if err := json.Unmarshal(out, &s); err != nil || len(s.Roots) == 0 {
		b.Fatalf("%v\n%s", err, out)
	}
	return s
}

// twoReplicas has two replicas of the control plane, each with one of the nodes.
func (b *bench) twoReplicas() {
	b.Helper()
	scale := func(ctx context.Context, replicas int) error {
		return b.command(ctx, "kubectl", "-n", system, "scale", "deployment/signet-control", fmt.Sprintf("--replicas=%d", replicas)).Run()
	}
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), time.Minute)
		defer cancel()
		if err := scale(ctx, 1); err != nil {
			b.Error(err)
		}
	})
	if err := scale(b.Context(), 2); err != nil {
		b.Fatal(err)
	}
	b.kubectl("-n", system, "rollout", "status", "deployment/signet-control", "--timeout=2m")
	var connected []string
	for range 12 { // which replica an agent finds is chance
		b.kubectl("-n", system, "delete", "pod", b.partOn("agent", "node1"))
		b.ready()
		connected = nil
		for _, pod := range strings.Fields(b.kubectl("-n", system, "get", "pods", "-l", "app.kubernetes.io/component=control", "-o", "jsonpath={.items[*].metadata.name}")) {
			for line := range strings.Lines(b.kubectl("get", "--raw", "/api/v1/namespaces/"+system+"/pods/"+pod+":9440/proxy/metrics")) {
				if n, ok := strings.CutPrefix(line, "signet_control_nodes_connected "); ok {
					connected = append(connected, strings.TrimSpace(n))
				}
			}
		}
		if slices.Equal(connected, []string{"1", "1"}) {
			return
		}
	}
	b.Fatalf("nodes connected to the replicas: %q; want one each", connected)
}

// The root is replaced under load, with two replicas of the control plane that
// share it: nothing fails, nothing breaks, every node ends up with the new root
// alone, and so does the Secret. Who may only look may not have it replaced.
func TestRootRotation(t *testing.T) {
	b := open(t)
	b.twoReplicas()
	l := b.load()
	b.setTTL(20 * time.Second)
	b.eventually(time.Minute, func() string {
		for _, c := range b.certificates() {
			if c.Holder != "node" && c.NotAfter.Sub(c.NotBefore) > time.Minute {
				return c.Holder + " has a certificate of the longer life"
			}
		}
		return ""
	})
	l.steady(30 * time.Second)
	l.since = time.Now()

	operator := b.as(l.namespace, "operator", bound(l.namespace, "operator"))
	t.Cleanup(func() { b.unbind(l.namespace, "operator") })
	cmd := b.command(t.Context(), "kubectl", "signet", "ca", "rotate")
	cmd.Env = append(cmd.Env, "KUBECONFIG="+operator)
	if out, err := cmd.CombinedOutput(); err == nil || !strings.Contains(string(out), "rootNotBefore") {
		t.Errorf("who may only look replaces the root: %v\n%s", err, out)
	}
	before := b.ca("status")
	began := time.Now()
	after := b.ca("rotate")
	t.Logf("the root was replaced within %s", time.Since(began).Round(100*time.Millisecond))
	if after.Stage != "idle" || len(after.Roots) != 1 || after.Roots[0].Fingerprint == before.Roots[0].Fingerprint {
		t.Errorf("before %+v, after %+v", before, after)
	}
	b.eventually(20*time.Second, func() string { // whichever replica is asked
		s := b.ca("status")
		if s.Stage != "idle" || s.Roots[0] != after.Roots[0] || len(s.Nodes) != 2 {
			return fmt.Sprintf("%+v", s)
		}
		for _, n := range s.Nodes {
			if want := []string{after.Roots[0].Fingerprint}; fmt.Sprint(n.Trusted, n.Used) != fmt.Sprint(want, want) {
				return fmt.Sprintf("%+v", n)
			}
		}
		return ""
	})
	if keys := b.kubectl("-n", system, "get", "secret", "signet-ca", "-o", "go-template={{range $name, $_ := .data}}{{$name}} {{end}}"); keys != "root.crt root.key " {
		t.Errorf("the Secret has %s", keys)
	}
	l.judge("the root replaced")
	if got := b.statusOf(l.namespace); got != allThree {
		t.Errorf("the status says %q", got)
	}
	// A replica that starts now, and an agent, have the new root.
	b.roll("control")
	b.kubectl("-n", system, "delete", "pod", b.partOn("agent", "node2"))
	b.ready()
	b.waitStatus(l.namespace, allThree)
	l.judge("the control plane and an agent started again")
	if s := b.ca("status"); s.Roots[0] != after.Roots[0] {
		t.Errorf("after a restart %+v, before %+v", s.Roots, after.Roots)
	}
}

// A root is distrusted while the agent of a node hangs. Nobody waits for it for
// long: its node is cut off, and comes back by itself when its agent does, with the
// roots that are published to the cluster. Tunnels from before end, once.
func TestDistrust(t *testing.T) {
	b := open(t)
	b.controlOn("node1")
	l := b.load()
	node2 := b.cluster.Node("node2")
	b.signal(node2, "signet-agent", "STOP")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		_ = node2.Command(ctx, "pkill", "-CONT", "-x", "signet-agent").Run() // it may be another by now
	})
	before := b.ca("status")
	l.since = time.Now()
	after := b.ca("distrust", "--yes")
	took := time.Since(l.since)
	t.Logf("with a node that does not answer the root was replaced within %s", took.Round(100*time.Millisecond))
	if len(after.Roots) != 1 || after.Roots[0].Fingerprint == before.Roots[0].Fingerprint || took > time.Minute {
		t.Errorf("%+v after %s", after, took)
	}
	b.eventually(20*time.Second, func() string {
		_, c := l.loads(l.namespace, "near", time.Now().Add(-1500*time.Millisecond))
		if c.OK == 0 || c.Failed+c.StreamFailed > 0 || c.Streams != streams {
			return fmt.Sprintf("near is not served again: %+v", c)
		}
		return ""
	})
	var near counts
	b.eventually(20*time.Second, func() string {
		if _, near = l.loads(l.namespace, "near", l.since); near.StreamFailed < streams {
			return fmt.Sprintf("%d of %d streams from before have ended", near.StreamFailed, streams)
		}
		return ""
	})
	t.Logf("near: %d new connections, %d failed; %d streams ended, within %s", near.OK+near.Failed, near.Failed, near.StreamFailed, time.Since(l.since).Round(time.Second))
	time.Sleep(4 * time.Second)
	if _, far := l.loads(l.namespace, "far", time.Now().Add(-3*time.Second)); far.OK > 0 {
		t.Errorf("a node with certificates of the distrusted root is served: %+v", far)
	}

	// Its token is spent; a new pod has another. What the node keeps is stale.
	b.signal(node2, "signet-agent", "CONT")
	back := time.Now()
	b.kubectl("-n", system, "delete", "pod", b.partOn("agent", "node2"))
	b.ready()
	b.waitStatus(l.namespace, allThree)
	l.steady(time.Minute)
	t.Logf("the node was back %s after its agent", time.Since(back).Round(time.Second))
	for _, n := range b.ca("status").Nodes {
		if want := []string{after.Roots[0].Fingerprint}; fmt.Sprint(n.Trusted, n.Used) != fmt.Sprint(want, want) {
			t.Errorf("%+v", n)
		}
	}
}
