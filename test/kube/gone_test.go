package kube

import (
	"context"
	"fmt"
	"strings"
	"testing"
	"time"
)

// pinned is where a pod's network namespace is pinned on its node.
func (b *bench) pinned(namespace, name string) string {
	b.Helper()
	return "/run/signet/netns/" + strings.TrimSpace(b.kubectl("-n", namespace, "get", "pod", name, "-o", "jsonpath={.metadata.uid}"))
}

// says reads a namespace's status until it is or is no longer as given, and
// returns how long that took.
func (b *bench) says(namespace, text string, is bool) time.Duration {
	b.Helper()
	began := time.Now()
	b.eventually(time.Minute, func() string {
		if got := b.statusOf(namespace); (got == text) != is {
			return fmt.Sprintf("status is %q", got)
		}
		return ""
	})
	return time.Since(began).Round(10 * time.Millisecond)
}

const allThree = "enforce: 3 of 3 pods enrolled"

// Defends: a pod whose rules are gone is never open, not even while no agent is
// there to repair them, and is repaired within a second once there is; a pin
// that is unmounted is made again, and what is open stays open.
func TestRulesGone(t *testing.T) {
	b := open(t)
	b.controlOn("node2")
	l := b.load()
	node1 := b.cluster.Node("node1")
	outside := b.namespace("")
	b.startPods(&pod{namespace: outside, name: "plain", node: "node2", args: []string{"serve"}})
	plain := b.ip(outside, "plain") + ":8080"
	pin := b.pinned(l.namespace, "server")
	address := "server." + l.namespace + ":8080"
	near, far := b.hammer("node1", address), b.hammer("node2", b.ip(l.namespace, "server")+":8080")
	if a := b.dial(l.namespace, "server", plain); !a.OK {
		t.Fatalf("the server calls outside of the mesh: %+v", a)
	}

	// Nobody repairs.
	b.signal(node1, "signet-agent", "STOP")
	t.Cleanup(func() {
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
		defer cancel()
		if out, err := node1.Command(ctx, "pkill", "-CONT", "-x", "signet-agent").CombinedOutput(); err != nil {
			t.Errorf("%v\n%s", err, out)
		}
	})
	b.script(node1, "nsenter --net="+pin+" nft flush ruleset")
	t.Logf("the agent stopped and rules deleted: the status said so %s later", b.says(l.namespace, allThree, false))
	if a := b.dial(l.namespace, "server", plain); a.OK {
		t.Errorf("without its rules the server calls outside of the mesh: %+v", a)
	}
	time.Sleep(3 * time.Second)
	began := time.Now()
	b.signal(node1, "signet-agent", "CONT")
	b.eventually(5*time.Second, func() string {
		if out := b.script(node1, "nsenter --net="+pin+" nft list tables"); !strings.Contains(out, "signet") {
			return out
		}
		return ""
	})
	took := time.Since(began)
	t.Logf("the agent goes on: the rules were there again after %s", took.Round(10*time.Millisecond))
	if took > 2*time.Second { // looking takes time too
		t.Errorf("the rules were gone for %s with an agent there", took)
	}
	b.waitStatus(l.namespace, allThree)
	l.steady(time.Minute)

	// The pin is gone: the node's agent finds the namespace again.
	l.since = time.Now()
	for range 3 {
		began = time.Now()
		b.script(node1, "umount "+pin)
		low := ""
		b.eventually(20*time.Second, func() string {
			if got := b.statusOf(l.namespace); got != allThree {
				low = got
			}
			if out := b.script(node1, "grep -c "+pin+" /proc/self/mountinfo || true"); out != "1" {
				return "pinned " + out + " times"
			}
			return ""
		})
		t.Logf("the pin was there again after %s; the status said meanwhile %q", time.Since(began).Round(10*time.Millisecond), low)
	}
	b.waitStatus(l.namespace, allThree)
	for _, name := range []string{"near", "far"} {
		_, c := l.loads(l.namespace, name, l.since)
		t.Logf("the pin unmounted three times: %s: %d new connections, %d failed; %d streams broke", name, c.OK+c.Failed, c.Failed, c.StreamFailed)
		if c.Wrong+c.StreamFailed+c.StreamWrong > 0 {
			t.Errorf("the pin unmounted: %s: %+v", name, c)
		}
	}
	l.steady(time.Minute)
	near()
	far()
}
