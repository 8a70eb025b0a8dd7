// Package spire runs SPIRE's server and agent, the reference implementation of
// SPIFFE: for the tests that another trust domain may be run by it, and for
// measuring side by side. The programs are brought along, unmodified, and run
// with their state in a directory that is thrown away.
package spire

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"
)

// Env names the directory with the programs.
const Env = "SPIRE"

// Programs are the paths of the two programs.
type Programs struct{ Server, Agent string }

// Find returns the programs in a directory.
func Find(dir string) (Programs, error) {
	switch {
	case dir == "":
		return Programs{}, fmt.Errorf("%s is not set: name a directory with the programs spire-server and spire-agent", Env)
	case !filepath.IsAbs(dir):
		return Programs{}, fmt.Errorf("%s: %s must be an absolute path", Env, dir)
	}
	p := Programs{Server: filepath.Join(dir, "spire-server"), Agent: filepath.Join(dir, "spire-agent")}
	for _, path := range []string{p.Server, p.Agent} {
		info, err := os.Stat(path)
		if err == nil && (!info.Mode().IsRegular() || info.Mode()&0o111 == 0) {
			err = fmt.Errorf("%s is not a program", path)
		}
		if err != nil {
			return Programs{}, fmt.Errorf("%s: %w", Env, err)
		}
	}
	return p, nil
}

// Version is what the server says of itself.
func (p Programs) Version(ctx context.Context) (string, error) {
	out, err := exec.CommandContext(ctx, p.Server, "--version").CombinedOutput() // to either
	if err != nil {
		return "", fmt.Errorf("spire-server --version: %w\n%s", err, out)
	}
	return strings.TrimSpace(string(out)), nil
}

const (
	startTime   = 60 * time.Second // until a program is ready
	commandTime = 30 * time.Second
	stopTime    = 10 * time.Second
)

// process is a running program.
type process struct {
	cmd  *exec.Cmd
	done chan struct{}
	err  error // why it ended; read after done is closed
	once sync.Once
}

// start runs a program. Its output goes to log.
func start(program string, args, env []string, log io.Writer) (*process, error) {
	p := &process{cmd: exec.Command(program, args...), done: make(chan struct{})}
	p.cmd.Env = append(os.Environ(), env...)
	p.cmd.Stdout, p.cmd.Stderr = log, log
	if err := p.cmd.Start(); err != nil {
		return nil, err
	}
	go func() { p.err = p.cmd.Wait(); close(p.done) }()
	return p, nil
}

// Pid is the process id.
func (p *process) Pid() int { return p.cmd.Process.Pid }

// Stop ends the process and waits for it.
func (p *process) Stop() {
	p.once.Do(func() {
		_ = p.cmd.Process.Signal(syscall.SIGTERM)
		select {
		case <-p.done:
		case <-time.After(stopTime):
			_ = p.cmd.Process.Kill()
		}
	})
	<-p.done
}

// ready asks again and again until the answer is good.
func (p *process) ready(ctx context.Context, ask func(context.Context) error) error {
	ctx, cancel := context.WithTimeout(ctx, startTime)
	defer cancel()
	for {
		err := ask(ctx)
		if err == nil {
			return nil
		}
		select {
		case <-p.done:
			return fmt.Errorf("%s ended: %w", p.cmd.Path, p.err)
		case <-ctx.Done():
			return fmt.Errorf("%s is not ready: %w", p.cmd.Path, err)
		case <-time.After(100 * time.Millisecond):
		}
	}
}

// run runs a command to its end and returns what it prints.
func run(ctx context.Context, program string, stdin []byte, args ...string) ([]byte, error) {
	ctx, cancel := context.WithTimeout(ctx, commandTime)
	defer cancel()
	cmd := exec.CommandContext(ctx, program, args...)
	cmd.Stdin = bytes.NewReader(stdin)
	out, err := cmd.Output()
	if err != nil {
		var exit *exec.ExitError
		if errors.As(err, &exit) {
			out = append(out, exit.Stderr...)
		}
		return nil, fmt.Errorf("%s %s: %w\n%s", filepath.Base(program), strings.Join(args, " "), err, bytes.TrimSpace(out))
	}
	return out, nil
}
