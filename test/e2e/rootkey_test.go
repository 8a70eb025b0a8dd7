package e2e

import (
	"bytes"
	"context"
	"crypto"
	"crypto/x509"
	"encoding/pem"
	"errors"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	adminv1 "github.com/signet-mesh/signet/api/admin/v1"
	"github.com/signet-mesh/signet/internal/control"
	"github.com/signet-mesh/signet/test/harness"
)

const (
	softHSM  = "/usr/lib/softhsm/libsofthsm2.so"
	tokenPIN = "4711-right"
)

// newToken makes a SoftHSM with a token, and returns the URI for --root-key, the
// folder, and what another program lists in the token.
func newToken(t *testing.T) (uri, dir string, list func(what string) string) {
	t.Helper()
	dir = scratch(t)
	store := filepath.Join(dir, "tokens")
	if err := os.Mkdir(store, 0o700); err != nil {
		t.Fatal(err)
	}
	put(t, filepath.Join(dir, "softhsm2.conf"), "directories.tokendir = "+store+"\nobjectstore.backend = file\nlog.level = ERROR\n")
	t.Setenv("SOFTHSM2_CONF", filepath.Join(dir, "softhsm2.conf"))
	tool := func(name string, args ...string) string {
		out, err := exec.CommandContext(t.Context(), program(t, name), args...).CombinedOutput()
		if err != nil {
			t.Fatalf("%s %v: %v\n%s", name, args, err, out)
		}
		return string(out)
	}
	tool("softhsm2-util", "--init-token", "--free", "--label", "mesh", "--so-pin", "so-"+tokenPIN, "--pin", tokenPIN)
	put(t, filepath.Join(dir, "pin"), tokenPIN+"\n")
	return "pkcs11:token=mesh?module-path=" + softHSM + "&pin-source=" + filepath.Join(dir, "pin"), dir, func(what string) string {
		return tool("pkcs11-tool", "--module", softHSM, "--token-label", "mesh", "--login", "--pin", tokenPIN, "--list-objects", "--type", what)
	}
}

// TestRootKeyInToken: the root's key is made in a token and stays there. A restart
// keeps the root, a rotation makes a key for the next one, calls all the while, and
// destroys the old one's; nothing on the disk holds the key of a root, or the PIN.
func TestRootKeyInToken(t *testing.T) {
	uri, _, list := newToken(t)
	dir := scratch(t)
	start := func(args ...string) *harness.Mesh {
		m := harness.Start(t, harness.Options{
			Pods: map[string]string{"red": "10.88.0.10", "blue": "10.88.0.11", "server": "10.88.0.12"}, Dir: dir, Args: args,
			Documents: map[string]string{"mesh.yaml": harness.Config("8s") + harness.Namespace("shop", "enforce") +
				harness.Workload("shop", "red", "10.88.0.10") + harness.Workload("shop", "blue", "10.88.0.11") +
				harness.Workload("shop", "server", "10.88.0.12") +
				harness.Allow("shop", "allow", "server", []int{8080}, "red", "blue")},
		})
		serve(t, m.Pod("server"), ":8080", echo)
		return m
	}
	root := func(m *harness.Mesh) *x509.Certificate {
		t.Helper()
		text, err := os.ReadFile(control.RootFile(m.StateDir))
		if err != nil {
			t.Fatal(err)
		}
		block, _ := pem.Decode(text)
		c, err := x509.ParseCertificate(block.Bytes)
		if err != nil {
			t.Fatal(err)
		}
		return c
	}
	keys := func(want int) {
		t.Helper()
		if seen := list("privkey"); strings.Count(seen, "Private Key Object") != want || strings.Count(seen, "never extractable") != want {
			t.Errorf("the token holds, instead of %d keys:\n%s", want, seen)
		}
	}

	m := start("--root-key", uri)
	first := root(m)
	keys(1)
	m.Kill("control")
	m.Eventually(20*time.Second, "the control plane to be back", func() error { _, err := m.Client.ControlStatus(t.Context()); return err })
	if err := callEcho(t.Context(), m.Pod("red"), serverAt); err != nil {
		t.Error(err)
	}
	if !root(m).Equal(first) {
		t.Error("a restart made another root")
	}
	keys(1)
	notOnDisk(t, m, first)
	if out, code := m.CLI("ca", "status", "-o", "wide"); code != 0 || !strings.Contains(out, "pkcs11:id=%") {
		t.Errorf("signet ca status: %d\n%s", code, out)
	}

	// A rotation under load.
	loaded, enough := context.WithTimeout(t.Context(), 2*time.Minute)
	defer enough()
	done := make(chan struct{})
	go func() { defer close(done); underLoad(loaded, t, m) }()
	defer func() { enough(); <-done }()
	began := time.Now()
	s, err := m.Client.RotateRoot(t.Context(), false)
	if err != nil {
		t.Fatal(err)
	}
	if s.Stage != adminv1.RotationPublishing {
		t.Errorf("the rotation is %s", s.Stage)
	}
	keys(2)
	m.Eventually(time.Minute, "the old root's key to be destroyed", func() error {
		if s, err = m.Client.Authority(t.Context()); err == nil && s.Stage == adminv1.RotationPublishing {
			err = errors.New(string(s.Stage))
		}
		return err
	})
	keys(1)
	m.Eventually(time.Minute, "the old root to be withdrawn", func() error {
		if s, err = m.Client.Authority(t.Context()); err == nil && s.Stage != adminv1.RotationIdle {
			err = errors.New(string(s.Stage))
		}
		return err
	})
	t.Logf("the rotation took %s", time.Since(began).Round(10*time.Millisecond))
	enough()
	<-done
	second := root(m)
	if second.Equal(first) || bytes.Equal(second.RawSubjectPublicKeyInfo, first.RawSubjectPublicKeyInfo) {
		t.Error("the root, or its key, is the same after the rotation")
	}
	notOnDisk(t, m, first, second)
	if strings.Contains(m.Log(), tokenPIN) {
		t.Error("the PIN is in the log")
	}

	// Without the token's name nothing takes the key's place.
	if err := callEcho(t.Context(), m.Pod("blue"), serverAt); err != nil {
		t.Error(err)
	}
	m.Stop()
	out, err := upOnce(t, m, "")
	if err == nil || !strings.Contains(out, "name the token with --root-key") {
		t.Errorf("without --root-key: %v\n%s", err, out)
	}
}

// notOnDisk fails if the private key of a root, or the PIN, is anywhere in the
// mesh's state.
func notOnDisk(t *testing.T, m *harness.Mesh, roots ...*x509.Certificate) {
	t.Helper()
	files, privates := 0, 0
	err := filepath.WalkDir(m.StateDir, func(path string, d fs.DirEntry, err error) error {
		if err != nil || !d.Type().IsRegular() {
			return err
		}
		text, err := os.ReadFile(path)
		if err != nil {
			return err
		}
		files++
		if bytes.Contains(text, []byte(tokenPIN)) {
			t.Errorf("%s holds the PIN", path)
		}
		for rest := text; ; {
			var block *pem.Block
			if block, rest = pem.Decode(rest); block == nil {
				return nil
			}
			if !strings.Contains(block.Type, "PRIVATE KEY") {
				continue
			}
			privates++
			key, err := x509.ParsePKCS8PrivateKey(block.Bytes)
			if err != nil {
				return err
			}
			public := key.(crypto.Signer).Public().(interface{ Equal(crypto.PublicKey) bool })
			for _, root := range roots {
				if public.Equal(root.PublicKey) {
					t.Errorf("%s holds the key of the root %s", path, root.Subject)
				}
			}
		}
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) { // a file may go meanwhile
		t.Fatal(err)
	}
	if files < 5 || privates == 0 {
		t.Errorf("%d files with %d private keys were looked at, not even that of the intermediate", files, privates)
	}
}

// upOnce runs `signet up` on the directories of a mesh for as long as it wants to,
// up to 15 s, and returns what it wrote.
func upOnce(t *testing.T, m *harness.Mesh, rootKey string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 15*time.Second)
	defer cancel()
	args := []string{"up", "-c", m.Dir, "--run-dir", m.RunDir, "--state-dir", m.StateDir, "--node", m.Node, "--envoy", harness.Envoy(t)}
	if rootKey != "" {
		args = append(args, "--root-key", rootKey)
	}
	cmd := exec.CommandContext(ctx, harness.Bin("signet"), args...)
	cmd.Cancel = func() error { return cmd.Process.Signal(os.Interrupt) }
	cmd.WaitDelay = 20 * time.Second
	out, err := cmd.CombinedOutput()
	return string(out), errors.Join(err, ctx.Err())
}

// TestRootKeyWrongPIN: `signet up` with a wrong PIN ends with a message, and does not
// bring the control plane back to try it again; neither does who brings back
// `signet up`. Every call of the token's library is recorded on its way.
func TestRootKeyWrongPIN(t *testing.T) {
	uri, dir, _ := newToken(t)
	spies, err := filepath.Glob("/usr/lib/*/pkcs11/pkcs11-spy.so")
	if err != nil || len(spies) == 0 {
		t.Fatalf("pkcs11-spy.so is not installed: run `make deps-debian` (%v)", err)
	}
	calls := filepath.Join(dir, "calls")
	t.Setenv("PKCS11SPY", softHSM)
	t.Setenv("PKCS11SPY_OUTPUT", calls)
	put(t, filepath.Join(dir, "pin"), "0000-wrong\n")
	base := scratch(t)
	m := &harness.Mesh{Dir: filepath.Join(base, "docs"), RunDir: filepath.Join(base, "run"), StateDir: filepath.Join(base, "state"), Node: "n1"}
	put(t, filepath.Join(m.Dir, "mesh.yaml"), harness.Config("8s")+harness.Namespace("shop", "enforce"))
	for i, want := range []string{"the token refuses the PIN in", "was refused at", "was refused at"} {
		out, err := upOnce(t, m, strings.Replace(uri, softHSM, spies[0], 1))
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(out, want) || !strings.Contains(out, "signet: control has ended with status 78") {
			t.Errorf("start %d: %v, without %q:\n%s", i+1, err, want, out)
		}
		if n := strings.Count(out, `msg="process started" process=control`); n != 1 {
			t.Errorf("start %d: the control plane was started %d times", i+1, n)
		}
		if strings.Contains(out, "0000-wrong") {
			t.Errorf("start %d: the PIN is in the output:\n%s", i+1, out)
		}
	}
	if n := lines(t, calls, "C_Login"); n != 1 {
		t.Errorf("the wrong PIN reached the token %d times", n)
	}
}
