package harness

import (
	"fmt"
	"strings"
)

// Config is a MeshConfig document. ttl is a duration such as "10s".
func Config(ttl string) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: mesh.test, svidTTL: %s}
---
`, ttl)
}

// Namespace is a Namespace document; mode is enforce, observe or off.
func Namespace(name, mode string) string {
	return fmt.Sprintf(`apiVersion: v1
kind: Namespace
metadata: {name: %s, annotations: {signet.dev/mesh: "%s"}}
---
`, name, mode)
}

// Workload is a captured WorkloadEntry whose pod, name and service account
// have the same name.
func Workload(namespace, name, addr string) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: %[2]s, namespace: %[1]s}
spec: {serviceAccount: %[2]s, capture: {networkNamespace: %[2]s, addresses: [%[3]s]}}
---
`, namespace, name, addr)
}

// Service is a ServiceEntry with one port in front of workloads of its
// namespace.
func Service(namespace, name, vip string, port, target int, workloads ...string) string {
	var eps []string
	for _, w := range workloads {
		eps = append(eps, "{workload: "+w+"}")
	}
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: ServiceEntry
metadata: {name: %s, namespace: %s}
spec: {vips: [%s], ports: [{port: %d, targetPort: %d}], endpoints: [%s]}
---
`, name, namespace, vip, port, target, strings.Join(eps, ", "))
}

// Allow is an AllowPolicy; from are service accounts ("name" or
// "namespace/name"). No ports means every port.
func Allow(namespace, name, target string, ports []int, from ...string) string {
	var peers []string
	for _, f := range from {
		peers = append(peers, "{serviceAccount: "+f+"}")
	}
	list := ""
	if len(ports) > 0 {
		list = fmt.Sprintf(", ports: [%s]", strings.Trim(strings.Join(strings.Fields(fmt.Sprint(ports)), ", "), "[]"))
	}
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: AllowPolicy
metadata: {name: %s, namespace: %s}
spec: {target: {serviceAccount: %s}%s, from: [%s]}
---
`, name, namespace, target, list, strings.Join(peers, ", "))
}
