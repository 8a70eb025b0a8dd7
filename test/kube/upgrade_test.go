package kube

import (
	"fmt"
	"os"
	"testing"
	"time"
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
				if len(each) > 0 {
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

// roll replaces a part of the release pod by pod, as an upgrade does.
func (b *bench) roll(what string) {
	b.Helper()
	b.kubectl("-n", system, "rollout", "restart", what)
	b.kubectl("-n", system, "rollout", "status", what, "--timeout=4m")
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
		for _, what := range []string{"daemonset/signet-proxy", "daemonset/signet-agent", "deployment/signet-control"} {
			b.roll(what)
			l.judge(fmt.Sprintf("round %d, %s", round+1, what))
		}
	}
	// The streams live in the proxies of before; each is in Terminating, and
	// ends with the last of them.
	pods := b.kubectl("-n", system, "get", "pods", "-l", "app.kubernetes.io/component=proxy", "-o", "name")
	t.Logf("proxies that hold streams, and the newest:\n%s", pods)
	b.kubectl("-n", l.namespace, "delete", "pod", "near", "far", "server", "--wait=true")
	b.eventually(time.Minute, func() string {
		if n := b.proxies(); n != 2 {
			return fmt.Sprintf("%d proxies are left, want one on each node", n)
		}
		return ""
	})
}

// proxies counts the pods of proxies.
func (b *bench) proxies() int {
	b.Helper()
	n := 0
	for _, r := range b.kubectl("-n", system, "get", "pods", "-l", "app.kubernetes.io/component=proxy", "-o", "name") {
		if r == '\n' {
			n++
		}
	}
	return n
}
