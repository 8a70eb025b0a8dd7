package main

import (
	"errors"
	"fmt"
	"os"
	"os/signal"
	"slices"
	"syscall"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/cluster/internal/spec"
)

const (
	restartAfter = time.Second     // a service that ended by itself
	killAfter    = 5 * time.Second // a service that does not end when told to
)

// supervisor keeps the services of a machine running and reaps its orphans.
// Only the goroutine in run touches it.
type supervisor struct {
	dir        *os.Root
	generation int
	wanted     []spec.Service
	running    map[int]*process
	notBefore  map[string]time.Time // by service: when it may start again
	signals    chan os.Signal
}

type process struct {
	spec.Service
	kill time.Time // when to kill it; zero: it is to run
}

// newSupervisor takes signals from now on: whoever is told that the machine is
// ready sends one at once, and the first process of a machine ignores what it
// has no handler for.
func newSupervisor(dir *os.Root) (*supervisor, error) {
	s := &supervisor{dir: dir, running: map[int]*process{}, notBefore: map[string]time.Time{}, signals: make(chan os.Signal, 16)}
	signal.Notify(s.signals, syscall.SIGHUP, syscall.SIGCHLD, syscall.SIGTERM)
	return s, s.report()
}

func (s *supervisor) run() error {
	// A lost SIGCHLD, for there may be many, is made up for; so are deadlines.
	tick := time.NewTicker(time.Second)
	defer tick.Stop()
	for {
		select {
		case sig := <-s.signals:
			switch sig {
			case syscall.SIGTERM:
				return nil
			case syscall.SIGHUP:
				if err := s.load(); err != nil {
					fmt.Fprintln(os.Stderr, "services:", err)
				}
			}
		case <-tick.C:
		}
		changed := s.reap()
		changed = s.converge(time.Now()) || changed
		if changed {
			if err := s.report(); err != nil {
				fmt.Fprintln(os.Stderr, "status:", err)
			}
		}
	}
}

// load reads what is to run.
func (s *supervisor) load() error {
	var services spec.Services
	if err := spec.Read(s.dir, spec.ServicesFile, &services); err != nil {
		return err
	}
	s.generation, s.wanted = services.Generation, services.Services
	clear(s.notBefore)
	s.converge(time.Now())
	return s.report()
}

// reap collects every process that ended, and reports whether a service was
// among them.
func (s *supervisor) reap() (changed bool) {
	for {
		var status syscall.WaitStatus
		pid, err := syscall.Wait4(-1, &status, syscall.WNOHANG, nil)
		if errors.Is(err, syscall.EINTR) {
			continue
		}
		if err != nil || pid <= 0 {
			return changed
		}
		p := s.running[pid]
		if p == nil {
			continue // an orphan
		}
		changed = true
		delete(s.running, pid)
		if p.kill.IsZero() {
			fmt.Fprintf(os.Stderr, "%s: ended by itself: code %d, signal %d\n", p.Name, status.ExitStatus(), status.Signal())
			s.notBefore[p.Name] = time.Now().Add(restartAfter)
		}
	}
}

// converge starts what is to run and ends what is not.
func (s *supervisor) converge(now time.Time) (changed bool) {
	up := map[string]bool{}
	for pid, p := range s.running {
		up[p.Name] = true
		switch {
		case !p.kill.IsZero():
			if now.After(p.kill) {
				_ = unix.Kill(pid, unix.SIGKILL) // not reaped yet, so it is that process
			}
		case !s.wants(p.Service):
			p.kill = now.Add(killAfter)
			_ = unix.Kill(pid, unix.SIGTERM)
		}
	}
	for _, w := range s.wanted {
		if up[w.Name] || now.Before(s.notBefore[w.Name]) {
			continue
		}
		pid, err := s.start(w)
		if err != nil {
			fmt.Fprintf(os.Stderr, "%s: %v\n", w.Name, err)
			s.notBefore[w.Name] = now.Add(restartAfter)
			continue
		}
		changed = true
		s.running[pid] = &process{Service: w}
	}
	return changed
}

func (s *supervisor) wants(service spec.Service) bool {
	return slices.ContainsFunc(s.wanted, func(w spec.Service) bool {
		return w.Name == service.Name && slices.Equal(w.Argv, service.Argv)
	})
}

// start starts a service, not by os/exec: its Wait would compete with reap.
func (s *supervisor) start(w spec.Service) (pid int, err error) {
	log, err := s.dir.OpenFile(spec.LogDir+"/"+w.Name+".log", os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o644)
	if err != nil {
		return 0, err
	}
	defer log.Close()
	null, err := os.Open(os.DevNull)
	if err != nil {
		return 0, err
	}
	defer null.Close()
	sys := &syscall.SysProcAttr{Setsid: true}
	cgroup, err := serviceCgroup(w.Name)
	if err != nil {
		return 0, err
	}
	if cgroup != nil {
		defer cgroup.Close()
		sys.UseCgroupFD, sys.CgroupFD = true, int(cgroup.Fd())
	}
	return syscall.ForkExec(w.Argv[0], w.Argv, &syscall.ProcAttr{
		Dir:   "/",
		Env:   environment(),
		Files: []uintptr{null.Fd(), log.Fd(), log.Fd()},
		Sys:   sys,
	})
}

// environment is what programs in a machine get.
func environment() []string {
	return []string{"PATH=" + spec.Path, "HOME=/root", "LANG=C.UTF-8"}
}

// report writes what runs.
func (s *supervisor) report() error {
	status := spec.Status{Generation: s.generation, Pids: map[string]int{}, Settled: len(s.running) == len(s.wanted)}
	for pid, p := range s.running {
		status.Pids[p.Name] = pid
		status.Settled = status.Settled && p.kill.IsZero()
	}
	return spec.Write(s.dir, spec.StatusFile, status)
}
