package control

import (
	"context"
	"fmt"
	"net"
	"net/http"
	"strings"

	"github.com/prometheus/client_golang/prometheus/promhttp"

	"github.com/signet-mesh/signet/internal/adminserver"
)

// serveHealth answers the kubelet, and whoever gathers metrics, until ctx ends.
func (c *control) serveHealth(ctx context.Context, l net.Listener) error {
	mux := http.NewServeMux()
	mux.HandleFunc("GET /healthz", func(w http.ResponseWriter, _ *http.Request) { fmt.Fprintln(w, "ok") })
	mux.HandleFunc("GET /readyz", func(w http.ResponseWriter, _ *http.Request) {
		if why := c.unready(ctx); why != "" {
			w.WriteHeader(http.StatusServiceUnavailable)
			fmt.Fprintln(w, why)
			return
		}
		fmt.Fprintln(w, "ok")
	})
	mux.Handle("GET /metrics", promhttp.HandlerFor(c.metrics(), promhttp.HandlerOpts{}))
	return adminserver.Serve(ctx, l, mux)
}

// unready says why nodes cannot be served; empty: they can.
func (c *control) unready(ctx context.Context) string {
	c.mu.Lock()
	rejected := c.rejected
	c.mu.Unlock()
	view, _ := c.feed.Get()
	switch {
	case ctx.Err() != nil:
		return "ending"
	case view == nil && len(rejected) > 0:
		return "no state yet: " + strings.Join(rejected, "; ")
	case view == nil:
		return "no state yet: waiting for the source"
	case c.nodes.Load() == nil && c.above.Load() != nil:
		s, _ := c.above.Load().Status()
		return "no intermediate to sign with: " + s.Message
	case c.nodes.Load() == nil:
		return "the certificate authority is not open yet"
	}
	return ""
}
