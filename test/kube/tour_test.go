package kube

import (
	"context"
	"os"
	"testing"
	"time"

	"github.com/signet-mesh/signet/examples/shop/tour"
)

// The tour of examples/shop works word for word.
func TestTour(t *testing.T) {
	b := open(t)
	document, err := os.ReadFile(project + "/examples/shop/README.md")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { // what a tour that stopped half way left
		ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute)
		defer cancel()
		_ = b.command(ctx, "kubectl", "delete", "namespace", "shop", "data", "--ignore-not-found").Run()
		_ = b.command(ctx, "kubectl", "delete", "quarantine", "--all", "--ignore-not-found").Run()
	})
	if err := tour.Run(t.Context(), tour.Options{
		Document: string(document), Kubeconfig: b.cluster.Kubeconfig(), Dir: project,
		Path: []string{b.bin, b.cluster.Programs()}, TrustDomain: trustDomain, Log: t.Output(),
	}); err != nil {
		t.Fatal(err)
	}
}
