package kube

import (
	"testing"
	"time"
)

// Two pods on two nodes: nothing passes without a policy, what a policy allows
// passes encrypted and is recorded at both ends, and a caller that is not in
// the mesh is refused.
func TestTwoNodes(t *testing.T) {
	b := open(t)
	began := time.Now()
	in, out := b.namespace("enforce"), b.namespace("")
	b.apply(service(in, "server", "server"))
	b.startPods(
		&pod{namespace: in, name: "server", account: "server", node: "node1", args: []string{"serve"},
			more: []string{"readinessProbe: {httpGet: {path: /healthz, port: 8080}, periodSeconds: 1}"}},
		&pod{namespace: in, name: "client", account: "client", node: "node2", args: []string{"hold"}},
		&pod{namespace: out, name: "stranger", node: "node2", args: []string{"hold"}},
	)
	b.waitStatus(in, "enforce: 2 of 2 pods enrolled")
	address := "server." + in + ":8080"
	b.refused(in, "client", address)
	b.refused(out, "stranger", address)
	b.apply(allow(in, "server", "client"))
	b.served(in, "client", address, "server")
	b.refused(out, "stranger", address)

	sides := map[string]bool{}
	b.eventually(10*time.Second, func() string {
		for _, r := range b.audit("--since", began.UTC().Format(time.RFC3339), "--from", in+"/client", "--to", in+"/server", "--verdict", "allowed") {
			if r.Transport == "mtls" && r.Source.ID == id(in, "client") && r.Destination.ID == id(in, "server") {
				sides[r.Side+" "+r.Node] = true
			}
		}
		if !sides["source node2"] || !sides["destination node1"] {
			return "the call was not recorded at both ends"
		}
		return ""
	})
}
