package e2e

import (
	"bufio"
	"bytes"
	"context"
	crand "crypto/rand"
	"crypto/sha256"
	"crypto/x509"
	"crypto/x509/pkix"
	"encoding/pem"
	"errors"
	"fmt"
	"io"
	"math/big"
	"math/rand/v2"
	"net"
	"net/http"
	"os"
	"path/filepath"
	"strings"
	"sync"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
)

const (
	webVIP    = "10.96.0.1:80"
	largeSize = 30 << 20
)

// TestTransfers: what nginx and curl move arrives whole, in both directions,
// whoever closes first and however slow the reader is; see docs/decisions.md,
// "Servers that close first".
func TestTransfers(t *testing.T) {
	m := programsMesh(t)
	dir := scratch(t)
	// Noise, so that a piece that is missing or doubled is seen.
	large := make([]byte, largeSize)
	noise := rand.NewChaCha8([32]byte{1})
	_, _ = noise.Read(large)
	want := sha256.Sum256(large)
	put(t, filepath.Join(dir, "www", "large"), string(large))
	cert, listen := selfSigned(t, dir, m.Pod("web").Addr.AsSlice(), net.ParseIP("10.96.0.2"))
	nginx(t, m.Pod("web"), dir, listen)
	client := m.Pod("client")

	t.Run("download with curl", func(t *testing.T) {
		for range 3 {
			got := filepath.Join(dir, "got")
			if out, err := run(t, client, "curl", "-sSf", "--max-time", "100", "-H", "Connection: close", "-o", got, "http://"+webVIP+"/large"); err != nil {
				t.Fatalf("%v: %s", err, out)
			}
			checkFile(t, got, want)
		}
	})
	// To the end of the connection: nginx closes when it has written.
	for _, c := range []struct {
		name    string
		readers int
		wait    time.Duration
		rounds  int
	}{
		{"download to the end", 1, 0, 3},
		{"download to the end by a slow reader", 1, time.Second, 3},
		{"download to the end by slow readers at once", 4, time.Second, 1},
	} {
		t.Run(c.name, func(t *testing.T) {
			for round := range c.rounds {
				var wg sync.WaitGroup
				for range c.readers {
					wg.Go(func() {
						n, sum, err := get(t.Context(), client, webVIP, "/large", c.wait)
						if err != nil || n != largeSize || sum != want {
							t.Errorf("round %d: %d of %d bytes, %v, sum right: %v", round, n, largeSize, err, sum == want)
						}
					})
				}
				wg.Wait()
			}
		})
	}
	// It defends a window of the tunnel that holds those of all its
	// connections: with 256 MiB the last download waits for ever.
	t.Run("beside readers that stand still", func(t *testing.T) {
		for range 40 {
			c := dial(t, client, webVIP)
			_, _ = io.WriteString(c, "GET /large HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n")
		}
		time.Sleep(3 * time.Second)
		for range 4 {
			if n, sum, err := get(t.Context(), client, webVIP, "/large", 0); err != nil || sum != want {
				t.Errorf("%d of %d bytes, %v, sum right: %v", n, largeSize, err, sum == want)
			}
		}
	})
	t.Run("small answers to the end", func(t *testing.T) {
		for i := range 50 {
			if n, _, err := get(t.Context(), client, webVIP, "/", 0); err != nil || n != int64(len(serverSays)+1) {
				t.Errorf("call %d: %d bytes, %v", i, n, err)
			}
		}
	})
	t.Run("upload with curl", func(t *testing.T) {
		if out, err := run(t, client, "curl", "-sSf", "--max-time", "100", "-T", filepath.Join(dir, "www", "large"), "http://"+webVIP+"/uploaded"); err != nil {
			t.Fatalf("%v: %s", err, out)
		}
		checkFile(t, filepath.Join(dir, "www", "uploaded"), want)
	})
	// The client has said all, and closes its side, before the answer begins.
	t.Run("half-closed client of nginx", func(t *testing.T) {
		for range 10 {
			c := dial(t, client, webVIP)
			_, _ = io.WriteString(c, "GET / HTTP/1.0\r\n\r\n")
			if err := c.CloseWrite(); err != nil {
				t.Fatal(err)
			}
			if got, err := io.ReadAll(c); err != nil || !bytes.HasSuffix(got, []byte("\r\n\r\n"+serverSays+"\n")) {
				t.Errorf("got %q, %v", got, err)
			}
		}
	})
	t.Run("half-closed upload", func(t *testing.T) {
		// This server answers only when it has seen the end of what the client
		// says.
		serve(t, m.Pod("web"), ":9000", func(c net.Conn) {
			h := sha256.New()
			_, _ = io.Copy(h, c)
			_, _ = c.Write(h.Sum(nil))
		})
		c := dial(t, client, "10.88.0.20:9000")
		if _, err := c.Write(large); err != nil {
			t.Fatal(err)
		}
		if err := c.CloseWrite(); err != nil {
			t.Fatal(err)
		}
		if got, err := io.ReadAll(c); err != nil || !bytes.Equal(got, want[:]) {
			t.Errorf("the server answered %x, %v; want %x", got, err, want)
		}
	})
	t.Run("TLS of the application", func(t *testing.T) {
		for _, at := range []string{"10.96.0.2", "10.88.0.20:8443"} {
			if out, err := run(t, client, "curl", "-sSf", "--max-time", "60", "--cacert", cert, "https://"+at+"/"); err != nil || !strings.Contains(out, serverSays) {
				t.Errorf("%s: %v, %q", at, err, out)
			}
			if n, err := firstBytes(t.Context(), m.Pod("other"), strings.Replace(at, "10.96.0.2", "10.96.0.2:443", 1), "\x16\x03\x01"); n != 0 || timedOut(err) {
				t.Errorf("%s: a denied caller received %d bytes, %v", at, n, err)
			}
		}
		// The mesh's own TLS is around it, and it is the one that is recorded.
		m.Eventually(15*time.Second, "the record of a call to the service", func() error {
			for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Source, Verdicts: []audit.Verdict{audit.Allowed}}) {
				if r.Destination.Address == "10.96.0.2:443" && r.TLS != nil && r.TLS.Group == "X25519MLKEM768" {
					return nil
				}
			}
			return errors.New("there is none with the TLS of the mesh")
		})
	})
}

// TestRedisTraffic: publishers and subscribers, and clients that send ahead of
// the answers.
func TestRedisTraffic(t *testing.T) {
	m := programsMesh(t)
	startRedis(t, m.Pod("cache"))
	client := m.Pod("client")
	const host, subscribers, messages = "10.96.0.3", 5, 200

	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	var wg sync.WaitGroup
	defer wg.Wait()
	defer cancel()
	ready, heard := make(chan error, subscribers), make(chan error, subscribers)
	for range subscribers {
		cmd := client.Command(ctx, "redis-cli", "-h", host, "SUBSCRIBE", "news")
		out, err := cmd.StdoutPipe()
		if err != nil {
			t.Fatal(err)
		}
		if err := cmd.Start(); err != nil {
			t.Fatal(err)
		}
		wg.Go(func() {
			in := bufio.NewScanner(out)
			await := func(line string) error {
				for in.Scan() {
					if in.Text() == line {
						return nil
					}
				}
				return fmt.Errorf("no %q: %w", line, in.Err())
			}
			ready <- errors.Join(await("subscribe"), await("news"), await("1"))
			var err error
			for i := 0; i < messages && err == nil; i++ {
				err = await(fmt.Sprintf("message-%d", i))
			}
			heard <- err
			_ = cmd.Process.Kill() // it never ends by itself
			_ = cmd.Wait()
		})
	}
	for range subscribers {
		if err := <-ready; err != nil {
			t.Fatal(err)
		}
	}
	var publish strings.Builder
	for i := range messages {
		fmt.Fprintf(&publish, "PUBLISH news message-%d\n", i)
	}
	cmd := client.Command(ctx, "redis-cli", "-h", host)
	cmd.Stdin = strings.NewReader(publish.String())
	out, err := cmd.Output()
	if err != nil || strings.Count(string(out), fmt.Sprintf("%d\n", subscribers)) != messages {
		t.Errorf("%d publications: %v, %q", messages, err, out)
	}
	for range subscribers {
		if err := <-heard; err != nil {
			t.Error(err)
		}
	}

	// Each of several clients sends its commands without waiting for answers.
	const commands = 20_000
	var pipes sync.WaitGroup
	for i := range 4 {
		pipes.Go(func() {
			var in bytes.Buffer
			for range commands {
				fmt.Fprintf(&in, "*2\r\n$4\r\nINCR\r\n$2\r\nn%d\r\n", i)
			}
			cmd := client.Command(ctx, "redis-cli", "-h", host, "--pipe")
			cmd.Stdin = &in
			out, err := cmd.CombinedOutput()
			if err != nil || !strings.Contains(string(out), fmt.Sprintf("errors: 0, replies: %d", commands)) {
				t.Errorf("pipe %d: %v, %q", i, err, out)
			}
			if out, err := run(t, client, "redis-cli", "-h", host, "GET", fmt.Sprintf("n%d", i)); strings.TrimSpace(out) != fmt.Sprint(commands) {
				t.Errorf("pipe %d: counted %q, %v; want %d", i, out, err, commands)
			}
		})
	}
	pipes.Wait()
}

// dial opens a connection that is closed when the test ends.
func dial(t *testing.T, pod *lab.Pod, at string) *net.TCPConn {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 20*time.Second)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp", at)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { c.Close() })
	_ = c.SetDeadline(time.Now().Add(100 * time.Second))
	return c.(*net.TCPConn)
}

// get asks a web server that closes when it has answered, waits, and reads
// until the connection ends, which must be in order. It returns what the
// answer's body was.
func get(ctx context.Context, pod *lab.Pod, at, path string, wait time.Duration) (n int64, sum [sha256.Size]byte, err error) {
	ctx, cancel := context.WithTimeout(ctx, 100*time.Second)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp", at)
	if err != nil {
		return 0, sum, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(100 * time.Second))
	if _, err := io.WriteString(c, "GET "+path+" HTTP/1.1\r\nHost: web\r\nConnection: close\r\n\r\n"); err != nil {
		return 0, sum, err
	}
	time.Sleep(wait)
	in := bufio.NewReader(c)
	resp, err := http.ReadResponse(in, nil)
	if err != nil {
		return 0, sum, err
	}
	defer resp.Body.Close()
	h := sha256.New()
	n, err = io.Copy(h, resp.Body)
	if err != nil {
		return n, sum, err
	}
	if more, err := io.Copy(io.Discard, in); more != 0 || err != nil {
		return n, sum, fmt.Errorf("after the body: %d bytes, %w", more, err)
	}
	return n, [sha256.Size]byte(h.Sum(nil)), nil
}

func checkFile(t *testing.T, path string, want [sha256.Size]byte) {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil {
		t.Fatal(err)
	}
	if sha256.Sum256(b) != want {
		t.Errorf("%s: %d bytes that are not those that were sent", path, len(b))
	}
}

// selfSigned makes a web server's own certificate. It returns its path and the
// lines by which nginx uses it.
func selfSigned(t *testing.T, dir string, addrs ...net.IP) (path, listen string) {
	t.Helper()
	key := newKey(t)
	tmpl := &x509.Certificate{
		SerialNumber: big.NewInt(1), Subject: pkix.Name{CommonName: "web"}, IPAddresses: addrs,
		NotBefore: time.Now().Add(-time.Minute), NotAfter: time.Now().Add(time.Hour),
		BasicConstraintsValid: true, IsCA: true,
	}
	der, err := x509.CreateCertificate(crand.Reader, tmpl, tmpl, key.Public(), key)
	if err != nil {
		t.Fatal(err)
	}
	keyDER, err := x509.MarshalPKCS8PrivateKey(key)
	if err != nil {
		t.Fatal(err)
	}
	path = filepath.Join(dir, "web.crt")
	put(t, path, string(pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der})))
	put(t, filepath.Join(dir, "web.key"), string(pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: keyDER})))
	return path, "listen 8443 ssl; ssl_certificate " + path + "; ssl_certificate_key " + filepath.Join(dir, "web.key") + ";"
}
