package clients

import (
	"context"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"

	"github.com/signet-mesh/signet/test/harness"
)

const examples = "../../examples/spiffe"

// block returns the n-th block of a kind in a README, from 0.
func block(t *testing.T, readme, kind string, n int) string {
	t.Helper()
	text, err := os.ReadFile(readme)
	if err != nil {
		t.Fatal(err)
	}
	all := regexp.MustCompile("(?ms)^```"+kind+"\n(.*?)^```$").FindAllStringSubmatch(string(text), -1)
	if len(all) <= n {
		t.Fatalf("%s has %d blocks of %s, and not one more", readme, len(all), kind)
	}
	return all[n][1]
}

// recipe is what the README of an example says: where its commands are given, and
// those.
type recipe struct {
	dir         string
	serve, call []string
}

// theirAddress is where the READMEs have servers listen.
const theirAddress = "127.0.0.1:8443"

// with is a command with another address and, unless empty, another peer.
func with(argv []string, address, peer string) []string {
	out := append([]string{}, argv...)
	out[len(out)-2] = address
	if peer != "" {
		out[len(out)-1] = peer
	}
	return out
}

// readRecipe reads the commands of an example. Those that build it were given by
// `make clients`, or are here, for the one in Go, but for where the program is put.
func readRecipe(t *testing.T, language, installed, scratch string) *recipe {
	t.Helper()
	folder := filepath.Join(examples, language)
	readme := filepath.Join(folder, "README.md")
	r := &recipe{dir: filepath.Join(installed, language, "example")}
	commands := block(t, readme, "sh", 1)
	if language == "go" {
		const theirs = "/tmp/example"
		build := block(t, readme, "sh", 0)
		if !strings.Contains(build, theirs) || !strings.Contains(commands, theirs) {
			t.Fatalf("%s: the program is not at %s", readme, theirs)
		}
		r.dir = scratch
		mine := filepath.Join(scratch, "example")
		commands = strings.ReplaceAll(commands, theirs, mine)
		c := exec.Command("bash", "-euo", "pipefail", "-c", strings.ReplaceAll(build, theirs, mine))
		c.Dir = folder
		c.Env = append(os.Environ(), "GOFLAGS=-buildvcs=false")
		if out, err := c.CombinedOutput(); err != nil {
			t.Fatalf("%v\n%s", err, out)
		}
	} else if was, now := block(t, filepath.Join(r.dir, "README.md"), "sh", 0), block(t, readme, "sh", 0); was != now {
		t.Fatalf("the example in %s was built by %q, and its README says %q: run `make clients`", language, was, now)
	}
	for line := range strings.Lines(commands) {
		text, _, _ := strings.Cut(line, "#")
		argv := strings.Fields(text)
		if n := len(argv); n < 4 || argv[n-2] != theirAddress {
			t.Fatalf("%s: %q is no command with %s and a SPIFFE ID", readme, line, theirAddress)
		}
		switch argv[len(argv)-3] {
		case "serve":
			r.serve = argv
		case "call":
			r.call = argv
		}
	}
	if r.serve == nil || r.call == nil {
		t.Fatalf("%s does not say how to serve and to call", readme)
	}
	return r
}

// example is one of examples/spiffe that runs.
type example struct {
	out, errs harness.Output
	ended     chan error // has one
}

// TestExamples: the programs of examples/spiffe do what their READMEs say, built and
// called as it is written there, as the workloads that are written there, each as a
// server and as a client of each other, and for longer than any certificate lives. A
// client that wants another server, and a server that wants another client, refuse.
func TestExamples(t *testing.T) {
	const life = 10 * time.Second
	at, err := installed()
	if err != nil {
		t.Fatal(err)
	}
	dir := publicDir(t)
	languages := []string{"go", "java", "python", "rust"}
	recipes := map[string]*recipe{}
	for _, l := range languages {
		recipes[l] = readRecipe(t, l, at, dir)
	}

	// The two workloads, and the users that they are.
	entries := block(t, filepath.Join(examples, "README.md"), "yaml", 0)
	uids := map[string]uint32{}
	for _, e := range regexp.MustCompile(`serviceAccount: (\w+), attest: {uid: (\d+)}`).FindAllStringSubmatch(entries, -1) {
		uid, err := strconv.ParseUint(e[2], 10, 32)
		if err != nil {
			t.Fatal(err)
		}
		uids[e[1]] = uint32(uid)
	}
	if len(uids) != 2 || uids["ledger"] == 0 || uids["billing"] == 0 {
		t.Fatalf("the README's workloads are %v", uids)
	}
	billing := spiffeid.RequireFromString(recipes["go"].serve[len(recipes["go"].serve)-1])
	nobody := spiffeid.RequireFromPath(billing.TrustDomain(), "/ns/pay/sa/nobody").String()
	m := harness.Start(t, harness.Options{Dir: dir, Documents: map[string]string{
		"entries.yaml": entries,
		"mesh.yaml":    harness.ConfigOf(billing.TrustDomain().Name(), life.String()) + harness.Namespace("pay", "enforce"),
	}})
	// run starts a program, as a workload, until the test ends.
	run := func(t *testing.T, language, as string, argv []string) *example {
		t.Helper()
		ctx, cancel := context.WithTimeout(context.Background(), 3*time.Minute)
		c := command(ctx, m, uids[as], argv...)
		e := &example{ended: make(chan error, 1)}
		c.Dir, c.Stdout, c.Stderr = recipes[language].dir, &e.out, &e.errs
		c.Env = append(c.Env, "JAVA_TOOL_OPTIONS=-XX:TieredStopAtLevel=1 -XX:+UseSerialGC -Xmx128m") // many at a time
		if err := c.Start(); err != nil {
			cancel()
			t.Fatal(err)
		}
		done := make(chan struct{})
		go func() { defer close(done); e.ended <- c.Wait() }()
		t.Cleanup(func() { cancel(); <-done })
		return e
	}
	serve := func(t *testing.T, language string) *example {
		t.Helper()
		return run(t, language, "ledger", with(recipes[language].serve, "127.0.0.1:0", ""))
	}

	servers, addresses := map[string]*example{}, map[string]string{}
	for _, l := range languages {
		servers[l] = serve(t, l)
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
				l + " calls a server that is another": run(t, l, "billing", with(recipes[l].call, addresses["go"], nobody)),
				"another client calls " + l:           run(t, "go", "ledger", with(recipes["go"].call, addresses[l], "")),
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
				running[[2]string{client, server}] = run(t, client, "billing", with(recipes[client].call, addresses[server], ""))
			}
		}
		for _, client := range languages {
			for _, server := range languages {
				t.Run(client+" calls "+server, func(t *testing.T) {
					e := running[[2]string{client, server}]
					hello := "hello " + billing.String() + "\n"
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
