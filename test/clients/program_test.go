package clients

import (
	"bufio"
	"cmp"
	"context"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"golang.org/x/sys/unix"

	"github.com/signet-mesh/signet/test/harness"
)

// The programs take the same commands and print JSON lines:
//
//	fetch               id, chain and roots, as the Workload API has them
//	watch N             leaf, for each of N certificates as it comes; then polls
//	                    and gaps: how often the library was asked for its
//	                    certificate meanwhile, and when it had none that is valid
//	serve ADDR IDS ...  listening, with the address; then for each connection
//	                    server, the address, and leaf or error. Answers "hello"
//	                    to clients that are one of IDS.
//	dial                for each line "ADDR ID" of the input leaf and got, the
//	                    server's certificate and answer, or error. ID is whom the
//	                    client wants to find there.
//	jwt AUDIENCE        id and token
//	validate            for each line "TOKEN AUDIENCE" of the input agent or
//	                    agentError, by ValidateJWTSVID, and local or localError,
//	                    by the library's own judgement
//
// A command that fails prints error and exits with 1. What reads its input ends
// when that does.
type line struct {
	ID         string
	Chain      [][]byte
	Roots      [][]byte
	Leaf       []byte
	Polls      int
	Gaps       []string
	Listening  string
	Server     string
	Got        string
	Token      string
	Agent      string
	AgentError string
	Local      string
	LocalError string
	Error      string

	at time.Time // when it was read
}

// leaf is the certificate in a line.
func (l line) leaf(t *testing.T) *x509.Certificate {
	t.Helper()
	c, err := x509.ParseCertificate(l.Leaf)
	if err != nil {
		t.Fatalf("no certificate (%v), but: %s", err, l.Error)
	}
	return c
}

// language is a workload: a program, and the user that it runs as.
type language struct {
	name string
	uid  uint32
	argv []string
	exe  string // what attests it: the program itself, or its interpreter
}

func (l *language) id() string { return "spiffe://mesh.test/ns/shop/sa/" + l.name }

const (
	firstUID  = 61001
	nobodyUID = 61099 // no workload's
	nobodyID  = "spiffe://mesh.test/ns/shop/sa/nobody"
)

// installed mounts what `make clients` made below /run, which is the tests' own:
// to that every user has a way, whoever owns the folders above this one.
var installed = sync.OnceValues(func() (string, error) {
	const at = "/run/clients"
	from := cmp.Or(os.Getenv("SIGNET_CLIENTS"), filepath.Join("..", "..", ".tools", "clients"))
	for _, what := range []string{"python/installed", "rust/installed", "java/installed"} {
		if _, err := os.Stat(filepath.Join(from, what)); err != nil {
			return "", fmt.Errorf("%w: run `make clients`, or set SIGNET_CLIENTS", err)
		}
	}
	if err := os.MkdirAll(at, 0o755); err != nil {
		return "", err
	}
	if err := unix.Mount(from, at, "", unix.MS_BIND, ""); err != nil {
		return "", fmt.Errorf("mount %s at %s: %w", from, at, err)
	}
	if err := unix.Mount("", at, "", unix.MS_BIND|unix.MS_REMOUNT|unix.MS_RDONLY, ""); err != nil {
		return "", fmt.Errorf("mount %s read-only: %w", at, err)
	}
	return at, nil
})

// publicDir is a folder to which every user has a way.
func publicDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "mesh-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// command is a program on a mesh, of a user.
func command(ctx context.Context, m *harness.Mesh, uid uint32, argv ...string) *exec.Cmd {
	c := exec.CommandContext(ctx, argv[0], argv[1:]...)
	c.Dir = "/"
	c.Env = []string{"PATH=/usr/bin:/bin", "LANG=C.UTF-8", "SPIFFE_ENDPOINT_SOCKET=unix://" + filepath.Join(m.RunDir, "api", "agent.sock")}
	c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uid, Gid: uid}}
	return c
}

// plain is a captured workload that speaks no TLS.
const plain = "plain"

// fixture is a mesh with a workload for each language, and plain.
type fixture struct {
	t         *testing.T
	mesh      *harness.Mesh
	languages []*language
}

func start(t *testing.T, ttl time.Duration) *fixture {
	t.Helper()
	at, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	dir := publicDir(t)
	goclient := filepath.Join(dir, "goclient")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", goclient, "./goclient").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	script, err := os.ReadFile("python/client.py")
	if err != nil {
		t.Fatal(err)
	}
	client := filepath.Join(dir, "client.py")
	if err := os.WriteFile(client, script, 0o644); err != nil {
		t.Fatal(err)
	}
	java, err := exec.LookPath("java")
	if err != nil {
		t.Fatal(err)
	}
	f := &fixture{t: t, languages: []*language{
		{name: "go", argv: []string{goclient}},
		// Started as fast as a JVM starts.
		{name: "java", argv: []string{java, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx256m", "-jar", at + "/java/client.jar"}},
		{name: "python", argv: []string{at + "/python/venv/bin/python", client}},
		{name: "rust", argv: []string{at + "/rust/client"}},
	}}
	var docs strings.Builder
	docs.WriteString(harness.Config(ttl.String()) + harness.Namespace("shop", "enforce") + harness.Workload("shop", plain, "10.88.0.10"))
	for i, l := range f.languages {
		l.uid = uint32(firstUID + i)
		if l.exe, err = filepath.EvalSymlinks(l.argv[0]); err != nil {
			t.Fatal(err)
		}
		docs.WriteString(harness.Program("shop", l.name, int(l.uid), l.exe))
	}
	f.mesh = harness.Start(t, harness.Options{Dir: dir, Pods: map[string]string{plain: "10.88.0.10"}, Documents: map[string]string{"mesh.yaml": docs.String()}})
	return f
}

// each runs a subtest for every language.
func (f *fixture) each(test func(t *testing.T, l *language)) {
	for _, l := range f.languages {
		f.t.Run(l.name, func(t *testing.T) { test(t, l) })
	}
}

// program is a running program.
type program struct {
	what  string
	in    io.WriteCloser
	lines chan line // closed at the end of its output
	done  chan struct{}
	err   error          // after done
	also  harness.Output // what it writes for people
}

// run starts a program as a user, the language's own for 0. It is ended with
// the test.
func (f *fixture) run(t *testing.T, l *language, uid uint32, args ...string) *program {
	t.Helper()
	// Not the test's context, which ends before the program's input does.
	ctx, cancel := context.WithTimeout(context.Background(), 80*time.Second)
	c := command(ctx, f.mesh, cmp.Or(uid, l.uid), slices.Concat(l.argv, args)...)
	p := &program{what: l.name + " " + args[0], lines: make(chan line, 256), done: make(chan struct{})}
	c.Stderr = &p.also
	in, err := c.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	p.in = in
	out, err := c.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		t.Fatal(err)
	}
	go func() {
		defer close(p.done)
		defer close(p.lines)
		// Not a Scanner: a line has certificates in it.
		for r := bufio.NewReader(out); ; {
			raw, err := r.ReadBytes('\n')
			if len(raw) > 0 {
				l := line{at: time.Now()}
				if bad := json.Unmarshal(raw, &l); bad != nil {
					l.Error = fmt.Sprintf("%v: %s", bad, raw)
				}
				p.lines <- l
			}
			if err != nil {
				break
			}
		}
		p.err = c.Wait()
	}()
	t.Cleanup(func() {
		in.Close()
		select {
		case <-p.done:
		case <-time.After(10 * time.Second):
			t.Errorf("%s does not end with its input", p.what)
		}
		cancel()
		for range p.lines { // so that what reads it is not stuck
		}
		<-p.done
		if also := p.also.String(); t.Failed() && also != "" {
			t.Logf("%s says:\n%s", p.what, also)
		}
	})
	return p
}

// next is the next line that the program prints.
func (p *program) next(t *testing.T) line {
	t.Helper()
	select {
	case l, ok := <-p.lines:
		if !ok {
			<-p.done
			t.Fatalf("%s ended: %v\n%s", p.what, p.err, &p.also)
		}
		return l
	case <-time.After(40 * time.Second):
		t.Fatalf("%s says nothing\n%s", p.what, &p.also)
	}
	panic("not reached")
}

// ask sends a line and returns the answer.
func (p *program) ask(t *testing.T, words ...string) line {
	t.Helper()
	if _, err := fmt.Fprintln(p.in, strings.Join(words, " ")); err != nil {
		t.Fatalf("%s: %v\n%s", p.what, err, &p.also)
	}
	return p.next(t)
}
