// Command clusterctl starts, shows and removes the test cluster by hand.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"io"
	"os"
	"os/exec"
	"os/signal"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/test/cluster"
)

const usage = `usage: clusterctl [flags] COMMAND

  up                        start the cluster, or what of it is off
  down                      remove it
  status                    show its machines and nodes
  reboot NODE               cut the power of a node, and start it
  load FILE...              import image archives into every node
  shell NODE [-- CMD ARG]   run a command inside of a node; bash if none is named
  env                       print what a shell needs for kubectl

flags:
`

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	defer stop()
	err := run(ctx, os.Args[1:], os.Stdout, os.Stderr)
	var exit exitCode
	switch {
	case errors.As(err, &exit):
		stop()
		os.Exit(int(exit))
	case errors.Is(err, flag.ErrHelp):
	case err != nil:
		fmt.Fprintln(os.Stderr, err)
		stop()
		os.Exit(1)
	}
}

func run(ctx context.Context, args []string, out, log io.Writer) error {
	flags := flag.NewFlagSet("clusterctl", flag.ContinueOnError)
	flags.SetOutput(log)
	flags.Usage = func() { fmt.Fprint(log, usage); flags.PrintDefaults() }
	o := cluster.Options{Log: log}
	flags.StringVar(&o.Dir, "dir", "", "folder of the cluster; empty: .cache/cluster in the project")
	flags.IntVar(&o.Nodes, "nodes", 2, "number of nodes, for up")
	flags.StringVar(&o.ProxyMode, "proxy", "nftables", "kube-proxy's mode, for up: nftables or iptables")
	if err := flags.Parse(args); err != nil {
		return err
	}
	args = flags.Args()
	if len(args) == 0 {
		flags.Usage()
		return errors.New("clusterctl: name a command")
	}
	command, args := args[0], args[1:]
	switch command {
	case "up":
		return up(ctx, o, out)
	case "down":
		return cluster.Down(ctx, o.Dir, log)
	}
	c, err := cluster.Attach(o.Dir, log)
	if err != nil {
		return err
	}
	switch {
	case command == "status" && len(args) == 0:
		return status(ctx, c, out)
	case command == "env" && len(args) == 0:
		_, err := fmt.Fprint(out, environment(c))
		return err
	case command == "load" && len(args) > 0:
		for _, archive := range args {
			if err := c.LoadImage(ctx, archive); err != nil {
				return err
			}
		}
		return nil
	case command == "reboot" && len(args) == 1:
		n, err := node(c, args[0])
		if err != nil {
			return err
		}
		if err := n.Reboot(ctx); err != nil {
			return err
		}
		return n.WaitReady(ctx)
	case command == "shell" && len(args) >= 1:
		n, err := node(c, args[0])
		if err != nil {
			return err
		}
		return shell(ctx, n, args[1:])
	}
	flags.Usage()
	return fmt.Errorf("clusterctl: %s: no such command, or not with these arguments", command)
}

func up(ctx context.Context, o cluster.Options, out io.Writer) error {
	start := time.Now()
	c, err := cluster.Start(ctx, o)
	if err != nil {
		return err
	}
	_, err = fmt.Fprintf(out, "The cluster was up after %.1f s. To use it:\n\n%s\n", time.Since(start).Seconds(), environment(c))
	return err
}

func environment(c *cluster.Cluster) string {
	return fmt.Sprintf("export KUBECONFIG=%s\nexport PATH=%s:$PATH\n", c.Kubeconfig(), c.Programs())
}

func status(ctx context.Context, c *cluster.Cluster, out io.Writer) error {
	for _, n := range c.Nodes() {
		power := "off"
		if n.Running() {
			power = "on"
		}
		fmt.Fprintf(out, "%s: %s, %s, pods %s, disk %s\n", n.Name(), power, n.Addr(), n.PodCIDR(), n.Disk())
	}
	cmd := c.Kubectl(ctx, "get", "nodes,pods", "--all-namespaces", "-o", "wide")
	cmd.Stdout, cmd.Stderr = out, os.Stderr
	return cmd.Run()
}

func node(c *cluster.Cluster, name string) (*cluster.Node, error) {
	if n := c.Node(name); n != nil {
		return n, nil
	}
	return nil, fmt.Errorf("clusterctl: there is no node %q", name)
}

func shell(ctx context.Context, n *cluster.Node, args []string) error {
	if len(args) > 0 && args[0] == "--" {
		args = args[1:]
	}
	if len(args) == 0 {
		args = []string{"bash"}
	}
	cmd := n.Command(ctx, args...)
	cmd.Stdin, cmd.Stdout, cmd.Stderr = os.Stdin, os.Stdout, os.Stderr
	err := cmd.Run()
	var exit *exec.ExitError
	if errors.As(err, &exit) {
		return exitCode(exit.ExitCode())
	}
	return err
}

// exitCode is that of a command in a node, which said itself what went wrong.
type exitCode int

func (c exitCode) Error() string { return fmt.Sprintf("the command failed with code %d", int(c)) }
