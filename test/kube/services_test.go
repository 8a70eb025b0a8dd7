package kube

import (
	"context"
	"fmt"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/internal/lab"
)

// svc is the documents of a Service with port 80, which pods name "web".
func svc(namespace, name string, spec ...string) string {
	return fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: %s, namespace: %s}\nspec:\n  ports: [{name: http, port: 80, targetPort: web}]\n  %s\n---\n",
		name, namespace, strings.Join(spec, "\n  "))
}

// web names the port of a container.
const web = "ports: [{name: web, containerPort: 8080}]"

// Every kind of Service leads captured pods where it leads others.
//
// What it defends: that the proxy, which stands in for kube-proxy here, reads
// Services as kube-proxy does.
func TestServices(t *testing.T) {
	b := open(t)
	in, out := b.namespace("enforce"), b.namespace("")
	serve := []string{"serve"}
	b.startPods(&pod{namespace: out, name: "plain", node: "node2", args: serve, more: []string{web}})
	one := &pod{namespace: in, name: "one", account: "server", node: "node1", args: serve, more: []string{web}, labels: map[string]string{"app": "web"}}
	two := &pod{namespace: in, name: "two", account: "server", node: "node2", args: serve, more: []string{web}, labels: map[string]string{"app": "web"}}
	b.apply(allow(in, "server", "client", "server") +
		svc(in, "usual", "selector: {app: web}") +
		svc(in, "headless", "selector: {app: web}", "clusterIP: None") +
		svc(in, "local", "selector: {app: web}", "internalTrafficPolicy: Local") +
		svc(in, "sticky", "selector: {app: web}", "sessionAffinity: ClientIP") +
		fmt.Sprintf("apiVersion: v1\nkind: Service\nmetadata: {name: external, namespace: %s}\nspec: {type: ExternalName, externalName: plain.%s.svc.cluster.local}\n---\n", in, out) +
		service(out, "plain", "plain"))
	b.apply(svc(in, "db", "selector: {app: db}", "clusterIP: None") + fmt.Sprintf(`apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: %s}
spec:
  serviceName: db
  replicas: 2
  podManagementPolicy: Parallel
  selector: {matchLabels: {app: db}}
  template:
    metadata: {labels: {app: db}}
    spec:
      serviceAccountName: server
      terminationGracePeriodSeconds: 1
      containers:
        - {name: main, image: "signet.example/testpod:1", imagePullPolicy: Never, args: [serve], %s}
---
`, in, web))
	b.startPods(one, two,
		&pod{namespace: in, name: "near", account: "client", node: "node1", args: []string{"hold"}},
		&pod{namespace: in, name: "far", account: "client", node: "node2", args: []string{"hold"}})
	b.kubectl("-n", in, "rollout", "status", "statefulset/db", "--timeout=2m")
	b.waitStatus(in, "enforce: 6 of 6 pods enrolled")
	// A service with one endpoint in the mesh and one outside.
	b.apply(fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: mixed, namespace: %[1]s}
spec: {ports: [{name: http, port: 80, targetPort: 8080}]}
---
apiVersion: discovery.k8s.io/v1
kind: EndpointSlice
metadata: {name: mixed-1, namespace: %[1]s, labels: {kubernetes.io/service-name: mixed}}
addressType: IPv4
ports: [{name: http, port: 8080}]
endpoints: [{addresses: [%[2]q]}, {addresses: [%[3]q]}]
---
`, in, b.ip(in, "one"), b.ip(out, "plain")))

	vip := func(name string) string { return b.clusterIP(in, name) + ":80" }
	for _, caller := range []string{"near", "far"} {
		local := map[string]string{"near": "one", "far": "two"}[caller]
		for _, c := range []struct {
			what, address string
			want          []string
			all           bool // each of them answers
		}{
			{"a service with a named port", vip("usual"), []string{"one", "two"}, true},
			{"a service with endpoints in and outside of the mesh", vip("mixed"), []string{"one", "plain"}, true},
			{"a service with internalTrafficPolicy Local", vip("local"), []string{local}, true},
			{"a service with session affinity", vip("sticky"), []string{"one", "two"}, false},
		} {
			var by map[string]int
			b.eventually(20*time.Second, func() string {
				by = b.answersTo(in, caller, c.address, 20)
				for who := range by {
					if !slices.Contains(c.want, who) {
						return fmt.Sprintf("%s of %s: %v", c.what, caller, by)
					}
				}
				if c.all && len(by) != len(c.want) || !c.all && len(by) != 1 {
					return fmt.Sprintf("%s of %s: %v answer", c.what, caller, by)
				}
				return ""
			})
			t.Logf("%s calls %s: %v", caller, c.what, by)
		}
		b.served(in, caller, "db-0.db."+in+":8080", "db-0")
		b.served(in, caller, "db-1.db."+in+":8080", "db-1")
		b.served(in, caller, "external."+in+":8080", "plain")
		if a := b.dial(in, caller, "headless."+in+":8080"); a.ID != "one" && a.ID != "two" {
			t.Errorf("%s calls a headless service: %+v", caller, a)
		}
	}
	// To itself, through its service, which may choose the other too.
	if by := b.answersTo(in, "one", vip("local"), 20); by["one"] != 20 {
		t.Errorf("a pod that calls itself through its service: %v", by)
	}
	if a := b.dial(in, "near", "kubernetes.default:443"); !strings.Contains(a.Error, "400") {
		t.Errorf("the API server is called in plain, and answers %+v", a)
	}
	for _, network := range []string{"udp", "tcp"} {
		if err := b.resolve(in, "near", network, "usual."+in+".svc.cluster.local."); err != nil {
			t.Errorf("DNS by %s: %v", network, err)
		}
	}
	b.endpointChanges(in)
}

// clusterIP returns a service's address.
func (b *bench) clusterIP(namespace, name string) string {
	b.Helper()
	s, err := b.client.CoreV1().Services(namespace).Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	return s.Spec.ClusterIP
}

// resolve has a pod ask the cluster's DNS.
func (b *bench) resolve(namespace, name, network, host string) error {
	b.Helper()
	server := net.JoinHostPort(b.clusterIP("kube-system", "kube-dns"), "53")
	path := b.inside(namespace, name)
	r := &net.Resolver{PreferGo: true, Dial: func(ctx context.Context, _, _ string) (c net.Conn, err error) {
		err = lab.In(path, func() error {
			var d net.Dialer
			c, err = d.DialContext(ctx, network, server)
			return err
		})
		return c, err
	}}
	_, err := r.LookupNetIP(b.Context(), "ip4", host)
	return err
}

// endpointChanges measures how long after an EndpointSlice has changed a caller
// gets to a new endpoint, and no longer gets to one that went.
func (b *bench) endpointChanges(in string) {
	b.Helper()
	b.apply(svc(in, "changing", "selector: {changing: \"yes\"}"))
	address := b.clusterIP(in, "changing") + ":80"
	ctx, cancel := context.WithCancel(b.Context())
	defer cancel()
	watch, err := b.client.DiscoveryV1().EndpointSlices(in).Watch(ctx, metav1.ListOptions{LabelSelector: "kubernetes.io/service-name=changing"})
	if err != nil {
		b.Fatal(err)
	}
	defer watch.Stop()
	changed := func(want int) time.Time {
		for limit := time.After(20 * time.Second); ; {
			select {
			case e := <-watch.ResultChan():
				// A service of two families has a slice of each.
				if s, ok := e.Object.(*discoveryv1.EndpointSlice); ok && s.AddressType == discoveryv1.AddressTypeIPv4 && len(s.Endpoints) == want {
					return time.Now()
				}
			case <-limit:
				b.Fatalf("the service has not %d endpoints after 20 s", want)
			}
		}
	}
	var most, sum time.Duration
	const rounds = 10
	for range rounds {
		for _, want := range []string{"one", ""} {
			label, count := "changing=yes", 1
			if want == "" {
				label, count = "changing-", 0
			}
			b.kubectl("-n", in, "label", "pod", "one", label)
			at := changed(count)
			if err := lab.In(b.inside(in, "far"), func() error {
				for time.Since(at) < 10*time.Second {
					if _, answer, _ := ask(ctx, address); answer == want {
						return nil
					}
					time.Sleep(10 * time.Millisecond)
				}
				return fmt.Errorf("the service's endpoints are %q to a caller's proxy 10 s later", want)
			}); err != nil {
				b.Fatal(err)
			}
			took := time.Since(at)
			sum, most = sum+took, max(most, took)
		}
	}
	b.Logf("%d changes of endpoints reached a caller's proxy after %s on average, %s at most", 2*rounds, (sum / (2 * rounds)).Round(time.Millisecond), most.Round(time.Millisecond))
	if most > time.Second {
		b.Errorf("a change of endpoints reached a caller's proxy after %s", most)
	}
}
