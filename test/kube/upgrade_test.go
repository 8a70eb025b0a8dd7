package kube

import (
	"fmt"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
)

// loaded is callers under load: one on the server's node and one on the other.
type loaded struct {
	*bench
	namespace string
	since     time.Time
}

// streams is how many connections each caller keeps open, rate how many new
// ones it makes in a second.
const (
	streams = 25
	rate    = 25
)

// load starts a server and two callers that never pause.
func (b *bench) load() *loaded {
	b.Helper()
	ns := b.namespace("enforce")
	b.apply(service(ns, "server", "server") + allow(ns, "server", "client"))
	caller := func(name, node string) *pod {
		return &pod{namespace: ns, name: name, account: "client", node: node,
			args: []string{"load", "server." + ns + ":8080", fmt.Sprintf("--rate=%d", rate), fmt.Sprintf("--conns=%d", streams), "--want=server"}}
	}
	b.startPods(&pod{namespace: ns, name: "server", account: "server", node: "node1", args: []string{"serve"},
		more: []string{"readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}"}})
	b.startPods(caller("near", "node1"), caller("far", "node2"))
	b.waitStatus(ns, "enforce: 3 of 3 pods enrolled")
	l := &loaded{bench: b, namespace: ns}
	l.steady(30 * time.Second)
	l.since = time.Now()
	return l
}

// steady waits until both callers have all of their streams and nothing fails
// or hangs: what hangs has not failed yet, but in two seconds nearly all comes
// back (25 new connections and 250 messages each).
func (l *loaded) steady(limit time.Duration) {
	l.Helper()
	from := time.Now()
	l.eventually(limit, func() string {
		for _, name := range []string{"near", "far"} {
			each, total := l.loads(l.namespace, name, from)
			if total.Failed+total.StreamFailed > 0 {
				from = time.Now()
				return fmt.Sprintf("%s fails: %+v", name, total)
			}
			if len(each) < 2 {
				return name + " has not told enough yet"
			}
			last := each[len(each)-2:]
			if last[1].Streams != streams || last[0].OK+last[1].OK < 2*rate*3/4 || last[0].Echoed+last[1].Echoed < 2*streams*6 {
				return fmt.Sprintf("%s is not under steady load: %+v", name, last)
			}
		}
		return ""
	})
}

// judge fails the test when a connection failed since the load was steady.
func (l *loaded) judge(what string) {
	l.Helper()
	time.Sleep(2 * time.Second) // lines are printed each second
	for _, name := range []string{"near", "far"} {
		_, c := l.loads(l.namespace, name, l.since)
		l.Logf("%s: %s: %d new connections, %d failed, %d wrong, %d skipped; %d streams, %d broke; longest call %.0f ms %v",
			what, name, c.OK+c.Failed, c.Failed, c.Wrong, c.Skipped, c.Streams, c.StreamFailed, c.MaxMS, c.Errors)
		if c.OK == 0 || c.Failed+c.Wrong+c.Skipped+c.StreamFailed+c.StreamWrong > 0 || c.Streams != streams {
			l.Errorf("%s: %s: connections failed: %+v", what, name, c)
		}
	}
	l.since = time.Now()
}

// workloadOf is a component's DaemonSet or Deployment.
func workloadOf(component string) string {
	if component == "control" {
		return "deployment/signet-control"
	}
	return "daemonset/signet-" + component
}

// roll replaces a part of the release ("agent", "proxy", "control") pod by pod,
// and returns when the new pods are ready.
func (b *bench) roll(component string) {
	b.Helper()
	b.replace(component, func() { b.kubectl("-n", system, "rollout", "restart", workloadOf(component)) })
}

// replace changes a part of the release and returns when it has been replaced by
// new pods that are ready. `kubectl rollout status` would wait for the old ones
// of the proxy, which end with their last connection.
func (b *bench) replace(component string, change func()) {
	b.Helper()
	want := len(b.cluster.Nodes())
	if component == "control" {
		d, err := b.client.AppsV1().Deployments(system).Get(b.Context(), "signet-control", metav1.GetOptions{})
		if err != nil {
			b.Fatal(err)
		}
		want = int(*d.Spec.Replicas)
	}
	before := b.parts(component)
	change()
	b.eventually(3*time.Minute, func() string {
		ready := 0
		for uid, ok := range b.parts(component) {
			if _, old := before[uid]; !old && ok {
				ready++
			}
		}
		if ready < want {
			return fmt.Sprintf("%d new pods of the %s are ready, want %d", ready, component, want)
		}
		return ""
	})
}

// retag gives the release's images a second tag on every node.
func (b *bench) retag(tag string) {
	b.Helper()
	for _, n := range b.cluster.Nodes() {
		for _, component := range []string{"control", "agent", "proxy"} {
			name := "localhost/signet-" + component + ":"
			b.script(n, fmt.Sprintf("ctr -n k8s.io images tag --force %s%s %s%s", name, b.version, name, tag))
		}
	}
}

// image sets the image of a component to that with a tag.
func (b *bench) image(component, tag string) {
	b.Helper()
	image := "localhost/signet-" + component + ":" + tag
	args := []string{"-n", system, "set", "image", workloadOf(component), component + "=" + image}
	if component == "agent" {
		args = append(args, "cni="+image)
	}
	b.kubectl(args...)
}

// parts has the pods of a component by UID, and whether each is ready and stays.
func (b *bench) parts(component string) map[types.UID]bool {
	b.Helper()
	pods, err := b.client.CoreV1().Pods(system).List(b.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=" + component})
	if err != nil {
		b.Fatal(err)
	}
	out := map[types.UID]bool{}
	for i := range pods.Items {
		p := &pods.Items[i]
		out[p.UID] = p.DeletionTimestamp == nil && slices.ContainsFunc(p.Status.Conditions, func(c corev1.PodCondition) bool {
			return c.Type == corev1.PodReady && c.Status == corev1.ConditionTrue
		})
	}
	return out
}

// dialler is a pod whose first instruction calls the server, and which ends with
// what that said.
func (l *loaded) dialler(name, node string) *pod {
	return &pod{namespace: l.namespace, name: name, account: "client", node: node,
		args: []string{"dial", "server." + l.namespace + ":8080"}, spec: []string{"restartPolicy: Never"}}
}

// dialled waits until diallers have ended, and fails the test unless each was
// answered by the server.
func (l *loaded) dialled(limit time.Duration, names ...string) {
	l.Helper()
	for _, name := range names {
		l.eventually(limit, func() string {
			p, err := l.client.CoreV1().Pods(l.namespace).Get(l.Context(), name, metav1.GetOptions{})
			if err != nil {
				return err.Error()
			}
			switch p.Status.Phase {
			case corev1.PodSucceeded:
				return ""
			case corev1.PodFailed:
				l.Errorf("%s started and was not served: %s", name, l.kubectl("-n", l.namespace, "logs", name))
				return ""
			}
			return name + " is " + string(p.Status.Phase)
		})
	}
	l.kubectl(append([]string{"-n", l.namespace, "delete", "pod", "--wait=false"}, names...)...)
}

// An upgrade of the agent, of Envoy or of the control plane, be it to another
// template or to another image, fails no new connection and breaks no open one:
// the open ones live on in the old proxy. Pods that start meanwhile wait until
// they are captured, and then do.
func TestUpgradeUnderLoad(t *testing.T) {
	b := open(t)
	next := b.version + "-next"
	b.retag(next)
	l := b.load()
	// Without it, connections that wait at the old proxy's socket when that
	// closes are reset.
	if got := strings.TrimSpace(b.kubectl("-n", l.namespace, "exec", "server", "--", "busybox", "cat", "/proc/sys/net/ipv4/tcp_migrate_req")); got != "1" {
		t.Errorf("net.ipv4.tcp_migrate_req in a pod is %q, want 1", got)
	}
	rounds := 3
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		rounds = 10
	}
	for round := range rounds {
		for _, what := range []string{"proxy", "agent", "control"} {
			how := []string{"restarted", "to another image", "back to the first image"}[round%3]
			names := []string{fmt.Sprintf("%s-%d-1", what, round), fmt.Sprintf("%s-%d-2", what, round)}
			b.replace(what, func() {
				switch round % 3 {
				case 0:
					b.kubectl("-n", system, "rollout", "restart", workloadOf(what))
				case 1:
					b.image(what, next)
				case 2:
					b.image(what, b.version)
				}
				b.apply(l.dialler(names[0], "node1").yaml() + l.dialler(names[1], "node2").yaml())
			})
			l.dialled(time.Minute, names...)
			l.judge(fmt.Sprintf("round %d, the %s %s", round+1, what, how))
		}
	}
	// The streams live in the proxies of before; each is in Terminating, and
	// ends with the last of them.
	n := len(b.parts("proxy"))
	t.Logf("%d proxies run, %d of them only for streams from before", n, n-2)
	if n < 4 {
		t.Error("no proxy of before is left, though its streams are open")
	}
	b.kubectl("-n", l.namespace, "delete", "pod", "near", "far", "server", "--wait=true")
	b.eventually(time.Minute, func() string {
		if n := len(b.parts("proxy")); n != 2 {
			return fmt.Sprintf("%d proxies are left, want one on each node", n)
		}
		return ""
	})
}

// Connections that are open when a proxy is replaced are cut at the drain limit,
// not before and not much later; new ones are served all the while. The other
// limit, that of listeners which are replaced, does not concern them: Envoy by
// itself would end them in the last third of that.
func TestDrainLimit(t *testing.T) {
	const limit, other = 50 * time.Second, 30 * time.Second
	b := open(t)
	whole := func() { b.kubectl("apply", "-f", b.manifests) }
	b.replace("proxy", func() { b.patchProxy("--drain-limit="+limit.String(), "--replaced-limit="+other.String()) })
	l := b.load()
	old := b.parts("proxy")
	b.roll("proxy")
	began := time.Now()
	time.Sleep(other + 3*time.Second)
	l.judge("within the limit") // 2 s
	b.eventually(limit+20*time.Second, func() string {
		for uid := range b.parts("proxy") {
			if _, was := old[uid]; was {
				return fmt.Sprintf("proxy %s of before still runs", uid)
			}
		}
		return ""
	})
	t.Logf("the proxies of before had ended %s after the new ones were ready", time.Since(began).Round(100*time.Millisecond))
	time.Sleep(2 * time.Second)
	for _, name := range []string{"near", "far"} {
		_, c := l.loads(l.namespace, name, l.since)
		t.Logf("at the limit: %s: %d new connections, %d failed; %d of %d streams were cut %v", name, c.OK+c.Failed, c.Failed, c.StreamFailed, streams, c.Errors)
		if c.OK == 0 || c.Failed+c.Wrong+c.Skipped+c.StreamWrong > 0 {
			t.Errorf("at the limit: %s: new connections failed: %+v", name, c)
		}
		if c.StreamFailed < streams { // one that is opened anew may be cut by the second node's
			t.Errorf("at the limit: %s: %d of %d streams were cut", name, c.StreamFailed, streams)
		}
	}
	l.steady(30 * time.Second)
	l.since = time.Now()
	b.replace("proxy", whole)
	l.judge("back to the usual limit")
}

// patchProxy replaces the last argument of the proxy, which is its limit.
func (b *bench) patchProxy(args ...string) {
	b.Helper()
	patch := []string{`{"op": "remove", "path": "/spec/template/spec/containers/0/args/3"}`}
	for _, arg := range args {
		patch = append(patch, fmt.Sprintf(`{"op": "add", "path": "/spec/template/spec/containers/0/args/-", "value": %q}`, arg))
	}
	b.kubectl("-n", system, "patch", workloadOf("proxy"), "--type=json", "-p", "["+strings.Join(patch, ",")+"]")
}

// An upgrade to something that cannot start, or cannot serve, stops at the first
// node: every old proxy serves on, nothing fails, and taking the upgrade back is
// all there is to do. The second case is the one in which the new pod does run,
// and answers readiness for itself only: if the old one answered for it, the
// old one would not be ready either and be deleted.
func TestUpgradeThatFails(t *testing.T) {
	b := open(t)
	l := b.load()
	// What earlier tests have left ends with its last connection, and is not to do
	// so while it is looked at.
	b.eventually(time.Minute, func() string {
		if n := len(b.parts("proxy")); n != len(b.cluster.Nodes()) {
			return fmt.Sprintf("%d proxies, want one on each node", n)
		}
		return ""
	})
	for _, c := range []struct {
		what string
		do   func()
	}{
		{"an image that does not exist", func() { b.image("proxy", "no-such-tag") }},
		{"an Envoy that ends at once", func() { b.patchProxy("--envoy=/usr/bin/signet-proxy") }},
	} {
		before := b.parts("proxy")
		c.do()
		b.eventually(30*time.Second, func() string {
			if n := len(b.parts("proxy")); n != len(before)+1 {
				return fmt.Sprintf("%d proxies, want one more than %d", n, len(before))
			}
			return ""
		})
		for end := time.Now().Add(20 * time.Second); time.Now().Before(end); time.Sleep(500 * time.Millisecond) {
			now := b.parts("proxy")
			for uid, ready := range before {
				if ready && !now[uid] {
					t.Fatalf("%s: an old proxy that served was ended, or is not ready: %v", c.what, now)
				}
			}
			if len(now) != len(before)+1 {
				t.Fatalf("%s: it went on to another node: %v", c.what, now)
			}
		}
		b.kubectl("-n", system, "rollout", "undo", workloadOf("proxy"))
		b.eventually(30*time.Second, func() string {
			if n := len(b.parts("proxy")); n != len(before) {
				return fmt.Sprintf("%d proxies, want %d", n, len(before))
			}
			return ""
		})
		l.judge("a proxy with " + c.what)
	}

	// There is one agent on a node, so the node is without: its pods are served,
	// new ones wait, and start when it is back.
	b.image("agent", "no-such-tag")
	agentless := ""
	b.eventually(30*time.Second, func() string {
		has := map[string]bool{}
		pods, err := b.client.CoreV1().Pods(system).List(t.Context(), metav1.ListOptions{LabelSelector: "app.kubernetes.io/component=agent"})
		if err != nil {
			t.Fatal(err)
		}
		ready := b.parts("agent")
		for i := range pods.Items {
			has[pods.Items[i].Spec.NodeName] = has[pods.Items[i].Spec.NodeName] || ready[pods.Items[i].UID]
		}
		if len(pods.Items) == 2 && has["node1"] != has["node2"] {
			agentless = "node1"
			if has["node1"] {
				agentless = "node2"
			}
			return ""
		}
		return fmt.Sprintf("nodes with an agent: %v", has)
	})
	b.apply(l.dialler("waits", agentless).yaml())
	other := map[string]string{"node1": "node2", "node2": "node1"}[agentless]
	b.apply(l.dialler("elsewhere", other).yaml())
	l.dialled(30*time.Second, "elsewhere")
	b.eventually(30*time.Second, func() string {
		if out := b.kubectl("-n", l.namespace, "get", "events", "--field-selector=involvedObject.name=waits,reason=FailedCreatePodSandBox"); !strings.Contains(out, "signet") {
			return "no event says why the pod waits: " + out
		}
		return ""
	})
	time.Sleep(5 * time.Second)
	if p := b.kubectl("-n", l.namespace, "get", "pod", "waits", "-o", "jsonpath={.status.phase}"); p != "Pending" {
		t.Errorf("a pod of a node without an agent is %s, want it to wait", p)
	}
	l.judge(agentless + " without an agent")
	b.kubectl("-n", system, "rollout", "undo", workloadOf("agent"))
	l.dialled(time.Minute, "waits")
	b.ready()
	l.judge("the agent is back")
}
