package e2e

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffeid"
	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"

	"github.com/signet-mesh/signet/ca"
	"github.com/signet-mesh/signet/test/harness"
)

// A real nginx speaks mutual TLS with the files of `signet svid files`, which
// renews them every few seconds and has nginx reload: no connection fails, new
// ones get the new certificates, and a client of another authority gets nothing.
// When the identity is taken away, the files go with the certificate's life.
func TestSVIDFiles(t *testing.T) {
	exe, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	entry := func(name, path string) string {
		return harness.Program("shop", name, os.Geteuid(), path)
	}
	base := harness.Config("8s") + harness.Namespace("shop", "enforce") + entry("app", exe)
	m := harness.Start(t, harness.Options{
		Pods:      map[string]string{"web": "10.88.0.20", "client": "10.88.0.21"},
		Documents: map[string]string{"mesh.yaml": base + entry("web", harness.Bin("signet"))},
	})
	dir := scratch(t)
	files := filepath.Join(dir, "tls")
	nginxPID := filepath.Join(dir, "nginx.pid")

	// The first files before nginx starts, as an init container would.
	endpoint := "unix://" + filepath.Join(m.RunDir, "api", "agent.sock")
	if out, code := m.CLI("svid", "files", files, "--once", "--endpoint", endpoint); code != 0 {
		t.Fatalf("svid files --once: %d\n%s", code, out)
	}
	if info, err := os.Stat(filepath.Join(files, "tls.key")); err != nil || info.Mode().Perm() != 0o600 {
		t.Fatalf("the key's file: %v, %v", info, err)
	}
	nginx(t, m.Pod("web"), dir, strings.NewReplacer("FILES", files).Replace(`listen 8443 ssl;
		ssl_certificate FILES/tls.crt;
		ssl_certificate_key FILES/tls.key;
		ssl_client_certificate FILES/ca.crt;
		ssl_verify_client on;
		ssl_verify_depth 3;`))
	helper := exec.CommandContext(t.Context(), harness.Bin("signet"), "svid", "files", files, "--endpoint", endpoint, "--signal", "hup", "--pid-file", nginxPID)
	said := &strings.Builder{}
	helper.Stderr = said
	helper.Cancel = func() error { return helper.Process.Signal(syscall.SIGTERM) }
	if err := helper.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- helper.Wait() }()
	t.Cleanup(func() {
		<-ended
		if t.Failed() {
			t.Logf("signet svid files wrote:\n%s", said)
		}
	})

	source, err := workloadapi.NewX509Source(t.Context(), workloadapi.WithClientOptions(workloadapi.WithAddr(endpoint)))
	if err != nil {
		t.Fatal(err)
	}
	defer source.Close()
	web := spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/web")
	get := func(cfg *tls.Config) (serial string, code int, err error) {
		transport := &http.Transport{DisableKeepAlives: true, TLSClientConfig: cfg, DialContext: m.Pod("client").Dial}
		resp, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get("https://10.88.0.20:8443/")
		if err != nil {
			return "", 0, err
		}
		defer resp.Body.Close()
		if _, err := io.Copy(io.Discard, resp.Body); err != nil {
			return "", 0, err
		}
		return resp.TLS.PeerCertificates[0].SerialNumber.String(), resp.StatusCode, nil
	}
	var mu sync.Mutex
	serials, n := map[string]bool{}, 0
	ctx, enough := context.WithTimeout(t.Context(), 25*time.Second)
	defer enough()
	var wg sync.WaitGroup
	for range 4 {
		wg.Go(func() {
			for ctx.Err() == nil {
				serial, code, err := get(tlsconfig.MTLSClientConfig(source, source, tlsconfig.AuthorizeID(web)))
				mu.Lock()
				n++
				if serials[serial] = true; err != nil || code != http.StatusOK {
					t.Errorf("connection %d: %d, %v", n, code, err)
				}
				mu.Unlock()
				time.Sleep(20 * time.Millisecond)
			}
		})
	}
	wg.Wait()
	t.Logf("%d connections, 0 failed; nginx showed %d certificates", n, len(serials))
	if len(serials) < 4 {
		t.Errorf("nginx showed %d certificates in 25 s, want at least 4 of 8 s", len(serials))
	}

	// nginx answers 400 to whoever shows a certificate that it does not accept.
	foreign, err := ca.Open(ca.Options{Dir: filepath.Join(t.TempDir(), "ca"), TrustDomain: web.TrustDomain(), Log: slog.New(slog.DiscardHandler)})
	if err != nil {
		t.Fatal(err)
	}
	defer foreign.Close()
	forged, err := foreign.ServerCertificate(spiffeid.RequireFromString("spiffe://mesh.test/ns/shop/sa/app"), time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	cfg := tlsconfig.TLSClientConfig(source, tlsconfig.AuthorizeID(web))
	cfg.GetClientCertificate = func(*tls.CertificateRequestInfo) (*tls.Certificate, error) { return forged.Get() }
	if _, code, err := get(cfg); err != nil || code != http.StatusBadRequest {
		t.Errorf("a client of another authority: %d, %v; want 400", code, err)
	}

	m.Edit("mesh.yaml", base)
	m.Eventually(20*time.Second, "the files to go with the certificate's life", func() error {
		b, err := os.ReadFile(filepath.Join(files, "tls.crt"))
		if errors.Is(err, os.ErrNotExist) {
			return nil
		}
		return fmt.Errorf("%d bytes, %w", len(b), err)
	})
}
