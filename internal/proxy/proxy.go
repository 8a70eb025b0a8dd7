// Package proxy is the parent of a node's Envoy: it starts Envoy, brings it
// back when it dies, passes its audit lines on, and ends it without cutting
// connections while another proxy of the node takes over.
package proxy

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
	"sync/atomic"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/internal/proxy/instance"
	"github.com/signet-mesh/signet/internal/supervise"
	"github.com/signet-mesh/signet/xds"
)

// Config configures a proxy. Node, Envoy, RunDir, ADS and Spool are required.
type Config struct {
	// Node is what the agent calls this node.
	Node string
	// Envoy is the program's file.
	Envoy string
	// RunDir holds the directories of the node's proxies.
	RunDir string
	// ADS is the agent's socket, where the configuration comes from.
	ADS string
	// Spool is the file that the agent reads audit lines from.
	Spool string
	// Owner is the pod that this proxy runs in, which Ready asks by; it may be
	// empty.
	Owner string
	// Threads is the number of Envoy's workers. 0: one for each processor.
	Threads int
	// DrainLimit is how long open connections may live on when the proxy is
	// to end and another has taken over. 0: they are cut at once.
	DrainLimit time.Duration
	// Log is where the proxy says what it does.
	Log *slog.Logger
	// Out gets Envoy's own lines.
	Out io.Writer
}

func (c *Config) check() error {
	for _, f := range []struct{ name, value string }{
		{"Node", c.Node}, {"Envoy", c.Envoy}, {"RunDir", c.RunDir}, {"ADS", c.ADS}, {"Spool", c.Spool},
	} {
		if f.value == "" {
			return fmt.Errorf("proxy: %s is empty", f.name)
		}
	}
	for _, f := range []struct{ name, value string }{{"RunDir", c.RunDir}, {"ADS", c.ADS}, {"Spool", c.Spool}} {
		if !filepath.IsAbs(f.value) { // Envoy has another working directory
			return fmt.Errorf("proxy: %s: %q must be an absolute path", f.name, f.value)
		}
	}
	if c.Threads < 0 || c.DrainLimit < 0 {
		return errors.New("proxy: Threads and DrainLimit must not be negative")
	}
	return nil
}

// envoyGrace is how long Envoy may take to end after SIGTERM.
const envoyGrace = 5 * time.Second

// Run runs a proxy until ctx ends and it has drained, or cut ends. An Envoy that
// dies is started again, unless it was draining: nothing is left then. The
// kernel kills Envoy when this process dies in whatever way: nobody would be
// there to take its audit lines, or to end it.
func Run(ctx, cut context.Context, c Config) error {
	if err := c.check(); err != nil {
		return err
	}
	own, err := instance.Create(c.RunDir, c.Owner)
	if err != nil {
		return fmt.Errorf("proxy: %w", err)
	}
	p := &proxy{Config: c, plain: c.Log, own: own, admin: newAdmin(own.Admin()), died: make(chan struct{})}
	p.Log = c.Log.With("proxy", own.ID)
	return errors.Join(p.run(ctx, cut), own.Close())
}

// proxy is one running proxy.
type proxy struct {
	Config                // with a Log that names the proxy
	plain    *slog.Logger // the Log as it was given
	own      *instance.Own
	admin    *admin
	lines    *os.File    // the pipe's writing end, beside Envoy's
	draining atomic.Bool // Envoy is not started again
	died     chan struct{}
}

func (p *proxy) run(ctx, cut context.Context) error {
	pipe, err := p.openPipe()
	if err != nil {
		return fmt.Errorf("proxy: audit pipe: %w", err)
	}
	// Lines are saved for as long as Envoy writes any, and a little longer.
	saving, stopSaving := context.WithCancel(context.Background())
	defer stopSaving()
	var spooling, running sync.WaitGroup
	spooling.Go(func() { newSpooler(p.Spool, p.own.ID, p.Log).run(saving, pipe) })

	living, end := context.WithCancel(context.WithoutCancel(ctx))
	defer end()
	var failed error // of the supervisor; read after running.Wait
	running.Go(func() {
		failed = supervise.Run(living, p.plain, p.Out, p.process(end))
	})
	select {
	case <-ctx.Done():
		p.drain(cut)
	case <-cut.Done():
	case <-living.Done():
	}
	end()
	running.Wait()
	err = errors.Join(failed, p.lines.Close()) // with Envoy gone, the pipe has an end
	giveUp := time.AfterFunc(envoyGrace, stopSaving)
	defer giveUp.Stop()
	spooling.Wait()
	return errors.Join(err, pipe.Close())
}

// openPipe makes the pipe that Envoy writes its audit lines to. It has a name,
// so that the configuration, which is the same for every proxy, can name it.
func (p *proxy) openPipe() (*os.File, error) {
	path := filepath.Join(p.own.Dir, xds.AuditPipe)
	if err := unix.Mkfifo(path, 0o600); err != nil {
		return nil, err
	}
	r, err := os.OpenFile(path, os.O_RDONLY|unix.O_NONBLOCK, 0)
	if err != nil {
		return nil, err
	}
	// With an end of its own here, the pipe survives Envoy's death.
	if p.lines, err = os.OpenFile(path, os.O_WRONLY, 0); err != nil {
		return nil, errors.Join(err, r.Close())
	}
	raw, err := r.SyscallConn()
	if err == nil {
		// Larger, so that Envoy seldom waits. It works with what it gets.
		err = raw.Control(func(fd uintptr) { _, _ = unix.FcntlInt(fd, unix.F_SETPIPE_SZ, 1<<20) })
	}
	if err != nil {
		return nil, errors.Join(err, r.Close(), p.lines.Close())
	}
	return r, nil
}

// haste is a file with a directory of its own: Envoy watches the directory, and
// would notice every line in its audit pipe.
func (p *proxy) haste() string { return filepath.Join(p.own.Dir, "haste", "value") }

func (p *proxy) setHaste(value string) error {
	path := p.haste()
	if err := os.MkdirAll(filepath.Dir(path), 0o700); err != nil {
		return err
	}
	if err := os.WriteFile(path+".new", []byte(value), 0o600); err != nil {
		return err
	}
	return os.Rename(path+".new", path)
}

// process is Envoy as the supervisor runs it; end stops the supervisor.
func (p *proxy) process(end context.CancelFunc) supervise.Process {
	bootstrap := filepath.Join(p.own.Dir, "envoy.json")
	args := []string{
		"--config-path", bootstrap, "--disable-hot-restart", "--log-level", "warning",
		"--file-flush-interval-msec", "20",
		// A listener that is replaced gives its open connections this long.
		"--drain-time-s", "600", "--drain-strategy", "immediate",
	}
	if p.Threads > 0 {
		args = append(args, "--concurrency", strconv.Itoa(p.Threads))
	}
	return supervise.Process{
		Name: "envoy", Path: p.Envoy, Args: args, Dir: p.own.Dir, Grace: envoyGrace,
		Before: func(context.Context, int) error {
			config, err := xds.Bootstrap(xds.Proxy{Node: p.Node, Instance: p.own.ID, ADS: p.ADS, Admin: p.own.Admin(), Haste: p.haste()})
			if err != nil {
				return err
			}
			if err := os.WriteFile(bootstrap, config, 0o600); err != nil {
				return err
			}
			if err := p.setHaste("0"); err != nil {
				return err
			}
			return p.own.Renew()
		},
		Exited: func(error) {
			// What it left of a line must not meet the next one's first.
			if _, err := p.lines.WriteString("\n"); err != nil {
				p.Log.Error("ending an audit line", "error", err)
			}
			if p.draining.Load() {
				close(p.died)
				end()
			}
		},
	}
}
