// Command signet-control is the control plane: it reads the mesh's documents,
// issues certificates, compiles policies and serves nodes. `signet up` starts
// it; it can be run by itself.
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
	"github.com/signet-mesh/signet/internal/control"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	if err := run(ctx, os.Args[1:]); err != nil {
		fmt.Fprintln(os.Stderr, "signet-control:", err)
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	f := flag.NewFlagSet("signet-control", flag.ContinueOnError)
	documents := f.String("config", "", "file or directory of documents (required)")
	node := f.String("node", host, "machine that workloads without a node run on")
	state := f.String("state-dir", "/var/lib/signet", "keeps the certificate authority")
	runDir := f.String("run-dir", "/run/signet", "holds the sockets")
	noAudit := f.Bool("no-audit", false, "tell proxies to keep no audit; for measuring only")
	if err := f.Parse(args); err != nil {
		return err
	}
	if *documents == "" {
		return fmt.Errorf("--config is required: the file or directory of documents")
	}
	cfg := control.Config{
		Documents: *documents, Node: *node, StateDir: *state,
		Listen:      filepath.Join(*runDir, "control.sock"),
		AdminSocket: filepath.Join(*runDir, "control-admin.sock"),
		AccessLog:   agent.Spool(filepath.Join(*state, "agent")),
		Log:         slog.New(slog.NewTextHandler(os.Stderr, nil)),
	}
	if *noAudit {
		cfg.AccessLog = ""
	}
	return control.Run(ctx, cfg)
}
