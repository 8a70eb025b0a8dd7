package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/internal/output"
)

// Defaults of flags, and the variables that stand in for them.
const (
	defaultRunDir   = "/run/signet"
	defaultStateDir = "/var/lib/signet"
	envRunDir       = "SIGNET_RUN_DIR"
	envStateDir     = "SIGNET_STATE_DIR"
	envEnvoy        = "SIGNET_ENVOY"
)

// app is one call of the program: the world it runs in and the flags that
// commands share.
type app struct {
	in       io.Reader
	out, err io.Writer
	getenv   func(string) string
	now      func() time.Time

	runDir  string
	cluster clusterFlags
	format  output.Format
	color   output.ColorMode
	// plugin is set when kubectl runs the program.
	plugin bool
}

// run executes a command line and returns the exit code.
func (a *app) run(ctx context.Context, argv []string) int {
	root := a.newRoot()
	root.SetArgs(argv)
	cmd, err := root.ExecuteContextC(ctx)
	code := exitCode(err)
	if code == exitUsage || code == exitFailed {
		a.complain(err)
	}
	if code == exitUsage {
		_, _ = fmt.Fprintf(a.err, "See `%s --help`.\n", cmd.CommandPath())
	}
	return code
}

// complain writes an error, whose lines may hold text from elsewhere.
func (a *app) complain(err error) {
	lead := "signet: "
	for line := range strings.SplitSeq(err.Error(), "\n") {
		_, _ = fmt.Fprintf(a.err, "%s%s\n", lead, output.Clean(line))
		lead = "  "
	}
}

func (a *app) env(name, otherwise string) string {
	if v := a.getenv(name); v != "" {
		return v
	}
	return otherwise
}

func (a *app) newRoot() *cobra.Command {
	root := group("signet", "A sidecar-free mTLS identity mesh", `Signet gives every workload a SPIFFE identity, lets only the connections
through that an AllowPolicy allows, and keeps a record of each.

The commands that ask a running mesh (status, audit, certs, policy explain,
policy generate) ask the one on this machine, or a cluster: when --kubeconfig,
--context or -n is given, when the program is run as "kubectl signet", or when
no mesh answers on this machine and there is a kubeconfig. They reach the control
plane through the API server's port-forward.

Exit codes, the same with every -o:
  0  good
  1  the tool could not do its work
  2  the command line makes no sense
  3  there are findings: something is denied, expired, broken or not able`, `  signet check                     # is this machine able?
  signet up -c examples/quickstart # start a mesh
  signet status                    # is it well?
  signet policy explain --from shop/web --to pay/ledger --port 8443
  signet status --context prod     # the same of a cluster`)
	root.SilenceErrors = true
	root.SilenceUsage = true
	root.SetIn(a.in)
	root.SetOut(a.out)
	root.SetErr(a.err)
	root.SetFlagErrorFunc(func(_ *cobra.Command, err error) error { return usage(err) })
	a.color = output.ColorAuto
	flags := root.PersistentFlags()
	flags.StringVar(&a.runDir, "run-dir", a.env(envRunDir, defaultRunDir), "directory of the running mesh's sockets ($"+envRunDir+")")
	flags.Var(&a.color, "color", "auto|always|never; auto honours NO_COLOR and TERM=dumb")
	complete(root, "color", "auto", "always", "never")
	root.AddCommand(a.newUpCommand(), a.newReleaseCommand(), a.newCheckCommand(), a.newProbeCommand(), a.newPolicyCommand(), a.newAuditCommand(),
		a.newCertsCommand(), a.newCACommand(), a.newSVIDCommand(), a.newConformanceCommand(), a.newStatusCommand(), a.newVersionCommand())
	if a.plugin {
		asPlugin(root)
	}
	root.InitDefaultCompletionCmd()
	for _, c := range root.Commands() {
		if c.Name() == "completion" {
			describeCompletion(c)
		}
	}
	return root
}

// describeCompletion gives cobra's command the manners of the others.
func describeCompletion(c *cobra.Command) {
	g := group(c.Use, c.Short, c.Long, "  source <(signet completion bash)")
	c.Args, c.RunE, c.Example = g.Args, g.RunE, g.Example
	for _, shell := range c.Commands() {
		shell.Args = args(cobra.NoArgs)
		shell.Example = "  signet completion " + shell.Name()
	}
}

// group is a command that only has others below it.
func group(use, short, long, example string) *cobra.Command {
	return &cobra.Command{
		Use: use, Short: short, Long: long, Example: example,
		Args: func(cmd *cobra.Command, given []string) error {
			if len(given) == 0 {
				return nil
			}
			msg := fmt.Sprintf("unknown command %q for %q", given[0], cmd.CommandPath())
			cmd.SuggestionsMinimumDistance = 2
			if near := cmd.SuggestionsFor(given[0]); len(near) > 0 {
				msg += fmt.Sprintf("; did you mean %s?", strings.Join(near, " or "))
			}
			return usage(errors.New(msg))
		},
		RunE: func(cmd *cobra.Command, _ []string) error {
			cmd.SetOut(cmd.ErrOrStderr())
			if err := cmd.Help(); err != nil {
				return err
			}
			return usage(errors.New("a command is missing"))
		},
	}
}

// answers adds -o to a command.
func (a *app) answers(cmd *cobra.Command) *cobra.Command {
	a.format = output.Table
	cmd.Flags().VarP(&a.format, "output", "o", output.FormatNames())
	complete(cmd, "output", "table", "wide", "json", "yaml")
	return cmd
}

func complete(cmd *cobra.Command, flag string, values ...string) {
	// The only error is a flag that does not exist, which the tests would show.
	if err := cmd.RegisterFlagCompletionFunc(flag, cobra.FixedCompletions(values, cobra.ShellCompDirectiveNoFileComp)); err != nil {
		panic(err)
	}
}

func (a *app) printer() *output.Printer {
	return output.NewPrinter(a.out, a.format, a.color.Use(a.out, a.getenv))
}
