package kube

import (
	"fmt"
	"strings"
	"testing"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/signet-mesh/signet/internal/mesh"
)

func serviceOf(namespace, name, vip string, edit ...func(*corev1.Service)) *corev1.Service {
	s := &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name},
		Spec: corev1.ServiceSpec{
			ClusterIPs: []string{vip},
			Ports:      []corev1.ServicePort{{Port: 80, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(8080)}},
		},
	}
	for _, f := range edit {
		f(s)
	}
	return s
}

// end is an endpoint "pod@address", "pod:uid@address" or "@address", with
// conditions behind it: r ready, s serving, t terminating.
func end(text, conditions string) discoveryv1.Endpoint {
	target, addr, _ := strings.Cut(text, "@")
	has := func(c string) *bool { b := strings.Contains(conditions, c); return &b }
	node := "one"
	e := discoveryv1.Endpoint{
		Addresses: []string{addr}, NodeName: &node,
		Conditions: discoveryv1.EndpointConditions{Ready: has("r"), Serving: has("s"), Terminating: has("t")},
	}
	if name, uid, _ := strings.Cut(target, ":"); name != "" {
		e.TargetRef = &corev1.ObjectReference{Kind: "Pod", Name: name, UID: types.UID(uid)}
	}
	return e
}

func sliceOf(namespace, service, name string, port int32, ends ...discoveryv1.Endpoint) *discoveryv1.EndpointSlice {
	empty, tcp := "", corev1.ProtocolTCP
	return &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Namespace: namespace, Name: name, Labels: map[string]string{discoveryv1.LabelServiceName: service}},
		AddressType: discoveryv1.AddressTypeIPv4,
		Ports:       []discoveryv1.EndpointPort{{Name: &empty, Port: &port, Protocol: &tcp}},
		Endpoints:   ends,
	}
}

// show writes a service's endpoints.
func show(s *mesh.State, key string) string {
	for i := range s.Services {
		if s.Services[i].Key() != key {
			continue
		}
		var out []string
		for _, e := range s.Services[i].Endpoints {
			text := e.Workload
			if text == "" {
				text = e.Addr.String()
			}
			if e.Ending {
				text += "(ending)"
			}
			if e.Targets != nil {
				text += fmt.Sprint(e.Targets)
			}
			out = append(out, text)
		}
		return strings.Join(out, " ")
	}
	return "no service"
}

// Which endpoints a service has, and whether they are reached through the
// mesh: one row per rule.
func TestEndpoints(t *testing.T) {
	for name, test := range map[string]struct {
		ends []discoveryv1.Endpoint
		want string
	}{
		"ready":                               {[]discoveryv1.Endpoint{end("web-1:u1@10.0.0.1", "rs")}, "shop/web-1"},
		"not ready":                           {[]discoveryv1.Endpoint{end("web-1:u1@10.0.0.1", "")}, ""},
		"ready before terminating":            {[]discoveryv1.Endpoint{end("web-1:u1@10.0.0.1", "rs"), end("web-2:u2@10.0.0.2", "st")}, "shop/web-1 shop/web-2(ending)"},
		"only terminating ones serve":         {[]discoveryv1.Endpoint{end("web-1:u1@10.0.0.1", "t"), end("web-2:u2@10.0.0.2", "st")}, "shop/web-2(ending)"},
		"host network and opted out in plain": {[]discoveryv1.Endpoint{end("host:u3@192.168.0.1", "rs"), end("web-1:u1@10.0.0.1", "rs")}, "192.168.0.1 shop/web-1"},
		// The slice may be seen before the pod; in plain would be wrong.
		"pod not known yet":           {[]discoveryv1.Endpoint{end("web-9:u9@10.0.0.9", "rs")}, ""},
		"pod replaced":                {[]discoveryv1.Endpoint{end("web-1:old@10.0.0.1", "rs")}, ""},
		"no pod, outside":             {[]discoveryv1.Endpoint{end("@192.0.2.7", "rs")}, "192.0.2.7"},
		"no pod, but a pod's address": {[]discoveryv1.Endpoint{end("@10.0.0.2", "rs")}, "shop/web-2"},
		"the same twice":              {[]discoveryv1.Endpoint{end("web-1:u1@10.0.0.1", "rs"), end("web-1:u1@fd00::1", "rs")}, "shop/web-1"},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			c.put(enforced("shop"))
			c.put(podOf("shop", "web-1", "u1", "10.0.0.1"))
			c.put(podOf("shop", "web-2", "u2", "10.0.0.2"))
			c.put(podOf("shop", "host", "u3", "192.168.0.1", func(p *corev1.Pod) { p.Spec.HostNetwork = true }))
			c.put(serviceOf("shop", "web", "10.96.0.1"))
			c.put(sliceOf("shop", "web", "web-a", 8080, test.ends...))
			s, _ := c.state()
			if got := show(s, "shop/web"); got != test.want {
				t.Errorf("%q, want %q", got, test.want)
			}
		})
	}
}

// An endpoint changes from plain to meshed and back when its pod does, though
// nothing of its service changed.
func TestEndpointFollowsPod(t *testing.T) {
	c := newCluster(t)
	c.put(ns("shop"))
	c.put(serviceOf("shop", "web", "10.96.0.1"))
	c.put(sliceOf("shop", "web", "web-a", 8080, end("web-1:u1@10.0.0.1", "rs")))
	want := func(step, want string) {
		t.Helper()
		if s, _ := c.state(); show(s, "shop/web") != want {
			t.Errorf("%s: %q, want %q", step, show(s, "shop/web"), want)
		}
	}
	want("before the pod, namespace off", "10.0.0.1")
	c.put(enforced("shop"))
	want("enrolled, pod not known", "")
	c.put(podOf("shop", "web-1", "u1", "10.0.0.1"))
	want("pod known", "shop/web-1")
	c.put(ns("shop"))
	want("left", "10.0.0.1")
	c.put(enforced("shop"))
	want("enrolled again", "shop/web-1")
	c.put(podOf("shop", "web-1", "u2", "10.0.0.1"))
	want("another pod of the same name", "")
}

// The shape of services: families, protocols, ports of the mesh, ports by
// name, policy of traffic.
func TestServiceShape(t *testing.T) {
	c := newCluster(t)
	c.put(enforced("shop"))
	c.put(podOf("shop", "web-1", "u1", "10.0.0.1"))
	c.put(podOf("shop", "web-2", "u2", "10.0.0.2"))
	local := corev1.ServiceInternalTrafficPolicyLocal
	c.put(serviceOf("shop", "web", "10.96.0.1", func(s *corev1.Service) {
		s.Spec.ClusterIPs = []string{"10.96.0.1", "fd00:96::1"}
		s.Spec.SessionAffinity, s.Spec.InternalTrafficPolicy = corev1.ServiceAffinityClientIP, &local
		s.Spec.Ports = []corev1.ServicePort{
			{Name: "http", Port: 80, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromString("web")},
			{Name: "dns", Port: 53, Protocol: corev1.ProtocolUDP},
			{Name: "tunnel", Port: 15008, Protocol: corev1.ProtocolTCP},
			{Name: "admin", Port: 81, Protocol: corev1.ProtocolTCP, TargetPort: intstr.FromInt32(9000)},
		}
	}))
	named := func(s *discoveryv1.EndpointSlice, ports map[string]int32) *discoveryv1.EndpointSlice {
		s.Ports = nil
		for name, port := range ports {
			s.Ports = append(s.Ports, discoveryv1.EndpointPort{Name: &name, Port: &port})
		}
		return s
	}
	c.put(named(sliceOf("shop", "web", "a", 0, end("web-1:u1@10.0.0.1", "rs")), map[string]int32{"http": 8080, "admin": 9000, "dns": 53}))
	c.put(named(sliceOf("shop", "web", "b", 0, end("web-2:u2@10.0.0.2", "rs")), map[string]int32{"http": 8000}))
	c.put(serviceOf("shop", "headless", corev1.ClusterIPNone))
	c.put(serviceOf("shop", "name", "", func(s *corev1.Service) { s.Spec.Type = corev1.ServiceTypeExternalName }))
	c.put(serviceOf("default", "kubernetes", "10.96.0.10"))
	c.put(sliceOf("default", "kubernetes", "kubernetes", 6443, end("@192.168.0.1", "rs")))
	s, _ := c.state()
	if len(s.Services) != 2 {
		t.Fatalf("%d services, want 2: %+v", len(s.Services), s.Services)
	}
	web := s.Services[1]
	if !web.Local || !web.Affinity || len(web.VIPs) != 2 || len(web.Ports) != 2 || web.Ports[1].Target != 9000 {
		t.Errorf("%+v", web)
	}
	if got, want := show(s, "shop/web"), "shop/web-1[8080 9000] shop/web-2[8000 0]"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
	if strings.Join(c.skipped, " ") != "web15008" {
		t.Errorf("skipped %v", c.skipped)
	}
	if got, want := show(s, "default/kubernetes"), "192.168.0.1[6443]"; got != want {
		t.Errorf("%q, want %q", got, want)
	}
}

// How much one change costs in a mesh of 5,000 pods behind 500 services.
func BenchmarkOneOfManyPods(b *testing.B) {
	c := newCluster(b)
	for i := range 50 {
		c.put(enforced(fmt.Sprintf("ns-%d", i)))
	}
	for i := range 500 {
		namespace := fmt.Sprintf("ns-%d", i%50)
		service := fmt.Sprintf("svc-%d", i)
		var ends []discoveryv1.Endpoint
		for j := range 10 {
			name, addr := fmt.Sprintf("pod-%d-%d", i, j), fmt.Sprintf("10.%d.%d.%d", 1+i/250, i%250, 1+j)
			c.put(podOf(namespace, name, "u-"+name, addr))
			ends = append(ends, end(name+":u-"+name+"@"+addr, "rs"))
		}
		c.put(serviceOf(namespace, service, fmt.Sprintf("10.96.%d.%d", i/250, 1+i%250)))
		c.put(sliceOf(namespace, service, service, 8080, ends...))
	}
	if s, _ := c.state(); len(s.Workloads) != 5000 || len(s.Services) != 500 {
		b.Fatalf("%d pods, %d services", len(s.Workloads), len(s.Services))
	}
	b.Run("pod replaced", func(b *testing.B) {
		b.ReportAllocs()
		for i := 0; b.Loop(); i++ {
			c.put(podOf("ns-7", "pod-7-3", fmt.Sprint("u", i), "10.1.7.4"))
			if _, changed := c.state(); !changed {
				b.Fatal("not seen")
			}
		}
	})
	b.Run("pod's status only", func(b *testing.B) {
		b.ReportAllocs()
		p := podOf("ns-7", "pod-7-3", "u", "10.1.7.4")
		c.put(p)
		c.state()
		for b.Loop() {
			c.put(p)
			if c.update(c.d) {
				b.Fatal("seen as a change")
			}
			c.d = newDirty()
		}
	})
}
