package kube

import (
	"context"
	"fmt"
	"net/netip"
	"os"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/client-go/informers"
	"k8s.io/client-go/tools/cache"

	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/cluster"
)

// perNode is how many addresses each node gives out while pods come and go, and
// inUse how many of them have a pod at a time: the others are of pods that end.
const (
	perNode = 10
	inUse   = 8
)

// mayCall says which accounts the accounts of these tests may call. Nobody may
// call a3.
var mayCall = map[string][]string{
	"green": {"a0", "a1"},
	"blue":  {"a1", "a2"},
	"a0":    {"keeper"},
	"a1":    {"keeper"},
}

// life is one pod that came and went. Its name is never used again.
type life struct {
	namespace, name, account string
	meshed                   bool
	addrs                    []netip.Addr
	// created is before it was made, seen when its address was known, ending
	// before it was told to end, gone when the API server had deleted it; zero:
	// not yet.
	created, seen, ending, gone time.Time
	running                     bool
}

func (l *life) key() string { return l.namespace + "/" + l.name }

// churn is pods that come and go, and callers who do not care.
type churn struct {
	*bench
	in, out string
	began   time.Time

	mu    sync.Mutex
	lives map[string]*life // guarded by mu; by namespace/name

	calls []*asked // guarded by mu; those that were answered
	// linger is how long after the API server a node may take to take a pod's
	// network away.
	linger   time.Duration
	failed   atomic.Int64
	unserved atomic.Int64 // closed without an answer
	records  map[string]record
	given    map[string][2]netip.Addr // by node: the first and last address for those who come and go
}

// asked is a call that was answered.
type asked struct {
	caller, local string // its pod and the address it came from
	to            string // the address that was called
	account       string // of the service that was called; "": a pod by its address
	answer        string
	began, ended  time.Time
}

// Pods of several service accounts and of none come and go on ten addresses per
// node while others call them, by services and by addresses, and while some of
// them call: nobody gets an answer of a server that it may not call, and every
// record of both sides names the workload that really was there.
//
// What it defends: that an address is never taken for an identity. What a caller's
// proxy believes of an address is proved by the certificate in the tunnel, and
// what a destination records is what the caller proved.
func TestChurn(t *testing.T) {
	n := 60
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		n = 1000
	}
	c := newChurn(open(t))
	c.run(n, func(context.Context) {})
	c.judge()
	if _, named := c.loads(c.in, "named", c.began); named.OK == 0 {
		t.Errorf("the caller of a1 was never answered: %+v", named)
	}
}

// As TestChurn, while the news of which pod has which address come late: by turns
// the control plane and each node's agent stand still for seconds. What is known
// is stale then, and pods of no mesh take the addresses of its servers. That may
// fail connections, and starts wait; it never makes one pass for another.
func TestChurnWatchDelayed(t *testing.T) {
	n := 40
	if os.Getenv("SIGNET_TEST_LONG") == "1" {
		n = 1000
	}
	c := newChurn(open(t))
	c.linger = 12 * time.Second // signet-cni waits for an agent that stands still
	stop := func(program string, node int) {
		host := c.cluster.Nodes()[node]
		script := `for p in /proc/[0-9]*; do [ "$(cat $p/comm 2>/dev/null)" = ` + program + ` ] && kill -%s ${p#/proc/}; done; true`
		for _, signal := range []string{"STOP", "CONT"} {
			// CONT is sent also when the test has ended.
			ctx, cancel := context.WithTimeout(context.WithoutCancel(c.Context()), 30*time.Second)
			if out, err := host.Command(ctx, "bash", "-c", fmt.Sprintf(script, signal)).CombinedOutput(); err != nil {
				c.Errorf("signal %s to %s: %v\n%s", signal, program, err, out)
			}
			cancel()
			time.Sleep(map[string]time.Duration{"STOP": 8 * time.Second, "CONT": 3 * time.Second}[signal])
		}
	}
	stops := 0
	c.run(n, func(ctx context.Context) {
		for ; ctx.Err() == nil; stops++ {
			switch stops % 3 {
			case 0: // on whichever node it is
				var wait sync.WaitGroup
				for node := range c.cluster.Nodes() {
					wait.Go(func() { stop("signet-control", node) })
				}
				wait.Wait()
			default:
				stop("signet-agent", stops%3-1)
			}
		}
	})
	t.Logf("the control plane or an agent stood still %d times", stops)
	c.judge()
}

// newChurn starts those who stay, and then limits the addresses.
func newChurn(b *bench) *churn {
	b.Helper()
	c := &churn{bench: b, in: b.namespace("enforce"), out: b.namespace(""), linger: time.Second, lives: map[string]*life{}, records: map[string]record{}, given: map[string][2]netip.Addr{}}
	var docs strings.Builder
	docs.WriteString(service(c.in, "keeper", "keeper") + allow(c.in, "keeper", "a0", "a1"))
	for account, callers := range map[string][]string{"a0": {"green"}, "a1": {"green", "blue"}, "a2": {"blue"}} {
		docs.WriteString(allow(c.in, account, callers...))
	}
	for i := range 4 {
		fmt.Fprintf(&docs, "apiVersion: v1\nkind: ServiceAccount\nmetadata: {name: a%d, namespace: %s}\n---\n", i, c.in)
		docs.WriteString(service(c.in, fmt.Sprintf("a%d", i), fmt.Sprintf("a%d", i)))
	}
	b.apply(docs.String())
	b.startPods(
		&pod{namespace: c.in, name: "keeper", account: "keeper", node: "node1", args: []string{"serve"}},
		&pod{namespace: c.in, name: "green", account: "green", node: "node1", args: []string{"hold"}},
		&pod{namespace: c.in, name: "blue", account: "blue", node: "node2", args: []string{"hold"}},
		&pod{namespace: c.in, name: "named", account: "green", node: "node2", args: []string{"load", "a1." + c.in + ":8080", "--want=a1-", "--rate=5", "--timeout=2s"}},
	)
	b.waitStatus(c.in, "enforce: 4 of 4 pods enrolled")
	for _, name := range []string{"keeper", "green", "blue", "named"} {
		l := &life{namespace: c.in, name: name, account: name, meshed: true, addrs: b.addresses(c.in, name), seen: time.Now()}
		if name == "named" {
			l.account = "green"
		}
		c.lives[l.key()] = l
	}
	c.limit()
	return c
}

// ranges returns the first and the last address that a node is to give out: none
// of them is in use.
func (c *churn) ranges(node *cluster.Node) (first, last netip.Addr) {
	c.Helper()
	if r, ok := c.given[node.Name()]; ok {
		return r[0], r[1]
	}
	entries, err := os.ReadDir(node.Disk() + "/var/lib/cni/networks/pods") // a file for each address in use
	if err != nil {
		c.Fatal(err)
	}
	for start := byte(20); start < 240; start += perNode {
		raw := node.PodCIDR().Masked().Addr().As4()
		raw[3] = start
		first = netip.AddrFrom4(raw)
		raw[3] += perNode - 1
		last = netip.AddrFrom4(raw)
		if !slices.ContainsFunc(entries, func(e os.DirEntry) bool {
			a, err := netip.ParseAddr(e.Name())
			return err == nil && a.Compare(first) >= 0 && a.Compare(last) <= 0
		}) {
			c.given[node.Name()] = [2]netip.Addr{first, last}
			return first, last
		}
	}
	c.Fatalf("%s has no %d addresses in a row that are free", node.Name(), perNode)
	return first, last
}

// limit makes every node give out few addresses, until the test ends.
func (c *churn) limit() {
	c.Helper()
	const folder = "/etc/cni/net.d/"
	for _, node := range c.cluster.Nodes() {
		file := node.Disk() + folder + "10-pods.conflist"
		was, err := os.ReadFile(file)
		if err != nil {
			c.Fatal(err)
		}
		first, last := c.ranges(node)
		subnet := fmt.Sprintf("%q", node.PodCIDR())
		now := strings.Replace(string(was), subnet, fmt.Sprintf("%s, \"rangeStart\": %q, \"rangeEnd\": %q", subnet, first, last), 1)
		if now == string(was) {
			c.Fatalf("%s has no range %s:\n%s", file, subnet, was)
		}
		// The container runtime must read whole files.
		put := func(text []byte) error {
			if err := os.WriteFile(file+".new", text, 0o644); err != nil {
				return err
			}
			return os.Rename(file+".new", file)
		}
		chained := func(limited bool) func() string {
			return func() string {
				text, err := os.ReadFile(node.Disk() + folder + "10-pods-signet.conflist")
				if err != nil || strings.Contains(string(text), "rangeStart") != limited || strings.LastIndex(string(text), `"type"`) != strings.LastIndex(string(text), `"type": "signet-cni"`) {
					return fmt.Sprintf("signet-cni does not follow last, with limited addresses %v: %v\n%s", limited, err, text)
				}
				return ""
			}
		}
		c.Cleanup(func() {
			if err := put(was); err != nil {
				c.Error(err)
			}
			c.eventually(20*time.Second, chained(false))
		})
		if err := put([]byte(now)); err != nil {
			c.Fatal(err)
		}
		c.eventually(20*time.Second, chained(true))
	}
	time.Sleep(2 * time.Second) // the runtime reads it
}

// watch keeps the book of who had which address when.
func (c *churn) watch(ctx context.Context) (stop func()) {
	factory := informers.NewSharedInformerFactoryWithOptions(c.client, 0, informers.WithTweakListOptions(func(o *metav1.ListOptions) {
		o.LabelSelector = "churn=yes"
	}))
	note := func(obj any, gone bool) {
		if last, ok := obj.(cache.DeletedFinalStateUnknown); ok {
			obj = last.Obj
		}
		p := obj.(*corev1.Pod)
		c.mu.Lock()
		defer c.mu.Unlock()
		l := c.lives[p.Namespace+"/"+p.Name]
		if l == nil {
			return // of an earlier test
		}
		if l.running = p.Status.Phase == corev1.PodRunning; gone {
			l.gone, l.running = time.Now(), false
		}
		for _, ip := range p.Status.PodIPs {
			a := netip.MustParseAddr(ip.IP)
			if l.seen.IsZero() {
				l.seen = time.Now()
			}
			if !slices.Contains(l.addrs, a) {
				l.addrs = append(l.addrs, a)
			}
		}
	}
	if _, err := factory.Core().V1().Pods().Informer().AddEventHandler(cache.ResourceEventHandlerFuncs{
		AddFunc:    func(obj any) { note(obj, false) },
		UpdateFunc: func(_, obj any) { note(obj, false) },
		DeleteFunc: func(obj any) { note(obj, true) },
	}); err != nil {
		c.Fatal(err)
	}
	factory.Start(ctx.Done())
	factory.WaitForCacheSync(ctx.Done())
	return factory.Shutdown
}

// run has so many pods come and go, with callers and with trouble beside them.
func (c *churn) run(total int, trouble func(context.Context)) {
	c.Helper()
	ctx, cancel := context.WithCancel(c.Context())
	defer cancel()
	c.began = time.Now()
	stop := c.watch(ctx)
	var callers, pods, troubles sync.WaitGroup
	calling, hangUp := context.WithCancel(ctx)
	defer hangUp()
	for _, name := range []string{"green", "blue"} {
		c.callers(calling, &callers, name)
	}
	var next atomic.Int64
	var done atomic.Int64
	for _, node := range c.cluster.Nodes() {
		for range inUse {
			pods.Go(func() {
				for n := next.Add(1) - 1; n < int64(total) && ctx.Err() == nil; n = next.Add(1) - 1 {
					// The others go on: the book is only right to its end.
					if err := c.one(ctx, int(n), node.Name()); err != nil {
						c.Error(err)
						continue
					}
					done.Add(1)
				}
			})
		}
	}
	troubling, peace := context.WithCancel(ctx)
	defer peace()
	troubles.Go(func() { trouble(troubling) })
	over := make(chan struct{})
	go func() { pods.Wait(); close(over) }()
	checked := c.began
	tick := time.NewTicker(15 * time.Second)
	defer tick.Stop()
	for going := true; going; {
		select {
		case <-over:
			going = false
		case <-tick.C:
			c.mu.Lock()
			answered := len(c.calls)
			c.mu.Unlock()
			c.Logf("%s: %d of %d pods have come and gone; %d calls answered, %d closed, %d failed; %d records", time.Since(c.began).Round(time.Second),
				done.Load(), total, answered, c.unserved.Load(), c.failed.Load(), len(c.records))
			if records, missing := c.auditOnce("--since", checked.Add(-20*time.Second).UTC().Format(time.RFC3339)); missing == "" {
				c.keep(records)
				checked = time.Now().Add(-15 * time.Second)
			}
		}
	}
	peace()
	troubles.Wait()
	hangUp()
	callers.Wait()
	time.Sleep(3 * time.Second) // the last lines are read
	c.keep(c.audit("--since", checked.Add(-20*time.Second).UTC().Format(time.RFC3339)))
	cancel()
	stop()
	c.Logf("%d of %d pods came and went in %s", done.Load(), total, time.Since(c.began).Round(time.Second))
	if done.Load() != int64(total) {
		c.Errorf("%d of %d pods came and went", done.Load(), total)
	}
}

// keep remembers records; the last one of a connection is the whole one.
func (c *churn) keep(records []record) {
	for _, r := range records {
		c.records[r.Node+" "+r.Side+" "+r.ID] = r
	}
}

// one pod comes, stays a moment, and goes.
func (c *churn) one(ctx context.Context, n int, node string) error {
	account := fmt.Sprintf("a%d", n/5%4)
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: c.in, Name: fmt.Sprintf("%s-%d", account, n), Labels: map[string]string{"churn": "yes", "app": account}},
		Spec: corev1.PodSpec{
			NodeName: node, ServiceAccountName: account, RestartPolicy: corev1.RestartPolicyNever,
			Containers: []corev1.Container{{
				Name: "main", Image: "signet.example/testpod:1", ImagePullPolicy: corev1.PullNever, Args: []string{"serve"},
				Env: []corev1.EnvVar{{Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}},
			}},
		},
	}
	calls := []string{"load", "keeper." + c.in + ":8080", "--rate=5", "--want=keeper", "--timeout=2s"}
	outside := func() {
		p.Namespace, p.Name, p.Spec.ServiceAccountName, account = c.out, fmt.Sprintf("plain-%d", n), "default", ""
		p.Labels["app"] = "plain"
	}
	switch n % 5 {
	case 2: // calls, with its own identity
		p.Labels["app"], p.Spec.Containers[0].Args = "calls", calls
	case 3: // serves, outside of the mesh
		outside()
	case 4: // by turns calls from outside of the mesh, and is one more server
		if n%2 == 0 {
			outside()
			p.Spec.Containers[0].Args = calls
		}
	}
	l := &life{namespace: p.Namespace, name: p.Name, account: account, meshed: p.Namespace == c.in, created: time.Now()}
	c.mu.Lock()
	c.lives[l.key()] = l
	c.mu.Unlock()
	pods := c.client.CoreV1().Pods(p.Namespace)
	if _, err := pods.Create(ctx, p, metav1.CreateOptions{}); err != nil {
		return err
	}
	is := func(what string, ok func() bool) error {
		for end := time.Now().Add(3 * time.Minute); time.Now().Before(end); time.Sleep(50 * time.Millisecond) {
			c.mu.Lock()
			good := ok()
			c.mu.Unlock()
			if good {
				return nil
			}
			if ctx.Err() != nil {
				return ctx.Err()
			}
		}
		return fmt.Errorf("pod %s was not %s in 3 minutes", p.Name, what)
	}
	if err := is("running", func() bool { return l.running }); err != nil {
		return err
	}
	time.Sleep(time.Duration(500+n*137%1500) * time.Millisecond)
	c.mu.Lock()
	l.ending = time.Now()
	c.mu.Unlock()
	grace := int64(1)
	if err := pods.Delete(ctx, p.Name, metav1.DeleteOptions{GracePeriodSeconds: &grace}); err != nil {
		return err
	}
	return is("gone", func() bool { return !l.gone.IsZero() })
}

// callers call every address and every service from inside of a pod.
func (c *churn) callers(ctx context.Context, wait *sync.WaitGroup, name string) {
	c.Helper()
	ns := c.inside(c.in, name)
	each := func(to netip.Addr, account string) {
		address := netip.AddrPortFrom(to, 8080).String()
		wait.Go(func() {
			if err := lab.In(ns, func() error {
				for ctx.Err() == nil {
					c.call(ctx, &asked{caller: name, to: address, account: account})
					select {
					case <-ctx.Done():
					case <-time.After(300 * time.Millisecond):
					}
				}
				return nil
			}); err != nil {
				c.Error(err)
			}
		})
	}
	for _, node := range c.cluster.Nodes() {
		first, last := c.ranges(node)
		for a := first; a.Compare(last) <= 0; a = a.Next() {
			each(a, "")
		}
	}
	for i := range 4 {
		account := fmt.Sprintf("a%d", i)
		s, err := c.client.CoreV1().Services(c.in).Get(ctx, account, metav1.GetOptions{})
		if err != nil {
			c.Fatal(err)
		}
		each(netip.MustParseAddr(s.Spec.ClusterIP), account)
	}
}

// call asks once who answers.
func (c *churn) call(ctx context.Context, a *asked) {
	var err error
	a.began = time.Now()
	a.local, a.answer, err = ask(ctx, a.to)
	a.ended = time.Now()
	switch {
	case err != nil:
		c.failed.Add(1)
	case a.answer == "":
		c.unserved.Add(1)
	default:
		c.mu.Lock()
		defer c.mu.Unlock()
		c.calls = append(c.calls, a)
	}
}
