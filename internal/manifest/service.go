package manifest

import (
	"fmt"
	"net/netip"
	"strings"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

func (b *builder) serviceEntries() {
	docs := b.byKind[v1alpha1.KindServiceEntry]
	services := make([]mesh.Service, len(docs))
	// All virtual addresses first: endpoints must not be one of them.
	for i, d := range docs {
		spec := d.spec.(*v1alpha1.ServiceEntrySpec)
		s := &services[i]
		s.Namespace, s.Name = d.meta.Namespace, d.meta.Name
		if len(spec.VIPs) == 0 {
			d.fault(CodeRequired, "spec.vips", "is empty; give the service at least one address")
		}
		for j, vip := range spec.VIPs {
			if addr, ok := b.claim(d, fmt.Sprintf("spec.vips[%d]", j), vip, "service "+s.Key()); ok {
				s.VIPs = append(s.VIPs, addr)
			}
		}
	}
	for i, d := range docs {
		spec := d.spec.(*v1alpha1.ServiceEntrySpec)
		services[i].Ports = servicePorts(d, spec.Ports)
		services[i].Endpoints = b.endpoints(d, spec.Endpoints)
	}
	b.state.Services = services
}

func servicePorts(d *document, ports []v1alpha1.ServicePort) []mesh.ServicePort {
	if len(ports) == 0 {
		d.fault(CodeRequired, "spec.ports", "is empty; give the service at least one port")
	}
	var out []mesh.ServicePort
	numbers, names := map[uint16]bool{}, map[string]bool{}
	for i, p := range ports {
		field := fmt.Sprintf("spec.ports[%d]", i)
		if p.Port == 0 && d.lines[field+".port"] == 0 {
			d.fault(CodeRequired, field+".port", "is missing")
			continue
		}
		port, ok := checkPort(d, field+".port", p.Port)
		if ok && numbers[port] {
			d.fault(CodeDuplicate, field+".port", "port %d is listed twice", port)
		}
		numbers[port] = true
		target := port
		if d.lines[field+".targetPort"] != 0 {
			target, _ = checkPort(d, field+".targetPort", p.TargetPort)
		}
		if p.Name != "" {
			if err := authz.CheckNamespace(p.Name); err != nil { // a label, as in Kubernetes
				d.fault(CodeValue, field+".name", "%v", err)
			}
			if names[p.Name] {
				d.fault(CodeDuplicate, field+".name", "port name %q is used twice", p.Name)
			}
			names[p.Name] = true
		}
		out = append(out, mesh.ServicePort{Name: p.Name, Port: port, Target: target})
	}
	return out
}

func checkPort(d *document, field string, port int32) (uint16, bool) {
	switch {
	case port < 1 || port > 65535:
		d.fault(CodeValue, field, "%d is no port; use 1 to 65535", port)
		return 0, false
	case port == mesh.PortOutbound || port == mesh.PortInbound || port == mesh.PortTunnel:
		d.fault(CodeValue, field, "port %d belongs to the mesh itself", port)
		return 0, false
	}
	return uint16(port), true
}

func (b *builder) endpoints(d *document, endpoints []v1alpha1.ServiceEndpoint) []mesh.Endpoint {
	if len(endpoints) == 0 {
		d.fault(CodeRequired, "spec.endpoints", "is empty; give the service at least one endpoint")
	}
	var out []mesh.Endpoint
	type target struct {
		workload string
		addr     netip.Addr
	}
	seen := map[target]bool{}
	for i, e := range endpoints {
		field := fmt.Sprintf("spec.endpoints[%d]", i)
		var endpoint mesh.Endpoint
		switch {
		case (e.Workload == "") == (e.Address == ""):
			d.fault(CodeValue, field, "set exactly one of workload and address")
			continue
		case e.Workload != "":
			field += ".workload"
			endpoint.Workload = e.Workload
			if !strings.Contains(e.Workload, "/") {
				endpoint.Workload = d.meta.Namespace + "/" + e.Workload
			}
			b.workloadEndpoint(d, field, endpoint.Workload)
		default:
			field += ".address"
			addr, err := parseAddr(e.Address)
			if err != nil {
				d.fault(CodeValue, field, "%v", err)
				continue
			}
			if owner, taken := b.addresses[addr]; taken {
				d.fault(CodeValue, field, "%s belongs to %s; an endpoint in the mesh is given as workload", addr, owner)
			}
			endpoint.Addr = addr
		}
		if e.SPIFFEID != "" {
			endpoint.Identity = b.endpointIdentity(d, fmt.Sprintf("spec.endpoints[%d].spiffeID", i), e)
		}
		originate(d, fmt.Sprintf("spec.endpoints[%d]", i), e, &endpoint)
		key := target{endpoint.Workload, endpoint.Addr}
		if seen[key] {
			d.fault(CodeDuplicate, field, "the endpoint is listed twice")
		}
		seen[key] = true
		out = append(out, endpoint)
	}
	return out
}

// originate reads whether what listens at an address speaks mutual TLS itself.
func originate(d *document, field string, e v1alpha1.ServiceEndpoint, out *mesh.Endpoint) {
	switch {
	case e.TLS == "" && e.ALPN != "":
		d.fault(CodeValue, field+".alpn", "needs tls: %s, for it is what is offered in that TLS", v1alpha1.TLSOriginate)
	case e.TLS == "":
	case e.TLS != v1alpha1.TLSOriginate:
		d.fault(CodeValue, field+".tls", "%q is not known; write %s, or leave it out", e.TLS, v1alpha1.TLSOriginate)
	case e.Workload != "":
		d.fault(CodeValue, field+".tls", "has no meaning with workload; write it in an AllowPolicy for it")
	case e.SPIFFEID == "":
		d.fault(CodeRequired, field+".spiffeID", "is missing; with tls, say who is to answer")
	default:
		out.Originate, out.ALPN = true, e.ALPN
		if err := authz.CheckALPN(e.ALPN); e.ALPN != "" && err != nil {
			d.fault(CodeValue, field+".alpn", "%v", err)
		}
	}
}

// endpointIdentity reads who must answer at an address.
func (b *builder) endpointIdentity(d *document, field string, e v1alpha1.ServiceEndpoint) spiffeid.ID {
	id, err := spiffeid.FromString(e.SPIFFEID)
	if err == nil && e.Workload == "" {
		err = b.domains().CheckWorkload(id, b.report.incomplete || b.partial && len(b.state.Federations) == 0)
		if err == nil && id.TrustDomain() == b.state.TrustDomain && e.TLS == "" {
			err = fmt.Errorf("%q is of this mesh; give the endpoint as workload, or write tls: %s if it speaks mutual TLS itself", id, v1alpha1.TLSOriginate)
		}
	}
	switch {
	case e.Workload != "":
		d.fault(CodeValue, field, "has no meaning with workload, whose identity is known; remove it")
	case err != nil:
		d.fault(CodeValue, field, "%v", err)
	default:
		return id
	}
	return spiffeid.ID{}
}

func (b *builder) workloadEndpoint(d *document, field, key string) {
	if b.report.incomplete || b.partial && len(b.workloads) == 0 {
		return
	}
	captured, exists := b.workloads[key]
	switch {
	case !exists:
		d.fault(CodeReference, field, "workload %q does not exist; add a WorkloadEntry", key)
	case !captured:
		d.fault(CodeReference, field, "workload %q has no capture and so no address; add one", key)
	}
}
