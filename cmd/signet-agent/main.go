// Command signet-agent is the node's part of the mesh: it holds the node's
// certificates, serves the Workload API and the proxy, keeps traffic captured
// and keeps the audit. `signet up` starts it; it can be run by itself.
package main

import (
	"context"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"

	"github.com/signet-mesh/signet/agent"
)

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
	f := flag.NewFlagSet("signet-agent", flag.ContinueOnError)
	node := f.String("node", host, "name of this node, as its join token says")
	td := f.String("trust-domain", "", "SPIFFE trust domain (required)")
	state := f.String("state-dir", "/var/lib/signet/agent", "keeps keys, the last known state and the audit")
	runDir := f.String("run-dir", "/run/signet", "holds the sockets")
	bundle := f.String("bundle", "", "PEM file with the roots to trust before the first join (required)")
	token := f.String("join-token", "", "file with a one-use join token; needed when this node has no valid certificate")
	address := f.String("control", "", "control plane, as gRPC takes it (default: unix socket in the run directory)")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *td == "" || *bundle == "" {
		return fmt.Errorf("--trust-domain and --bundle are required")
	}
	if *address == "" {
		abs, err := filepath.Abs(*runDir)
		if err != nil {
			return err
		}
		*address = "unix://" + filepath.Join(abs, "control.sock")
	}
	return agent.Run(ctx, agent.Config{
		Node: *node, TrustDomain: *td, Control: *address, Bundle: *bundle, JoinToken: *token,
		StateDir: *state, RunDir: *runDir, Log: slog.New(slog.NewTextHandler(os.Stderr, nil)),
	})
}
