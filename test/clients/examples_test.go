package clients

import (
	"bytes"
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/test/harness"
)

// output is what a program writes, as far as it has come.
type output struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

func (o *output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

func (o *output) String() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.String()
}

// example is one of examples/spiffe that runs.
type example struct {
	out, errs output
	ended     chan error // has one
}

// TestExamples: the programs of examples/spiffe do what they say, each as a server and
// as a client of each other, and for longer than any certificate lives. A client
// that wants another server, and a server that wants another client, refuse.
func TestExamples(t *testing.T) {
	const life = 10 * time.Second
	at, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	dir, err := os.MkdirTemp("/run", "examples-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	const folder = "../../examples/spiffe"
	goExample, script := filepath.Join(dir, "go"), filepath.Join(dir, "main.py")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", goExample, folder+"/go").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	text, err := os.ReadFile(folder + "/python/main.py")
	if err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(script, text, 0o644); err != nil {
		t.Fatal(err)
	}
	java, err := exec.LookPath("java")
	if err != nil {
		t.Fatal(err)
	}
	commands := map[string][]string{
		"go":     {goExample},
		"java":   {java, "-XX:TieredStopAtLevel=1", "-XX:+UseSerialGC", "-Xmx128m", "-jar", at + "/java/example/example.jar"},
		"python": {at + "/python/venv/bin/python", script},
		"rust":   {at + "/rust/example"},
	}
	languages := []string{"go", "java", "python", "rust"}

	// All servers are one workload, and all clients another: two users.
	const ledger, billing = "spiffe://mesh.test/ns/shop/sa/ledger", "spiffe://mesh.test/ns/shop/sa/billing"
	uids := map[string]uint32{ledger: 61201, billing: 61202}
	var docs strings.Builder
	docs.WriteString(harness.Config(life.String()) + harness.Namespace("shop", "enforce"))
	for id, uid := range uids {
		account := id[strings.LastIndexByte(id, '/')+1:]
		for _, l := range languages {
			exe, err := filepath.EvalSymlinks(commands[l][0])
			if err != nil {
				t.Fatal(err)
			}
			fmt.Fprintf(&docs, `apiVersion: signet.dev/v1alpha1
kind: WorkloadEntry
metadata: {name: %[1]s-%[2]s, namespace: shop}
spec: {serviceAccount: %[1]s, attest: {uid: %[3]d, path: %[4]q}}
---
`, account, l, uid, exe)
		}
	}
	m := harness.Start(t, harness.Options{Dir: dir, Documents: map[string]string{"mesh.yaml": docs.String()}})
	// run starts a program, as a workload, until the test ends.
	run := func(t *testing.T, language, as string, args ...string) *example {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		argv := slices.Concat(commands[language], args)
		c := exec.CommandContext(ctx, argv[0], argv[1:]...)
		e := &example{ended: make(chan error, 1)}
		c.Dir, c.Stdout, c.Stderr = "/", &e.out, &e.errs
		c.Env = []string{"PATH=/usr/bin:/bin", "LANG=C.UTF-8", "SPIFFE_ENDPOINT_SOCKET=unix://" + filepath.Join(m.RunDir, "api", "agent.sock")}
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uids[as], Gid: uids[as]}}
		if err := c.Start(); err != nil {
			cancel()
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { defer close(done); e.ended <- c.Wait() }()
		t.Cleanup(func() { cancel(); <-done })
		return e
	}

	servers, addresses := map[string]*example{}, map[string]string{}
	for _, l := range languages {
		servers[l] = run(t, l, ledger, "serve", "127.0.0.1:0", billing)
	}
	for _, l := range languages {
		m.Eventually(30*time.Second, l+" to listen", func() error {
			address, ok := strings.CutPrefix(strings.TrimSpace(servers[l].out.String()), "listening on ")
			if !ok {
				return fmt.Errorf("it says %q, %q", servers[l].out.String(), servers[l].errs.String())
			}
			addresses[l] = address
			return nil
		})
	}

	t.Run("refused", func(t *testing.T) {
		for _, l := range languages {
			for what, e := range map[string]*example{
				l + " calls a server that is another": run(t, l, billing, "call", addresses["go"], nobodyID),
				"another client calls " + l:           run(t, "go", ledger, "call", addresses[l], ledger),
			} {
				select {
				case err := <-e.ended:
					if err == nil || e.out.String() != "" {
						t.Errorf("%s: %v, it says %q", what, err, e.out.String())
					}
				case <-time.After(30 * time.Second):
					t.Errorf("%s: it goes on", what)
				}
			}
		}
	})
	// A call each second: as many as need every certificate of now to be replaced.
	const calls = int(life/time.Second) + 4
	t.Run("served", func(t *testing.T) {
		running := map[[2]string]*example{}
		for _, client := range languages {
			for _, server := range languages {
				running[[2]string{client, server}] = run(t, client, billing, "call", addresses[server], ledger)
			}
		}
		for _, client := range languages {
			for _, server := range languages {
				t.Run(client+" calls "+server, func(t *testing.T) {
					e := running[[2]string{client, server}]
					hello := "hello " + billing + "\n"
					for end := time.Now().Add(90 * time.Second); strings.Count(e.out.String(), hello) < calls; time.Sleep(100 * time.Millisecond) {
						select {
						case err := <-e.ended:
							t.Fatalf("it ended: %v\n%s%s", err, e.out.String(), e.errs.String())
						default:
						}
						if time.Now().After(end) {
							t.Fatalf("after 90 s it has said\n%s%s", e.out.String(), e.errs.String())
						}
					}
					if rest := strings.ReplaceAll(e.out.String(), hello, ""); rest != "" {
						t.Errorf("it says besides: %q", rest)
					}
				})
			}
		}
	})
	for _, l := range languages {
		if n := strings.Count(servers[l].errs.String(), "refused: "); n == 0 {
			t.Errorf("the server in %s says nothing of whom it refused", l)
		} else {
			t.Logf("%s: refused %d", l, n)
		}
	}
}
