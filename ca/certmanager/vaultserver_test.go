//go:build interop

package certmanager_test

import (
	"bytes"
	"context"
	"crypto/tls"
	"crypto/x509"
	"encoding/json"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync/atomic"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/test/kubeapiserver"
)

// vaultRoot is the token that may do everything in a test's Vault.
const vaultRoot = "root-of-a-test"

// vault is a real Vault in development mode: in memory, unsealed, on loopback, with TLS.
type vault struct {
	t       *testing.T
	address string
	dir     string // holds the program by the name vault, and is its home
	ca      []byte // who certified its TLS, PEM
	client  *http.Client
	stop    func()
}

// startVault starts the program that VAULT names. It ends with the test, or before.
func startVault(t *testing.T) *vault {
	t.Helper()
	program := os.Getenv("VAULT")
	if info, err := os.Stat(program); err != nil || !filepath.IsAbs(program) || info.IsDir() || info.Mode()&0o111 == 0 {
		t.Fatalf("VAULT is %q, and must be the path of HashiCorp Vault's program (%v). Run this as: make interop VAULT=/path/to/vault", program, err)
	}
	l, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	listen := l.Addr().String()
	l.Close()
	v := &vault{t: t, address: "https://" + listen, dir: t.TempDir()}
	if err := os.Symlink(program, filepath.Join(v.dir, "vault")); err != nil {
		t.Fatal(err)
	}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, program, "server", "-dev", "-dev-tls", "-dev-tls-cert-dir="+v.dir, "-dev-no-store-token",
		"-dev-root-token-id="+vaultRoot, "-dev-listen-address="+listen)
	var said kubeapiserver.Output
	cmd.Env, cmd.Stdout, cmd.Stderr = []string{"HOME=" + v.dir, "PATH=" + os.Getenv("PATH")}, &said, &said
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	done := make(chan struct{})
	go func() {
		_ = cmd.Wait() // it is killed
		close(done)
	}()
	v.stop = func() { cancel(); <-done }
	t.Cleanup(func() {
		v.stop()
		if t.Failed() {
			t.Logf("vault:\n%s", said.Tail())
		}
	})
	eventually(t, time.Minute, func() (err error) {
		if v.ca, err = os.ReadFile(filepath.Join(v.dir, "vault-ca.pem")); err != nil {
			return fmt.Errorf("%w\n%s", err, said.Tail())
		}
		pool := x509.NewCertPool()
		pool.AppendCertsFromPEM(v.ca)
		v.client = &http.Client{Timeout: 20 * time.Second, Transport: &http.Transport{TLSClientConfig: &tls.Config{RootCAs: pool}}}
		_, err = v.try(vaultRoot, "sys/mounts", nil)
		return err
	})
	t.Cleanup(v.client.CloseIdleConnections)
	return v
}

// try reads a path of the API, or writes to it when there is a body, and returns the
// answer's data.
func (v *vault) try(token, path string, body any) (map[string]any, error) {
	method, text := http.MethodGet, []byte(nil)
	if body != nil {
		var err error
		if text, err = json.Marshal(body); err != nil {
			return nil, err
		}
		method = http.MethodPost
	}
	req, err := http.NewRequestWithContext(v.t.Context(), method, v.address+"/v1/"+path, bytes.NewReader(text))
	if err != nil {
		return nil, err
	}
	req.Header.Set("X-Vault-Token", token)
	resp, err := v.client.Do(req)
	if err != nil {
		return nil, err
	}
	defer resp.Body.Close()
	answer, err := io.ReadAll(resp.Body)
	if err != nil {
		return nil, err
	}
	if resp.StatusCode >= http.StatusMultipleChoices {
		return nil, fmt.Errorf("vault: %s %s: %s: %s", method, path, resp.Status, answer)
	}
	var got struct {
		Data map[string]any
		Auth struct {
			Token string `json:"client_token"`
		}
	}
	if len(answer) > 0 {
		if err := json.Unmarshal(answer, &got); err != nil {
			return nil, err
		}
	}
	if got.Auth.Token != "" {
		got.Data = map[string]any{"token": got.Auth.Token}
	}
	return got.Data, nil
}

// do writes as who may do everything.
func (v *vault) do(path string, body any) map[string]any {
	v.t.Helper()
	got, err := v.try(vaultRoot, path, body)
	if err != nil {
		v.t.Fatal(err)
	}
	return got
}

// token makes one that a policy is all of.
func (v *vault) token(policy string) string {
	v.t.Helper()
	return v.do("auth/token/create", map[string]any{"policies": []string{policy}, "no_default_policy": true, "no_parent": true})["token"].(string)
}

// shell runs commands as a person would who may do everything.
func (v *vault) shell(commands string) {
	v.t.Helper()
	cmd := exec.CommandContext(v.t.Context(), "sh", "-eux", "-c", commands)
	cmd.Env = []string{"HOME=" + v.dir, "PATH=" + v.dir + ":" + os.Getenv("PATH"), "VAULT_ADDR=" + v.address, "VAULT_TOKEN=" + vaultRoot, "VAULT_CACERT=" + filepath.Join(v.dir, "vault-ca.pem")}
	if out, err := cmd.CombinedOutput(); err != nil {
		v.t.Fatalf("%v\n%s", err, out)
	}
}

// examples returns what docs/cert-manager.md has users run and apply for Vault, in
// their order: what they read is what is tested.
func examples(t *testing.T, language string) (out []string) {
	t.Helper()
	text, err := os.ReadFile("../../docs/cert-manager.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(text), "\n## HashiCorp Vault\n")
	section, _, ended := strings.Cut(section, "\n## ")
	if !found || !ended {
		t.Fatal("docs/cert-manager.md has no section HashiCorp Vault")
	}
	for i, block := range strings.Split(section, "\n```") {
		if kind, body, _ := strings.Cut(block, "\n"); i%2 == 1 && kind == language {
			out = append(out, body)
		}
	}
	return out
}

// instead replaces, in an example, what stands for the reader's own.
func instead(t *testing.T, text string, pairs ...string) string {
	t.Helper()
	for i := 0; i < len(pairs); i += 2 {
		if !strings.Contains(text, pairs[i]) {
			t.Fatalf("no %q in\n%s", pairs[i], text)
		}
		text = strings.ReplaceAll(text, pairs[i], pairs[i+1])
	}
	return text
}

// secondRoot replaces Vault's root, and waits until the authority, which is told to
// want another intermediate, publishes it.
func (v *vault) secondRoot(a *ca.Authority, due *atomic.Bool) {
	v.t.Helper()
	v.shell(examples(v.t, "sh")[1])
	due.Store(true)
	eventually(v.t, time.Minute, func() error {
		if n := len(a.Roots()); n != 2 {
			return fmt.Errorf("%d roots; %+v", n, a.Roots())
		}
		return nil
	})
	due.Store(false)
}
