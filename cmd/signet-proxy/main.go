// Command signet-proxy is the parent of a node's Envoy. It ends gently: after
// SIGTERM another proxy of the node takes new connections, and the open ones
// live on until they end. A second SIGTERM cuts them. `signet up` starts it; it
// can be run by itself.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/agent"
	"github.com/signet-mesh/signet/internal/proxy"
)

func main() {
	signals := make(chan os.Signal, 2)
	signal.Notify(signals, os.Interrupt, syscall.SIGTERM)
	start := func() error { return run(signals, os.Args[1:]) }
	if len(os.Args) > 1 && os.Args[1] == "ready" {
		start = func() error { return ready(os.Args[2:]) }
	}
	if err := start(); err != nil {
		fmt.Fprintln(os.Stderr, "signet-proxy:", err)
		os.Exit(1)
	}
}

func run(signals <-chan os.Signal, args []string) error {
	host, err := os.Hostname()
	if err != nil {
		return err
	}
	f := flag.NewFlagSet("signet-proxy", flag.ContinueOnError)
	node := f.String("node", envOr("NODE_NAME", host), "name of this node, as its agent has it ($NODE_NAME)")
	state := f.String("state-dir", "/var/lib/signet/agent", "the agent's; the audit's lines go there")
	runDir := f.String("run-dir", "/run/signet", "holds the sockets")
	envoy := f.String("envoy", "envoy", "Envoy program, a path or a name in PATH")
	threads := f.Int("threads", 0, "worker threads of Envoy (default: one for each processor)")
	limit := f.Duration("drain-limit", time.Hour, "how long open connections may live on after SIGTERM beside the proxy that takes over; 0 cuts them at once")
	asJSON := f.Bool("log-json", false, "log lines of JSON")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	if *threads < 0 {
		return fmt.Errorf("--threads: %d is negative; give the number of worker threads, or 0", *threads)
	}
	if *limit < 0 {
		return fmt.Errorf("--drain-limit: %s is negative; give a duration such as 1h, or 0", *limit)
	}
	program, err := exec.LookPath(*envoy)
	if err != nil {
		return fmt.Errorf("--envoy: %w", err)
	}
	for _, p := range []*string{state, runDir, &program} {
		if *p, err = filepath.Abs(*p); err != nil {
			return err
		}
	}
	spool := agent.Spool(*state)
	if err := os.MkdirAll(filepath.Dir(spool), 0o700); err != nil {
		return err
	}
	raiseFileLimit()
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	if *asJSON {
		log = slog.New(slog.NewJSONHandler(os.Stderr, nil))
	}
	ctx, drain := context.WithCancel(context.Background())
	defer drain()
	cut, cutNow := context.WithCancel(context.Background())
	defer cutNow()
	done := make(chan error, 1)
	go func() {
		done <- proxy.Run(ctx, cut, proxy.Config{
			Node: *node, Envoy: program, RunDir: *runDir, ADS: agent.ProxySocket(*runDir), Spool: spool, Owner: os.Getenv("POD_NAME"),
			Threads: *threads, DrainLimit: *limit, Log: log, Out: io.Writer(os.Stderr),
		})
	}()
	for {
		select {
		case err := <-done:
			return err
		case s := <-signals:
			if ctx.Err() != nil {
				log.Warn("a second signal: open connections are cut", "signal", s.String())
				cutNow()
			}
			drain()
		}
	}
}

// ready fails while the proxy of this pod ($POD_NAME), or outside of a pod the
// node's newest, does not serve; for kubelet.
func ready(args []string) error {
	f := flag.NewFlagSet("signet-proxy ready", flag.ContinueOnError)
	runDir := f.String("run-dir", "/run/signet", "holds the sockets")
	if err := f.Parse(args); err != nil {
		if errors.Is(err, flag.ErrHelp) {
			return nil
		}
		return err
	}
	ctx, cancel := context.WithTimeout(context.Background(), 4*time.Second)
	defer cancel()
	return proxy.Ready(ctx, *runDir, os.Getenv("POD_NAME"))
}

// raiseFileLimit lets Envoy, which needs a few descriptors for each connection,
// have as many as the system allows: it inherits the limit.
func raiseFileLimit() {
	var limit syscall.Rlimit
	if syscall.Getrlimit(syscall.RLIMIT_NOFILE, &limit) == nil {
		limit.Cur = limit.Max
		_ = syscall.Setrlimit(syscall.RLIMIT_NOFILE, &limit) // what there is must do, then
	}
}

func envOr(name, otherwise string) string {
	if v := os.Getenv(name); v != "" {
		return v
	}
	return otherwise
}
