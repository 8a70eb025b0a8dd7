// Command signet-agent is the node's part of the mesh: it holds the node's
// certificates, serves the Workload API and the proxy, keeps traffic captured
// and keeps the audit. `signet up` starts it; it can be run by itself.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"sync"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/agent"
	"github.com/signet-mesh/signet/agent/csi"
	"github.com/signet-mesh/signet/internal/incluster"
)

// version is set by the build.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "signet-agent:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	cfg := agent.Config{Version: version}
	var pods agent.PodConfig
	f := flag.NewFlagSet("signet-agent", flag.ContinueOnError)
	f.StringVar(&cfg.Node, "node", envOr("NODE_NAME", host), "name of this node, as its join token says ($NODE_NAME)")
	f.StringVar(&cfg.TrustDomain, "trust-domain", "", "SPIFFE trust domain (required)")
	f.StringVar(&cfg.StateDir, "state-dir", "/var/lib/signet/agent", "keeps keys, the last known state and the audit")
	f.StringVar(&cfg.RunDir, "run-dir", "/run/signet", "holds the sockets")
	f.StringVar(&cfg.Bundle, "bundle", "", "PEM file with the roots to trust before the first join (required)")
	f.StringVar(&cfg.JoinToken, "join-token", "", "file with a one-use token; needed when this node has no valid certificate")
	f.StringVar(&cfg.Control, "control", "", "control plane, as gRPC takes it (default: unix socket in the run directory; in a cluster, Service signet-control)")
	f.BoolVar(&cfg.NoAudit, "no-audit", false, "keep no audit; for measuring only")
	kubernetes := f.Bool("kubernetes", false, "be the agent of a Kubernetes node")
	f.StringVar(&pods.Namespace, "namespace", envOr("POD_NAMESPACE", "signet-system"), "of the release, whose pods are never held back ($POD_NAMESPACE)")
	f.StringVar(&pods.Kubelet, "kubelet-dir", "", "in a cluster: kubelet's directory, to serve volumes of "+csi.Name+"; empty: none are served")
	f.StringVar(&pods.Admin, "admin-listen", ":9445", "in a cluster: where the control plane asks")
	f.StringVar(&pods.Health, "health", ":9446", "in a cluster: serves /healthz, /readyz and /metrics")
	configMap := f.String("bundle-configmap", "", "in a cluster: ConfigMap of the release with the roots, in place of --bundle")
	asJSON := f.Bool("log-json", false, "log lines of JSON")
	if err := f.Parse(args); err != nil {
		return err
	}
	if cfg.TrustDomain == "" || cfg.Bundle == "" && *configMap == "" {
		return fmt.Errorf("--trust-domain and --bundle (in a cluster, --bundle-configmap) are required")
	}
	if cfg.Control, err = controlAddress(*kubernetes, cfg.Control, cfg.RunDir); err != nil {
		return err
	}
	cfg.Log = slog.New(slog.NewTextHandler(os.Stderr, nil))
	if *asJSON {
		cfg.Log = slog.New(slog.NewJSONHandler(os.Stderr, nil))
	}
	if !*kubernetes {
		return agent.Run(ctx, cfg)
	}
	cfg.Pods = &pods
	return runInCluster(ctx, cfg, *configMap)
}

// runInCluster runs the agent of a Kubernetes node. When it is stopped because
// the release is deleted, it lets the node's pods go; stopped for any other
// reason, it leaves them captured, and new ones wait.
func runInCluster(ctx context.Context, cfg agent.Config, configMap string) error {
	api, err := incluster.Connect()
	if err != nil {
		return err
	}
	if configMap != "" {
		if cfg.Bundle, err = fetchBundle(ctx, api, cfg, configMap); err != nil {
			return err
		}
	}
	if configMap != "" {
		cfg.Pods.Roots = func(ctx context.Context) ([]byte, error) {
			data, err := api.ConfigMap(ctx, cfg.Pods.Namespace, configMap)
			return []byte(data["bundle.pem"]), err
		}
	}
	own := api.DaemonSet(cfg.Pods.Namespace, "signet-agent")
	var remembering sync.WaitGroup
	remembering.Go(func() { own.Remember(ctx, cfg.Log) })
	err = agent.Run(ctx, cfg)
	remembering.Wait()
	if ctx.Err() == nil || err != nil {
		return err
	}
	soon, cancel := context.WithTimeout(context.WithoutCancel(ctx), 15*time.Second)
	defer cancel()
	why, gone := own.Gone(soon, cfg.Log)
	if !gone {
		return nil
	}
	cfg.Log.Info("the release is deleted; this node's pods are let go", "because", why)
	return agent.ReleaseNode(cfg)
}

// fetchBundle writes the roots by which this node knows the control plane to a
// file. It waits for the control plane to publish them.
func fetchBundle(ctx context.Context, api *incluster.Client, cfg agent.Config, name string) (string, error) {
	path := filepath.Join(cfg.RunDir, "roots.pem")
	for said := false; ; {
		// What an earlier run of this node knows is newer, and is there when the
		// API server is not.
		if agent.KnowsRoots(cfg.StateDir) {
			return path, nil
		}
		data, err := api.ConfigMap(ctx, cfg.Pods.Namespace, name)
		if pem := data["bundle.pem"]; err == nil && pem != "" {
			if err := os.MkdirAll(cfg.RunDir, 0o755); err != nil {
				return "", err
			}
			return path, os.WriteFile(path, []byte(pem), 0o600)
		}
		if !said {
			said = true
			cfg.Log.Info("waiting for the trust bundle of the control plane", "configMap", cfg.Pods.Namespace+"/"+name, "error", err)
		}
		select {
		case <-ctx.Done():
			return "", ctx.Err()
		case <-time.After(500 * time.Millisecond):
		}
	}
}

// controlAddress finds the control plane. In a cluster its Service's address
// is in the environment, which comes first: a node that boots has no DNS yet,
// since the pods that serve it may wait for this agent.
func controlAddress(kubernetes bool, given, runDir string) (string, error) {
	if kubernetes {
		host, port := os.Getenv("SIGNET_CONTROL_SERVICE_HOST"), os.Getenv("SIGNET_CONTROL_SERVICE_PORT")
		if host != "" && port != "" {
			return "passthrough:///" + net.JoinHostPort(host, port), nil
		}
	}
	switch {
	case given != "":
		return given, nil
	case kubernetes:
		return "", fmt.Errorf("the address of Service signet-control is not in the environment ($SIGNET_CONTROL_SERVICE_HOST, _PORT): it must exist before this pod does; or name it with --control")
	}
	abs, err := filepath.Abs(runDir)
	return "unix://" + filepath.Join(abs, "control.sock"), err
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}
