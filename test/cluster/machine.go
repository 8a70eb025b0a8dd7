package cluster

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"runtime"
	"slices"
	"strconv"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

// machine is the control plane or a node.
type machine struct {
	machineState
	dir     string
	program string // the machine program
}

func (c *Cluster) machine(i int) *machine {
	m := c.state.Machines[i]
	return &machine{machineState: m, dir: filepath.Join(c.dir, m.Name), program: c.state.Tools.Machine}
}

func (c *Cluster) control() *machine { return c.machine(0) }

func (m *machine) disk() string { return filepath.Join(m.dir, spec.DiskDir) }

// read reads one of the machine's files.
func (m *machine) read(name string, v any) error {
	root, err := os.OpenRoot(m.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return spec.Read(root, name, v)
}

func (m *machine) write(name string, v any) error {
	root, err := os.OpenRoot(m.dir)
	if err != nil {
		return err
	}
	defer root.Close()
	return spec.Write(root, name, v)
}

// record returns the record of the machine's first process if it runs.
func (m *machine) record() (spec.Record, error) {
	var r spec.Record
	off := fmt.Errorf("cluster: %s is off", m.Name)
	if err := m.read(spec.RecordFile, &r); errors.Is(err, os.ErrNotExist) {
		return r, off
	} else if err != nil {
		return r, fmt.Errorf("cluster: %s: %w", m.Name, err)
	}
	now, err := spec.Find("/proc", r.Pid)
	if err != nil || now != r.Process {
		return r, off
	}
	return r, nil
}

// pid returns the number of the machine's first process if it runs.
func (m *machine) pid() (int, error) {
	r, err := m.record()
	return r.Pid, err
}

// boot makes the machine's namespaces. listener is nil or the socket whose
// connections the machine passes on. It must be off.
func (m *machine) boot(ctx context.Context, listener *os.File) error {
	for _, name := range []string{spec.StatusFile, spec.ServicesFile} {
		if err := os.Remove(filepath.Join(m.dir, name)); err != nil && !errors.Is(err, os.ErrNotExist) {
			return fmt.Errorf("cluster: %w", err)
		}
	}
	cmd := exec.CommandContext(ctx, m.program, "boot", m.dir)
	if listener != nil {
		cmd.ExtraFiles = []*os.File{listener}
	}
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cluster: boot %s: %w: %s", m.Name, err, bytes.TrimSpace(out))
	}
	return nil
}

// kill ends the machine's first process, and with it all, and waits until it is
// gone. A machine that is off is no error.
func (m *machine) kill(ctx context.Context) error {
	pid, err := m.pid()
	if err != nil {
		return nil
	}
	fd, err := unix.PidfdOpen(pid, 0)
	if errors.Is(err, unix.ESRCH) {
		return nil
	} else if err != nil {
		return fmt.Errorf("cluster: %s: %w", m.Name, err)
	}
	defer unix.Close(fd)
	// The descriptor is of the recorded process if that one is still there.
	if again, err := m.pid(); err != nil || again != pid {
		return nil
	}
	if err := unix.PidfdSendSignal(fd, unix.SIGKILL, nil, 0); err != nil && !errors.Is(err, unix.ESRCH) {
		return fmt.Errorf("cluster: kill %s: %w", m.Name, err)
	}
	for {
		n, err := unix.Poll([]unix.PollFd{{Fd: int32(fd), Events: unix.POLLIN}}, 100)
		if err != nil && !errors.Is(err, unix.EINTR) {
			return fmt.Errorf("cluster: wait for %s to be off: %w", m.Name, err)
		}
		if n > 0 {
			return nil
		}
		if ctx.Err() != nil {
			return fmt.Errorf("cluster: wait for %s to be off: %w", m.Name, context.Cause(ctx))
		}
	}
}

// command returns a command that runs inside of the machine.
func (m *machine) command(ctx context.Context, argv ...string) *exec.Cmd {
	r, err := m.record()
	args := append([]string{"enter", strconv.Itoa(r.Pid), strconv.FormatUint(r.Start, 10)}, argv...)
	cmd := exec.CommandContext(ctx, m.program, args...)
	if len(argv) == 0 {
		err = errors.Join(err, errors.New("cluster: a command needs a program"))
	}
	cmd.Err = errors.Join(cmd.Err, err)
	return cmd
}

// inNet runs f in the machine's network namespace. What f starts in other
// goroutines is not in there.
func (m *machine) inNet(f func() error) error {
	pid, err := m.pid()
	if err != nil {
		return err
	}
	there, err := os.Open(fmt.Sprintf("/proc/%d/ns/net", pid))
	if err != nil {
		return fmt.Errorf("cluster: %s is off: %w", m.Name, err)
	}
	defer there.Close()
	done := make(chan error)
	go func() {
		// Never unlocked: the thread ends with the goroutine.
		runtime.LockOSThread()
		if err := unix.Setns(int(there.Fd()), unix.CLONE_NEWNET); err != nil {
			done <- fmt.Errorf("cluster: enter the network of %s: %w", m.Name, err)
			return
		}
		done <- f()
	}()
	return <-done
}

func (m *machine) dial(ctx context.Context, network, addr string) (conn net.Conn, err error) {
	err = m.inNet(func() error {
		conn, err = (&net.Dialer{}).DialContext(ctx, network, addr)
		return err
	})
	return conn, err
}

// setServices says what the machine is to run, and returns when it does and
// nothing else of its services is left.
func (m *machine) setServices(ctx context.Context, services []spec.Service) error {
	ctx, cancel := context.WithTimeoutCause(ctx, settleTime, fmt.Errorf("%s is over", settleTime))
	defer cancel()
	pid, err := m.pid()
	if err != nil {
		return err
	}
	var status spec.Status
	if err := m.read(spec.StatusFile, &status); err != nil {
		return fmt.Errorf("cluster: %s: %w", m.Name, err)
	}
	want := spec.Services{Generation: status.Generation + 1, Services: services}
	if err := m.write(spec.ServicesFile, want); err != nil {
		return fmt.Errorf("cluster: %s: %w", m.Name, err)
	}
	if err := unix.Kill(pid, unix.SIGHUP); err != nil {
		return fmt.Errorf("cluster: %s: %w", m.Name, err)
	}
	return poll(ctx, 20*time.Millisecond, func() error {
		if err := m.read(spec.StatusFile, &status); err != nil {
			return err
		}
		if status.Generation < want.Generation || !status.Settled {
			return fmt.Errorf("%s: services do not run as they should; logs are in %s", m.Name, filepath.Join(m.dir, spec.LogDir))
		}
		return nil
	})
}

// settleTime bounds how long a machine's services take to start and end.
const settleTime = 2 * time.Minute

// changeServices changes which of a node's services run.
func (m *machine) changeServices(ctx context.Context, change func(running []string) ([]string, error)) error {
	unlock, err := lock(ctx, filepath.Dir(m.dir))
	if err != nil {
		return err
	}
	defer unlock()
	var now spec.Services
	if err := m.read(spec.ServicesFile, &now); err != nil && !errors.Is(err, os.ErrNotExist) {
		return fmt.Errorf("cluster: %s: %w", m.Name, err)
	}
	var names []string
	for _, s := range now.Services {
		names = append(names, s.Name)
	}
	names, err = change(names)
	if err != nil {
		return fmt.Errorf("cluster: %s: %w", m.Name, err)
	}
	var all struct{ Services []spec.Service }
	if err := m.read(nodeServicesFile, &all); err != nil {
		return fmt.Errorf("cluster: %s: %w", m.Name, err)
	}
	wanted := slices.DeleteFunc(all.Services, func(s spec.Service) bool { return !slices.Contains(names, s.Name) })
	return m.setServices(ctx, wanted)
}

func without(names []string, name string) []string {
	return slices.DeleteFunc(slices.Clone(names), func(n string) bool { return n == name })
}

// poll calls f until it succeeds or ctx ends; then the error tells both.
func poll(ctx context.Context, every time.Duration, f func() error) error {
	for {
		err := f()
		if err == nil {
			return nil
		}
		select {
		case <-ctx.Done():
			return fmt.Errorf("cluster: %w (%w)", err, context.Cause(ctx))
		case <-time.After(every):
		}
	}
}
