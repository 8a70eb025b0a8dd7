package kube

import (
	"context"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/netip"
	"os"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/internal/lab"
)

// firsts is how many pods of each kind the tests of first instructions start.
func firsts() int {
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		return 200
	}
	return 20
}

// atATime is how many pods are started together.
const atATime = 10

// once makes a pod that is not started again when it ends.
const once = "restartPolicy: Never"

// A pod whose first instruction dials out is captured before it: its
// connection is recorded with its own identity and through a tunnel, never in
// plain.
//
// What it defends: that a pod's sandbox is captured, with the proxy listening
// in it, before CNI says that it is ready.
func TestFirstDials(t *testing.T) {
	b := open(t)
	in := b.namespace("enforce")
	b.apply(service(in, "server", "server") + allow(in, "server", "first"))
	b.startPods(&pod{namespace: in, name: "server", account: "server", node: "node1", args: []string{"serve"}})
	began := time.Now()
	for start := 0; start < firsts(); start += atATime {
		var all strings.Builder
		for i := start; i < start+atATime; i++ {
			p := &pod{namespace: in, name: fmt.Sprintf("first-%d", i), account: "first", node: fmt.Sprintf("node%d", i%2+1),
				args: []string{"dial", "server." + in + ":8080"}, spec: []string{once}}
			all.WriteString(p.yaml())
		}
		b.apply(all.String())
		b.phase(in, "first-", start+atATime, corev1.PodSucceeded)
		t.Logf("%s: %d pods have dialled", time.Since(began).Round(time.Second), start+atATime)
	}
	for i := range firsts() {
		name := fmt.Sprintf("first-%d", i)
		var a answer
		out := b.kubectl("-n", in, "logs", name)
		if err := json.Unmarshal([]byte(strings.SplitN(out, "\n", 2)[0]), &a); err != nil || !a.OK || a.ID != "server" {
			t.Errorf("%s says %s (%v)", name, out, err)
		}
	}
	// Of every pod, at both ends, and nothing else.
	want := firsts()
	b.eventually(20*time.Second, func() string {
		source, destination := map[string]bool{}, 0
		for _, r := range b.audit("--since", began.UTC().Format(time.RFC3339)) {
			from := strings.HasPrefix(r.Source.Workload, in+"/first-")
			if !from && r.Destination.Workload != in+"/server" {
				continue
			}
			if r.Verdict == "failed" && r.Side == "destination" && r.Transport == "mtls" && r.Source.ID == "" {
				continue // a tunnel that broke in its handshake, so nobody has proven anything
			}
			if r.Transport != "mtls" || r.Source.ID != id(in, "first") || r.Verdict != "allowed" && r.Verdict != "failed" {
				t.Fatalf("a first instruction was not captured: %+v", r)
			}
			if r.Verdict == "failed" { // a tunnel that the proxy opened besides
				continue
			}
			if r.Side == "source" {
				source[r.Source.Workload] = true
			} else {
				destination++
			}
		}
		if len(source) != want || destination != want {
			return fmt.Sprintf("%d pods are recorded as callers, and %d calls at the server, want %d", len(source), destination, want)
		}
		return ""
	})
	t.Logf("%d pods, each dialled with its first instruction: all recorded at both ends, through tunnels", want)
}

// phase waits until all pods with a prefix, so many, are in a phase.
func (b *bench) phase(namespace, prefix string, want int, phase corev1.PodPhase) {
	b.Helper()
	b.eventually(3*time.Minute, func() string {
		pods, err := b.client.CoreV1().Pods(namespace).List(b.Context(), metav1.ListOptions{})
		if err != nil {
			return err.Error()
		}
		n, others := 0, map[string]corev1.PodPhase{}
		for _, p := range pods.Items {
			switch {
			case !strings.HasPrefix(p.Name, prefix):
			case p.Status.Phase == phase:
				n++
			case p.Status.Phase == corev1.PodFailed:
				b.Fatalf("pod %s failed", p.Name)
			default:
				others[p.Name] = p.Status.Phase
			}
		}
		if n != want {
			return fmt.Sprintf("%d of %d pods %s* are %s; %v", n, want, prefix, phase, others)
		}
		return ""
	})
}

// A pod whose first instruction listens is captured before it: callers without
// an identity, on both nodes, that try the addresses which the nodes give out
// next, from before the pods exist, are served by none.
//
// What it defends: as TestFirstDials, for what comes in. That the callers are
// fast enough to be served is shown by pods outside of the mesh.
func TestFirstListens(t *testing.T) {
	b := open(t)
	in, out := b.namespace("enforce"), b.namespace("")
	h := &hammer{b: b, served: map[string]int{}}
	began := time.Now()
	listen := func(namespace, prefix string, count int) {
		for start := 0; start < count; start += atATime {
			stop := h.start()
			var all strings.Builder
			var names []string
			for i := start; i < start+atATime; i++ {
				p := &pod{namespace: namespace, name: fmt.Sprintf("%s-%d", prefix, i), account: "first", node: fmt.Sprintf("node%d", i%2+1), args: []string{"serve", "--first-instruction"}}
				all.WriteString(p.yaml())
				names = append(names, p.name)
			}
			b.apply(all.String())
			b.phase(namespace, prefix+"-", atATime, corev1.PodRunning)
			time.Sleep(300 * time.Millisecond)
			h.covered(namespace, names)
			b.kubectl(append([]string{"-n", namespace, "delete", "pod", "--wait=true", "--grace-period=1"}, names...)...)
			stop()
			t.Logf("%s: %d pods %s-* have listened; %d calls, %d closed without an answer, %d pods have served", time.Since(began).Round(time.Second),
				start+atATime, prefix, h.calls.Load(), h.closed.Load(), len(h.served))
		}
	}
	listen(out, "open", atATime)
	if n := len(h.served); n != atATime {
		t.Errorf("of %d pods outside of the mesh %d served the callers, so these show nothing: %v", atATime, n, h.served)
	}
	h.served = map[string]int{}
	listen(in, "first", firsts())
	if len(h.served) > 0 {
		t.Errorf("callers without an identity were served by pods that enforce: %v", h.served)
	}
	if h.closed.Load() == 0 {
		t.Error("no call reached a pod that enforces")
	}
}

// hammer calls the addresses that pods get next, without rest.
type hammer struct {
	b      *bench
	calls  atomic.Int64
	closed atomic.Int64 // connected, and not answered
	called map[string]bool

	mu     sync.Mutex
	served map[string]int // guarded by mu; by name
}

// start calls from both nodes, outside of every pod, until the function that it
// returns is called.
func (h *hammer) start() (stop func()) {
	h.b.Helper()
	ctx, cancel := context.WithCancel(h.b.Context())
	var wait sync.WaitGroup
	h.called = map[string]bool{}
	// An address that somebody has is not given out.
	taken := map[string]bool{}
	pods, err := h.b.client.CoreV1().Pods("").List(ctx, metav1.ListOptions{})
	if err != nil {
		h.b.Fatal(err)
	}
	for _, p := range pods.Items {
		taken[p.Status.PodIP] = true
	}
	for _, node := range h.b.cluster.Nodes() {
		// The nodes give their addresses out one after the other.
		last, err := os.ReadFile(node.Disk() + "/var/lib/cni/networks/pods/last_reserved_ip.0")
		if err != nil {
			h.b.Fatal(err)
		}
		next, err := netip.ParseAddr(strings.TrimSpace(string(last)))
		if err != nil {
			h.b.Fatal(err)
		}
		for n := 0; n <= atATime/2; {
			if next = next.Next(); !node.PodCIDR().Contains(next.Next()) { // the last is the broadcast address
				next = node.PodCIDR().Masked().Addr().Next().Next()
			}
			if taken[next.String()] {
				continue
			}
			n++
			h.called[next.String()] = true
			for _, from := range h.b.cluster.Nodes() {
				ns, err := from.NetNS()
				if err != nil {
					h.b.Fatal(err)
				}
				address := netip.AddrPortFrom(next, 8080).String()
				wait.Go(func() {
					if err := lab.In(ns, func() error { h.hammer(ctx, address); return nil }); err != nil {
						h.b.Error(err)
					}
				})
			}
		}
	}
	return func() { cancel(); wait.Wait() }
}

// covered makes sure that the pods got addresses that are called.
func (h *hammer) covered(namespace string, names []string) {
	h.b.Helper()
	for _, name := range names {
		if ip := h.b.ip(namespace, name); !h.called[ip] {
			h.b.Errorf("pod %s has the address %s, which nobody calls", name, ip)
		}
	}
}

func (h *hammer) hammer(ctx context.Context, address string) {
	for ctx.Err() == nil {
		h.call(ctx, address)
		select {
		case <-ctx.Done():
		case <-time.After(5 * time.Millisecond):
		}
	}
}

func (h *hammer) call(ctx context.Context, address string) {
	h.calls.Add(1)
	d := net.Dialer{Timeout: 500 * time.Millisecond}
	c, err := d.DialContext(ctx, "tcp", address)
	if err != nil {
		return
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(time.Second))
	_, _ = io.WriteString(c, "GET /id HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
	got, _ := io.ReadAll(c)
	if len(got) == 0 {
		h.closed.Add(1)
		return
	}
	_, name, _ := strings.Cut(string(got), "\r\n\r\n")
	h.mu.Lock()
	defer h.mu.Unlock()
	h.served[strings.TrimSpace(name)]++
}

// With the agent away a pod of the mesh waits, and says why; it starts,
// captured, when the agent is back.
//
// What it defends: that no answer fails the sandbox.
func TestFirstWithoutAgent(t *testing.T) {
	b := open(t)
	in := b.namespace("enforce")
	b.apply(service(in, "server", "server") + allow(in, "server", "first"))
	b.startPods(&pod{namespace: in, name: "server", account: "server", node: "node1", args: []string{"serve"}})
	const park = `{"spec":{"template":{"spec":{"nodeSelector":{"signet.example/none":"%s"}}}}}`
	patch := func(value string) {
		body := fmt.Sprintf(park, value)
		if value == "" {
			body = strings.ReplaceAll(body, `"signet.example/none":""`, `"signet.example/none":null`)
		}
		b.kubectl("-n", system, "patch", "daemonset", "signet-agent", "--type=merge", "-p", body)
	}
	defer func() { patch(""); b.ready() }()
	patch("yes")
	b.kubectl("-n", system, "wait", "pod", "--for=delete", "-l", "app.kubernetes.io/name=signet-agent", "--timeout=1m")

	began := time.Now()
	dials := &pod{namespace: in, name: "dials", account: "first", node: "node2", args: []string{"dial", "server." + in + ":8080"}, spec: []string{once}}
	listens := &pod{namespace: in, name: "listens", account: "first", node: "node1", args: []string{"serve", "--first-instruction"}}
	b.apply(dials.yaml() + listens.yaml())
	said := map[string]string{}
	b.eventually(time.Minute, func() string {
		events, err := b.client.CoreV1().Events(in).List(b.Context(), metav1.ListOptions{FieldSelector: "type=Warning"})
		if err != nil {
			return err.Error()
		}
		for _, e := range events.Items {
			if strings.Contains(e.Message, "signet-agent") {
				said[e.InvolvedObject.Name] = e.Reason + ": " + e.Message
			}
		}
		if said["dials"] == "" || said["listens"] == "" {
			return fmt.Sprintf("no event names signet-agent for both pods: %v", said)
		}
		return ""
	})
	t.Logf("after %s: %s", time.Since(began).Round(time.Millisecond), said["dials"])
	time.Sleep(5 * time.Second)
	for _, name := range []string{"dials", "listens"} {
		p, err := b.client.CoreV1().Pods(in).Get(t.Context(), name, metav1.GetOptions{})
		if err != nil {
			t.Fatal(err)
		}
		if p.Status.Phase != corev1.PodPending {
			t.Errorf("without the agent, pod %s is %s", name, p.Status.Phase)
		}
	}
	patch("")
	b.ready()
	back := time.Now()
	b.phase(in, "dials", 1, corev1.PodSucceeded)
	b.phase(in, "listens", 1, corev1.PodRunning)
	t.Logf("%s after the agent was ready, both pods have started", time.Since(back).Round(time.Millisecond))
	b.eventually(20*time.Second, func() string {
		for _, r := range b.audit("--since", began.UTC().Format(time.RFC3339), "--from", in+"/first") {
			if r.Transport == "mtls" && r.Source.ID == id(in, "first") && r.Verdict == "allowed" && r.Side == "destination" {
				return ""
			}
		}
		return "the call of pod dials is not recorded with its identity"
	})
	if out, err := b.cluster.Nodes()[0].DialContext(t.Context(), "tcp", b.ip(in, "listens")+":8080"); err == nil {
		defer out.Close()
		_ = out.SetDeadline(time.Now().Add(5 * time.Second))
		_, _ = io.WriteString(out, "GET /id HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
		if got, _ := io.ReadAll(out); len(got) > 0 {
			t.Errorf("pod listens served a caller without an identity: %q", got)
		}
	}
}
