package main

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"path/filepath"
	"strconv"
	"sync"
	"time"

	"github.com/spf13/cobra"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/ca/caserver"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/internal/manifest"
	"github.com/signet-mesh/signet/internal/supervise"
)

// mesh is what `signet up` starts.
type meshFlags struct {
	documents   string
	stateDir    string
	node        string
	envoy       string
	concurrency int
	noAudit     bool
	noProxy     bool
	jwtKeyLife  time.Duration
	federation  control.FederationConfig
	rootKey     control.RootKeyConfig
}

func (a *app) newUpCommand() *cobra.Command {
	var f meshFlags
	cmd := &cobra.Command{
		Use:   "up -c FILE|DIR",
		Short: "Start a mesh on this machine",
		Long: `Start the control plane, the agent and the proxy as one supervised tree, from a
file or directory of documents. Each of the three is brought back when it dies.
Edits of the documents take effect within a second; an edit that makes no sense
is refused, and the last good state stays in force.

When the mesh stops, captured network namespaces stay captured: what is closed
stays closed until the mesh is back, or until ` + "`signet release`" + ` lets them go.`,
		Example: `  signet up -c examples/quickstart
  signet up -c /etc/signet --run-dir /run/signet --state-dir /var/lib/signet
  signet up -c /etc/signet --root-key 'pkcs11:token=mesh?module-path=/usr/lib/softhsm/libsofthsm2.so&pin-source=/etc/signet-pin'`,
		Args: args(cobra.NoArgs),
		RunE: func(cmd *cobra.Command, _ []string) error {
			if f.documents == "" {
				return usage(errors.New("-c is missing: the file or directory of documents"))
			}
			if err := ca.CheckJWTKeyLife(f.jwtKeyLife); err != nil {
				return usage(fmt.Errorf("--jwt-key-life: %w", err))
			}
			if err := f.federation.Check(f.jwtKeyLife); err != nil {
				return usage(err)
			}
			if err := f.rootKey.Check(); err != nil {
				return usage(err)
			}
			return a.up(cmd.Context(), f)
		},
	}
	host, err := os.Hostname()
	if err != nil {
		host = "localhost"
	}
	cmd.Flags().StringVarP(&f.documents, "config", "c", "", "file or directory of documents")
	cmd.Flags().StringVar(&f.stateDir, "state-dir", a.env(envStateDir, defaultStateDir), "directory of keys, audit and last known state ($"+envStateDir+")")
	cmd.Flags().StringVar(&f.node, "node", host, "name of this machine in the mesh")
	cmd.Flags().StringVar(&f.envoy, "envoy", "", "Envoy program ($"+envEnvoy+", the project's tools, or PATH)")
	cmd.Flags().IntVar(&f.concurrency, "proxy-threads", 0, "worker threads of the proxy (default: one for each processor)")
	cmd.Flags().DurationVar(&f.jwtKeyLife, "jwt-key-life", ca.DefaultJWTKeyLife, "how long a key signs JWT-SVIDs before the next one does")
	f.rootKey.Flags(cmd.Flags())
	f.federation.Flags(cmd.Flags())
	cmd.Flags().BoolVar(&f.noAudit, "no-audit", false, "keep no audit; for measuring what it costs")
	cmd.Flags().BoolVar(&f.noProxy, "no-proxy", false, "start no proxy: signet-proxy runs beside, with --run-dir as here and --state-dir that of the agent, 'agent' in the one here")
	return cmd
}

// up checks what it can before it starts anything, so that a mistake is one
// clear message and not three processes that fail in turn.
func (a *app) up(ctx context.Context, f meshFlags) error {
	envoy, err := findEnvoy(f.envoy, a.getenv)
	if err != nil {
		return fmt.Errorf("%w; run `make tools` in the project's folder, or name the program with --envoy", err)
	}
	documents, err := manifest.Load(f.documents, f.node)
	if err != nil {
		return err
	}
	m, err := a.prepare(f, envoy, documents.State.TrustDomain.Name())
	if err != nil {
		return err
	}
	log := slog.New(slog.NewTextHandler(a.err, nil))
	var beside sync.WaitGroup
	running, stop := context.WithCancel(ctx)
	beside.Go(func() { a.announce(running, m) })
	beside.Go(func() { m.keepToken(running, log) })
	err = supervise.Run(ctx, log, a.err, m.processes()...)
	stop()
	beside.Wait()
	return err
}

// machine is one mesh on this machine, with every path absolute.
type machine struct {
	meshFlags
	runDir, trustDomain string
	bin                 string // directory of the programs
	tokens              *caserver.TokenStore
	out                 io.Writer
}

func (a *app) prepare(f meshFlags, envoy, trustDomain string) (*machine, error) {
	m := &machine{meshFlags: f, trustDomain: trustDomain, out: a.out, runDir: a.runDir}
	m.envoy = envoy
	paths := []*string{&m.documents, &m.stateDir, &m.runDir}
	if m.federation.WebListen != "" {
		paths = append(paths, &m.federation.Certificate, &m.federation.Key)
	}
	for _, p := range paths {
		abs, err := filepath.Abs(*p)
		if err != nil {
			return nil, err
		}
		*p = abs
	}
	exe, err := os.Executable()
	if err != nil {
		return nil, err
	}
	m.bin = filepath.Dir(exe)
	for _, name := range []string{"signet-control", "signet-agent", "signet-proxy"} {
		if _, err := os.Stat(filepath.Join(m.bin, name)); err != nil {
			return nil, fmt.Errorf("%s must be beside signet: %w; run `make build`", name, err)
		}
	}
	for _, dir := range []string{m.stateDir, filepath.Join(m.stateDir, "agent", "spool"), m.runDir} {
		if err := os.MkdirAll(dir, 0o700); err != nil {
			return nil, err
		}
	}
	// The Workload API is open to every process, so the way to it must be.
	if err := os.Chmod(m.runDir, 0o711); err != nil {
		return nil, err
	}
	m.tokens, err = caserver.OpenTokens(control.TokenDir(m.stateDir))
	return m, err
}

func (m *machine) agentState() string { return filepath.Join(m.stateDir, "agent") }
func (m *machine) tokenFile() string  { return filepath.Join(m.stateDir, "agent", "join-token") }

func (m *machine) processes() []supervise.Process {
	out := []supervise.Process{m.control(), m.agent()}
	if !m.noProxy {
		out = append(out, m.proxy())
	}
	return out
}

func (m *machine) control() supervise.Process {
	args := []string{"--config", m.documents, "--node", m.node, "--state-dir", m.stateDir, "--run-dir", m.runDir, "--jwt-key-life", m.jwtKeyLife.String()}
	args = append(args, m.rootKey.Args()...)
	args = append(args, m.federation.Args()...)
	return supervise.Process{Name: "control", Path: filepath.Join(m.bin, "signet-control"), Args: args, Grace: 5 * time.Second, Final: control.ExitNoRetry}
}

func (m *machine) agent() supervise.Process {
	root := control.RootFile(m.stateDir)
	args := []string{
		"--node", m.node, "--trust-domain", m.trustDomain, "--state-dir", m.agentState(), "--run-dir", m.runDir,
		"--bundle", root, "--join-token", m.tokenFile(),
	}
	if m.noAudit {
		args = append(args, "--no-audit")
	}
	return supervise.Process{
		Name: "agent", Path: filepath.Join(m.bin, "signet-agent"), Grace: 5 * time.Second,
		Args: args,
		Before: func(context.Context, int) error {
			if _, err := os.Stat(root); err != nil {
				return fmt.Errorf("the control plane has not made its root yet: %w", err)
			}
			return m.writeToken()
		},
	}
}

// proxy has no time to drain: the whole mesh ends, or nothing does.
func (m *machine) proxy() supervise.Process {
	args := []string{
		"--node", m.node, "--state-dir", m.agentState(), "--run-dir", m.runDir, "--envoy", m.envoy,
		"--threads", strconv.Itoa(m.concurrency), "--drain-limit", "0",
	}
	return supervise.Process{Name: "proxy", Path: filepath.Join(m.bin, "signet-proxy"), Args: args, Grace: 10 * time.Second}
}

// announce says on standard output when the mesh is ready, and meanwhile, on
// standard error, what it waits for.
func (a *app) announce(ctx context.Context, m *machine) {
	tick := time.NewTicker(100 * time.Millisecond)
	defer tick.Stop()
	said := time.Now()
	for {
		select {
		case <-ctx.Done():
			return
		case <-tick.C:
		}
		missing := a.missing(ctx)
		if missing == "" {
			_, _ = fmt.Fprintf(a.out, "mesh is ready: trust domain %s, node %s, sockets in %s\n", m.trustDomain, m.node, m.runDir)
			return
		}
		if time.Since(said) > 2*time.Second {
			said = time.Now()
			_, _ = fmt.Fprintln(a.err, "waiting:", missing)
		}
	}
}

// missing says what the mesh still lacks, "" if nothing.
func (a *app) missing(ctx context.Context) string {
	client := a.client()
	c, err := client.ControlStatus(ctx)
	if err != nil {
		return "the control plane does not answer yet"
	}
	s, err := client.AgentStatus(ctx)
	if err != nil {
		return "the agent does not answer yet"
	}
	switch {
	case !s.ControlConnected:
		return "the agent is not connected to the control plane yet"
	case s.Revision != c.Revision:
		return "the proxy has not taken the newest state yet"
	}
	certs, err := client.Certificates(ctx)
	if err != nil {
		return err.Error()
	}
	return notReady(s.Workloads, certs)
}

func notReady(workloads []adminv1.WorkloadStatus, certs []adminv1.Certificate) string {
	for _, w := range workloads {
		if w.Problem != "" {
			return w.Workload + ": " + w.Problem
		}
	}
	for _, c := range certs {
		if c.Serial == "" {
			return c.Holder + " has no certificate yet"
		}
	}
	return ""
}
