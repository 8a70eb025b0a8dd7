package e2e

import (
	"bufio"
	"bytes"
	"context"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/test/harness"
)

// everyonesDir is a folder to which every user has a way.
func everyonesDir(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("/run", "sdk-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	if err := os.Chmod(dir, 0o711); err != nil {
		t.Fatal(err)
	}
	return dir
}

// TestSDKExample: examples/sdk does what its comment says, as two workloads that
// are two users.
func TestSDKExample(t *testing.T) {
	dir := everyonesDir(t)
	exe := filepath.Join(dir, "sdk")
	if out, err := exec.Command("go", "build", "-buildvcs=false", "-o", exe, "../../examples/sdk").CombinedOutput(); err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	var documents strings.Builder
	documents.WriteString(harness.Config("1h") + harness.Namespace("shop", "enforce"))
	uids := map[string]uint32{"ledger": 61101, "billing": 61102, "other": 61103}
	for name, uid := range uids {
		documents.WriteString(harness.Program("shop", name, int(uid), exe))
	}
	m := harness.Start(t, harness.Options{Dir: dir, Documents: map[string]string{"mesh.yaml": documents.String()}})
	ctx, cancel := context.WithTimeout(t.Context(), 60*time.Second)
	defer cancel()
	command := func(as string, args ...string) *exec.Cmd {
		c := exec.CommandContext(ctx, exe, args...)
		c.Dir, c.Env = "/", []string{"SPIFFE_ENDPOINT_SOCKET=unix://" + filepath.Join(m.RunDir, "api", "agent.sock")}
		c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uids[as], Gid: uids[as]}}
		c.Stderr = &bytes.Buffer{}
		return c
	}
	for kind, want := range map[string]string{"": "hello " + sa("billing") + "\n", "-http": "hello " + sa("billing") + "\n", "-grpc": "SERVING\n"} {
		t.Run("serve"+kind, func(t *testing.T) {
			server := command("ledger", "serve"+kind, "127.0.0.1:0")
			out, err := server.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := server.Start(); err != nil {
				t.Fatal(err)
			}
			lines := bufio.NewReader(out)
			line, err := lines.ReadString('\n')
			if err != nil {
				t.Fatalf("%v: %s", err, server.Stderr)
			}
			id, address, _ := strings.Cut(strings.TrimSpace(line), " listens on ")
			if id != sa("ledger") {
				t.Fatalf("the server says %q", line)
			}
			_, text, err := net.SplitHostPort(address)
			if err != nil {
				t.Fatal(err)
			}
			port, err := strconv.Atoi(text)
			if err != nil {
				t.Fatal(err)
			}
			m.Edit("mesh.yaml", documents.String()+harness.Allow("shop", "billing-to-ledger", "ledger", []int{port}, "billing"))
			call := func(as string) (string, error) {
				c := command(as, "call"+kind, address, id)
				got, err := c.Output()
				return string(got) + fmt.Sprint(c.Stderr), err
			}
			m.Eventually(10*time.Second, "the policy to be in force", func() error {
				got, err := call("billing")
				if err == nil && got != want {
					err = fmt.Errorf("the client prints %q", got)
				}
				return err
			})
			refused := "refused by the destination"
			if kind == "-grpc" {
				refused = "Unavailable" // gRPC may notice that it cannot write before it reads why
			}
			if got, err := call("other"); err == nil || !strings.Contains(got, refused) {
				t.Errorf("whom no policy names: %q, %v", got, err)
			}
			if err := server.Process.Signal(syscall.SIGTERM); err != nil {
				t.Fatal(err)
			}
			more, err := io.ReadAll(lines)
			if err != nil || kind == "-grpc" && string(more) != "hello "+sa("billing")+"\n" {
				t.Errorf("the server says %q, %v", more, err)
			}
			if err := server.Wait(); err != nil {
				t.Errorf("the server ended with %v: %s", err, server.Stderr)
			}
		})
	}
}

// TestSDKReadme: the commands of examples/sdk/README.md, with its documents, print what
// it says: two programs with the SDK, one with it and a server that speaks no TLS, and
// a client that speaks none and one with it.
func TestSDKReadme(t *testing.T) {
	page, err := os.ReadFile("../../examples/sdk/README.md")
	if err != nil {
		t.Fatal(err)
	}
	blocks := regexp.MustCompile("(?ms)^```([a-z]*)\n(.*?)^```$").FindAllStringSubmatch(string(page), -1)
	var documents strings.Builder
	for _, b := range blocks {
		if b[1] == "yaml" {
			documents.WriteString(b[2])
		}
	}
	dir := everyonesDir(t)
	m := harness.Start(t, harness.Options{Dir: dir, Pods: map[string]string{"web": "10.88.0.20", "batch": "10.88.0.21"}, Documents: map[string]string{"mesh.yaml": documents.String()}})
	startNginx(t, m.Pod("web"))
	ctx, cancel := context.WithTimeout(context.WithoutCancel(t.Context()), 2*time.Minute) // programs end in the clean-up
	t.Cleanup(cancel)
	user := regexp.MustCompile(`# as user (\d+)\n$`)
	ran := 0
	for i, b := range blocks {
		if b[1] != "sh" {
			continue
		}
		ran++
		c := exec.CommandContext(ctx, "sh", "-c", "exec "+b[2])
		c.Dir, c.Stderr, c.WaitDelay = dir, os.Stderr, 5*time.Second
		c.Env = append(os.Environ(), "SPIFFE_ENDPOINT_SOCKET=unix://"+filepath.Join(m.RunDir, "api", "agent.sock"))
		if as := user.FindStringSubmatch(b[2]); as != nil {
			uid, err := strconv.ParseUint(as[1], 10, 32)
			if err != nil {
				t.Fatal(err)
			}
			c.SysProcAttr = &syscall.SysProcAttr{Credential: &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid)}}
		}
		switch {
		case strings.HasPrefix(b[2], "go build -o sdk "):
			c = exec.CommandContext(ctx, "go", "build", "-buildvcs=false", "-o", filepath.Join(dir, "sdk"), "../../"+strings.TrimSpace(strings.TrimPrefix(b[2], "go build -o sdk ")))
			if out, err := c.CombinedOutput(); err != nil {
				t.Fatalf("%s: %v\n%s", b[2], err, out)
			}
		case strings.HasPrefix(b[2], "./sdk serve"):
			out, err := c.StdoutPipe()
			if err != nil {
				t.Fatal(err)
			}
			if err := c.Start(); err != nil {
				t.Fatal(err)
			}
			t.Cleanup(func() {
				_ = c.Process.Signal(syscall.SIGTERM)
				if err := c.Wait(); err != nil {
					t.Errorf("%s ended with %v", b[2], err)
				}
			})
			if line, err := bufio.NewReader(out).ReadString('\n'); err != nil || !strings.Contains(line, " listens on ") {
				t.Fatalf("the server says %q, %v", line, err)
			}
		default:
			if got, err := c.Output(); err != nil || string(got) != blocks[i+1][2] {
				t.Errorf("%s: %v, %q; the page has %q", b[2], err, got, blocks[i+1][2])
			}
		}
	}
	if ran != 5 {
		t.Errorf("%d commands were found", ran)
	}
}
