package main

import (
	"bytes"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

// boot starts the first process of a machine in namespaces of its own and
// returns when it is ready. The process outlives this one and all before it.
func boot(dir string) error {
	m, err := readMachine(dir)
	if err != nil {
		return err
	}
	// The cgroup namespace begins where this process is.
	if err := join(m.Cgroup); err != nil {
		return err
	}
	ready, theirs, err := os.Pipe()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(filepath.Join(dir, spec.LogDir), 0o755); err != nil {
		return err
	}
	log, err := os.OpenFile(filepath.Join(dir, spec.LogDir, "init.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	cmd := exec.Command("/proc/self/exe", "init", dir)
	cmd.Env = []string{}
	cmd.Stdout, cmd.Stderr = log, log
	cmd.ExtraFiles = []*os.File{theirs}
	if m.Forward != "" {
		cmd.ExtraFiles = append(cmd.ExtraFiles, os.NewFile(3, "listener"))
	}
	cmd.Dir = "/"
	cmd.SysProcAttr = &syscall.SysProcAttr{
		Setsid: true,
		Cloneflags: unix.CLONE_NEWNS | unix.CLONE_NEWNET | unix.CLONE_NEWPID | unix.CLONE_NEWUTS |
			unix.CLONE_NEWIPC | unix.CLONE_NEWCGROUP,
	}
	if err := cmd.Start(); err != nil {
		return fmt.Errorf("make the machine's namespaces: %w", err)
	}
	said, err := []byte(nil), errors.Join(theirs.Close(), leave())
	if err == nil {
		said, err = io.ReadAll(ready)
	}
	if err == nil && string(said) != readyWord {
		err = fmt.Errorf("the machine did not come up: %s", bytes.TrimSpace(said))
	}
	if err != nil {
		_ = cmd.Process.Kill() // it may have ended by itself
		_ = cmd.Wait()
		return err
	}
	return cmd.Process.Release()
}

func readMachine(dir string) (m spec.Machine, err error) {
	root, err := os.OpenRoot(dir)
	if err != nil {
		return m, err
	}
	defer root.Close()
	return m, spec.Read(root, spec.MachineFile, &m)
}
