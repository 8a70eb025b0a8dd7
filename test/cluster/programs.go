package cluster

import (
	"fmt"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

// controlPrograms are the services of the control plane's machine.
func (c *Cluster) controlPrograms() []spec.Service {
	return []spec.Service{
		{Name: "etcd", Argv: []string{bin + "etcd",
			"--name=control", "--data-dir=/var/lib/etcd",
			"--listen-client-urls=http://127.0.0.1:2379", "--advertise-client-urls=http://127.0.0.1:2379",
			"--listen-peer-urls=http://127.0.0.1:2380", "--initial-advertise-peer-urls=http://127.0.0.1:2380",
			"--initial-cluster=control=http://127.0.0.1:2380",
			// Nothing in a test outlives the machine's power.
			"--unsafe-no-fsync", "--log-level=warn"}},
		{Name: "kube-apiserver", Argv: []string{bin + "kube-apiserver",
			"--etcd-servers=http://127.0.0.1:2379",
			"--advertise-address=" + c.control().Addr4.String(), "--secure-port=6443",
			"--tls-cert-file=" + etc + "apiserver.crt", "--tls-private-key-file=" + etc + "apiserver.key",
			"--client-ca-file=" + etc + "ca.crt",
			"--service-account-issuer=https://kubernetes.default.svc",
			"--service-account-key-file=" + etc + "sa.key", "--service-account-signing-key-file=" + etc + "sa.key",
			"--service-cluster-ip-range=" + serviceCIDR,
			"--authorization-mode=Node,RBAC", "--enable-admission-plugins=NodeRestriction",
			"--kubelet-client-certificate=" + etc + "kubelet-client.crt", "--kubelet-client-key=" + etc + "kubelet-client.key",
			"--kubelet-certificate-authority=" + etc + "ca.crt",
			// Nothing resolves the nodes' names.
			"--kubelet-preferred-address-types=InternalIP",
			"--allow-privileged=true", "--event-ttl=15m"}},
		{Name: "kube-controller-manager", Argv: []string{bin + "kube-controller-manager",
			"--kubeconfig=" + etc + "controller-manager.conf",
			"--service-account-private-key-file=" + etc + "sa.key", "--root-ca-file=" + etc + "ca.crt",
			"--cluster-signing-cert-file=" + etc + "ca.crt", "--cluster-signing-key-file=" + etc + "ca.key",
			"--use-service-account-credentials", "--leader-elect=false",
			// The nodes are made with their ranges.
			"--allocate-node-cidrs=false",
			"--node-monitor-period=2s"}},
		{Name: "kube-scheduler", Argv: []string{bin + "kube-scheduler",
			"--kubeconfig=" + etc + "scheduler.conf", "--leader-elect=false"}},
	}
}

// nodePrograms are the services of a node.
func (c *Cluster) nodePrograms(m *machine) []spec.Service {
	return []spec.Service{
		{Name: "containerd", Argv: []string{"/usr/bin/containerd"}},
		{Name: "kubelet", Argv: []string{bin + "kubelet",
			"--config=" + etc + "kubelet.yaml", "--kubeconfig=" + etc + "kubelet.conf",
			"--hostname-override=" + m.Name, fmt.Sprintf("--node-ip=%s,%s", m.Addr4, m.Addr6)}},
		{Name: "kube-proxy", Argv: []string{bin + "kube-proxy",
			"--kubeconfig=" + etc + "kube-proxy.conf", "--hostname-override=" + m.Name,
			"--proxy-mode=" + c.state.ProxyMode, "--cluster-cidr=" + podCIDR,
			// These are settings of the whole kernel.
			"--conntrack-max-per-core=0", "--conntrack-min=0",
			"--conntrack-tcp-timeout-established=0s", "--conntrack-tcp-timeout-close-wait=0s",
			"--oom-score-adj=0"}},
	}
}
