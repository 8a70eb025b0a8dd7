package kube

import (
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/runtime"
	"k8s.io/apimachinery/pkg/runtime/schema"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/internal/mesh"
)

// pod is what the cache keeps of a Pod: a few hundred bytes instead of many
// thousand. It is immutable.
type pod struct {
	metav1.ObjectMeta // name, namespace, UID, resource version
	serviceAccount    string
	node              string
	hostNetwork       bool
	over              bool // has succeeded or failed: nothing runs any more
	optOut            bool // asks to stay outside
	addrs             []netip.Addr
	probes            []uint16 // sorted
}

// GetObjectKind and DeepCopyObject make a pod an object to client-go.
func (p *pod) GetObjectKind() schema.ObjectKind { return schema.EmptyObjectKind }

// DeepCopyObject implements runtime.Object.
func (p *pod) DeepCopyObject() runtime.Object {
	out := *p
	p.ObjectMeta.DeepCopyInto(&out.ObjectMeta)
	out.addrs, out.probes = slices.Clone(p.addrs), slices.Clone(p.probes)
	return &out
}

// stripPod is the transform of the pod cache.
func stripPod(obj any) (any, error) {
	in, ok := obj.(*corev1.Pod)
	if !ok { // stripped already, or a tombstone
		return obj, nil
	}
	return newPod(in), nil
}

func newPod(in *corev1.Pod) *pod {
	out := &pod{
		ObjectMeta: metav1.ObjectMeta{
			Name: in.Name, Namespace: in.Namespace, UID: in.UID, ResourceVersion: in.ResourceVersion,
		},
		serviceAccount: in.Spec.ServiceAccountName,
		node:           in.Spec.NodeName,
		hostNetwork:    in.Spec.HostNetwork,
		over:           in.Status.Phase == corev1.PodSucceeded || in.Status.Phase == corev1.PodFailed,
		optOut:         in.Annotations[v1alpha1.AnnotationMesh] == "off",
		probes:         probePorts(&in.Spec),
	}
	if out.serviceAccount == "" {
		out.serviceAccount = "default"
	}
	for _, ip := range in.Status.PodIPs {
		if addr, err := netip.ParseAddr(ip.IP); err == nil {
			out.addrs = append(out.addrs, addr.Unmap())
		}
	}
	return out
}

// runs reports whether the pod has, or is about to have, a network namespace of
// its own on a node. One that is being deleted runs until it is over: what it
// does in preStop must work.
func (p *pod) runs() bool { return !p.hostNetwork && !p.over && p.node != "" }

// probePorts lists the ports that the kubelet connects to: those of probes and
// of lifecycle handlers of containers that stay. A handler that names a host
// goes there and not to the pod.
func probePorts(spec *corev1.PodSpec) []uint16 {
	var out []uint16
	add := func(c *corev1.Container, host string, port intstr.IntOrString) {
		if n, ok := portNumber(c, port); ok && host == "" && !meshPort(n) {
			out = append(out, n)
		}
	}
	container := func(c *corev1.Container) {
		for _, p := range []*corev1.Probe{c.LivenessProbe, c.ReadinessProbe, c.StartupProbe} {
			switch {
			case p == nil:
			case p.HTTPGet != nil:
				add(c, p.HTTPGet.Host, p.HTTPGet.Port)
			case p.TCPSocket != nil:
				add(c, p.TCPSocket.Host, p.TCPSocket.Port)
			case p.GRPC != nil:
				add(c, "", intstr.FromInt32(p.GRPC.Port))
			}
		}
		if c.Lifecycle == nil {
			return
		}
		for _, h := range []*corev1.LifecycleHandler{c.Lifecycle.PostStart, c.Lifecycle.PreStop} {
			switch {
			case h == nil:
			case h.HTTPGet != nil:
				add(c, h.HTTPGet.Host, h.HTTPGet.Port)
			case h.TCPSocket != nil:
				add(c, h.TCPSocket.Host, h.TCPSocket.Port)
			}
		}
	}
	for i := range spec.Containers {
		container(&spec.Containers[i])
	}
	for i := range spec.InitContainers {
		c := &spec.InitContainers[i]
		if c.RestartPolicy != nil && *c.RestartPolicy == corev1.ContainerRestartPolicyAlways {
			container(c)
		}
	}
	slices.Sort(out)
	return slices.Compact(out)
}

// portNumber resolves a port that may be the name of one of the container's.
func portNumber(c *corev1.Container, port intstr.IntOrString) (uint16, bool) {
	n := port.IntVal
	if port.Type == intstr.String {
		n = 0
		for i := range c.Ports {
			if c.Ports[i].Name == port.StrVal {
				n = c.Ports[i].ContainerPort
			}
		}
	}
	return uint16(n), n > 0 && n <= 65535
}

func meshPort(n uint16) bool {
	return n == mesh.PortOutbound || n == mesh.PortInbound || n == mesh.PortTunnel
}
