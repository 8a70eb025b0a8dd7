package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"log/slog"
	"os"
	"strings"
	"time"

	v1 "github.com/signet-mesh/signet/api/cni/v1"
	"github.com/signet-mesh/signet/internal/cniconf"
	"github.com/signet-mesh/signet/internal/incluster"
)

// settle is how long a runtime is given to notice that the entry is gone
// before the program is.
const settle = 3 * time.Second

func command(ctx context.Context, name string, args []string) error {
	log := slog.New(slog.NewTextHandler(os.Stderr, nil))
	f := flag.NewFlagSet("signet-cni "+name, flag.ContinueOnError)
	cfg := cniconf.Config{Log: log}
	f.StringVar(&cfg.BinDir, "bin-dir", "/opt/cni/bin", "where the container runtime looks for CNI plugins")
	f.StringVar(&cfg.ConfDir, "conf-dir", "/etc/cni/net.d", "where the container runtime looks for CNI configuration")
	switch name {
	case "install":
		f.StringVar(&cfg.Entry.Socket, "socket", v1.DefaultSocket, "the agent's socket, as a path on the node")
		f.StringVar(&cfg.Entry.OwnNamespace, "own-namespace", "signet-system", "namespace of the release; its pods never wait")
		f.StringVar(&cfg.Entry.Timeout, "timeout", "", "how long a pod's start may be held in one try, from 1s to 90s")
		watch := f.Bool("watch", false, "stay, and install again whenever the node's CNI changes its configuration")
		owner := f.String("daemonset", "", "NAMESPACE/NAME of the DaemonSet that this runs in: when it is stopped because that is deleted, remove everything (with --watch)")
		if err := parseFlags(f, args); err != nil {
			return err
		}
		return install(ctx, cfg, *watch, *owner)
	case "remove":
		if err := parseFlags(f, args); err != nil {
			return err
		}
		i, err := cniconf.New(cfg)
		if err != nil {
			return err
		}
		return i.Remove(settle)
	}
	return errUsage
}

func parseFlags(f *flag.FlagSet, args []string) error {
	if err := f.Parse(args); err != nil {
		return err
	}
	if f.NArg() > 0 {
		return fmt.Errorf("%s takes no arguments, only flags: %q", f.Name(), f.Args())
	}
	return nil
}

func install(ctx context.Context, cfg cniconf.Config, watch bool, owner string) error {
	// What the plugin would refuse at a pod's start is refused here.
	if _, err := parse(fmt.Appendf(nil, `{"socket":%q,"timeout":%q}`, cfg.Entry.Socket, cfg.Entry.Timeout)); err != nil {
		return err
	}
	i, err := cniconf.New(cfg)
	if err != nil {
		return err
	}
	if !watch {
		if owner != "" {
			return errors.New("--daemonset: works with --watch only")
		}
		_, err := i.Install()
		return err
	}
	var set *incluster.DaemonSet
	if owner != "" {
		namespace, name, ok := strings.Cut(owner, "/")
		if !ok || namespace == "" || name == "" || strings.Contains(name, "/") {
			return fmt.Errorf("--daemonset %q: want NAMESPACE/NAME", owner)
		}
		api, err := incluster.Connect()
		if err != nil {
			return fmt.Errorf("--daemonset: %w", err)
		}
		set = api.DaemonSet(namespace, name)
		// In the background: the entry must be in place whatever the API
		// server does.
		seen := make(chan struct{})
		go func() { defer close(seen); set.Remember(ctx, cfg.Log) }()
		defer func() { <-seen }()
	}
	if err := i.Watch(ctx, nil); err != nil || set == nil {
		return err
	}
	// The context has ended: what follows has a time of its own, less than
	// the 30 seconds that kubelet gives.
	end, cancel := context.WithTimeout(context.WithoutCancel(ctx), 10*time.Second)
	defer cancel()
	if why, gone := set.Gone(end, cfg.Log); gone {
		cfg.Log.InfoContext(end, "the release is being deleted; removing signet-cni", "why", why)
		return i.Remove(settle)
	}
	cfg.Log.InfoContext(end, "stopped; signet-cni stays in place, and pods wait for the next agent")
	return nil
}
