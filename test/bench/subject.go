package main

import (
	"bufio"
	"context"
	"errors"
	"fmt"
	"io"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
	"github.com/signet-mesh/signet/test/ztunnel"
)

// subject is one way from a client to a server.
type subject struct {
	name  string
	about string // for the report
	// client is the pod that load comes from.
	client, server *lab.Pod
	// target is what the client dials, for each of the server's ports.
	target netip.Addr
	// pids are the roots of the process trees that make up the subject.
	pids []int
	// generator is the process id of the server.
	generator int
	stop      []func() // last first
}

// Names of the subjects.
const (
	nameRaw     = "raw"
	nameEnvoy   = "envoy"
	nameMesh    = "mesh"
	nameNoAudit = "mesh-no-audit"
	nameZtunnel = "ztunnel"
	nameAgainst = "against"
)

// isMesh says whether the subject is this mesh, of whatever build.
func (s *subject) isMesh() bool {
	return s.name == nameMesh || s.name == nameNoAudit || s.name == nameAgainst
}

// bench is one run.
type bench struct {
	options
	plan           plan
	lab            *lab.Lab
	dir            string
	subjects       []*subject
	results        []map[string]*sample // by round, by subject
	idle           map[string]float64   // CPU seconds per second without load, by subject
	noise          float64              // share of the machine that others used meanwhile
	loads          int                  // turns of one kind of load
	repeated       int                  // of those, thrown away since others disturbed them
	disturbed      int                  // of those, kept although others disturbed them
	started, ended time.Time
}

// setUp starts every subject. All run for the whole time; the ones that have no
// load do next to nothing.
func (b *bench) setUp(ctx context.Context) error {
	type maker struct {
		name string
		make func(context.Context, *subject) error
	}
	makers := []maker{
		{nameRaw, b.raw},
		{nameEnvoy, b.staticEnvoy},
		{nameMesh, func(ctx context.Context, s *subject) error {
			return b.mesh(ctx, s, filepath.Dir(harness.Bin("signet")))
		}},
		{nameNoAudit, func(ctx context.Context, s *subject) error {
			return b.mesh(ctx, s, filepath.Dir(harness.Bin("signet")), "--no-audit")
		}},
	}
	if b.ztunnel != "" {
		makers = append(makers, maker{nameZtunnel, b.ztunnels})
	}
	if b.against != "" {
		makers = append(makers, maker{nameAgainst, func(ctx context.Context, s *subject) error {
			return b.mesh(ctx, s, b.against)
		}})
	}
	for i, m := range makers {
		if b.only != "" && m.name != nameRaw && !slices.Contains(strings.Split(b.only, ","), m.name) {
			continue
		}
		fmt.Fprintf(os.Stderr, "bench: starting %s\n", m.name)
		s := &subject{name: m.name}
		b.subjects = append(b.subjects, s)
		var err error
		for j, pod := range []**lab.Pod{&s.client, &s.server} {
			addr := netip.AddrFrom4([4]byte{10, 88, byte(10 + i), byte(10 + j)})
			if *pod, err = b.lab.AddPod(m.name+[]string{"-c", "-s"}[j], addr); err != nil {
				return err
			}
			if err := (*pod).Do(manyPorts); err != nil {
				return err
			}
		}
		s.target = s.server.Addr
		if err := b.serve(ctx, s); err != nil {
			return fmt.Errorf("%s: server: %w", m.name, err)
		}
		if err := m.make(ctx, s); err != nil {
			return fmt.Errorf("%s: %w", m.name, err)
		}
	}
	return nil
}

// manyPorts lets the namespace it runs in use connections' source ports again
// soon, in all subjects alike: what is measured is the proxies, and not how a
// kernel that is short of ports looks for one.
func manyPorts() error {
	return errors.Join(
		os.WriteFile("/proc/sys/net/ipv4/ip_local_port_range", []byte("1024 65535"), 0o644),
		os.WriteFile("/proc/sys/net/ipv4/tcp_tw_reuse", []byte("1"), 0o644))
}

// serve runs the server.
func (b *bench) serve(ctx context.Context, s *subject) error {
	cmd := s.server.Command(context.WithoutCancel(ctx), "/proc/self/exe", workerArg, "serve")
	cmd.Stderr = os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.generator = cmd.Process.Pid
	s.stop = append(s.stop, func() { _ = cmd.Process.Kill(); _ = cmd.Wait() })
	line, err := bufio.NewReader(out).ReadString('\n')
	if err != nil || line != lineReady+"\n" {
		return fmt.Errorf("said %q, %w", line, err)
	}
	return nil
}

func (b *bench) raw(_ context.Context, s *subject) error {
	s.about = "no proxy: the client dials the server"
	return nil
}

// mesh runs `signet up` for the pair.
func (b *bench) mesh(ctx context.Context, s *subject, bin string, args ...string) error {
	s.about = "`signet up " + strings.Join(append(args, "…`, one Envoy with its default of a thread per processor for both pods"), " ")
	dir := filepath.Join(b.dir, s.name)
	documents := filepath.Join(dir, "mesh.yaml")
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	text := harness.Config("1h") + harness.Namespace("bench", "enforce") +
		harness.Workload("bench", s.client.Name, s.client.Addr.String()) +
		harness.Workload("bench", s.server.Name, s.server.Addr.String()) +
		harness.Allow("bench", "allow-client", s.server.Name, []int{portEcho, portSink, portSource}, s.client.Name)
	if err := os.WriteFile(documents, []byte(text), 0o644); err != nil {
		return err
	}
	log, err := os.Create(filepath.Join(dir, "log"))
	if err != nil {
		return err
	}
	cmd := exec.Command(filepath.Join(bin, "signet"), append([]string{"up", "-c", documents,
		"--run-dir", filepath.Join(dir, "run"), "--state-dir", filepath.Join(dir, "state"), "--node", s.name, "--envoy", b.envoy}, args...)...)
	cmd.Stderr = log
	out, err := cmd.StdoutPipe()
	if err != nil {
		return err
	}
	if err := cmd.Start(); err != nil {
		return err
	}
	s.pids = []int{cmd.Process.Pid}
	s.stop = append(s.stop, func() {
		_ = cmd.Process.Signal(syscall.SIGTERM)
		force := time.AfterFunc(20*time.Second, func() { _ = cmd.Process.Kill() })
		_ = cmd.Wait()
		force.Stop()
		_ = log.Close()
	})
	ready := make(chan error, 1)
	go func() {
		line, err := bufio.NewReader(out).ReadString('\n')
		if err == nil && !strings.Contains(line, "mesh is ready") {
			err = errors.New(line)
		}
		ready <- err
	}()
	select {
	case err = <-ready:
	case <-time.After(30 * time.Second):
		err = errors.New("not ready within 30 s")
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		said, _ := os.ReadFile(log.Name())
		return fmt.Errorf("signet up: %w\n%s", err, said)
	}
	return nil
}

// ztunnels runs one ztunnel in each pod.
func (b *bench) ztunnels(ctx context.Context, s *subject) error {
	s.about = "two ztunnels in dedicated mode, with their default of two worker threads each, the mesh's capture rules, and their access log to a file"
	var all []ztunnel.Workload
	for _, p := range []*lab.Pod{s.client, s.server} {
		all = append(all, ztunnel.Workload{Namespace: "bench", Name: p.Name, ServiceAccount: p.Name, Addr: p.Addr})
	}
	config := filepath.Join(b.dir, "ztunnel.yaml")
	err := ztunnel.WriteConfig(config, all, []ztunnel.Allow{{Namespace: "bench", Name: "allow-client", From: all[:1]}})
	if err != nil {
		return err
	}
	for i, p := range []*lab.Pod{s.client, s.server} {
		log, err := os.Create(filepath.Join(b.dir, p.Name+".log"))
		if err != nil {
			return err
		}
		s.stop = append(s.stop, func() { _ = log.Close() })
		z, err := ztunnel.Start(ctx, b.ztunnel, p, all[i], config, log)
		if err != nil {
			_, _ = log.Seek(0, io.SeekStart)
			_, _ = io.Copy(os.Stderr, log)
			return err
		}
		s.pids = append(s.pids, z.Pid())
		s.stop = append(s.stop, z.Stop)
	}
	return nil
}

// stop ends every subject.
func (b *bench) stop() {
	for _, s := range slices.Backward(b.subjects) {
		for _, f := range slices.Backward(s.stop) {
			f()
		}
	}
}
