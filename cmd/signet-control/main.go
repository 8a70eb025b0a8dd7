// Command signet-control is the control plane: it follows the mesh's documents,
// or a Kubernetes API server, issues certificates, compiles policies and serves
// nodes. `signet up` starts it on one machine; in a cluster it is a Deployment.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"net"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/internal/fanout"
	"github.com/signet-mesh/signet/internal/kube"
)

// version is set by the build.
var version = "dev"

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "signet-control:", err)
		if errors.Is(err, ca.ErrNoRetry) {
			os.Exit(control.ExitNoRetry)
		}
		os.Exit(1)
	}
}

// options are the command line.
type options struct {
	documents, node, stateDir, runDir string
	kubernetes                        bool
	kubeconfig, namespace             string
	listen, admin, health             string
	identity                          string
	jwtKeyLife                        time.Duration
	json                              bool
	federation                        control.FederationConfig
	rootKey                           control.RootKeyConfig
	certManager                       certManager
}

func run(ctx context.Context, args []string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	var o options
	f := flag.NewFlagSet("signet-control", flag.ContinueOnError)
	f.StringVar(&o.documents, "config", "", "file or directory of documents (required without --kubernetes)")
	f.StringVar(&o.node, "node", host, "machine that workloads without a node run on")
	f.StringVar(&o.stateDir, "state-dir", "/var/lib/signet", "keeps the certificate authority; in a cluster, memory")
	f.StringVar(&o.runDir, "run-dir", "/run/signet", "holds the sockets")
	f.BoolVar(&o.kubernetes, "kubernetes", false, "follow a Kubernetes API server instead of documents")
	f.StringVar(&o.kubeconfig, "kubeconfig", "", "how to reach the API server from outside its cluster")
	f.StringVar(&o.namespace, "namespace", envOr("POD_NAMESPACE", "signet-system"), "of the release")
	f.StringVar(&o.identity, "replica", envOr("POD_NAME", host), "name of this replica in the election")
	f.StringVar(&o.listen, "listen", "", "where nodes connect: host:port or an absolute path (default :9443, or control.sock in --run-dir)")
	f.StringVar(&o.admin, "admin-listen", "", "where the operator connects (default 127.0.0.1:9441, or control-admin.sock in --run-dir)")
	f.StringVar(&o.health, "health-listen", "", "serves /healthz, /readyz and /metrics (default :9440, or nowhere)")
	f.DurationVar(&o.jwtKeyLife, "jwt-key-life", ca.DefaultJWTKeyLife, "how long a key signs JWT-SVIDs before the next one does")
	o.rootKey.Flags(f)
	o.federation.Flags(f)
	o.certManager.flags(f)
	f.BoolVar(&o.json, "log-json", false, "log lines of JSON")
	if err := f.Parse(args); err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if o.json {
		log = slog.New(slog.NewJSONHandler(os.Stderr, nil))
	}
	if err := ca.CheckJWTKeyLife(o.jwtKeyLife); err != nil {
		return fmt.Errorf("--jwt-key-life: %w", err)
	}
	if err := o.federation.Check(o.jwtKeyLife); err != nil {
		return err
	}
	if o.kubernetes && o.rootKey.URI != "" {
		return errors.New("--root-key and --kubernetes: give one of them; replicas in a cluster share the roots of the Secret signet-ca, and a token is on one machine")
	}
	if err := o.certManager.check(o.kubernetes); err != nil {
		return err
	}
	if err := o.rootKey.Check(); err != nil {
		return err
	}
	switch {
	case o.kubernetes && o.documents != "":
		return errors.New("--config and --kubernetes: give one of them; a mesh has one source")
	case o.kubernetes:
		return o.inCluster(ctx, log)
	case o.documents == "":
		return errors.New("--config is required: the file or directory of documents (or give --kubernetes)")
	}
	return o.onMachine(ctx, log)
}

func (o *options) onMachine(ctx context.Context, log *slog.Logger) error {
	rootKeys, err := o.rootKey.Open(o.stateDir, log)
	if err != nil {
		return err
	}
	cfg := control.Config{
		Version:      version,
		Source:       control.Files(o.documents, o.node, log),
		StateDir:     o.stateDir,
		Listen:       or(o.listen, filepath.Join(o.runDir, "control.sock")),
		AdminListen:  or(o.admin, filepath.Join(o.runDir, "control-admin.sock")),
		HealthListen: o.health,
		RootKeys:     rootKeys,
		JWTKeyLife:   o.jwtKeyLife,
		Federation:   o.federation,
		Log:          log,
	}
	return control.Run(ctx, cfg)
}

func (o *options) inCluster(ctx context.Context, log *slog.Logger) error {
	client, err := kube.Connect(o.kubeconfig, log)
	if err != nil {
		return err
	}
	watcher, err := kube.NewWatcher(client, log)
	if err != nil {
		return err
	}
	cfg := control.Config{
		Version:      version,
		Source:       watcher,
		StateDir:     o.stateDir,
		Listen:       or(o.listen, ":9443"),
		AdminListen:  or(o.admin, "127.0.0.1:9441"),
		HealthListen: or(o.health, ":9440"),
		Tokens:       kube.NewJoiner(client, o.namespace),
		Roots:        kube.NewRoots(client, o.namespace),
		JWTKeys:      kube.NewJWTKeys(client, o.namespace),
		JWTKeyLife:   o.jwtKeyLife,
		Federation:   o.federation,
		Log:          log,
	}
	cfg.Federation.Store = kube.NewPublished(client, o.namespace)
	cfg.Federation.Copies = watcher.BundleCopies
	if _, port, err := net.SplitHostPort(cfg.Listen); err == nil { // else it is a socket, which no other replica reaches
		cfg.Replicas = func() []string { return watcher.Replicas(o.namespace, o.identity, port) }
	}
	cfg.Steps = watcher.Steps
	cfg.Agents = func() []fanout.Node { return watcher.Agents(o.namespace) }
	status := &kube.AuthorityStatus{Client: client, Namespace: o.namespace, Identity: o.identity, Log: log}
	if err := o.certManager.apply(&cfg, client, o.namespace, status); err != nil {
		return err
	}
	cfg.Attend = func(ctx context.Context, facts control.Facts) error {
		if cfg.Above == nil {
			if err := status.Run(ctx); err != nil {
				return err
			}
		}
		watcher.FollowNodes(facts.Own, facts.Others)
		leader := &kube.Leader{
			Client: client, Namespace: o.namespace, Identity: o.identity, Watcher: watcher,
			Reports: facts.Reports, Federations: facts.Federations, Bundle: facts.Bundle, Log: log,
		}
		return leader.Run(ctx)
	}
	return control.Run(ctx, cfg)
}

func or(value, otherwise string) string {
	if value == "" {
		return otherwise
	}
	return value
}

func envOr(name, otherwise string) string { return or(os.Getenv(name), otherwise) }
