package main

import (
	"bytes"
	"context"
	"embed"
	"errors"
	"fmt"
	"net/netip"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
)

// documents are what the mesh is started with.
//
//go:embed *.yaml
var documents embed.FS

// All files are on the tmpfs that only this program's namespaces have. The
// run directory is the one that signet uses by itself.
const (
	runDir   = "/run/signet"
	meshDir  = "/run/quickstart/mesh"  // a copy of the documents, to be edited
	stateDir = "/run/quickstart/state" // keys and audit
	wwwDir   = "/run/quickstart/www"   // what the services serve
)

// The services as the documents have them.
var addresses = map[string]string{
	"web":      "10.88.0.10",
	"orders":   "10.88.0.11",
	"batch":    "10.88.0.12",
	"notebook": "10.88.0.13",
}

const (
	ordersURL   = "http://10.96.0.10/" // the service's virtual address
	notebookURL = "http://10.88.0.13:8080/"
)

// quickstart is one run. It belongs to one goroutine.
type quickstart struct {
	*screen
	bin, envoy string
	python     string
	curl       string // empty: python is used instead

	lab     *lab.Lab
	mesh    *program
	servers map[string]*program
	held    []*program

	seen    map[flow]int // connections by what the callers saw
	edited  time.Time    // when the policy was edited
	audited int          // audit records that match them
	rotated int          // workloads seen with a new certificate
}

// program is a running process and what it has written.
type program struct {
	name string
	proc *os.Process
	done chan struct{} // closed when it has ended
	err  error         // why it ended, never nil; read after done
	at   time.Time     // when; read after done

	out buffer // both streams
}

// buffer is safe for concurrent use.
type buffer struct {
	mu sync.Mutex
	b  bytes.Buffer // guarded by mu
}

func (b *buffer) Write(p []byte) (int, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.Write(p)
}

func (b *buffer) String() string {
	b.mu.Lock()
	defer b.mu.Unlock()
	return b.b.String()
}

// start runs a program in a pod, or in none.
func start(pod *lab.Pod, name, path string, args ...string) (*program, error) {
	p := &program{name: name, done: make(chan struct{})}
	cmd := exec.Command(path, args...)
	cmd.Stdout, cmd.Stderr = &p.out, &p.out
	cmd.Env = environment()
	cmd.WaitDelay = time.Second
	var err error
	if pod != nil {
		err = pod.Do(cmd.Start)
	} else {
		err = cmd.Start()
	}
	if err != nil {
		return nil, fmt.Errorf("start %s: %w", name, err)
	}
	p.proc = cmd.Process
	go func() {
		p.err, p.at = cmd.Wait(), time.Now()
		if p.err == nil {
			p.err = errors.New("exit status 0")
		}
		close(p.done)
	}()
	return p, nil
}

// stop ends the program and waits for it.
func (p *program) stop(grace time.Duration) error {
	_ = p.proc.Signal(syscall.SIGTERM) // it may have ended
	select {
	case <-p.done:
		return nil
	case <-time.After(grace):
	}
	_ = p.proc.Kill()
	<-p.done
	return fmt.Errorf("%s did not stop within %s", p.name, grace)
}

func (p *program) ended() bool {
	select {
	case <-p.done:
		return true
	default:
		return false
	}
}

// environment is this process's without the proxies and mesh settings that
// the user may have for other things.
func environment() []string {
	var env []string
	for _, e := range os.Environ() {
		name, _, _ := strings.Cut(e, "=")
		if strings.HasSuffix(strings.ToLower(name), "_proxy") || strings.HasPrefix(name, "SIGNET_") {
			continue
		}
		env = append(env, e)
	}
	return env
}

// prepare finds the programs, writes the files and makes the pods.
func (q *quickstart) prepare() error {
	var err error
	if q.python, err = exec.LookPath("python3"); err != nil {
		return errors.New("python3 is missing: it plays the services; on Debian and Ubuntu: apt-get install python3")
	}
	if q.curl, err = exec.LookPath("curl"); err != nil {
		q.curl = ""
	}
	for _, name := range []string{"signet", "signet-control", "signet-agent", "signet-proxy"} {
		if _, err := exec.LookPath(filepath.Join(q.bin, name)); err != nil {
			return fmt.Errorf("%w; run `make build`, or name the directory of the programs with -bin", err)
		}
	}
	files, err := documents.ReadDir(".")
	if err != nil {
		return err
	}
	if err := os.MkdirAll(meshDir, 0o755); err != nil {
		return err
	}
	for _, f := range files {
		text, err := documents.ReadFile(f.Name())
		if err == nil {
			err = os.WriteFile(filepath.Join(meshDir, f.Name()), text, 0o600)
		}
		if err != nil {
			return err
		}
	}
	if q.lab, err = lab.New(lab.Config{}); err != nil {
		return err
	}
	for name, addr := range addresses {
		if _, err := q.lab.AddPod(name, netip.MustParseAddr(addr)); err != nil {
			return err
		}
	}
	return nil
}

// serve starts a web server in a pod and waits until it listens.
func (q *quickstart) serve(ctx context.Context, name, page string) error {
	dir := filepath.Join(wwwDir, name)
	if err := os.MkdirAll(dir, 0o755); err != nil {
		return err
	}
	if err := os.WriteFile(filepath.Join(dir, "index.html"), []byte(page+"\n"), 0o600); err != nil {
		return err
	}
	pod := q.lab.Pod(name)
	q.command(name, "python3 -m http.server 8080")
	p, err := start(pod, name, q.python, "-m", "http.server", "8080", "--directory", dir)
	if err != nil {
		return err
	}
	q.servers[name] = p
	return q.until(ctx, 10*time.Second, name+" to listen", func() error {
		if p.ended() {
			return &finalError{fmt.Errorf("it ended: %w: %s", p.err, p.out.String())}
		}
		c, err := pod.Dial(ctx, "tcp", "127.0.0.1:8080") // loopback is not captured
		if err != nil {
			return err
		}
		return c.Close()
	})
}

// up starts the mesh and waits until it is ready.
func (q *quickstart) up(ctx context.Context) error {
	args := []string{"up", "-c", meshDir, "--state-dir", stateDir, "--node", "quickstart", "--proxy-threads", "2"}
	q.command("node", "signet "+strings.Join(args[:5], " "))
	if q.envoy != "" {
		args = append(args, "--envoy", q.envoy)
	}
	began := time.Now()
	var err error
	if q.mesh, err = start(nil, "signet up", filepath.Join(q.bin, "signet"), args...); err != nil {
		return err
	}
	err = q.until(ctx, 30*time.Second, "the mesh to be ready", func() error {
		if q.mesh.ended() {
			return &finalError{fmt.Errorf("signet up ended: %w", q.mesh.err)}
		}
		if !strings.Contains(q.mesh.out.String(), "mesh is ready") {
			return errors.New("not yet")
		}
		return nil
	})
	if err == nil {
		q.ok("control plane, agent and Envoy are ready after %s", time.Since(began).Round(10*time.Millisecond))
	}
	return err
}

// explain adds the end of the mesh's log to an error.
func (q *quickstart) explain(err error) error {
	if q.mesh == nil {
		return err
	}
	lines := strings.Split(strings.TrimSpace(q.mesh.out.String()), "\n")
	return fmt.Errorf("%w\nThe mesh wrote last:\n  %s", err, strings.Join(lines[max(0, len(lines)-15):], "\n  "))
}

// close stops everything. The mesh goes first: it would call the end of its
// pods a fault.
func (q *quickstart) close() error {
	var errs []error
	if q.mesh != nil {
		errs = append(errs, q.mesh.stop(15*time.Second))
	}
	for _, p := range q.held {
		_ = p.stop(0) // it waits for bytes, or has ended
	}
	for _, p := range q.servers {
		errs = append(errs, p.stop(5*time.Second))
	}
	if q.lab != nil {
		errs = append(errs, q.lab.Close())
	}
	return errors.Join(errs...)
}
