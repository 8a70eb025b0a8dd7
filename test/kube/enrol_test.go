package kube

import (
	"context"
	"fmt"
	"maps"
	"os"
	"slices"
	"strings"
	"testing"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
)

// The kinds of callers, each with one pod on each node.
const (
	allowed  = "allowed"  // by a policy
	denied   = "denied"   // in the mesh, and no policy allows it
	stranger = "stranger" // outside of the mesh
)

var kinds = []string{allowed, denied, stranger}

// secret is what the calls of a kind of caller carry.
func secret(kind string) string { return "canary-" + kind + "-5e1f08" }

// step is one edit of the annotation, and how long it lasted.
type step struct {
	name              string // "observe -> enforce"
	edited, ready, at time.Time
}

// Switched through off, observe, enforce and off again under continuous
// traffic, without a restart of a pod: nobody is served who must not be, no
// verdict contradicts the policy, and once the status says that all pods
// enforce, nothing of what they say to each other is to be read on either node.
// How many connections failed at each kind of step is told; those of the
// allowed caller must be none, but for streams that were open before.
//
// What it defends: the order of steps in which a namespace joins and leaves.
func TestEnrolAndLeave(t *testing.T) {
	rounds := 4
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		rounds = 100
	}
	open(t).enrolAndLeave(rounds)
}

// The same with two replicas of the control plane, each of which tells one of the
// nodes what to do.
//
// What it defends: that replicas keep step.
func TestEnrolAndLeaveReplicas(t *testing.T) {
	rounds := 2
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		rounds = 20
	}
	b := open(t)
	b.twoReplicas()
	b.enrolAndLeave(rounds)
}

func (b *bench) enrolAndLeave(rounds int) {
	in, out := b.namespace(""), b.namespace("")
	b.apply(service(in, "server", "server") + allow(in, "server", allowed))
	b.startPods(&pod{namespace: in, name: "server", account: "server", node: "node1", args: []string{"serve"}})
	var pods []*pod
	for _, kind := range kinds {
		for _, node := range []string{"node1", "node2"} {
			p := &pod{namespace: in, name: kind + "-" + node, account: kind, node: node, args: []string{
				"load", "server." + in + ":8080", "--rate=10", "--conns=3", "--want=server", "--every=200ms", "--timeout=10s", "--mark=" + secret(kind),
			}}
			if kind == stranger {
				p.namespace = out
			}
			pods = append(pods, p)
		}
	}
	b.startPods(pods...)
	wire := b.sniff()

	began := time.Now()
	checked := began
	var steps []step
	var leaks int
	edit := func(from, to, status string, stay time.Duration) {
		s := step{name: from + " -> " + to, edited: time.Now()}
		b.mode(in, to)
		b.waitStatus(in, status)
		s.ready = time.Now()
		before := wire.mesh()
		time.Sleep(stay)
		if to == "enforce" {
			if n := wire.mesh() - before; n > 0 {
				leaks += n
				b.Errorf("round %d: %d times what enrolled pods said was in plain on the wire after the status said %q", len(steps)/3+1, n, status)
			}
		}
		s.at = time.Now()
		steps = append(steps, s)
	}
	time.Sleep(2 * time.Second)
	for n := range rounds {
		edit("off", "observe", "observe: 5 of 5 pods enrolled", time.Second)
		edit("observe", "enforce", "enforce: 5 of 5 pods enrolled", 2*time.Second)
		edit("enforce", "off", "", time.Second)
		if n%2 == 1 || n == rounds-1 { // few records at a time: asking must not slow the callers down
			b.verdicts(in, checked)
			checked = time.Now().Add(-5 * time.Second)
			b.Logf("%s: round %d", time.Since(began).Round(time.Second), n+1)
		}
	}
	wire.close()
	plain := wire.mesh()
	b.Logf("%d rounds in %s; %d packets looked at, %d lost; in plain on the wire: %d times in all, %d of them under enforce",
		rounds, time.Since(began).Round(time.Second), wire.packets(), wire.lost(), plain, leaks)
	if plain == 0 || wire.lost() > 0 {
		b.Error("the look at the wire shows nothing: it finds no plain text while the mesh is off, or has lost packets")
	}
	b.judge(pods, steps, began)
}

// tally is what callers of one kind saw at one kind of step.
type tally struct {
	ok, failed, streams int
	errors              map[string]int
}

// judge reads what the callers counted, tells it by kind of step, and finds
// whoever was served under enforce and must not be.
func (b *bench) judge(pods []*pod, steps []step, began time.Time) {
	b.Helper()
	sums := map[string]*tally{}
	for _, p := range pods {
		kind := p.account
		each, total := b.loads(p.namespace, p.name, began)
		if total.Wrong > 0 || total.StreamWrong > 0 || total.Skipped > 0 {
			b.Errorf("%s: %d answers by another, %d streams with another's data, %d calls skipped", p.name, total.Wrong, total.StreamWrong, total.Skipped)
		}
		i := 0
		for _, c := range each {
			for i < len(steps)-1 && c.At.After(steps[i+1].edited) {
				i++
			}
			s := steps[i]
			if c.At.Before(s.edited) {
				continue
			}
			sum := sums[kind+" "+s.name]
			if sum == nil {
				sum = &tally{errors: map[string]int{}}
				sums[kind+" "+s.name] = sum
			}
			if kind == allowed && c.Failed > 0 {
				b.Logf("%s: of %d calls %d failed %s after the edit %s, %s after it was in force: %v", p.name, c.OK+c.Failed, c.Failed,
					c.At.Sub(s.edited).Round(time.Millisecond), s.name, c.At.Sub(s.ready).Round(time.Millisecond), c.Errors)
			}
			sum.ok += c.OK
			sum.failed += c.Failed
			sum.streams += c.StreamFailed
			for text, n := range c.Errors {
				sum.errors[text] += n
			}
			// Each line tells of the 200 ms before it.
			if kind != allowed && strings.HasSuffix(s.name, "enforce") && c.At.Add(-250*time.Millisecond).After(s.ready) && c.At.Before(s.at) && c.OK+c.Echoed > 0 {
				b.Errorf("%s was served %d times, and echoed %d times, %s after the status said that all pods enforce", p.name, c.OK, c.Echoed, c.At.Sub(s.ready))
			}
		}
	}
	took := map[string]time.Duration{}
	count := map[string]int{}
	for _, s := range steps {
		took[s.name] += s.ready.Sub(s.edited)
		count[s.name]++
	}
	for name, d := range took {
		b.Logf("%s: %d times, in force after %s on average", name, count[name], (d / time.Duration(count[name])).Round(time.Millisecond))
	}
	for _, key := range slices.Sorted(maps.Keys(sums)) {
		s := sums[key]
		b.Logf("%-30s %6d calls answered, %5d failed; %4d streams ended; %v", key, s.ok, s.failed, s.streams, s.errors)
		if strings.HasPrefix(key, allowed) && s.failed > 0 {
			b.Errorf("%d calls of an allowed caller failed at the step %s", s.failed, strings.TrimPrefix(key, allowed+" "))
		}
	}
}

// verdicts looks at the records since an instant for those that contradict the
// policy.
func (b *bench) verdicts(namespace string, since time.Time) {
	b.Helper()
	n := 0
	for _, r := range b.audit("--since", since.UTC().Format(time.RFC3339)) {
		from, to := r.Source.ID, r.Destination
		if to.Workload != namespace+"/server" || r.Transport != "mtls" {
			if r.Transport == "plaintext" && r.Side == "destination" && to.Workload == namespace+"/server" && r.Verdict == "allowed" {
				b.Errorf("a plaintext connection was allowed: %+v", r)
			}
			continue
		}
		n++
		switch {
		case from == id(namespace, allowed) && r.Verdict != "allowed" && r.Verdict != "failed",
			from == id(namespace, denied) && r.Verdict == "allowed",
			from != id(namespace, allowed) && from != id(namespace, denied) && r.Verdict == "allowed":
			b.Errorf("a verdict contradicts the policy: %+v", r)
		case r.Verdict == "failed":
			b.Logf("failed: %+v", r)
		}
	}
	if n == 0 {
		b.Errorf("no connection was recorded since %s", since)
	}
}

// wire is a look at everything that enters and leaves the pods of both nodes.
type wire struct {
	b        *bench
	sniffers []*lab.Sniffer
}

// sniff looks at every interface of the nodes that a pod is behind.
func (b *bench) sniff() *wire {
	b.Helper()
	w := &wire{b: b}
	ctx, cancel := context.WithCancel(b.Context())
	b.Cleanup(func() { cancel(); w.close() })
	for _, node := range b.cluster.Nodes() {
		ns, err := node.NetNS()
		if err != nil {
			b.Fatal(err)
		}
		names, err := node.Command(ctx, "ls", "/sys/class/net").Output()
		if err != nil {
			b.Fatal(err)
		}
		for _, name := range strings.Fields(string(names)) {
			if !strings.HasPrefix(name, "veth") && name != "eth0" {
				continue
			}
			s, err := lab.SniffAt(ctx, ns, name, []byte(secret(allowed)), []byte(secret(denied)))
			if err != nil {
				b.Fatal(fmt.Errorf("%s of %s: %w", name, node.Name(), err))
			}
			w.sniffers = append(w.sniffers, s)
		}
	}
	return w
}

// mesh is how often what the pods of the mesh said was in plain.
func (w *wire) mesh() (n int) {
	for _, s := range w.sniffers {
		n += s.Count([]byte(secret(allowed))) + s.Count([]byte(secret(denied)))
	}
	return n
}

func (w *wire) packets() (n int) {
	for _, s := range w.sniffers {
		n += s.Packets()
	}
	return n
}

func (w *wire) lost() (n int) {
	for _, s := range w.sniffers {
		n += s.Lost()
	}
	return n
}

func (w *wire) close() {
	for _, s := range w.sniffers {
		if err := s.Close(); err != nil {
			w.b.Error(err)
		}
	}
}
