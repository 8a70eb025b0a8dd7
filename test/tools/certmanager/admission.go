package main

import (
	"context"

	"golang.org/x/sync/errgroup"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/runtime"
	utilruntime "k8s.io/apimachinery/pkg/util/runtime"
	kscheme "k8s.io/client-go/kubernetes/scheme"
	"k8s.io/client-go/tools/clientcmd"
	ctrl "sigs.k8s.io/controller-runtime"
	"sigs.k8s.io/controller-runtime/pkg/client"
	metricsserver "sigs.k8s.io/controller-runtime/pkg/metrics/server"

	"github.com/cert-manager/cert-manager/internal/webhook"
	cmscheme "github.com/cert-manager/cert-manager/pkg/client/clientset/versioned/scheme"
	"github.com/cert-manager/cert-manager/pkg/controller/cainjector"
	logf "github.com/cert-manager/cert-manager/pkg/logs"
	"github.com/cert-manager/cert-manager/pkg/util"
	"github.com/cert-manager/cert-manager/pkg/webhook/options"
)

// admit is what cert-manager's cmd/webhook does, with the names that its chart gives,
// and of its cmd/cainjector what brings the webhook's CA to the API server.
func admit(ctx context.Context, kubeconfig, namespace string, port int) error {
	logf.InitLogs()
	ctrl.SetLogger(logf.Log)
	config, err := options.NewWebhookConfiguration()
	if err != nil {
		return err
	}
	const name = "cert-manager-webhook"
	config.KubeConfig, config.SecurePort, config.HealthzPort, config.MetricsListenAddress = kubeconfig, int32(port), 0, "0"
	dynamic := &config.TLSConfig.Dynamic
	dynamic.SecretNamespace, dynamic.SecretName = namespace, name+"-ca"
	dynamic.DNSNames = []string{name, name + "." + namespace, name + "." + namespace + ".svc"}
	server, err := webhook.NewCertManagerWebhookServer(logf.Log, *config)
	if err != nil {
		return err
	}

	rest, err := clientcmd.BuildConfigFromFlags("", kubeconfig)
	if err != nil {
		return err
	}
	rest = util.RestConfigWithUserAgent(rest, "cainjector")
	scheme := runtime.NewScheme()
	utilruntime.Must(kscheme.AddToScheme(scheme))
	utilruntime.Must(cmscheme.AddToScheme(scheme))
	injector, err := ctrl.NewManager(rest, ctrl.Options{
		Scheme: scheme, Metrics: metricsserver.Options{BindAddress: "0"},
		Client: client.Options{Cache: &client.CacheOptions{DisableFor: []client.Object{&corev1.Secret{}}}},
	})
	if err != nil {
		return err
	}
	err = cainjector.RegisterAllInjectors(ctx, injector, cainjector.SetupOptions{EnabledReconcilersFor: map[string]bool{
		cainjector.MutatingWebhookConfigurationName: true, cainjector.ValidatingWebhookConfigurationName: true,
	}})
	if err != nil {
		return err
	}
	g, ctx := errgroup.WithContext(ctx)
	g.Go(func() error { return server.Run(ctx) })
	g.Go(func() error { return injector.Start(ctx) })
	return g.Wait()
}
