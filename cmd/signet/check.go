package main

import (
	"context"
	"fmt"

	"github.com/spf13/cobra"

	"github.com/signet-mesh/signet/internal/output"
)

// The levels of a check.
const (
	levelOK      = "ok"
	levelWarning = "warning" // works, but not as well as it should
	levelError   = "error"   // the mesh cannot work like this
)

// check is one thing that was looked at. Its code stays the same whatever
// the outcome.
type check struct {
	Code    string `json:"code"`
	Name    string `json:"name"`
	Level   string `json:"level"`
	Message string `json:"message"`
	// Why says what the mesh needs it for.
	Why string `json:"why"`
	Fix string `json:"fix,omitempty"`
}

// subject is what a check is about.
type subject struct{ code, name, why string }

func (s subject) ok(format string, args ...any) check {
	return check{Code: s.code, Name: s.name, Why: s.why, Level: levelOK, Message: fmt.Sprintf(format, args...)}
}

func (s subject) warning(fix, format string, args ...any) check {
	c := s.ok(format, args...)
	c.Level, c.Fix = levelWarning, fix
	return c
}

func (s subject) error(fix, format string, args ...any) check {
	c := s.ok(format, args...)
	c.Level, c.Fix = levelError, fix
	return c
}

type checkDoc struct {
	output.Meta
	Checks   []check `json:"checks"`
	Errors   int     `json:"errors"`
	Warnings int     `json:"warnings"`
}

func newCheckDoc(checks []check) *checkDoc {
	d := &checkDoc{Meta: output.NewMeta("Check"), Checks: checks}
	for _, c := range checks {
		switch c.Level {
		case levelError:
			d.Errors++
		case levelWarning:
			d.Warnings++
		}
	}
	return d
}

func (d *checkDoc) Text(t *output.Text) {
	styles := map[string]output.Style{levelOK: output.Good, levelWarning: output.Warn, levelError: output.Bad}
	const indent = "                  "
	for _, c := range d.Checks {
		t.Line(output.S(styles[c.Level], fmt.Sprintf("%-7s", c.Level)), "  ", c.Code, "  ", c.Name, ": ", c.Message)
		if c.Fix != "" {
			t.Line(indent, "fix: ", c.Fix)
		}
		if t.Wide {
			t.Line(indent, "why: ", c.Why)
		}
	}
	t.Line(plural(len(d.Checks), "check", "checks"), ", ", plural(d.Errors, "error", "errors"), ", ", plural(d.Warnings, "warning", "warnings"))
}

type checkFlags struct {
	envoy, stateDir, documents, failOn string
}

func (a *app) newCheckCommand() *cobra.Command {
	var f checkFlags
	cmd := a.asks(&cobra.Command{
		Use:   "check",
		Short: "Tell whether this machine, or a cluster, is able to run a mesh",
		Long: `Try what a mesh needs of this machine, one line each with a stable code and,
where it does not work, a fix. Kernel features are not guessed from versions:
they are tried in a network namespace that is thrown away. Nothing on the
machine is changed.

Envoy is looked for at --envoy, $SIGNET_ENVOY, .tools/envoy/bin/envoy beside
the folder of this program and in the working directory, and in PATH.

With --kubeconfig, --context or -n, and as "kubectl signet check", look at a
cluster instead: before Signet is installed, whether it can be; after that,
whether every part of it is ready and every enrolled pod captured.

Exit code 3 when there are errors (with --fail-on warning, warnings too).`,
		Example: `  signet check
  signet check -c examples/quickstart   # and whether these documents can run here
  signet check -o wide                  # and what each thing is needed for
  signet check --context prod           # a cluster, before or after the installation
  signet check --fail-on warning -o json | jq -r '.checks[] | select(.level != "ok") | .fix'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.failOn != levelError && f.failOn != levelWarning {
				return usage(fmt.Errorf("--fail-on %q: must be error or warning", f.failOn))
			}
			cluster, err := a.wantsCluster(cmd)
			if err != nil {
				return err
			}
			var checks []check
			if cluster {
				for _, local := range []string{"envoy", "state-dir", "config"} {
					if cmd.Flags().Changed(local) {
						return usage(fmt.Errorf("--%s is about this machine, and a cluster is asked about", local))
					}
				}
				if checks, err = a.checkCluster(cmd.Context()); err != nil {
					return err
				}
			} else {
				checks = a.check(cmd.Context(), f)
			}
			doc := newCheckDoc(checks)
			if err := cmd.Context().Err(); err != nil {
				return err
			}
			if err := a.printer().Print(doc); err != nil {
				return err
			}
			return findings(doc.Errors > 0 || f.failOn == levelWarning && doc.Warnings > 0)
		},
	})
	flags := cmd.Flags()
	flags.StringVar(&f.envoy, "envoy", "", "path of the Envoy program ($"+envEnvoy+")")
	flags.StringVar(&f.stateDir, "state-dir", a.env(envStateDir, defaultStateDir), "directory of keys, certificates and audit records ($"+envStateDir+")")
	flags.StringVarP(&f.documents, "config", "c", "", "check that these documents can run on this machine, too")
	flags.StringVar(&f.failOn, "fail-on", levelError, "error|warning: what makes the exit code 3")
	complete(cmd, "fail-on", "error", "warning")
	return cmd
}

// check looks at everything, in the order in which one would mend it.
func (a *app) check(ctx context.Context, f checkFlags) []check {
	running := a.meshRuns(ctx)
	checks := kernelChecks(ctx)
	checks = append(checks, openFiles(), a.checkEnvoy(ctx, f.envoy), checkRunDir(a.runDir, running), checkStateDir(f.stateDir), checkSpace(f.stateDir), a.checkClock(), a.checkAuthority(f.stateDir, running))
	if f.documents != "" {
		checks = append(checks, checkDocuments(f.documents, running)...)
	}
	return checks
}
