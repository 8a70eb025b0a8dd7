package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"time"

	"golang.org/x/sys/unix"
)

// tools are the programs that a cluster consists of.
type tools struct {
	Bin     string // folder of Kubernetes' programs, etcd and coredns
	Machine string
	Pause   string
}

func (t tools) program(name string) string { return filepath.Join(t.Bin, name) }

// prepareTools builds what is not built yet.
func prepareTools(ctx context.Context, log *progress) (tools, error) {
	root, err := projectRoot()
	if err != nil {
		return tools{}, err
	}
	for _, p := range []string{"containerd", "ctr", "runc", "nft", "iptables", "conntrack", "/usr/lib/cni/ptp"} {
		if _, err := exec.LookPath(p); err != nil {
			return tools{}, fmt.Errorf("cluster: %s is missing: run make deps-debian", p)
		}
	}
	build := exec.CommandContext(ctx, filepath.Join(root, "test/tools/kubernetes.sh"))
	build.Dir = root
	build.Stdout, build.Stderr = log.w, log.w
	if err := build.Run(); err != nil {
		return tools{}, fmt.Errorf("cluster: build Kubernetes: %w", err)
	}
	dir := filepath.Join(root, ".tools", "cluster")
	t := tools{Bin: filepath.Join(root, ".tools/kubernetes/bin"),
		Machine: filepath.Join(dir, "machine"), Pause: filepath.Join(dir, "pause")}
	return t, BuildProgram(ctx, dir, "./test/cluster/machine", "./test/cluster/pause")
}

// BuildProgram builds static programs of the project into a folder. Packages
// are named from the project's root, such as "./cmd/signet". What is built and
// unchanged stays as it is; a program that runs may be replaced.
func BuildProgram(ctx context.Context, dir string, packages ...string) error {
	root, err := projectRoot()
	if err != nil {
		return err
	}
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	lock, err := os.OpenFile(filepath.Join(dir, "lock"), os.O_CREATE|os.O_RDWR, 0o600)
	if err != nil {
		return fmt.Errorf("cluster: %w", err)
	}
	defer lock.Close()
	if err := unix.Flock(int(lock.Fd()), unix.LOCK_EX); err != nil {
		return fmt.Errorf("cluster: lock %s: %w", dir, err)
	}
	cmd := exec.CommandContext(ctx, "go", append([]string{"build", "-trimpath", "-buildvcs=false", "-ldflags=-s -w", "-o", dir + "/"}, packages...)...)
	cmd.Dir = root
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return fmt.Errorf("cluster: go build %s: %w\n%s", strings.Join(packages, " "), err, out)
	}
	return nil
}

// projectRoot finds the folder of the project's go.mod, above the working
// directory.
func projectRoot() (string, error) {
	start, err := os.Getwd()
	if err != nil {
		return "", fmt.Errorf("cluster: %w", err)
	}
	for dir := start; ; dir = filepath.Dir(dir) {
		b, err := os.ReadFile(filepath.Join(dir, "go.mod"))
		if err == nil && strings.HasPrefix(string(b), "module github.com/signet-mesh/signet\n") {
			return dir, nil
		}
		if err != nil && !errors.Is(err, os.ErrNotExist) {
			return "", fmt.Errorf("cluster: %w", err)
		}
		if dir == filepath.Dir(dir) {
			return "", fmt.Errorf("cluster: %s is not in the project: run it in there", start)
		}
	}
}

// progress writes lines with the time since it was made.
type progress struct {
	mu    sync.Mutex // guards w
	w     io.Writer
	start time.Time
}

func newProgress(w io.Writer) *progress {
	if w == nil {
		w = io.Discard
	}
	return &progress{w: w, start: time.Now()}
}

func (p *progress) say(format string, args ...any) {
	p.mu.Lock()
	defer p.mu.Unlock()
	_, _ = fmt.Fprintf(p.w, "cluster: %5.1f s  %s\n", time.Since(p.start).Seconds(), fmt.Sprintf(format, args...))
}
