package kube

import (
	"context"
	"fmt"
	"maps"
	"net"
	"slices"
	"strings"
	"testing"
	"time"

	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/internal/lab"
)

// svc is the documents of a Service whose ports 80 and 81 pods name "web".
func svc(namespace, name string, spec ...string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: %s, namespace: %s}
spec:
  ports: [{name: http, port: 80, targetPort: web}, {name: more, port: 81, targetPort: web}]
  %s
---
`, name, namespace, strings.Join(spec, "\n  "))
}

// web names a port of a container.
func web(port int) []string {
	return []string{fmt.Sprintf("ports: [{name: web, containerPort: %d}]", port)}
}

// kinds is a namespace with services of every kind, servers on both nodes, "one"
// and "two", whose ports of the same name differ, and callers on both, "near"
// and "far".
func (b *bench) kinds(ns string) {
	b.Helper()
	labels := map[string]string{"app": "web"}
	b.apply(svc(ns, "usual", "selector: {app: web}") +
		svc(ns, "both", "selector: {app: web}", "ipFamilyPolicy: RequireDualStack") +
		svc(ns, "headless", "selector: {app: web}", "clusterIP: None") +
		svc(ns, "local", "selector: {app: web}", "internalTrafficPolicy: Local") +
		svc(ns, "sticky", "selector: {app: web}", "sessionAffinity: ClientIP") +
		svc(ns, "none", "selector: {app: nobody}") +
		svc(ns, "changing", "selector: {changing: \"yes\"}") +
		svc(ns, "ending", "selector: {app: ending}", "internalTrafficPolicy: Local") +
		svc(ns, "db", "selector: {app: db}", "clusterIP: None") + fmt.Sprintf(`apiVersion: v1
kind: Service
metadata: {name: external, namespace: %[1]s}
spec: {type: ExternalName, externalName: usual.%[1]s.svc.cluster.local}
---
apiVersion: v1
kind: ServiceAccount
metadata: {name: server, namespace: %[1]s}
---
apiVersion: apps/v1
kind: StatefulSet
metadata: {name: db, namespace: %[1]s}
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
        - name: main
          image: signet.example/testpod:1
          imagePullPolicy: Never
          args: [serve]
---
`, ns))
	pods := []*pod{
		{namespace: ns, name: "one", account: "server", node: "node1", args: []string{"serve"}, more: web(8080), labels: labels},
		{namespace: ns, name: "two", account: "server", node: "node2", args: []string{"serve", "--port=9000"}, more: web(9000), labels: labels},
		{namespace: ns, name: "near", account: "client", node: "node1", args: []string{"hold"}},
		{namespace: ns, name: "far", account: "client", node: "node2", args: []string{"hold"}},
	}
	for i := range 2 {
		pods = append(pods, &pod{namespace: ns, name: fmt.Sprintf("ending-%d", i+1), account: "server", node: fmt.Sprintf("node%d", i+1), args: []string{"serve"},
			grace: 10, labels: map[string]string{"app": "ending"}, more: append(web(8080), "lifecycle: {preStop: {sleep: {seconds: 8}}}")})
	}
	b.startPods(pods...)
	b.kubectl("-n", ns, "rollout", "status", "statefulset/db", "--timeout=2m")
}

// Every kind of Service leads captured pods where it leads those of a namespace
// outside of the mesh that is the same in all else, and what it leads to is
// recorded with the identities of both ends.
//
// What it defends: that the proxy, which stands in for kube-proxy here, reads
// Services as kube-proxy does.
func TestServices(t *testing.T) {
	b := open(t)
	in, out := b.namespace("enforce"), b.namespace("")
	b.apply(allow(in, "server", "client", "server"))
	b.kinds(in)
	b.kinds(out)
	b.waitStatus(in, "enforce: 8 of 8 pods enrolled")
	callers := map[string]string{"near": "one", "far": "two"} // and the server on its node

	for _, c := range []struct {
		what, service, port string
		six, local          bool
		each, any           []string // each of them, or only one of them, answers
	}{
		{what: "a port by name", service: "usual", port: "80", each: []string{"one", "two"}},
		{what: "a second port", service: "usual", port: "81", each: []string{"one", "two"}},
		{what: "a port that it has not", service: "usual", port: "82", each: []string{""}},
		{what: "no endpoints", service: "none", port: "80", each: []string{""}},
		{what: "two families, the first", service: "both", port: "80", each: []string{"one", "two"}},
		{what: "two families, IPv6", service: "both", port: "80", six: true, each: []string{"one", "two"}},
		{what: "internalTrafficPolicy Local", service: "local", port: "80", local: true},
		{what: "session affinity", service: "sticky", port: "80", any: []string{"one", "two"}},
	} {
		t.Run(c.what, func(t *testing.T) {
			b := b.at(t)
			began := time.Now()
			for caller, beside := range callers {
				each := c.each
				if c.local {
					each = []string{beside}
				}
				times := 20
				if slices.Contains(each, "") {
					times = 2 // each may take its 2 s
				}
				for _, ns := range []string{in, out} {
					address := net.JoinHostPort(b.clusterIP(ns, c.service, c.six), c.port)
					var by map[string]int
					b.eventually(20*time.Second, func() string {
						by = b.answersTo(ns, caller, address, times)
						got := slices.Sorted(maps.Keys(by))
						if each != nil && !slices.Equal(got, each) || each == nil && (len(got) != 1 || !slices.Contains(c.any, got[0])) {
							return fmt.Sprintf("%s/%s calls: %v answer", ns, caller, by)
						}
						return ""
					})
					t.Logf("in the mesh %v: %s calls, %v answer", ns == in, caller, by)
					if got := slices.Sorted(maps.Keys(by)); ns == in && got[0] != "" {
						b.recorded(began, in+"/"+caller, "client", got...)
					}
				}
			}
		})
	}

	t.Run("names", func(t *testing.T) {
		b := b.at(t)
		began := time.Now()
		for _, ns := range []string{in, out} {
			for caller := range callers {
				for _, db := range []string{"db-0", "db-1"} { // of a StatefulSet
					b.served(ns, caller, db+".db."+ns+":8080", db)
				}
				// ExternalName is an alias in DNS and nothing else.
				if a := b.dial(ns, caller, "external."+ns+":80"); a.ID != "one" && a.ID != "two" {
					t.Errorf("%s/%s calls by an ExternalName: %+v", ns, caller, a)
				}
				// A headless service's name is its pods' addresses, with their own ports.
				if a := b.dial(ns, caller, "headless."+ns+":8080"); a.ID != "one" && !strings.Contains(a.Error, "refused") && !strings.Contains(a.Error, "EOF") && !strings.Contains(a.Error, "reset") {
					t.Errorf("%s/%s calls a headless service: %+v", ns, caller, a)
				}
				b.served(ns, caller, b.ip(ns, "one")+":8080", "one")
			}
		}
		b.recorded(began, in+"/near", "client", "db-0", "db-1", "one")
		b.recorded(began, in+"/far", "client", "db-0", "db-1", "one")
	})
	t.Run("one endpoint in the mesh and one outside", func(t *testing.T) { b.at(t).mixed(in, out) })
	t.Run("itself", func(t *testing.T) {
		b := b.at(t)
		began := time.Now()
		for _, ns := range []string{in, out} {
			for _, address := range []string{net.JoinHostPort(b.clusterIP(ns, "local", false), "80"), b.ip(ns, "one") + ":8080", "127.0.0.1:8080"} {
				if by := b.answersTo(ns, "one", address, 20); by["one"] != 20 {
					t.Errorf("in the mesh %v: a pod calls itself by %s: %v answer", ns == in, address, by)
				}
			}
		}
		b.recorded(began, in+"/one", "server", "one")
	})
	t.Run("API server and DNS", func(t *testing.T) {
		b := b.at(t)
		for _, ns := range []string{in, out} {
			for caller := range callers {
				// In plain, so its answer is that it wants TLS.
				if a := b.dial(ns, caller, "kubernetes.default:443"); !strings.Contains(a.Error, "400") {
					t.Errorf("%s/%s calls the API server: %+v", ns, caller, a)
				}
				for _, network := range []string{"udp", "tcp"} {
					if err := b.resolve(ns, caller, network, "usual."+ns+".svc.cluster.local."); err != nil {
						t.Errorf("%s/%s asks DNS by %s: %v", ns, caller, network, err)
					}
				}
			}
		}
	})
	t.Run("an endpoint that ends", func(t *testing.T) { b.at(t).lastOfNode(in, out) })
	t.Run("changes", func(t *testing.T) { b.at(t).endpointChanges(in) })
}

// at is the bench for a subtest.
func (b *bench) at(t *testing.T) *bench {
	of := *b
	of.T = t
	return &of
}

// mixed: of a service with two endpoints that in the mesh is called through a
// tunnel, and the other in plain, which the record says.
func (b *bench) mixed(in, out string) {
	b.Helper()
	began := time.Now()
	outside := b.ip(out, "db-0") + ":8080"
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
`, in, b.ip(in, "one"), b.ip(out, "db-0")))
	address := net.JoinHostPort(b.clusterIP(in, "mixed", false), "80")
	for _, caller := range []string{"near", "far"} {
		b.eventually(20*time.Second, func() string {
			if by := b.answersTo(in, caller, address, 20); by["one"] == 0 || by["db-0"] == 0 || len(by) != 2 {
				return fmt.Sprintf("%s calls: %v answer", caller, by)
			}
			return ""
		})
		b.recorded(began, in+"/"+caller, "client", "one")
		b.eventually(20*time.Second, func() string {
			n := 0
			for _, r := range b.audit("--since", began.UTC().Format(time.RFC3339)) {
				if r.Source.Workload != in+"/"+caller || r.Destination.Via != outside {
					continue
				}
				if r.Transport != "plaintext" || r.Destination.ID != "" || r.Destination.Workload != "" {
					b.Fatalf("a call to a pod outside of the mesh is recorded as %+v", r)
				}
				n++
			}
			if n == 0 {
				return caller + "'s calls to the pod outside of the mesh are not recorded"
			}
			return ""
		})
	}
}

// clusterIP returns a service's address: the first, or that of IPv6.
func (b *bench) clusterIP(namespace, name string, six bool) string {
	b.Helper()
	s, err := b.client.CoreV1().Services(namespace).Get(b.Context(), name, metav1.GetOptions{})
	if err != nil {
		b.Fatal(err)
	}
	for _, ip := range s.Spec.ClusterIPs {
		if !six || strings.Contains(ip, ":") {
			return ip
		}
	}
	b.Fatalf("service %s/%s has the addresses %v", namespace, name, s.Spec.ClusterIPs)
	return ""
}

// resolve has a pod ask the cluster's DNS.
func (b *bench) resolve(namespace, name, network, host string) error {
	b.Helper()
	server := net.JoinHostPort(b.clusterIP("kube-system", "kube-dns", false), "53")
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
