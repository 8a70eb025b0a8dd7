package kube

import (
	"fmt"
	"os"
	"slices"
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

// steady waits until both callers have all of their streams and nothing fails.
func (l *loaded) steady(limit time.Duration) {
	l.Helper()
	from := time.Now()
	l.eventually(limit, func() string {
		for _, name := range []string{"near", "far"} {
			each, total := l.loads(l.namespace, name, from)
			if len(each) < 2 || total.OK == 0 || total.Failed+total.StreamFailed > 0 || each[len(each)-1].Streams != streams {
				if total.Failed+total.StreamFailed > 0 {
					from = time.Now()
				}
				return fmt.Sprintf("%s is not under steady load: %+v", name, total)
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

// roll replaces a part of the release ("agent", "proxy", "control") pod by pod,
// as an upgrade does, and returns when the new pods are ready. `kubectl rollout
// status` would wait for the old ones of the proxy, which end with their last
// connection.
func (b *bench) roll(component string) {
	b.Helper()
	kind, want := "daemonset", len(b.cluster.Nodes())
	if component == "control" {
		kind = "deployment"
		d, err := b.client.AppsV1().Deployments(system).Get(b.Context(), "signet-control", metav1.GetOptions{})
		if err != nil {
			b.Fatal(err)
		}
		want = int(*d.Spec.Replicas)
	}
	before := b.parts(component)
	b.kubectl("-n", system, "rollout", "restart", kind+"/signet-"+component)
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

// An upgrade of the agent, of Envoy or of the control plane fails no new
// connection and breaks no open one: the open ones live on in the old proxy.
func TestUpgradeUnderLoad(t *testing.T) {
	b := open(t)
	l := b.load()
	rounds := 2
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		rounds = 10
	}
	for round := range rounds {
		for _, what := range []string{"proxy", "agent", "control"} {
			b.roll(what)
			l.judge(fmt.Sprintf("round %d, the %s", round+1, what))
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
