package kube

import (
	"cmp"
	"net/netip"
	"slices"

	corev1 "k8s.io/api/core/v1"
	discoveryv1 "k8s.io/api/discovery/v1"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"

	"github.com/signet-mesh/signet/internal/mesh"
)

// stripService keeps what a mesh.Service is made of.
func stripService(obj any) (any, error) {
	in, ok := obj.(*corev1.Service)
	if !ok {
		return obj, nil
	}
	return &corev1.Service{
		ObjectMeta: metav1.ObjectMeta{Name: in.Name, Namespace: in.Namespace, UID: in.UID, ResourceVersion: in.ResourceVersion},
		Spec: corev1.ServiceSpec{
			Type: in.Spec.Type, Ports: in.Spec.Ports, ClusterIPs: in.Spec.ClusterIPs,
			SessionAffinity: in.Spec.SessionAffinity, InternalTrafficPolicy: in.Spec.InternalTrafficPolicy,
		},
	}, nil
}

// stripSlice drops labels but one, and what endpoints say of zones.
func stripSlice(obj any) (any, error) {
	in, ok := obj.(*discoveryv1.EndpointSlice)
	if !ok {
		return obj, nil
	}
	out := &discoveryv1.EndpointSlice{
		ObjectMeta:  metav1.ObjectMeta{Name: in.Name, Namespace: in.Namespace, UID: in.UID, ResourceVersion: in.ResourceVersion},
		AddressType: in.AddressType,
		Ports:       in.Ports,
	}
	if service := in.Labels[discoveryv1.LabelServiceName]; service != "" {
		out.Labels = map[string]string{discoveryv1.LabelServiceName: service}
	}
	for i := range in.Endpoints {
		e := &in.Endpoints[i]
		kept := discoveryv1.Endpoint{Addresses: e.Addresses, Conditions: e.Conditions, NodeName: e.NodeName}
		if r := e.TargetRef; r != nil {
			kept.TargetRef = &corev1.ObjectReference{Kind: r.Kind, Namespace: r.Namespace, Name: r.Name, UID: r.UID}
		}
		out.Endpoints = append(out.Endpoints, kept)
	}
	return out, nil
}

// services converts Services. What an endpoint is depends on the pods; the
// functions answer for the newest ones.
type services struct {
	// podEndpoint says what a pod is to its callers: the key of a workload,
	// or a plain address; neither, if it is not known yet which.
	podEndpoint func(namespace, name, uid string) (workload string, plain bool)
	// workloadAt returns the key of the workload that has an address.
	workloadAt func(netip.Addr) string
	// skipped hears of ports that a service cannot have in a mesh.
	skipped func(s *corev1.Service, port int32)
}

// convert returns the service, nil for one without a virtual address, and the
// pods ("namespace/name") and addresses that the result depends on.
func (c *services) convert(in *corev1.Service, from []*discoveryv1.EndpointSlice) (*mesh.Service, []string) {
	if in.Spec.Type == corev1.ServiceTypeExternalName {
		return nil, nil
	}
	out := &mesh.Service{
		Namespace: in.Namespace, Name: in.Name,
		Local:    in.Spec.InternalTrafficPolicy != nil && *in.Spec.InternalTrafficPolicy == corev1.ServiceInternalTrafficPolicyLocal,
		Affinity: in.Spec.SessionAffinity == corev1.ServiceAffinityClientIP,
	}
	for _, ip := range in.Spec.ClusterIPs {
		if addr, err := netip.ParseAddr(ip); err == nil {
			out.VIPs = append(out.VIPs, addr.Unmap())
		}
	}
	if len(out.VIPs) == 0 { // headless, or not allocated yet
		return nil, nil
	}
	for _, p := range in.Spec.Ports {
		if p.Protocol != corev1.ProtocolTCP && p.Protocol != "" || p.Port < 1 || p.Port > 65535 {
			continue
		}
		if meshPort(uint16(p.Port)) {
			c.skipped(in, p.Port)
			continue
		}
		port := mesh.ServicePort{Name: p.Name, Port: uint16(p.Port), Target: uint16(p.Port)}
		if p.TargetPort.Type == intstr.Int && p.TargetPort.IntVal > 0 && p.TargetPort.IntVal <= 65535 {
			port.Target = uint16(p.TargetPort.IntVal)
		}
		out.Ports = append(out.Ports, port)
	}
	var needs []string
	out.Endpoints, needs = c.endpoints(in, out, from)
	return out, needs
}

// candidate is an endpoint of a slice with the ports it has there.
type candidate struct {
	endpoint *discoveryv1.Endpoint
	addr     netip.Addr
	targets  []uint16
	ending   bool
}

// endpoints chooses those that kube-proxy would: the ready ones, and those that
// still serve while they end.
func (c *services) endpoints(in *corev1.Service, out *mesh.Service, from []*discoveryv1.EndpointSlice) ([]mesh.Endpoint, []string) {
	var ready, ending []candidate
	for _, slice := range from {
		if slice.AddressType == discoveryv1.AddressTypeFQDN {
			continue
		}
		targets := sliceTargets(in, out.Ports, slice, c.skipped)
		for i := range slice.Endpoints {
			e := &slice.Endpoints[i]
			if len(e.Addresses) == 0 {
				continue
			}
			addr, err := netip.ParseAddr(e.Addresses[0])
			if err != nil {
				continue
			}
			k := candidate{endpoint: e, addr: addr.Unmap(), targets: targets}
			isReady := e.Conditions.Ready == nil || *e.Conditions.Ready
			serving := e.Conditions.Serving == nil && isReady || e.Conditions.Serving != nil && *e.Conditions.Serving
			terminating := e.Conditions.Terminating != nil && *e.Conditions.Terminating
			switch {
			case isReady:
				ready = append(ready, k)
			case serving && terminating:
				k.ending = true
				ending = append(ending, k)
			}
		}
	}
	var result []mesh.Endpoint
	var needs []string
	at := map[any]int{} // workload key or address -> index in result
	for _, k := range append(ready, ending...) {
		e := mesh.Endpoint{Targets: k.targets, Ending: k.ending}
		if k.endpoint.NodeName != nil {
			e.Node = *k.endpoint.NodeName
		}
		if ref := k.endpoint.TargetRef; ref != nil && ref.Kind == "Pod" {
			namespace := cmp.Or(ref.Namespace, in.Namespace)
			needs = append(needs, namespace+"/"+ref.Name)
			workload, plain := c.podEndpoint(namespace, ref.Name, string(ref.UID))
			if workload == "" && !plain {
				continue
			}
			e.Workload = workload
		} else {
			needs = append(needs, k.addr.String())
			e.Workload = c.workloadAt(k.addr)
		}
		var id any = e.Workload
		if e.Workload == "" {
			e.Addr, id = k.addr, k.addr
		}
		if i, twice := at[id]; twice { // of another family, or in two slices
			if result[i].Ending == e.Ending { // else what is ready counts
				result[i].Targets = merged(result[i].Targets, e.Targets)
			}
			continue
		}
		at[id] = len(result)
		result = append(result, e)
	}
	slices.SortFunc(result, func(a, b mesh.Endpoint) int {
		return cmp.Or(cmp.Compare(a.Workload, b.Workload), a.Addr.Compare(b.Addr))
	})
	for i := range result {
		if usual(result[i].Targets, out.Ports) {
			result[i].Targets = nil
		}
	}
	return result, needs
}

// sliceTargets gives the slice's port for each of the service's, 0 for none.
func sliceTargets(in *corev1.Service, ports []mesh.ServicePort, slice *discoveryv1.EndpointSlice, skipped func(*corev1.Service, int32)) []uint16 {
	out := make([]uint16, len(ports))
	for i := range ports {
		for j := range slice.Ports {
			p := &slice.Ports[j]
			name := ""
			if p.Name != nil {
				name = *p.Name
			}
			if name != ports[i].Name || p.Port == nil || p.Protocol != nil && *p.Protocol != corev1.ProtocolTCP || *p.Port < 1 || *p.Port > 65535 {
				continue
			}
			if meshPort(uint16(*p.Port)) {
				skipped(in, *p.Port)
				continue
			}
			out[i] = uint16(*p.Port)
		}
	}
	return out
}

func merged(a, b []uint16) []uint16 {
	out := slices.Clone(a)
	for i := range out {
		if out[i] == 0 {
			out[i] = b[i]
		}
	}
	return out
}

func usual(targets []uint16, ports []mesh.ServicePort) bool {
	for i := range ports {
		if targets[i] != ports[i].Target {
			return false
		}
	}
	return true
}
