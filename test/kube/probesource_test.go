package kube

import (
	"context"
	"fmt"
	"net"
	"net/netip"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/agent/capture"
	"github.com/signet-mesh/signet/test/cluster"
)

// script runs a shell script as a node's root.
func (b *bench) script(n *cluster.Node, script string) string {
	b.Helper()
	out, err := n.Command(b.Context(), "bash", "-c", "set -e\n"+script).CombinedOutput()
	if err != nil {
		b.Fatalf("%s: %s: %v\n%s", n.Name(), script, err, out)
	}
	return strings.TrimSpace(string(out))
}

// addresses returns a pod's addresses, of both families where it has them.
func (b *bench) addresses(namespace, name string) (out []netip.Addr) {
	b.Helper()
	p, err := b.client.CoreV1().Pods(namespace).Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	for _, ip := range p.Status.PodIPs {
		out = append(out, netip.MustParseAddr(ip.IP))
	}
	return out
}

// place is where calls come from: a network namespace of a node.
type place struct {
	what  string
	node  *cluster.Node
	netns string // "": the node's own
	link  string // in the node's own namespace, the one that leads there
}

// within has a command run in the place.
func (p *place) within(command string) string {
	if p.netns == "" {
		return command
	}
	return "nsenter --net=" + p.netns + " " + command
}

// place returns the place that a pod is.
func (b *bench) place(what string, n *cluster.Node, namespace, name string) *place {
	b.Helper()
	address := b.ip(namespace, name)
	netns := b.script(n, fmt.Sprintf("for ns in /run/netns/*; do if nsenter --net=$ns ip -4 -o addr | grep -q ' %s/'; then echo $ns; fi; done", address))
	link := b.script(n, fmt.Sprintf(`ip -o route get %s | sed -n 's/.* dev \([^ ]*\).*/\1/p'`, address))
	if netns == "" || strings.ContainsAny(netns+link, "\n ") || link == "" {
		b.Fatalf("%s: %s: network namespace %q, link %q", n.Name(), name, netns, link)
	}
	return &place{what: what, node: n, netns: netns, link: link}
}

// calls is a script that calls ports of an address from a source, or whichever
// if that is not valid, a number of times at once, and says SERVED for each answer.
func (p *place) calls(source, to netip.Addr, times int, ports ...uint16) string {
	bind := ""
	if source.IsValid() {
		bind = "--interface " + source.String()
	}
	var out strings.Builder
	for _, port := range ports {
		fmt.Fprintf(&out, "for i in $(seq %d); do %s -g -sS --max-time 1 %s http://%s/id && echo SERVED by port %d & done 2>&1\n",
			times, p.within("curl"), bind, netip.AddrPortFrom(to, port), port)
	}
	return out.String() + "wait\ntrue"
}

func served(out string) int { return strings.Count(out, "SERVED") }

// atEnd runs a script on a node when the test ends; it may fail, since what it
// undoes may have gone by itself.
func (b *bench) atEnd(n *cluster.Node, script string) {
	b.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(b.Context()), 10*time.Second)
		defer cancel()
		_ = n.Command(ctx, "bash", "-c", script).Run()
	})
}

// forge gives the place an address that is somebody else's, to send from, and
// returns a script that takes it away again, as the test's end does.
func (b *bench) forge(p *place, source netip.Addr) (undo string) {
	b.Helper()
	link, more := "eth0", ""
	if p.netns == "" {
		link = "lo"
	}
	if source.Is6() {
		more = " nodad"
	}
	change := func(what string) string {
		return p.within(fmt.Sprintf("ip addr %s %s/%d dev %s", what, source, source.BitLen(), link))
	}
	b.script(p.node, change("add")+more)
	b.atEnd(p.node, change("del"))
	return change("del")
}

// answers has the nodes route to a place what is sent to an address: more than
// an attacker in a pod can do, so that nothing but the rules is in the way.
func (b *bench) answers(from *cluster.Node, p *place, source netip.Addr) {
	b.Helper()
	add := func(n *cluster.Node, to string) {
		route := fmt.Sprintf("%s/%d %s", source, source.BitLen(), to)
		b.script(n, "ip route replace "+route)
		b.atEnd(n, "ip route del "+route)
	}
	if p.netns != "" {
		add(p.node, "dev "+p.link)
	}
	if from != p.node {
		via := p.node.Addr().String()
		if source.Is6() {
			via = b.script(p.node, "ip -6 -o addr show scope global | grep -v ': lo ' | sed -n 's/.* inet6 \\([^/]*\\).*/\\1/p' | head -1")
		}
		add(from, "via "+via)
	}
}

// What lets kubelet's probes in lets nobody else in: not a pod that may send
// whatever it likes, from the source that pods see probes come from, from a
// node's address, or from that of a pod which a policy lets in; not a pod with
// the node's network; not root on the node, nor on another one that has deleted
// its own rules. Answers to the forged source are even routed to the attacker,
// so that the rules are all that stands in between: the test ends with the
// same attack at a moment when the node's rules are deleted, which is served.
func TestProbeSourceIsNobodyElses(t *testing.T) {
	b := open(t)
	ns, out := b.namespace("enforce"), b.namespace("")
	const slow = "periodSeconds: 1, failureThreshold: 60"
	target := &pod{namespace: ns, name: "one", account: "one", node: "node1", args: []string{"serve"}, more: []string{
		"readinessProbe: {httpGet: {path: /healthz, port: 8080}, " + slow + "}", "livenessProbe: {tcpSocket: {port: 8081}, " + slow + "}"}}
	b.apply(strings.TrimSuffix(strings.TrimRight(target.yaml(), "\n "), "---") + second)
	root := "securityContext: {runAsUser: 0, capabilities: {add: [NET_RAW, NET_ADMIN]}}"
	b.startPods(
		&pod{namespace: ns, name: "caller", account: "caller", node: "node1", args: []string{"hold"}},
		&pod{namespace: out, name: "near", node: "node1", args: []string{"hold"}, more: []string{root}},
		&pod{namespace: out, name: "far", node: "node2", args: []string{"hold"}, more: []string{root}},
		&pod{namespace: out, name: "host", node: "node1", args: []string{"hold"}, spec: []string{"hostNetwork: true", "hostPID: true"}, more: []string{root}},
	)
	b.kubectl("-n", ns, "wait", "pod", "one", "--for=condition=Ready", "--timeout=1m")
	b.waitStatus(ns, "enforce: 2 of 2 pods enrolled")
	b.apply(allow(ns, "one", "caller"))
	ones, callers := b.addresses(ns, "one"), b.addresses(ns, "caller")
	if len(ones) != 2 || len(callers) != 2 {
		t.Fatalf("addresses %s and %s, want each of both families", ones, callers)
	}
	b.served(ns, "caller", net.JoinHostPort(ones[0].String(), "8080"), "one")

	node1, node2 := b.cluster.Node("node1"), b.cluster.Node("node2")
	near, far := b.place("a pod of the same node", node1, out, "near"), b.place("a pod of the other node", node2, out, "far")
	root1, root2 := &place{what: "root on the node, outside of kubelet", node: node1}, &place{what: "root on the other node", node: node2}
	const times = 5
	attempts := 0
	attack := func(p *place, who string, source netip.Addr, before string) {
		t.Helper()
		for _, to := range ones {
			if source.IsValid() && source.Is4() != to.Is4() {
				continue
			}
			attempts += 3 * times
			says := b.script(p.node, before+"\n"+p.calls(source, to, times, 8080, 8081, 8085))
			if n := served(says); n > 0 {
				t.Errorf("%s%s was served %d times by %s: %s", p.what, who, n, to, says)
			}
		}
	}
	for _, p := range []*place{near, far, root1, root2} {
		attack(p, "", netip.Addr{}, "")
	}
	for _, p := range []*place{near, far} {
		for _, a := range []struct {
			who    string
			source netip.Addr
		}{
			{" with the address of the target's node", node1.Addr()},
			{" with the address of the other node", node2.Addr()},
			{" with the address of a pod that may", callers[0]},
			{" with the address of a pod that may", callers[1]},
		} {
			undo := b.forge(p, a.source)
			attack(p, a.who, a.source, "")
			b.script(p.node, undo)
		}
	}
	const deleted = "for t in inet bridge; do nft add table $t signet; nft delete table $t signet; done"
	for _, p := range []*place{far, root2, root1, near} {
		for _, source := range []netip.Addr{capture.ProbeSource, capture.ProbeSource6} {
			undo := b.forge(p, source)
			b.answers(node1, p, source)
			attack(p, " with the source of probes", source, "")
			if p == root2 { // nothing on its own node stops it
				attack(p, " with the source of probes and without rules", source, deleted)
			}
			if p != near { // which is needed below
				b.script(p.node, undo)
			}
		}
	}

	// The node's network and processes, as root, still are not kubelet, whose
	// control group it may not enter either.
	to := net.JoinHostPort(ones[0].String(), "8080")
	says := b.kubectl("-n", out, "exec", "host", "--", "busybox", "sh", "-c", fmt.Sprintf(`
kubelet=$(busybox pidof kubelet)
group=$(busybox sed -n 's/^0:://p' /proc/$kubelet/cgroup) # as this pod sees it: /../../..
path=${group##*..}
for dir in /sys/fs/cgroup /proc/$kubelet/root/sys/fs/cgroup /proc/1/root/sys/fs/cgroup; do
  for file in $dir$path/cgroup.procs $dir/cgroup.procs; do
    if (echo $$ > $file) 2>/dev/null && [ "$(busybox sed -n 's/^0:://p' /proc/self/cgroup)" = "$group" ]; then echo MOVED by $file; fi
  done
done
[ -n "$kubelet" ] && echo KUBELET is process $kubelet
for i in 1 2 3 4 5 6 7 8 9 10; do testpod dial %s --timeout=1s || true; done 2>&1`, to))
	attempts += 10
	if strings.Contains(says, `"ok":true`) || strings.Contains(says, "MOVED") || !strings.Contains(says, "KUBELET") || strings.Count(says, `"ok":false`) != 10 {
		t.Errorf("a pod with the node's network and processes: %s", says)
	}
	t.Logf("%d attempts to pass for kubelet, none served", attempts)

	// The control of all this: a process that is kubelet's own, by its control
	// group, is served on a probed port, and on no other one.
	if n, says := b.asKubelet(node1, to, 10); n != 10 {
		t.Errorf("kubelet's own process was served %d times of 10: %s", n, says)
	}
	if n, says := b.asKubelet(node1, net.JoinHostPort(ones[0].String(), "8085"), 10); n > 0 {
		t.Errorf("kubelet's own process was served %d times of 10 by a port that is not probed: %s", n, says)
	}
	// The same attack is served while the node's rules are gone, but on the
	// probed ports alone: the pod's own rules have the others.
	for i, source := range []netip.Addr{capture.ProbeSource, capture.ProbeSource6} {
		without := func(port uint16) (n int) {
			for range 3 { // the agent puts the rules back within a second
				n += served(b.script(node1, deleted+"\n"+near.calls(source, ones[i], times, port)))
				time.Sleep(2 * time.Second)
			}
			return n
		}
		n := without(8080)
		t.Logf("%s: %d of %d served while the node has no rules", source, n, 3*times)
		if n == 0 {
			t.Errorf("%s was not served while the node had no rules: the attack does not show what they do", source)
		}
		if n := without(8085); n > 0 {
			t.Errorf("%s was served %d times by a port that is not probed while the node had no rules", source, n)
		}
	}
	b.stay(ns, []string{"one"}, 2*time.Second, "after the attacks")
	records := b.audit("--since", "5m", "--to", ns+"/one", "--verdict", "denied")
	t.Logf("%d records of refusals", len(records))
	if len(records) == 0 {
		t.Error("refused callers left no record")
	}
}

// asKubelet has a process of a node, in kubelet's control group, call an address
// a number of times.
func (b *bench) asKubelet(n *cluster.Node, address string, times int) (count int, says string) {
	b.Helper()
	out := b.script(n, fmt.Sprintf(`mkdir -p /tmp/cgroup2; mount -t cgroup2 none /tmp/cgroup2
path=$(sed -n 's/^0:://p' /proc/$(pidof kubelet)/cgroup)
echo $$ > /tmp/cgroup2$path/cgroup.procs
umount /tmp/cgroup2
for i in $(seq %d); do curl -sS --max-time 1 http://%s/id && echo SERVED || true; done 2>&1`, times, address))
	return served(out), string(tail([]byte(out), 300))
}
