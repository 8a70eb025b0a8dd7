package lab

import (
	"bytes"
	"errors"
	"os/exec"
)

// Cmd is an exec.Cmd that starts inside a pod. Everything else is as in
// exec.Cmd.
type Cmd struct {
	*exec.Cmd
	pod *Pod
}

// Start starts the process inside the pod. SysProcAttr.Pdeathsig must not be
// set: it would follow a thread that may end at any time.
func (c *Cmd) Start() error {
	if a := c.SysProcAttr; a != nil && a.Pdeathsig != 0 {
		return errors.New("lab: SysProcAttr.Pdeathsig is set: leave it 0, processes end with the pod")
	}
	if err := c.pod.Do(c.Cmd.Start); err != nil {
		return err
	}
	c.pod.mu.Lock()
	defer c.pod.mu.Unlock()
	c.pod.procs = append(c.pod.procs, c.Process)
	return nil
}

// Run starts the process and waits for it.
func (c *Cmd) Run() error {
	if err := c.Start(); err != nil {
		return err
	}
	return c.Wait()
}

// Output runs the process and returns its standard output. Unless Stderr is
// set, an exec.ExitError carries the standard error.
func (c *Cmd) Output() ([]byte, error) {
	if c.Stdout != nil {
		return nil, errors.New("lab: Stdout already set")
	}
	var stdout, stderr bytes.Buffer
	c.Stdout = &stdout
	own := c.Stderr == nil
	if own {
		c.Stderr = &stderr
	}
	err := c.Run()
	var exit *exec.ExitError
	if own && errors.As(err, &exit) {
		exit.Stderr = stderr.Bytes()
	}
	return stdout.Bytes(), err
}

// CombinedOutput runs the process and returns its standard output and error.
func (c *Cmd) CombinedOutput() ([]byte, error) {
	if c.Stdout != nil || c.Stderr != nil {
		return nil, errors.New("lab: Stdout or Stderr already set")
	}
	var b bytes.Buffer
	c.Stdout, c.Stderr = &b, &b
	err := c.Run()
	return b.Bytes(), err
}
