// Command certmanager is cert-manager's own controllers: those for issuers that are
// self-signed, have a CA in a Secret, or are a Vault, for certificates, and the
// default approver. With --admission it is cert-manager's own admission webhook instead.
// What else cert-manager has is left out.
package main

import (
	"context"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"strings"
	"syscall"

	"golang.org/x/sync/errgroup"

	"github.com/cert-manager/cert-manager/pkg/controller"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/approver"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/ca"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/selfsigned"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificaterequests/vault"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/issuing"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/keymanager"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/readiness"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/requestmanager"
	_ "github.com/cert-manager/cert-manager/pkg/controller/certificates/trigger"
	_ "github.com/cert-manager/cert-manager/pkg/controller/clusterissuers"
	_ "github.com/cert-manager/cert-manager/pkg/controller/issuers"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/ca"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/selfsigned"
	_ "github.com/cert-manager/cert-manager/pkg/issuer/vault"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "certmanager:", err)
		os.Exit(1)
	}
}

// run is what cert-manager's cmd/controller does, without its leader election, or admit.
func run(ctx context.Context, args []string) error {
	f := flag.NewFlagSet("certmanager", flag.ContinueOnError)
	kubeconfig := f.String("kubeconfig", "", "how to reach the API server")
	namespace := f.String("cluster-resource-namespace", "cert-manager", "where Secrets of ClusterIssuers are")
	without := f.String("without", "", "names of controllers that are left out, with commas between")
	port := f.Int("admission", 0, "the port of the admission webhook, which is all that runs")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *port != 0 {
		return admit(ctx, *kubeconfig, *namespace, *port)
	}
	// As cert-manager's defaults have them.
	factory, err := controller.NewContextFactory(ctx, controller.ContextOptions{
		Kubeconfig: *kubeconfig, KubernetesAPIQPS: 20, KubernetesAPIBurst: 50,
		IssuerOptions: controller.IssuerOptions{ClusterResourceNamespace: *namespace, ClusterIssuerAmbientCredentials: true},
	})
	if err != nil {
		return err
	}
	shared, err := factory.Build()
	if err != nil {
		return err
	}
	left := map[string]bool{}
	for _, name := range strings.Split(*without, ",") {
		left[name] = true
	}
	g, ctx := errgroup.WithContext(ctx)
	for name, start := range controller.Known() {
		if left[name] {
			continue
		}
		one, err := start(factory)
		if err != nil {
			return fmt.Errorf("%s: %w", name, err)
		}
		fmt.Fprintln(os.Stderr, "controller", name)
		g.Go(func() error { return one.Run(5, ctx) })
	}
	shared.SharedInformerFactory.Start(ctx.Done())
	shared.KubeSharedInformerFactory.Start(ctx.Done())
	shared.HTTP01ResourceMetadataInformersFactory.Start(ctx.Done())
	return g.Wait()
}
