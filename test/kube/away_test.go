package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/test/cluster"
)

// shortTTL is the life of workload certificates in these tests.
const shortTTL = 100 * time.Second

// setTTL changes the life of workload certificates for the time of a test, and
// waits until the present ones live no longer.
func (b *bench) setTTL(ttl time.Duration) {
	b.Helper()
	set := func(value string) {
		b.kubectl("patch", "meshconfig", "mesh", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"svidTTL":%q}}`, value))
	}
	before := b.kubectl("get", "meshconfig", "mesh", "-o", "jsonpath={.spec.svidTTL}")
	set(ttl.String())
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), time.Minute)
		defer cancel()
		if out, err := b.command(ctx, "kubectl", "patch", "meshconfig", "mesh", "--type=merge", "-p", fmt.Sprintf(`{"spec":{"svidTTL":%q}}`, before)).CombinedOutput(); err != nil {
			b.Errorf("%v\n%s", err, out)
		}
	})
}

// hammer has a pod outside of the mesh call an address all the time, until the
// returned function is called, which fails the test if one call was answered.
// The caller says itself, each second, how many were.
func (b *bench) hammer(node, address string) (stop func()) {
	b.Helper()
	ns := b.namespace("")
	b.startPods(&pod{namespace: ns, name: "stranger", node: node, args: []string{"load", address, "--rate=50", "--timeout=500ms"}})
	since := time.Now()
	return func() {
		b.Helper()
		time.Sleep(time.Second)
		each, total := b.loads(ns, "stranger", since)
		b.Logf("a stranger called %s %d times in %d s, and was served %d times", address, total.OK+total.Failed, len(each), total.OK)
		if total.OK > 0 || total.Failed == 0 {
			b.Errorf("a caller outside of the mesh: %+v", total)
		}
	}
}

// partOn returns the name of a node's pod of a component.
func (b *bench) partOn(component, node string) string {
	b.Helper()
	return strings.TrimSpace(b.kubectl("-n", system, "get", "pods", "-l", "app.kubernetes.io/component="+component,
		"--field-selector=spec.nodeName="+node+",status.phase=Running", "-o", "jsonpath={.items[0].metadata.name}"))
}

// The control plane is away for longer than half of a certificate's life, and
// meanwhile the agent, Envoy and a whole node are started again. What was in the
// mesh is served all the while, by certificates that are still good; nobody
// else is.
func TestControlPlaneAway(t *testing.T) {
	b := open(t)
	l := b.load()
	address := "server." + l.namespace + ":8080"
	stop := b.hammer("node2", address)
	b.setTTL(shortTTL)
	// All have certificates of the short life.
	b.eventually(time.Minute, func() string {
		if n := b.longLived(); n > 0 {
			return fmt.Sprintf("%d certificates live longer than %s", n, shortTTL)
		}
		return ""
	})
	l.since = time.Now()
	node1 := b.cluster.Node("node1")

	b.kubectl("-n", system, "scale", "deployment/signet-control", "--replicas=0")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		_ = b.command(ctx, "kubectl", "-n", system, "scale", "deployment/signet-control", "--replicas=1").Run()
	})
	b.eventually(time.Minute, func() string {
		if n := len(b.parts("control")); n > 0 {
			return fmt.Sprintf("%d replicas of the control plane are left", n)
		}
		return ""
	})
	gone := time.Now()
	b.kubectl("-n", system, "delete", "pod", b.partOn("agent", "node1"), "--wait=false")
	time.Sleep(time.Until(gone.Add(shortTTL/2 + 2*time.Second)))
	l.judge(fmt.Sprintf("the control plane away for %s, an agent replaced", time.Since(gone).Round(time.Second)))

	b.kubectl("-n", system, "scale", "deployment/signet-control", "--replicas=1")
	b.ready()
	b.eventually(20*time.Second, func() string {
		if n := b.longLived(); n > 0 {
			return fmt.Sprint(n, " certificates")
		}
		return ""
	})
	l.judge("the control plane is back")

	// Envoy dies: what is open breaks, and new connections are served soon.
	before := time.Now()
	b.signal(node1, "envoy", "KILL")
	b.eventually(20*time.Second, func() string {
		_, c := l.loads(l.namespace, "far", time.Now().Add(-1500*time.Millisecond))
		if c.OK == 0 || c.Failed > 0 {
			return fmt.Sprintf("%+v", c)
		}
		return ""
	})
	_, c := l.loads(l.namespace, "far", before)
	t.Logf("Envoy killed: %d new connections failed, served again within %s; %d streams broke", c.Failed, time.Since(before).Round(100*time.Millisecond), c.StreamFailed)
	stop()
}

// certificate is what of `kubectl signet certs -o json` these tests look at.
type certificate struct {
	Holder, Issuer, LastError string
	NotBefore, NotAfter       time.Time
}

// certificates asks every node; that one of them has a finding is no fault here.
func (b *bench) certificates() []certificate {
	b.Helper()
	out, err := b.command(b.Context(), "kubectl", "signet", "certs", "-o", "json").Output()
	var doc struct{ Certificates []certificate }
	if jerr := json.Unmarshal(out, &doc); jerr != nil || len(doc.Certificates) == 0 {
		b.Fatalf("kubectl signet certs: %v: %v\n%s", err, jerr, out)
	}
	return doc.Certificates
}

// longLived counts the workload certificates that live longer than shortTTL.
func (b *bench) longLived() int {
	b.Helper()
	n := 0
	for _, c := range b.certificates() {
		if c.Holder != "node" && c.NotAfter.Sub(c.NotBefore) > shortTTL+30*time.Second {
			n++
		}
	}
	return n
}

// A node loses its power while the control plane is away. Its pods start again,
// each captured before its first process, by what the node has on its disk: they
// call others of the mesh, and a stranger who calls them is never served. No part
// waits for another that waits for it. Only where a pod is that came back with
// another address, the control plane has to tell the others.
func TestReboot(t *testing.T) {
	b := open(t)
	b.controlOn("node1")
	l := b.load()
	b.apply(service(l.namespace, "back", "back"))
	b.startPods(&pod{namespace: l.namespace, name: "back", account: "server", node: "node2", args: []string{"serve"}})
	b.waitStatus(l.namespace, "enforce: 4 of 4 pods enrolled")
	stop := b.hammer("node1", "back."+l.namespace+":8080")
	b.kubectl("-n", system, "scale", "deployment/signet-control", "--replicas=0")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		_ = b.command(ctx, "kubectl", "-n", system, "scale", "deployment/signet-control", "--replicas=1").Run()
	})
	b.eventually(time.Minute, func() string {
		if n := len(b.parts("control")); n > 0 {
			return fmt.Sprintf("%d replicas of the control plane are left", n)
		}
		return ""
	})
	node2 := b.cluster.Node("node2")
	began := time.Now()
	if err := node2.Reboot(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := node2.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	t.Logf("the node was ready %s after the power was cut", time.Since(began).Round(time.Second))
	b.eventually(3*time.Minute, func() string {
		out, err := b.try("-n", l.namespace, "logs", "far", "-c", "main", "--tail=2")
		if err != nil || !strings.Contains(out, `"ok":`) || strings.Contains(out, `"ok":0,`) || !strings.Contains(out, `"failed":0,`) {
			return fmt.Sprintf("the caller on the node: %v: %s", err, out)
		}
		return ""
	})
	t.Logf("with the control plane away, a pod of the node is served by one of the other %s after the power was cut", time.Since(began).Round(time.Second))
	b.kubectl("-n", system, "scale", "deployment/signet-control", "--replicas=1")
	b.ready()
	b.waitStatus(l.namespace, "enforce: 4 of 4 pods enrolled")
	b.served(l.namespace, "far", "back."+l.namespace+":8080", "back")
	l.steady(time.Minute)
	t.Logf("and all is as before after %s", time.Since(began).Round(time.Second))
	stop()
}

// controlOn keeps the control plane on a node for the time of a test: it must not
// be on the one whose power is cut.
func (b *bench) controlOn(node string) {
	b.Helper()
	set := func(ctx context.Context, value string) ([]byte, error) {
		patch := fmt.Sprintf(`{"spec":{"template":{"spec":{"nodeSelector":{"kubernetes.io/hostname":%s}}}}}`, value)
		return b.command(ctx, "kubectl", "-n", system, "patch", "deployment", "signet-control", "--type=merge", "-p", patch).CombinedOutput()
	}
	if out, err := set(b.Context(), fmt.Sprintf("%q", node)); err != nil {
		b.Fatalf("%v\n%s", err, out)
	}
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), time.Minute)
		defer cancel()
		if out, err := set(ctx, "null"); err != nil {
			b.Errorf("%v\n%s", err, out)
		}
	})
	b.ready()
	b.eventually(time.Minute, func() string {
		if n := len(b.parts("control")); n != 1 {
			return fmt.Sprintf("%d replicas of the control plane", n)
		}
		return ""
	})
}

// Status tells the truth: a pod counts only while its capture is looked at, and
// one whose rules are gone is repaired within a second and never open.
func TestStatusTellsTheTruth(t *testing.T) {
	b := open(t)
	b.controlOn("node2")
	l := b.load()
	node1 := b.cluster.Node("node1")
	// What the caller on the same node has said is lost with the node's power.
	near, far := b.hammer("node1", "server."+l.namespace+":8080"), b.hammer("node2", "server."+l.namespace+":8080")
	uid := strings.TrimSpace(b.kubectl("-n", l.namespace, "get", "pod", "server", "-o", "jsonpath={.metadata.uid}"))

	// All rules in the pod's namespace are deleted, again and again.
	for range 10 {
		if out, err := node1.Command(t.Context(), "nsenter", "--net=/run/signet/netns/"+uid, "nft", "flush", "ruleset").CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
		began := time.Now()
		b.eventually(2*time.Second, func() string {
			out, err := node1.Command(t.Context(), "nsenter", "--net=/run/signet/netns/"+uid, "nft", "list", "ruleset").CombinedOutput()
			if err != nil || !strings.Contains(string(out), "signet") {
				return fmt.Sprintf("%v\n%s", err, out)
			}
			return ""
		})
		t.Logf("deleted rules were there again after %s", time.Since(began).Round(10*time.Millisecond))
	}

	// Nobody looks: the agent is stopped, so nothing on its node counts.
	b.waitStatus(l.namespace, "enforce: 3 of 3 pods enrolled")
	began := time.Now()
	b.signal(node1, "signet-agent", "STOP")
	b.waitStatus(l.namespace, "enforce: 1 of 3 pods enrolled")
	t.Logf("the status knew %s after the agent was stopped that nobody looks", time.Since(began).Round(100*time.Millisecond))
	b.signal(node1, "signet-agent", "CONT")
	b.waitStatus(l.namespace, "enforce: 3 of 3 pods enrolled")

	// Nobody serves: the proxy is stopped.
	began = time.Now()
	b.signal(node1, "signet-proxy", "STOP") // or it would start another
	b.signal(node1, "envoy", "KILL")
	b.waitStatus(l.namespace, "enforce: 1 of 3 pods enrolled")
	t.Logf("the status knew %s after Envoy died", time.Since(began).Round(100*time.Millisecond))
	b.signal(node1, "signet-proxy", "CONT")
	b.waitStatus(l.namespace, "enforce: 3 of 3 pods enrolled")

	// The node is off.
	near()
	began = time.Now()
	if err := node1.PowerOff(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.waitStatus(l.namespace, "enforce: 1 of 3 pods enrolled")
	t.Logf("the status knew %s after the power was cut", time.Since(began).Round(100*time.Millisecond))
	if err := node1.PowerOn(t.Context()); err != nil {
		t.Fatal(err)
	}
	if err := node1.WaitReady(t.Context()); err != nil {
		t.Fatal(err)
	}
	b.waitStatus(l.namespace, "enforce: 3 of 3 pods enrolled")
	far()
}

// signal sends a signal to a program of a node by its name.
func (b *bench) signal(n *cluster.Node, program, signal string) {
	b.Helper()
	script := fmt.Sprintf(`found=; for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = %q ] && kill -%s ${p#/proc/} && found=1; done; [ -n "$found" ]`, program, signal)
	if out, err := n.Command(b.Context(), "bash", "-c", script).CombinedOutput(); err != nil {
		b.Fatalf("signal %s to %s on %s: %v\n%s", signal, program, n.Name(), err, out)
	}
}
