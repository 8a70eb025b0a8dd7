package agent

import (
	"context"
	"errors"
	"fmt"
	"net"
	"net/http"
	"path/filepath"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/signet-mesh/signet/agent/cni"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/adminserver"
)

// CNISocket is where signet-cni asks whether a pod may start.
func CNISocket(run string) string { return filepath.Join(run, "cni.sock") }

// servePods starts what an agent serves in a cluster only.
func (a *agent) servePods(ctx context.Context, g *errgroup.Group) error {
	gate := cni.New(cni.Config{
		Socket: CNISocket(a.cfg.RunDir), OwnNamespace: a.cfg.Pods.Namespace, Log: a.log,
	}, a)
	g.Go(func() error { return gate.Run(ctx) })
	if a.volumes != nil {
		g.Go(func() error { a.serveVolumes(ctx); return nil })
	}

	if address := a.cfg.Pods.Admin; address != "" {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("%w; does another agent run on this node?", err)
		}
		g.Go(func() error {
			return adminserver.ServeTLS(ctx, l, a.admin(), adminserver.TLS{
				Certificate: a.node.certificate, Bundle: a.node.bundle, Client: ca.ControlID(a.node.bundle.TrustDomain()), Log: a.log,
			})
		})
	}
	if address := a.cfg.Pods.Health; address != "" {
		l, err := net.Listen("tcp", address)
		if err != nil {
			return fmt.Errorf("%w; does another agent run on this node?", err)
		}
		g.Go(func() error { return adminserver.Serve(ctx, l, a.health()) })
	}
	return nil
}

// health answers kubelet and Prometheus; it says nothing that is secret.
func (a *agent) health() http.Handler {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { w.WriteHeader(http.StatusOK) })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if err := a.notReady(); err != nil {
			http.Error(w, err.Error(), http.StatusServiceUnavailable)
			return
		}
		w.WriteHeader(http.StatusOK)
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(a.metrics(), promhttp.HandlerOpts{}))
	return mux
}

// notReady says what the node lacks to take pods in. The control plane may be
// away: what is known stays in force.
func (a *agent) notReady() error {
	if !a.ready.Load() {
		return errors.New("no state has come from the control plane yet")
	}
	switch connected, _, refused := a.relay.Proxy(); {
	case !connected:
		return errors.New("the proxy is not connected")
	case refused != "":
		return errors.New("the proxy refused its configuration: " + refused)
	}
	return nil
}
