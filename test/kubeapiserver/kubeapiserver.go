// Package kubeapiserver runs a real kube-apiserver with its etcd, on loopback and
// without anything else of a cluster, for tests of what only it can answer.
package kubeapiserver

import (
	"bytes"
	"context"
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"fmt"
	"math/big"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"k8s.io/client-go/rest"
)

// Admin may do everything.
const Admin = "admin"

// Server is a running API server.
type Server struct {
	host string
	ca   []byte
}

// Token is the bearer token of a user.
func Token(user string) string { return "token-" + user }

// Config returns how to reach the server as a user that Start was told of. The
// caller owns it.
func (s *Server) Config(user string) *rest.Config {
	return &rest.Config{
		Host: s.host, BearerToken: Token(user), QPS: -1,
		TLSClientConfig: rest.TLSClientConfig{CAData: s.ca},
	}
}

// program finds a program of Kubernetes. A machine without it fails the test:
// what is checked here is checked nowhere else.
func program(t *testing.T, name string) string {
	t.Helper()
	dir := os.Getenv("SIGNET_KUBE_BIN")
	if dir == "" {
		dir = filepath.Join("..", "..", ".tools", "kubernetes", "bin")
	}
	path, err := filepath.Abs(filepath.Join(dir, name))
	if err != nil {
		t.Fatal(err)
	}
	if _, err := os.Stat(path); err != nil {
		t.Fatalf("%s is needed: run the tests with make test, or set SIGNET_KUBE_BIN to the folder that has it: %v", name, err)
	}
	return path
}

// Start returns when the server is ready. Beside Admin it knows the given users,
// who may do nothing until they are given a role. It ends with the test.
func Start(t *testing.T, users ...string) *Server {
	t.Helper()
	etcd, server := program(t, "etcd"), program(t, "kube-apiserver")
	dir := t.TempDir()
	at := func(name string) string { return filepath.Join(dir, name) }
	ports := freePorts(t, 3)
	url := func(i int) string { return fmt.Sprintf("http://127.0.0.1:%d", ports[i]) }
	ca := writeKeys(t, at("server.crt"), at("server.key"))

	var tokens strings.Builder
	for _, user := range append([]string{Admin}, users...) {
		group := ""
		if user == Admin {
			group = "system:masters"
		}
		fmt.Fprintf(&tokens, "%s,%s,%s,%q\n", Token(user), user, user, group)
	}
	if err := os.WriteFile(at("tokens.csv"), []byte(tokens.String()), 0o600); err != nil {
		t.Fatal(err)
	}

	start(t, etcd, "--data-dir", at("etcd"), "--unsafe-no-fsync",
		"--listen-client-urls", url(0), "--advertise-client-urls", url(0),
		"--listen-peer-urls", url(1), "--initial-advertise-peer-urls", url(1), "--initial-cluster", "default="+url(1))
	log := start(t, server, "--etcd-servers", url(0),
		"--bind-address", "127.0.0.1", "--advertise-address", "192.0.2.1", "--endpoint-reconciler-type", "none", "--secure-port", fmt.Sprint(ports[2]),
		"--tls-cert-file", at("server.crt"), "--tls-private-key-file", at("server.key"), "--cert-dir", dir,
		"--service-account-key-file", at("server.key"), "--service-account-signing-key-file", at("server.key"),
		"--service-account-issuer", "https://kubernetes.default.svc", "--service-cluster-ip-range", "10.96.0.0/16",
		"--token-auth-file", at("tokens.csv"), "--authorization-mode", "RBAC",
		// Nothing runs that would make the accounts that pods need.
		"--disable-admission-plugins", "ServiceAccount")

	s := &Server{host: fmt.Sprintf("https://127.0.0.1:%d", ports[2]), ca: ca}
	config := s.Config(Admin)
	config.Timeout = 5 * time.Second
	client, err := rest.HTTPClientFor(config)
	if err != nil {
		t.Fatal(err)
	}
	Eventually(t, time.Minute, func() error {
		r, err := client.Get(s.host + "/readyz")
		if err != nil {
			return fmt.Errorf("%w\n%s", err, log.Tail())
		}
		r.Body.Close()
		if r.StatusCode != http.StatusOK {
			return fmt.Errorf("readyz: %s\n%s", r.Status, log.Tail())
		}
		return nil
	})
	return s
}

// Eventually tries until try succeeds, and fails the test with its last error.
func Eventually(t *testing.T, limit time.Duration, try func() error) {
	t.Helper()
	deadline := time.Now().Add(limit)
	for {
		err := try()
		if err == nil {
			return
		}
		if time.Now().After(deadline) {
			t.Fatalf("after %v: %v", limit, err)
		}
		time.Sleep(100 * time.Millisecond)
	}
}

// Output keeps what a program prints. It is safe for concurrent use.
type Output struct {
	mu  sync.Mutex
	buf bytes.Buffer // guarded by mu
}

// Write implements io.Writer.
func (o *Output) Write(b []byte) (int, error) {
	o.mu.Lock()
	defer o.mu.Unlock()
	return o.buf.Write(b)
}

// Tail returns the newest 4000 bytes.
func (o *Output) Tail() string {
	o.mu.Lock()
	defer o.mu.Unlock()
	b := o.buf.Bytes()
	return string(b[max(0, len(b)-4000):])
}

// start runs a program until the test ends.
func start(t *testing.T, path string, args ...string) *Output {
	t.Helper()
	out := &Output{}
	ctx, cancel := context.WithCancel(context.Background())
	cmd := exec.CommandContext(ctx, path, args...)
	cmd.Stdout, cmd.Stderr = out, out
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 10 * time.Second
	cmd.SysProcAttr = &syscall.SysProcAttr{Pdeathsig: syscall.SIGKILL}
	if err := cmd.Start(); err != nil {
		cancel()
		t.Fatal(err)
	}
	t.Cleanup(func() {
		cancel()
		_ = cmd.Wait() // it was told to end; how does not matter
		if t.Failed() {
			t.Logf("%s:\n%s", filepath.Base(path), out.Tail())
		}
	})
	return out
}

func freePorts(t *testing.T, n int) []int {
	t.Helper()
	ports := make([]int, n)
	for i := range ports {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		defer l.Close()
		ports[i] = l.Addr().(*net.TCPAddr).Port
	}
	return ports
}

// writeKeys writes a certificate for 127.0.0.1 that is its own authority.
func writeKeys(t *testing.T, certFile, keyFile string) []byte {
	t.Helper()
	key, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "kube-apiserver"},
		NotBefore: time.Now().Add(-time.Hour), NotAfter: time.Now().Add(24 * time.Hour),
		IPAddresses: []net.IP{net.IPv4(127, 0, 0, 1)}, ExtKeyUsage: []x509.ExtKeyUsage{x509.ExtKeyUsageServerAuth},
		KeyUsage: x509.KeyUsageDigitalSignature | x509.KeyUsageCertSign, IsCA: true, BasicConstraintsValid: true,
	}
	der, err := x509.CreateCertificate(rand.Reader, template, template, &key.PublicKey, key)
	if err != nil {
		t.Fatal(err)
	}
	private, err := x509.MarshalECPrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	cert := pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})
	for file, data := range map[string][]byte{
		certFile: cert, keyFile: pem.EncodeToMemory(&pem.Block{Type: "EC PRIVATE KEY", Bytes: private}),
	} {
		if err := os.WriteFile(file, data, 0o600); err != nil {
			t.Fatal(err)
		}
	}
	return cert
}
