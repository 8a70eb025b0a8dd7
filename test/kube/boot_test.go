//go:build long

package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/test/cluster"
)

// Defends: without the API server, and without the control plane, the agent and
// Envoy start again from the node's disk, and a node that loses its power comes
// back when the API server does: nothing else is lost, nothing is opened, and
// what was recorded meanwhile is there afterwards.
func TestAPIServerAway(t *testing.T) {
	b := open(t)
	b.controlOn("node2")
	l := b.load()
	node1, node2 := b.cluster.Node("node1"), b.cluster.Node("node2")
	stop := b.hammer("node2", b.ip(l.namespace, "server")+":8080")
	far := b.ip(l.namespace, "far")
	l.since = time.Now()
	if err := b.cluster.StopControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
		defer cancel()
		if err := b.cluster.StartControlPlane(ctx); err != nil {
			t.Error(err)
		}
	})
	b.signal(node2, "signet-control", "KILL") // and it cannot come back: it has nobody to ask
	for round := range 2 {
		b.signal(node1, "signet-agent", "KILL")
		b.comes(node1, "signet-agent")
		t.Logf("round %d: the agent was killed and runs again without an API server", round+1)
	}
	time.Sleep(5 * time.Second)
	quiet := time.Now()
	b.signal(node1, "envoy", "KILL")
	b.comes(node1, "envoy")
	time.Sleep(5 * time.Second)
	served := time.Now()
	time.Sleep(5 * time.Second)
	cut := time.Now()
	if err := node1.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	time.Sleep(5 * time.Second)
	back := time.Now()
	if err := b.cluster.StartControlPlane(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := node1.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.ready()
	b.waitStatus(l.namespace, allThree)
	l.steady(2 * time.Minute)
	t.Logf("all is as before %s after the API server was started", time.Since(back).Round(time.Second))
	each, _ := l.loads(l.namespace, "far", l.since)
	between := func(from, to time.Time) (total counts) {
		for _, c := range each {
			if c.At.After(from.Add(time.Second)) && c.At.Before(to) {
				total.OK += c.OK
				total.Failed += c.Failed
				total.Wrong += c.Wrong
				total.StreamFailed += c.StreamFailed
			}
		}
		return total
	}
	agents, proxies := between(l.since, quiet), between(served, cut)
	t.Logf("no API server, no control plane, agent killed twice: %+v", agents)
	t.Logf("Envoy killed: %+v; 5 s later: %+v", between(quiet, served), proxies)
	for _, c := range []counts{agents, proxies} {
		if c.OK == 0 || c.Failed+c.Wrong+c.StreamFailed > 0 {
			t.Errorf("the API server away: %+v", c)
		}
	}
	records := 0
	for _, r := range b.audit("--since", l.since.UTC().Format(time.RFC3339), "--to", l.namespace+"/server", "--verdict", "allowed") {
		if r.Side == "destination" && r.Node == "node1" && strings.HasPrefix(r.Source.Address, far+":") && r.Start.Before(quiet) {
			records++
		}
	}
	t.Logf("%d of these connections are in the audit of the node that lost its power", records)
	if records < agents.OK {
		t.Errorf("%d connections were served and %d recorded", agents.OK, records)
	}
	// The server's address may be another's by now, or nobody's.
	stop()
}

// Defends: no part waits for one that waits for it. Every pod that may be in the
// mesh is in it, DNS included, and all nodes lose their power at once, those of
// the control plane too: all comes back, and a stranger is served never.
func TestBootWithAllEnrolled(t *testing.T) {
	b := open(t)
	b.mode("kube-system", "enforce")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if out, err := b.command(ctx, "kubectl", "annotate", "namespace", "kube-system", "signet.dev/mesh-").CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	l := b.load()
	all := b.statusOf("kube-system")
	t.Logf("kube-system: %s", all)
	stop := b.hammer("node2", "server."+l.namespace+":8080")
	began := time.Now()
	for _, n := range b.cluster.Nodes() {
		if err := n.PowerOff(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range b.cluster.Nodes() {
		if err := n.PowerOn(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	for _, n := range b.cluster.Nodes() {
		if err := n.WaitReady(t.Context()); err != nil {
			t.Fatal(err)
		}
	}
	t.Logf("the nodes were ready %s after the power was cut", time.Since(began).Round(time.Second))
	// What the API server says of pods is from before, until kubelet has looked.
	for _, name := range []string{"server", "near", "far"} {
		b.eventually(2*time.Minute, func() string {
			if n, _ := b.restarts(l.namespace, name); n == 0 {
				return name + " was not started again"
			}
			return ""
		})
	}
	b.ready()
	t.Logf("the mesh was ready after %s", time.Since(began).Round(time.Second))
	b.waitStatus(l.namespace, allThree)
	b.waitStatus("kube-system", all)
	t.Logf("all pods were in again after %s", time.Since(began).Round(time.Second))
	l.steady(2 * time.Minute)
	stop()
}

// comes waits until a program runs on a node for at least a moment.
func (b *bench) comes(n *cluster.Node, program string) {
	b.Helper()
	b.eventually(90*time.Second, func() string {
		script := fmt.Sprintf(`for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = %q ] && exit 0; done; exit 1`, program)
		if err := n.Command(b.Context(), "bash", "-c", script).Run(); err != nil {
			return program + " does not run"
		}
		return ""
	})
}
