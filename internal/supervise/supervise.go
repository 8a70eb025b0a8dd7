// Package supervise runs child processes, brings each back when it dies and
// stops them all together.
package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"time"
)

const (
	// defaultGrace is how long a process may take to end after SIGTERM.
	defaultGrace = 10 * time.Second

	firstDelay = 50 * time.Millisecond // before the first restart
	lastDelay  = 5 * time.Second       // the delay doubles up to this
	settled    = 10 * time.Second      // a life this long starts over at firstDelay
)

// Process is one program to keep running.
type Process struct {
	// Name is what log lines and output lines call the process. Required,
	// and unique within a Run.
	Name string
	// Path is the program's file. Required; it is not looked up in PATH.
	Path string
	// Args are its arguments, without the program's name.
	Args []string
	// Env is its environment as "key=value". Nil means that of this process.
	Env []string
	// Dir is its working directory. Empty means that of this process.
	Dir string
	// Before, if set, runs before each start and may edit nothing of the
	// Process. starts counts the starts so far that succeeded: 0 at first. Its
	// context ends when Run's does. An error counts as a failed start.
	Before func(ctx context.Context, starts int) error
	// Exited, if set, is called after each end that nobody asked for, with
	// the reason, which is never nil. It is not called for a start that
	// failed. Like Before it is called from one goroutine at a time, and holds
	// up the restart while it runs.
	Exited func(err error)
	// Final, if not 0, is the exit status with which the process says that another
	// start would be of no use, or would do harm. Run then ends.
	Final int
	// Grace is how long the process may take to end after SIGTERM before it is
	// killed. 0 means 10 s.
	Grace time.Duration
}

// Run starts the processes in order, restarts each that ends, and returns
// when ctx has ended and all of them are gone. It returns an error only if
// the processes are described wrongly, and has then started nothing, or if one of
// them ended with its Final status, and has then stopped the others.
//
// A process starts when the one before it has been started or has failed to
// start for the first time. A start that fails, and a process that ends with
// any status, is followed by another start, after 50 ms doubling to 5 s; a
// life of 10 s or more starts over at 50 ms. When ctx ends nothing is started
// any more and the processes are stopped one by one, the last first: SIGTERM,
// then SIGKILL after Grace.
//
// Each process leads a process group of its own, so a terminal's Ctrl-C does
// not reach it. What is left of its group is killed when it ends. The kernel
// kills it when this process dies in whatever way.
//
// Every line of a process's standard output and error goes to out with the
// name of the process before it, one Write a line, never two at a time. An
// error of out loses the line and stops nothing.
func Run(ctx context.Context, log *slog.Logger, out io.Writer, procs ...Process) error {
	if err := check(procs); err != nil {
		return err
	}
	ctx, end := context.WithCancelCause(ctx)
	defer end(nil)
	shared := &output{w: out}
	children := make([]*child, len(procs))
	for i, p := range procs {
		if p.Grace == 0 {
			p.Grace = defaultGrace
		}
		c := &child{
			Process: p,
			log:     log.With(slog.String("process", p.Name)),
			out:     shared,
			tried:   make(chan struct{}),
			stop:    make(chan struct{}),
			ended:   make(chan struct{}),
			final:   end,
		}
		children[i] = c
		go c.loop(ctx)
		<-c.tried
	}
	<-ctx.Done()
	for i := len(children) - 1; i >= 0; i-- {
		close(children[i].stop)
		<-children[i].ended
	}
	if final := new(finalError); errors.As(context.Cause(ctx), &final) {
		return final
	}
	return nil
}

// finalError is the end of a process with its Final status.
type finalError struct {
	name   string
	status int
}

func (e *finalError) Error() string {
	return fmt.Sprintf("%s has ended with status %d: starting it again would not help; see what it said", e.name, e.status)
}

func check(procs []Process) error {
	if len(procs) == 0 {
		return errors.New("supervise: no process given")
	}
	names := map[string]bool{}
	for i, p := range procs {
		switch {
		case p.Name == "":
			return fmt.Errorf("supervise: process %d: Name is empty: give each process a name", i)
		case names[p.Name]:
			return fmt.Errorf("supervise: process %d: Name %q is taken: give each process its own", i, p.Name)
		case p.Path == "":
			return fmt.Errorf("supervise: process %q: Path is empty: name the program's file", p.Name)
		case p.Grace < 0:
			return fmt.Errorf("supervise: process %q: Grace is %v: it must not be negative", p.Name, p.Grace)
		}
		names[p.Name] = true
	}
	return nil
}

// nextDelay returns how long to wait after a life of that length, which the
// delay before preceded; 0 before the first start.
func nextDelay(before, lived time.Duration) time.Duration {
	if before == 0 || lived >= settled {
		return firstDelay
	}
	return min(2*before, lastDelay)
}
