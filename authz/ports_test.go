package authz_test

import (
	"testing"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"

	"github.com/signet-mesh/signet/api/v1alpha1"
	"github.com/signet-mesh/signet/authz"
	"github.com/signet-mesh/signet/internal/mesh"
)

// Package mesh imports authz, so authz repeats the numbers of the mesh's own
// ports. A policy that grants one of them would open a way around the proxy.
func TestMeshPortsCannotBeGranted(t *testing.T) {
	td := spiffeid.RequireTrustDomainFromString("td")
	for _, port := range []int32{mesh.PortOutbound, mesh.PortInbound, mesh.PortTunnel} {
		m, diagnostics := authz.Compile(td, []v1alpha1.AllowPolicy{{
			ObjectMeta: metav1.ObjectMeta{Namespace: "shop", Name: "p"},
			Spec:       v1alpha1.AllowPolicySpec{Ports: []int32{port}, From: []v1alpha1.Peer{{Namespace: "shop"}}},
		}})
		if len(m.Policies()) != 0 || len(diagnostics) != 1 || diagnostics[0].Field != "spec.ports[0]" {
			t.Errorf("port %d: %+v, %+v", port, m.Policies(), diagnostics)
		}
	}
}
