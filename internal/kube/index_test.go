package kube

import (
	"fmt"
	"net/netip"
	"slices"
	"strings"
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/types"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/tools/cache"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/mesh"
)

var testDomain = spiffeid.RequireTrustDomainFromString("mesh.example")

// cluster is an index over stores that a test fills.
type cluster struct {
	*index
	t       testing.TB
	d       *dirty
	skipped []string
}

func newCluster(t testing.TB) *cluster {
	c := &cluster{t: t, d: newDirty()}
	store := func(more cache.Indexers) cache.Indexer {
		all := cache.Indexers{cache.NamespaceIndex: cache.MetaNamespaceIndexFunc}
		for name, f := range more {
			all[name] = f
		}
		return cache.NewIndexer(cache.MetaNamespaceKeyFunc, all)
	}
	c.index = newIndex(caches{store(nil), store(nil), store(nil), store(cache.Indexers{byService: sliceIndexer})}, testDomain,
		func(s *corev1.Service, port int32) { c.skipped = append(c.skipped, fmt.Sprint(s.Name, port)) })
	return c
}

// put stores an object as the informer would.
func (c *cluster) put(obj any) {
	c.t.Helper()
	var err error
	switch o := obj.(type) {
	case *corev1.Namespace:
		obj, _ = stripNamespace(o)
		err = c.namespaceStore.Add(obj)
		c.d.namespaces.add(o.Name)
	case *corev1.Pod:
		obj, _ = stripPod(o)
		err = c.podStore.Add(obj)
		c.d.pods.add(o.Namespace + "/" + o.Name)
	case *corev1.Service:
		obj, _ = stripService(o)
		err = c.serviceStore.Add(obj)
		c.d.services.add(o.Namespace + "/" + o.Name)
	case *discoveryv1.EndpointSlice:
		obj, _ = stripSlice(o)
		err = c.sliceStore.Add(obj)
		c.d.services.add(o.Namespace + "/" + o.Labels[discoveryv1.LabelServiceName])
	}
	if err != nil {
		c.t.Fatal(err)
	}
}

func (c *cluster) remove(p *corev1.Pod) {
	c.t.Helper()
	if err := c.podStore.Delete(newPod(p)); err != nil {
		c.t.Fatal(err)
	}
	c.d.pods.add(p.Namespace + "/" + p.Name)
}

func (c *cluster) state() (*mesh.State, bool) {
	changed := c.update(c.d)
	c.d = newDirty()
	return c.view(settings{td: testDomain}, &documents{}, &revocations{}).State, changed
}

func ns(name string, annotations ...string) *corev1.Namespace {
	n := &corev1.Namespace{ObjectMeta: metav1.ObjectMeta{Name: name, Annotations: map[string]string{}}}
	for i := 0; i < len(annotations); i += 2 {
		n.Annotations[annotations[i]] = annotations[i+1]
	}
	return n
}

func enforced(name string) *corev1.Namespace { return ns(name, v1alpha1.AnnotationMesh, "enforce") }

func podOf(namespace, name, uid, ip string, edit ...func(*corev1.Pod)) *corev1.Pod {
	p := &corev1.Pod{
		ObjectMeta: metav1.ObjectMeta{Namespace: namespace, Name: name, UID: types.UID(uid)},
		Spec:       corev1.PodSpec{NodeName: "one", ServiceAccountName: "web"},
		Status:     corev1.PodStatus{Phase: corev1.PodRunning, PodIPs: []corev1.PodIP{{IP: ip}}},
	}
	for _, f := range edit {
		f(p)
	}
	return p
}

func keys(s *mesh.State) string {
	var out []string
	for _, w := range s.Workloads {
		out = append(out, w.Key())
	}
	return strings.Join(out, " ")
}

// Which pods are in the mesh: one row per rule.
func TestWhichPods(t *testing.T) {
	off := func(p *corev1.Pod) { p.Annotations = map[string]string{v1alpha1.AnnotationMesh: "off"} }
	for name, test := range map[string]struct {
		ns       *corev1.Namespace
		edit     func(*corev1.Pod)
		in       bool
		excluded bool
	}{
		"enforced":                    {ns: enforced("shop"), in: true},
		"observed":                    {ns: ns("shop", v1alpha1.AnnotationMesh, "observe"), in: true},
		"not annotated":               {ns: ns("shop")},
		"off":                         {ns: ns("shop", v1alpha1.AnnotationMesh, "off")},
		"misspelt is enforced":        {ns: ns("shop", v1alpha1.AnnotationMesh, "enfroce"), in: true},
		"empty value is enforced":     {ns: ns("shop", v1alpha1.AnnotationMesh, ""), in: true},
		"host network":                {ns: enforced("shop"), edit: func(p *corev1.Pod) { p.Spec.HostNetwork = true }},
		"not on a node":               {ns: enforced("shop"), edit: func(p *corev1.Pod) { p.Spec.NodeName = "" }},
		"succeeded":                   {ns: enforced("shop"), edit: func(p *corev1.Pod) { p.Status.Phase = corev1.PodSucceeded }},
		"failed":                      {ns: enforced("shop"), edit: func(p *corev1.Pod) { p.Status.Phase = corev1.PodFailed }},
		"being deleted, still runs":   {ns: enforced("shop"), edit: func(p *corev1.Pod) { p.DeletionTimestamp = &metav1.Time{} }, in: true},
		"pending, without an address": {ns: enforced("shop"), edit: func(p *corev1.Pod) { p.Status = corev1.PodStatus{Phase: corev1.PodPending} }, in: true},
		"opts out, not allowed":       {ns: enforced("shop"), edit: off, in: true},
		"opts out, allowed":           {ns: ns("shop", v1alpha1.AnnotationMesh, "enforce", v1alpha1.AnnotationAllowOptOut, "true"), edit: off, excluded: true},
		"opt-out allowed in bad form": {ns: ns("shop", v1alpha1.AnnotationMesh, "enforce", v1alpha1.AnnotationAllowOptOut, "yes"), edit: off, in: true},
		"allowed, other value":        {ns: ns("shop", v1alpha1.AnnotationMesh, "enforce", v1alpha1.AnnotationAllowOptOut, "true"), edit: func(p *corev1.Pod) { p.Annotations = map[string]string{v1alpha1.AnnotationMesh: "no"} }, in: true},
	} {
		t.Run(name, func(t *testing.T) {
			c := newCluster(t)
			c.put(test.ns)
			edit := test.edit
			if edit == nil {
				edit = func(*corev1.Pod) {}
			}
			c.put(podOf("shop", "web-1", "u1", "10.0.0.1", edit))
			s, _ := c.state()
			if got := len(s.Workloads) == 1; got != test.in {
				t.Errorf("in the mesh: %t, want %t", got, test.in)
			}
			if got := s.Excluded["u1"] == "one"; got != test.excluded {
				t.Errorf("excluded: %v, want %t", s.Excluded, test.excluded)
			}
		})
	}
}

// What a workload is made of.
func TestWorkload(t *testing.T) {
	c := newCluster(t)
	c.put(enforced("shop"))
	always := corev1.ContainerRestartPolicyAlways
	http := func(port any, host string) *corev1.Probe {
		p := intstr.FromString(fmt.Sprint(port))
		if n, ok := port.(int); ok {
			p = intstr.FromInt32(int32(n))
		}
		return &corev1.Probe{ProbeHandler: corev1.ProbeHandler{HTTPGet: &corev1.HTTPGetAction{Port: p, Host: host}}}
	}
	c.put(podOf("shop", "web-1", "u1", "10.0.0.1", func(p *corev1.Pod) {
		p.Status.PodIPs = append(p.Status.PodIPs, corev1.PodIP{IP: "fd00::1"})
		p.Spec.Containers = []corev1.Container{{
			Ports:         []corev1.ContainerPort{{Name: "health", ContainerPort: 9000}},
			LivenessProbe: http("health", ""), ReadinessProbe: http(8080, "elsewhere.example"), StartupProbe: http("nothing", ""),
			Lifecycle: &corev1.Lifecycle{PreStop: &corev1.LifecycleHandler{HTTPGet: &corev1.HTTPGetAction{Port: intstr.FromInt32(8081)}}},
		}, {
			LivenessProbe:  &corev1.Probe{ProbeHandler: corev1.ProbeHandler{GRPC: &corev1.GRPCAction{Port: 9001}}},
			ReadinessProbe: &corev1.Probe{ProbeHandler: corev1.ProbeHandler{TCPSocket: &corev1.TCPSocketAction{Port: intstr.FromInt32(mesh.PortTunnel)}}},
			StartupProbe:   &corev1.Probe{ProbeHandler: corev1.ProbeHandler{Exec: &corev1.ExecAction{}}},
		}}
		p.Spec.InitContainers = []corev1.Container{
			{RestartPolicy: &always, LivenessProbe: http(9002, "")},
			{LivenessProbe: http(9003, "")}, // runs and ends: no probes
		}
	}))
	s, _ := c.state()
	w := s.Workloads[0]
	if w.ID.String() != "spiffe://mesh.example/ns/shop/sa/web" || w.UID != "u1" || w.Attest.PodUID != "u1" || w.Node != "one" || w.Capture.NetNS != "" {
		t.Errorf("%+v", w)
	}
	if want := []uint16{8081, 9000, 9001, 9002}; !slices.Equal(w.Capture.Probes, want) {
		t.Errorf("probes %v, want %v", w.Capture.Probes, want)
	}
	if want := []netip.Addr{netip.MustParseAddr("10.0.0.1"), netip.MustParseAddr("fd00::1")}; !slices.Equal(w.Capture.Addrs, want) {
		t.Errorf("addresses %v, want %v", w.Capture.Addrs, want)
	}
}

// Pods come and go with their namespace's annotation, and a state that was
// handed out is not edited.
func TestEnrolAndLeave(t *testing.T) {
	c := newCluster(t)
	c.put(ns("shop"))
	c.put(ns("a-shop"))
	one := podOf("shop", "one", "u1", "10.0.0.1")
	c.put(one)
	c.put(podOf("shop", "two", "u2", "10.0.0.2"))
	c.put(podOf("a-shop", "x", "u3", "10.0.0.3"))
	if s, _ := c.state(); keys(s) != "" {
		t.Errorf("before: %s", keys(s))
	}
	c.put(enforced("shop"))
	c.put(enforced("a-shop"))
	before, changed := c.state()
	if !changed || keys(before) != "a-shop/x shop/one shop/two" {
		t.Errorf("enrolled: %s", keys(before))
	}
	first := c.view(settings{td: testDomain}, &documents{}, &revocations{}).Revision
	c.put(one)
	if _, changed := c.state(); changed {
		t.Error("the same pod again counts as a change")
	}
	c.put(podOf("shop", "one", "u9", "10.0.0.1"))
	if s, changed := c.state(); !changed || s.Workloads[1].UID != "u9" || before.Workloads[1].UID != "u1" {
		t.Error("a pod that replaced another of its name is not seen, or the old state was edited")
	}
	if c.view(settings{td: testDomain}, &documents{}, &revocations{}).Revision == first {
		t.Error("the revision did not change")
	}
	c.put(one)
	c.remove(podOf("shop", "two", "u2", "10.0.0.2"))
	if s, _ := c.state(); keys(s) != "a-shop/x shop/one" {
		t.Errorf("after a removal: %s", keys(s))
	}
	c.put(ns("shop"))
	if s, _ := c.state(); keys(s) != "a-shop/x" || s.Mode("shop") != mesh.ModeOff {
		t.Errorf("after leaving: %s", keys(s))
	}
}
