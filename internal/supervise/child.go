package supervise

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"os/exec"
	"runtime"
	"sync"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

// outputDelay bounds the wait for output that a process's own children, in
// sessions of their own, could still write after its end.
const outputDelay = time.Second

// child is one supervised process through all its lives. The fields after
// the channels belong to loop's goroutine.
type child struct {
	Process
	log *slog.Logger
	out *output

	tried chan struct{} // closed after the first attempt to start
	stop  chan struct{} // closed by Run: end the process
	ended chan struct{} // closed when loop has returned
	final func(error)   // ends Run

	starts int
}

// loop starts the process until ctx ends, then waits for stop and for the
// process to be gone.
func (c *child) loop(ctx context.Context) {
	defer close(c.ended)
	// The kernel sends Pdeathsig when the thread that forked ends, so this
	// goroutine keeps its thread for as long as it may have a child.
	runtime.LockOSThread()
	defer runtime.UnlockOSThread()

	first := sync.OnceFunc(func() { close(c.tried) })
	defer first()
	var delay time.Duration
	for ctx.Err() == nil {
		began := time.Now()
		cmd, err := c.start(ctx)
		first()
		if err == nil {
			err = c.wait(cmd)
			if ctx.Err() != nil {
				return
			}
			if c.Exited != nil {
				c.Exited(err)
			}
			var exit *exec.ExitError
			if c.Final != 0 && errors.As(err, &exit) && exit.ExitCode() == c.Final {
				c.final(&finalError{c.Name, c.Final})
				return
			}
		}
		if ctx.Err() != nil {
			return
		}
		delay = nextDelay(delay, time.Since(began))
		c.log.Warn("process is not running", slog.Any("err", err), slog.Duration("restart_in", delay))
		select {
		case <-time.After(delay):
		case <-ctx.Done():
		}
	}
}

// start runs Before and forks.
func (c *child) start(ctx context.Context) (*exec.Cmd, error) {
	if c.Before != nil {
		if err := c.Before(ctx, c.starts); err != nil {
			return nil, fmt.Errorf("prepare: %w", err)
		}
		if err := ctx.Err(); err != nil {
			return nil, err
		}
	}
	lines := &lineWriter{out: c.out, name: c.Name}
	cmd := exec.Command(c.Path, c.Args...)
	cmd.Env = c.Env
	cmd.Dir = c.Dir
	cmd.Stdout, cmd.Stderr = lines, lines // one pipe: the order stays
	cmd.WaitDelay = outputDelay
	cmd.SysProcAttr = &syscall.SysProcAttr{Setpgid: true, Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		return nil, fmt.Errorf("start: %w", err)
	}
	c.starts++
	c.log.Info("process started", slog.Int("pid", cmd.Process.Pid), slog.Int("starts", c.starts))
	return cmd, nil
}

// wait returns when the process, its group and its output have ended. It
// stops the process when c.stop is closed. The error is never nil.
func (c *child) wait(cmd *exec.Cmd) error {
	pid := cmd.Process.Pid
	exited := make(chan struct{})
	var stopper sync.WaitGroup
	stopper.Go(func() { c.stopper(pid, exited) })

	// Seen, but not yet reaped: the number cannot belong to anyone else while
	// signals are sent to it and to its group.
	for {
		if err := unix.Waitid(unix.P_PID, pid, nil, unix.WEXITED|unix.WNOWAIT, nil); err != unix.EINTR {
			break
		}
	}
	close(exited)
	stopper.Wait()
	_ = unix.Kill(-pid, unix.SIGKILL) // ESRCH: nothing is left of the group
	err := cmd.Wait()
	if lines, ok := cmd.Stdout.(*lineWriter); ok {
		lines.flush()
	}
	var exit *exec.ExitError
	switch {
	case err == nil || errors.Is(err, exec.ErrWaitDelay):
		err = errors.New("exit status 0")
	case errors.As(err, &exit):
	default:
		err = fmt.Errorf("wait: %w", err)
	}
	return err
}

// stopper sends SIGTERM when c.stop is closed and SIGKILL after the grace,
// unless exited is closed first.
func (c *child) stopper(pid int, exited <-chan struct{}) {
	select {
	case <-exited:
		return
	case <-c.stop:
	}
	_ = unix.Kill(pid, unix.SIGTERM)
	grace := time.NewTimer(c.Grace)
	defer grace.Stop()
	select {
	case <-exited:
	case <-grace.C:
		c.log.Warn("process did not end in time, killing it", slog.Duration("grace", c.Grace))
		_ = unix.Kill(-pid, unix.SIGKILL)
	}
}
