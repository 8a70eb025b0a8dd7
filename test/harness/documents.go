package harness

import (
	"fmt"
	"strings"
)

// Config is a MeshConfig document. ttl is a duration such as "10s".
func Config(ttl string) string { return ConfigOf("mesh.test", ttl) }

// ConfigOf is the MeshConfig document of another trust domain.
func ConfigOf(trustDomain, ttl string) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: MeshConfig
metadata: {name: mesh}
spec: {trustDomain: %s, svidTTL: %s}
---
`, trustDomain, ttl)
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

// Program is a WorkloadEntry of the same name as its service account, which is what
// runs an executable as a user.
func Program(namespace, name string, uid int, executable string) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: %[2]s, namespace: %[1]s}
spec: {serviceAccount: %[2]s, attest: {uid: %[3]d, path: %[4]q}}
---
`, namespace, name, uid, executable)
}

// Federation is a Federation document of an endpoint that proves itself by SPIFFE,
// with the bundle to begin with.
func Federation(trustDomain, url, endpoint, bundle string) string {
	return fmt.Sprintf(`apiVersion: signet.dev/v1alpha1
kind: Federation
metadata: {name: %[1]s}
spec:
  trustDomain: %[1]s
  bundleEndpointURL: %[2]s
  profile: https_spiffe
  endpointSPIFFEID: %[3]s
  bundle: '%[4]s'
---
`, trustDomain, url, endpoint, strings.TrimSpace(bundle))
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
