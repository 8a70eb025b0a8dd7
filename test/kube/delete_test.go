package kube

import (
	"fmt"
	"strings"
	"testing"
	"time"
)

// inventory has, for each node, all that a release could leave on it: files,
// mounts, CNI plugins and configuration, packet rules of the node and of its
// pods, processes.
func (b *bench) inventory() map[string]string {
	b.Helper()
	const look = `
for dir in /run/signet /var/lib/signet; do [ ! -e $dir ] || find $dir; done
ls /opt/cni/bin /etc/cni/net.d /var/lib/kubelet/plugins /var/lib/kubelet/plugins_registry
for file in /etc/cni/net.d/*; do sha256sum "$file"; done
grep signet /proc/self/mountinfo || true
nft list tables | grep signet || true
for ns in /run/netns/*; do
  [ ! -e "$ns" ] || nsenter --net="$ns" nft list ruleset | grep -i signet || true
  [ ! -e "$ns" ] || nsenter --net="$ns" tc qdisc show | grep clsact || true
done
for p in /proc/[0-9]*; do grep -a -E 'signet|envoy' "$p/comm" 2>/dev/null || true; done`
	all := map[string]string{}
	for _, n := range b.cluster.Nodes() {
		out, err := n.Command(b.Context(), "sh", "-c", look).CombinedOutput()
		if err != nil {
			b.Fatalf("%s: %v\n%s", n.Name(), err, out)
		}
		all[n.Name()] = string(out)
	}
	return all
}

// Deleting the whole release under traffic: pods run on without a restart,
// nothing is left on the nodes, and a new install takes the pods in again.
func TestDeleteRelease(t *testing.T) {
	b := open(t)
	b.uninstall()
	before := b.inventory()
	b.install()

	l := b.load()
	began := time.Now()
	b.uninstall()
	t.Logf("the release was gone after %s", b.gone.Sub(began).Round(100*time.Millisecond))
	time.Sleep(5 * time.Second)
	for _, name := range []string{"near", "far"} {
		_, c := l.loads(l.namespace, name, began)
		t.Logf("%s: %d new connections were served, %d failed; %d streams broke %v", name, c.OK, c.Failed, c.StreamFailed, c.Errors)
		_, after := l.loads(l.namespace, name, time.Now().Add(-4*time.Second))
		if after.Failed+after.Wrong+after.StreamFailed > 0 || after.OK == 0 || after.Streams != streams {
			t.Errorf("%s: without the mesh: %+v", name, after)
		}
		if n, _ := b.restarts(l.namespace, name); n > 0 {
			t.Errorf("%s was started again %d times", name, n)
		}
	}
	for node, now := range b.inventory() {
		if now != before[node] || strings.Contains(now, "csi.signet.dev") {
			t.Errorf("%s has\n%s\nand had before\n%s", node, now, before[node])
		}
	}
	for line := range strings.Lines(b.kubectl("get", "clusterroles,clusterrolebindings,validatingadmissionpolicies,validatingadmissionpolicybindings,namespaces,csidrivers", "-o", "name")) {
		if strings.Contains(line, "signet") {
			t.Errorf("the API server still has %s", line)
		}
	}

	b.install()
	b.waitStatus(l.namespace, "enforce: 3 of 3 pods enrolled")
	l.steady(30 * time.Second)
	for _, r := range b.audit("--since", "3s", "--to", l.namespace+"/server") {
		if r.Transport != "mtls" || r.Verdict != "allowed" {
			t.Errorf("after the new install: %+v", r)
		}
	}
}

// uninstall deletes what install applied, but for the definitions of policies,
// and returns when all pods of it are gone.
func (b *bench) uninstall() {
	b.Helper()
	// Not found: the token in a Secret goes with its account.
	b.kubectl("delete", "--ignore-not-found", "-f", b.manifests, "--wait=false")
	b.eventually(time.Minute, func() string {
		if left := b.kubectl("get", "pods", "-A", "-l", "app.kubernetes.io/part-of=signet", "-o", "name"); left != "" {
			return fmt.Sprintf("left: %s", left)
		}
		return ""
	})
	// Kubernetes looks at a namespace that goes again after as long as the pods
	// in it may take to end, half an hour for a proxy; a change makes it look now.
	b.gone = time.Now()
	b.eventually(time.Minute, func() string {
		out, err := b.try("annotate", "--overwrite", "namespace", system, fmt.Sprintf("looked=%d", time.Now().UnixNano()))
		if err == nil || !strings.Contains(out, "NotFound") {
			return "the namespace is still there: " + out
		}
		return ""
	})
}
