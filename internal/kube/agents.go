package kube

import (
	"net"
	"slices"
	"strconv"
	"strings"

	"k8s.io/client-go/tools/cache"

	"github.com/signet-mesh/signet/internal/fanout"
)

// agentPort is where agents answer the control plane.
const agentPort = 9445

// controlServiceAccount is that of the control plane's replicas.
const controlServiceAccount = "signet-control"

// Replicas lists where nodes connect to the control plane's replicas, but for
// the one of a name. namespace is the release's, port where replicas listen for
// nodes.
func (w *Watcher) Replicas(namespace, but, port string) (addresses []string) {
	objs, _ := w.podStore.ByIndex(cache.NamespaceIndex, namespace) // the index exists
	for _, obj := range objs {
		p, ok := obj.(*pod)
		if !ok || p.serviceAccount != controlServiceAccount || p.Name == but || p.over || len(p.addrs) == 0 {
			continue
		}
		addresses = append(addresses, net.JoinHostPort(p.addrs[0].String(), port))
	}
	return addresses
}

// Agents lists the agents of all nodes, with those that do not answer: what
// counts is that their pods exist. namespace is the release's.
func (w *Watcher) Agents(namespace string) []fanout.Node {
	objs, _ := w.podStore.ByIndex(cache.NamespaceIndex, namespace) // the index exists
	var out []fanout.Node
	for _, obj := range objs {
		p, ok := obj.(*pod)
		if !ok || p.serviceAccount != agentServiceAccount || !p.hostNetwork || p.over || p.node == "" || len(p.addrs) == 0 {
			continue
		}
		out = append(out, fanout.Node{Name: p.node, Address: net.JoinHostPort(p.addrs[0].String(), strconv.Itoa(agentPort))})
	}
	slices.SortFunc(out, func(a, b fanout.Node) int { return strings.Compare(a.Name, b.Name) })
	// An agent that is being replaced is there twice.
	return slices.CompactFunc(out, func(a, b fanout.Node) bool { return a.Name == b.Name })
}
