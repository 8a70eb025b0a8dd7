package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"net"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
)

// on runs a command in a node, and fails the test when it fails.
func (b *bench) on(node string, argv ...string) string {
	b.Helper()
	out, err := b.cluster.Node(node).Command(b.Context(), argv...).CombinedOutput()
	if err != nil {
		b.Fatalf("%s: %q: %v: %s", node, argv, err, out)
	}
	return string(out)
}

// storm connects to an echo server from outside of the mesh, on another node,
// with several callers at full speed, until the function that it returns is
// called, which says how many tried and how many were answered.
func (f *field) storm(address string) (stop func() (tried, in int64)) {
	f.Helper()
	ctx, cancel := context.WithCancel(f.Context())
	from := f.cluster.Node("node2")
	var all sync.WaitGroup
	var tried, in atomic.Int64
	one := func() {
		dial, cancel := context.WithTimeout(ctx, 200*time.Millisecond)
		defer cancel()
		tried.Add(1)
		conn, err := from.DialContext(dial, "tcp", address)
		if err != nil {
			return
		}
		defer conn.Close()
		_ = conn.SetDeadline(time.Now().Add(200 * time.Millisecond))
		var got [1]byte
		if _, err := conn.Write([]byte("x")); err != nil {
			return
		}
		if _, err := conn.Read(got[:]); err == nil {
			in.Add(1)
		}
	}
	for range 16 {
		all.Go(func() {
			for ctx.Err() == nil {
				one()
			}
		})
	}
	return func() (int64, int64) {
		cancel()
		all.Wait()
		f.Logf("stormed %s: %d connections tried, %d were answered", address, tried.Load(), in.Load())
		return tried.Load(), in.Load()
	}
}

// event waits for an event with a reason of an object, and returns its message.
func (b *bench) event(kind, namespace, name, reason string, since time.Time) string {
	b.Helper()
	message := ""
	b.eventually(30*time.Second, func() string {
		list, err := b.client.CoreV1().Events(namespace).List(b.Context(), metav1.ListOptions{})
		if err != nil {
			return err.Error()
		}
		for _, e := range list.Items {
			if of := e.InvolvedObject; of.Kind == kind && of.Name == name && e.Reason == reason && !e.LastTimestamp.Time.Before(since.Truncate(time.Second)) {
				message = e.Message
				return ""
			}
		}
		return fmt.Sprintf("%s %s has no event %s", kind, name, reason)
	})
	b.Logf("event of %s %s: %s: %s", kind, name, reason, message)
	return message
}

// settings are those of a network namespace on node1 that capture changes; the
// command enters it.
func (f *field) settings(enter ...string) string {
	f.Helper()
	return strings.Join(strings.Fields(f.on("node1", append(enter, "sh", "-c", "cd /proc/sys/net/ipv4 && cat ip_local_port_range ip_local_reserved_ports tcp_tw_reuse tcp_migrate_req")...)), " ")
}

// Somebody flushes every packet filter rule in a captured pod's namespace,
// again and again, while others storm the pod, and nobody gets in: what the
// guard of another part of the kernel defends. The rules are there again within
// a second, the pod has an event that says so, and when it leaves the mesh, its
// settings are those from before.
func TestContradictionFlushed(t *testing.T) {
	b := open(t)
	f := b.field()
	times := 10
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		times = 200
	}
	pin := b.pinned(f.in, "server")
	flushes := [][]string{
		{"nft", "flush", "ruleset"},
		{"nft", "delete", "table", "inet", "signet"},
		{"nft", "flush", "table", "inet", "signet"},
		{"sh", "-c", "for t in nat filter mangle raw; do iptables -t $t -F; iptables -t $t -X; done; nft flush chain inet signet saved"},
		{"nft", "add table inet signet { flags dormant; }"},
	}
	stop := f.storm(net.JoinHostPort(f.server, "8081"))
	// The rules, without what is kept for the day when they are removed.
	list := "nsenter --net=" + pin + " nft list table inet signet | sed '/chain saved/,/}/d'"
	var repaired []time.Duration
	for i := range times {
		want := f.on("node1", "sh", "-c", list)
		began := time.Now()
		f.on("node1", append([]string{"nsenter", "--net=" + pin}, flushes[i%len(flushes)]...)...)
		f.eventually(10*time.Second, func() string {
			out, err := f.cluster.Node("node1").Command(t.Context(), "sh", "-c", list).CombinedOutput()
			if err != nil || string(out) != want {
				return fmt.Sprintf("%q: the rules are not there again: %v: %s\nwant %s", flushes[i%len(flushes)], err, out, want)
			}
			return ""
		})
		repaired = append(repaired, time.Since(began))
		time.Sleep(300 * time.Millisecond)
		if i%10 == 9 {
			t.Logf("%d of %d flushes", i+1, times)
		}
	}
	tried, in := stop()
	slices.Sort(repaired)
	median, worst := repaired[times/2], repaired[times-1]
	t.Logf("%d flushes: the rules were there again after %s, %s at most, looking included", times, median.Round(time.Millisecond), worst.Round(time.Millisecond))
	if in > 0 || tried < 100 {
		t.Errorf("%d of %d connections from outside of the mesh were answered", in, tried)
	}
	if median > 1500*time.Millisecond { // the commands' own time in it; the worst is the machine's
		t.Errorf("the rules are gone for %s", median)
	}
	f.closed()
	b.event("Pod", f.in, "server", "CaptureRepaired", f.began)
	f.waitStatus(f.in, "enforce: 4 of 4 pods enrolled")
	f.served(f.in, "near", f.address, "server")
	f.served(f.in, "far", f.address, "server")

	// Another pod loses its rules, and leaves the mesh later.
	lone := b.namespace("enforce")
	b.startPods(&pod{namespace: lone, name: "quiet", node: "node1", args: []string{"hold"}})
	b.waitStatus(lone, "enforce: 1 of 1 pods enrolled")
	f.on("node1", "sh", "-c", "touch /run/quiet && mount --bind "+b.pinned(lone, "quiet")+" /run/quiet") // it stays when the pin goes
	t.Cleanup(func() {
		if out, err := b.cluster.Node("node1").Command(context.WithoutCancel(t.Context()), "umount", "/run/quiet").CombinedOutput(); err != nil {
			t.Errorf("%v: %s", err, out)
		}
	})
	captured, fresh := f.settings("nsenter", "--net=/run/quiet"), f.settings("unshare", "--net")
	f.on("node1", "nsenter", "--net=/run/quiet", "nft", "flush", "ruleset")
	b.event("Pod", lone, "quiet", "CaptureRepaired", f.began)
	b.mode(lone, "")
	b.eventually(20*time.Second, func() string {
		if got := f.settings("nsenter", "--net=/run/quiet"); got != fresh {
			return fmt.Sprintf("a pod that has left has the settings %q, want %q; captured it had %q", got, fresh, captured)
		}
		return ""
	})
	t.Logf("the settings were %q, captured %q, and after a flush and the end of capture the first again", fresh, captured)
	if captured == fresh {
		t.Error("capture changes no settings: this shows nothing")
	}
}

// Two agents on one node: the scheduler and the kubelet keep a second one of
// the same ports away, and one without them ends with a clear error. The first
// goes on, and nothing opens.
func TestContradictionTwoAgents(t *testing.T) {
	b := open(t)
	f := b.field()
	second := func(name string, edit func(spec map[string]any)) {
		t.Helper()
		var set struct {
			Spec struct {
				Template struct {
					Spec map[string]any `json:"spec"`
				} `json:"template"`
			} `json:"spec"`
		}
		if err := json.Unmarshal([]byte(b.kubectl("-n", system, "get", "daemonset", "signet-agent", "-o", "json")), &set); err != nil {
			t.Fatal(err)
		}
		spec := set.Spec.Template.Spec
		spec["nodeName"] = "node1"
		spec["terminationGracePeriodSeconds"] = 1
		containers := spec["containers"].([]any)
		spec["containers"] = containers[:1]
		edit(containers[0].(map[string]any))
		doc, err := json.Marshal(map[string]any{"apiVersion": "v1", "kind": "Pod", "metadata": map[string]any{"name": name, "namespace": system}, "spec": spec})
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() {
			ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), time.Minute)
			defer cancel()
			if out, err := b.command(ctx, "kubectl", "-n", system, "delete", "--ignore-not-found", "pod", name).CombinedOutput(); err != nil {
				t.Errorf("%v: %s", err, out)
			}
		})
		b.apply(string(doc))
	}
	said := func(name, text string) {
		t.Helper()
		b.eventually(time.Minute, func() string {
			var all strings.Builder
			for _, args := range [][]string{{"logs", name}, {"logs", name, "--previous"}} {
				out, err := b.try(append([]string{"-n", system}, args...)...)
				if err == nil {
					all.WriteString(out)
				}
			}
			if !strings.Contains(all.String(), text) {
				return fmt.Sprintf("%s does not say %q: %s", name, text, tail([]byte(all.String()), 2000))
			}
			for line := range strings.Lines(all.String()) {
				if strings.Contains(line, text) {
					t.Logf("%s: %s", name, strings.TrimSpace(line))
					break
				}
			}
			return ""
		})
	}
	// The same again.
	second("second", func(map[string]any) {})
	b.eventually(30*time.Second, func() string {
		out := b.kubectl("-n", system, "get", "pod", "second", "-o", "jsonpath={.status.phase} {.status.reason} {.status.message}")
		if !strings.HasPrefix(out, "Failed NodePorts") {
			return "a second agent: " + out
		}
		t.Log("a second agent: " + out)
		return ""
	})
	b.refused(f.out, "stranger", f.server+":8080")
	// Without its ports, but with the first one's folders.
	bare := func(c map[string]any) { delete(c, "ports"); delete(c, "livenessProbe"); delete(c, "readinessProbe") }
	second("bare", bare)
	said("bare", "is another agent running?")
	// With folders of its own, too.
	second("apart", func(c map[string]any) {
		bare(c)
		args := c["args"].([]any)
		for i, a := range args {
			switch s := a.(string); {
			case strings.HasPrefix(s, "--state-dir="):
				args[i] = "--state-dir=/tmp/state"
			case strings.HasPrefix(s, "--run-dir="):
				args[i] = "--run-dir=/run/signet/second"
			}
		}
	})
	said("apart", "does another agent run on this node?")
	time.Sleep(5 * time.Second)
	f.intact()
	b.kubectl("-n", system, "delete", "pod", "second", "bare", "apart")
	b.startPods(&pod{namespace: f.in, name: "after", node: "node1", args: []string{"hold"}})
	b.waitStatus(f.in, "enforce: 5 of 5 pods enrolled")
	b.kubectl("-n", f.in, "delete", "pod", "after")
	f.intact()
}
