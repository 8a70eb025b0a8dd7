package e2e

import (
	"bufio"
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"github.com/signet-mesh/signet/agent/audit"
	"github.com/signet-mesh/signet/internal/adminclient"
	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/test/harness"
)

// programsMesh has a client that may and one that may not reach four servers,
// each behind a service and at its pod's address.
func programsMesh(t *testing.T) *harness.Mesh {
	return harness.Start(t, harness.Options{
		Pods: map[string]string{
			"client": "10.88.0.10", "other": "10.88.0.11",
			"web": "10.88.0.20", "cache": "10.88.0.21", "db": "10.88.0.22", "shell": "10.88.0.23",
		},
		Documents: map[string]string{"mesh.yaml": harness.Config("1h") + harness.Namespace("shop", "enforce") +
			harness.Workload("shop", "client", "10.88.0.10") + harness.Workload("shop", "other", "10.88.0.11") +
			harness.Workload("shop", "web", "10.88.0.20") + harness.Workload("shop", "cache", "10.88.0.21") +
			harness.Workload("shop", "db", "10.88.0.22") + harness.Workload("shop", "shell", "10.88.0.23") +
			harness.Service("shop", "web", "10.96.0.1", 80, 8080, "web") +
			harness.Service("shop", "web-tls", "10.96.0.2", 443, 8443, "web") +
			harness.Service("shop", "cache", "10.96.0.3", 6379, 6379, "cache") +
			harness.Service("shop", "db", "10.96.0.4", 3306, 3306, "db") +
			harness.Service("shop", "shell", "10.96.0.5", 22, 22, "shell") +
			harness.Allow("shop", "client-to-web", "web", []int{8080, 8443, 9000}, "client") +
			harness.Allow("shop", "client-to-cache", "cache", []int{6379}, "client") +
			harness.Allow("shop", "client-to-db", "db", []int{3306}, "client") +
			harness.Allow("shop", "client-to-shell", "shell", []int{22}, "client")},
	})
}

// TestRealPrograms: programs that know nothing of the mesh talk through it, by
// service and by pod address. A caller whom no policy names gets no byte, not
// even from the servers that speak first, and the server does not learn that
// it called: not by its counters, and not by its logs.
//
// What it defends: that the destination's proxy decides on the CONNECT request
// alone, before it contacts the application.
func TestRealPrograms(t *testing.T) {
	m := programsMesh(t)
	for _, p := range []struct {
		workload string
		start    func(*testing.T, *lab.Pod) server
		at       []string // service, pod
		hello    string   // what a client of a server that does not speak first says
		call     func(host, port string) []string
	}{
		{"web", startNginx, []string{"10.96.0.1:80", "10.88.0.20:8080"}, "GET / HTTP/1.0\r\n\r\n", func(host, port string) []string {
			return []string{"curl", "-sSf", "--max-time", "60", "http://" + net.JoinHostPort(host, port) + "/"}
		}},
		{"cache", startRedis, []string{"10.96.0.3:6379", "10.88.0.21:6379"}, "PING\r\n", func(host, port string) []string {
			return []string{"redis-cli", "-e", "-h", host, "-p", port, "ECHO", serverSays}
		}},
		{"db", startMariaDB, []string{"10.96.0.4:3306", "10.88.0.22:3306"}, "", func(host, port string) []string {
			return []string{"mariadb", "--no-defaults", "--protocol=tcp", "-h", host, "-P", port, "-u", "app", "-psecret", "-N", "-e", "SELECT word FROM shop.words", "shop"}
		}},
		{"shell", startSSH, []string{"10.96.0.5:22", "10.88.0.23:22"}, "", func(host, port string) []string {
			return []string{"ssh-keyscan", "-T", "60", "-t", "ed25519", "-p", port, host}
		}},
	} {
		t.Run(p.workload, func(t *testing.T) {
			s := p.start(t, m.Pod(p.workload))
			for _, at := range p.at {
				host, port, err := net.SplitHostPort(at)
				if err != nil {
					t.Fatal(err)
				}
				call := p.call(host, port)

				before := s.seen(t)
				out, err := run(t, m.Pod("client"), call...)
				if err != nil || !strings.Contains(out, s.says) {
					t.Errorf("%v: %v, %q; want %q", call, err, out, s.says)
				}
				after := s.seen(t)
				for what := range after {
					if after[what] <= before[what] {
						t.Errorf("%s: %s is %d before and after an allowed call, so it shows nothing", at, what, after[what])
					}
				}

				if n, err := firstBytes(t.Context(), m.Pod("other"), at, p.hello); n != 0 || err != io.EOF && !errors.Is(err, syscall.ECONNRESET) {
					t.Errorf("%s: a denied caller received %d bytes, %v; want 0 and the connection closed", at, n, err)
				}
				out, err = run(t, m.Pod("other"), call...)
				if strings.Contains(out, s.says) || err == nil && strings.TrimSpace(out) != "" {
					t.Errorf("%v by a denied caller: %v, %q; want a failure", call, err, out)
				}
				t.Logf("%s: a denied %s says %v, %q", at, call[0], err, strings.TrimSpace(out))
				for what, n := range s.seen(t) {
					if n != after[what] {
						t.Errorf("%s: %s went from %d to %d with denied calls only", at, what, after[what], n)
					}
				}
			}
			recordedCalls(t, m, "shop/"+p.workload, 2*len(p.at))
		})
	}
}

// recordedCalls looks for what the audit has of the two clients' calls.
func recordedCalls(t *testing.T, m *harness.Mesh, workload string, refusals int) {
	t.Helper()
	const from = "spiffe://mesh.test/ns/shop/sa/"
	m.Eventually(15*time.Second, "the records of all calls", func() error {
		denied, allowed := 0, 0
		for _, r := range m.Records(adminclient.AuditQuery{Side: audit.Destination}) {
			if r.Destination.Workload != workload {
				continue
			}
			switch {
			case r.Source.ID == from+"client" && r.Verdict == audit.Allowed:
				allowed++
			case r.Source.ID == from+"other" && r.Verdict == audit.Denied && strings.Contains(r.Reason, "default deny"):
				denied++
			default:
				t.Fatalf("the audit has %s by %q: %s", r.Verdict, r.Source.ID, r.Reason)
			}
		}
		if allowed < refusals/2 || denied < refusals {
			return fmt.Errorf("%d allowed, %d denied; want at least %d and %d", allowed, denied, refusals/2, refusals)
		}
		return nil
	})
}

// server is a running server program.
type server struct {
	// says is what an allowed client gets to see.
	says string
	// seen counts what the server knows of its clients, by counters of its
	// own and by its logs. The looks themselves are left out.
	seen func(*testing.T) map[string]int
}

// serverSays is what the servers are asked to say.
const serverSays = "through the mesh"

// run runs a client program inside a pod and returns all that it wrote.
func run(t *testing.T, pod *lab.Pod, args ...string) (string, error) {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Minute)
	defer cancel()
	out, err := pod.Command(ctx, args[0], args[1:]...).CombinedOutput()
	return string(out), err
}

// firstBytes connects, says hello and reads until the other side closes. It
// returns how much came.
func firstBytes(ctx context.Context, pod *lab.Pod, at, hello string) (int64, error) {
	ctx, cancel := context.WithTimeout(ctx, 20*time.Second)
	defer cancel()
	c, err := pod.Dial(ctx, "tcp", at)
	if err != nil {
		return 0, err
	}
	defer c.Close()
	_ = c.SetDeadline(time.Now().Add(20 * time.Second))
	if hello != "" {
		_, _ = io.WriteString(c, hello) // an error of it is the read's too
	}
	n, err := io.Copy(io.Discard, c)
	if err == nil {
		err = io.EOF
	}
	return n, err
}

// program finds a program, also where only root's path leads.
func program(t *testing.T, name string) string {
	t.Helper()
	for _, dir := range append(filepath.SplitList(os.Getenv("PATH")), "/usr/sbin", "/sbin") {
		if path, err := exec.LookPath(filepath.Join(dir, name)); err == nil {
			return path
		}
	}
	t.Fatalf("%s is not installed: run `make deps-debian`", name)
	return ""
}

// launch runs a server program in a pod until the test ends, and waits until
// it is ready. It returns the path of what it writes.
func launch(t *testing.T, pod *lab.Pod, dir string, ready func(output string) error, args ...string) string {
	t.Helper()
	path := filepath.Join(dir, "output")
	output, err := os.Create(path)
	if err != nil {
		t.Fatal(err)
	}
	defer output.Close()
	cmd := pod.Command(t.Context(), program(t, args[0]), args[1:]...)
	cmd.Stdout, cmd.Stderr, cmd.Dir = output, output, dir
	cmd.Cancel = func() error { return cmd.Process.Signal(syscall.SIGTERM) }
	cmd.WaitDelay = 20 * time.Second
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- cmd.Wait() }()
	t.Cleanup(func() {
		<-ended
		if t.Failed() {
			b, _ := os.ReadFile(path)
			t.Logf("%s wrote:\n%s", args[0], b)
		}
	})
	for deadline := time.Now().Add(90 * time.Second); ; time.Sleep(50 * time.Millisecond) {
		err := ready(path)
		if err == nil {
			return path
		}
		select {
		case err := <-ended:
			ended <- err
			t.Fatalf("%s ended: %v", args[0], err)
		default:
		}
		if time.Now().After(deadline) {
			t.Fatalf("%s is not ready: %v", args[0], err)
		}
	}
}

// scratch makes a folder with a short path, for sockets, until the test ends.
func scratch(t *testing.T) string {
	t.Helper()
	dir, err := os.MkdirTemp("", "prog-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(dir) })
	return dir
}

func put(t *testing.T, path, text string) {
	t.Helper()
	if err := os.MkdirAll(filepath.Dir(path), 0o755); err != nil {
		t.Fatal(err)
	}
	if err := os.WriteFile(path, []byte(text), 0o600); err != nil {
		t.Fatal(err)
	}
}

// lines counts the lines of a file that have a text. A file that is not there
// has none.
func lines(t *testing.T, path, text string) int {
	t.Helper()
	b, err := os.ReadFile(path)
	if err != nil && !errors.Is(err, os.ErrNotExist) {
		t.Fatal(err)
	}
	n := 0
	for line := range bytes.Lines(b) {
		if bytes.Contains(line, []byte(text)) {
			n++
		}
	}
	return n
}

// looks runs a function that makes one connection to a server and returns the
// server's number of connections, and takes those that it made out.
func looks(f func() (int, error)) func(*testing.T) int {
	var mu sync.Mutex
	made := 0
	return func(t *testing.T) int {
		t.Helper()
		mu.Lock()
		defer mu.Unlock()
		made++
		n, err := f()
		if err != nil {
			t.Fatal(err)
		}
		return n - made
	}
}

// nginxConf serves DIR/www, takes uploads into it, and counts on a socket.
const nginxConf = `daemon off;
user root;
worker_processes 2;
pid DIR/nginx.pid;
error_log DIR/error.log info;
events {}
http {
	access_log DIR/access.log;
	client_body_temp_path DIR/temp;
	proxy_temp_path DIR/temp;
	fastcgi_temp_path DIR/temp;
	uwsgi_temp_path DIR/temp;
	scgi_temp_path DIR/temp;
	client_max_body_size 64m;
	server {
		listen 8080;
		LISTENTLS
		root DIR/www;
		dav_methods PUT;
	}
	server {
		listen unix:DIR/status.sock;
		access_log off;
		location / { stub_status; }
	}
}
`

func startNginx(t *testing.T, pod *lab.Pod) server { return nginx(t, pod, scratch(t), "") }

// nginx serves the folder www of a folder.
func nginx(t *testing.T, pod *lab.Pod, dir, listenTLS string) server {
	put(t, filepath.Join(dir, "www", "index.html"), serverSays+"\n")
	conf := filepath.Join(dir, "nginx.conf")
	put(t, conf, strings.NewReplacer("DIR", dir, "LISTENTLS", listenTLS).Replace(nginxConf))
	accepts := regexp.MustCompile(`handled requests\n (\d+) `)
	status := func() (int, error) {
		transport := &http.Transport{DisableKeepAlives: true, DialContext: func(context.Context, string, string) (net.Conn, error) {
			return net.Dial("unix", filepath.Join(dir, "status.sock"))
		}}
		resp, err := (&http.Client{Transport: transport, Timeout: 10 * time.Second}).Get("http://status/")
		if err != nil {
			return 0, err
		}
		defer resp.Body.Close()
		b, err := io.ReadAll(resp.Body)
		if err != nil {
			return 0, err
		}
		found := accepts.FindSubmatch(b)
		if found == nil {
			return 0, fmt.Errorf("nginx says %q", b)
		}
		return strconv.Atoi(string(found[1]))
	}
	launch(t, pod, dir, func(string) error { _, err := status(); return err }, "nginx", "-p", dir, "-e", filepath.Join(dir, "error.log"), "-c", conf)
	connections := looks(status)
	return server{says: serverSays, seen: func(t *testing.T) map[string]int {
		return map[string]int{"nginx: accepts": connections(t), "access.log": lines(t, filepath.Join(dir, "access.log"), " ")}
	}}
}

func startRedis(t *testing.T, pod *lab.Pod) server {
	dir := scratch(t)
	socket := filepath.Join(dir, "redis.sock")
	received := regexp.MustCompile(`total_connections_received:(\d+)`)
	status := func() (int, error) {
		c, err := net.Dial("unix", socket)
		if err != nil {
			return 0, err
		}
		defer c.Close()
		_ = c.SetDeadline(time.Now().Add(10 * time.Second))
		if _, err := io.WriteString(c, "INFO stats\r\n"); err != nil {
			return 0, err
		}
		in := bufio.NewReader(c)
		for {
			line, err := in.ReadString('\n')
			if err != nil {
				return 0, err
			}
			if found := received.FindStringSubmatch(line); found != nil {
				return strconv.Atoi(found[1])
			}
		}
	}
	log := launch(t, pod, dir, func(string) error { _, err := status(); return err },
		"redis-server", "--port", "6379", "--bind", "0.0.0.0", "--protected-mode", "no", "--unixsocket", socket,
		"--save", "", "--dir", dir, "--loglevel", "verbose")
	connections := looks(status)
	return server{says: serverSays, seen: func(t *testing.T) map[string]int {
		return map[string]int{"redis: total_connections_received": connections(t), "log": lines(t, log, "Accepted 10.")}
	}}
}

func startMariaDB(t *testing.T, pod *lab.Pod) server {
	dir := scratch(t)
	data, socket, general := filepath.Join(dir, "data"), filepath.Join(dir, "db.sock"), filepath.Join(dir, "general.log")
	if out, err := run(t, pod, program(t, "mariadb-install-db"), "--no-defaults", "--user=root", "--datadir="+data,
		"--auth-root-authentication-method=normal", "--skip-test-db"); err != nil {
		t.Fatalf("mariadb-install-db: %v\n%s", err, out)
	}
	ask := func(sql string) (string, error) {
		ctx, cancel := context.WithTimeout(t.Context(), 30*time.Second)
		defer cancel()
		out, err := pod.Command(ctx, "mariadb", "--no-defaults", "--socket="+socket, "-u", "root", "-N", "-e", sql).CombinedOutput()
		return string(out), err
	}
	failed := 0
	status := func() (n int, err error) {
		out, err := ask(`SELECT SUM(IF(VARIABLE_NAME = 'CONNECTIONS', VARIABLE_VALUE, 0)), SUM(IF(VARIABLE_NAME = 'ABORTED_CONNECTS', VARIABLE_VALUE, 0))
			FROM information_schema.GLOBAL_STATUS`)
		if err != nil {
			return 0, fmt.Errorf("%w: %s", err, out)
		}
		_, err = fmt.Sscan(out, &n, &failed)
		return n, err
	}
	errorLog := launch(t, pod, dir, func(string) error { _, err := ask("SELECT 1"); return err },
		"mariadbd", "--no-defaults", "--user=root", "--datadir="+data, "--socket="+socket, "--pid-file="+filepath.Join(dir, "pid"),
		"--bind-address=0.0.0.0", "--port=3306", "--skip-name-resolve", "--log-warnings=9", "--innodb-buffer-pool-size=32M",
		"--general-log=1", "--general-log-file="+general)
	if out, err := ask(`CREATE DATABASE shop; CREATE TABLE shop.words (word TEXT); INSERT INTO shop.words VALUES ('` + serverSays + `');
		CREATE USER 'app'@'%' IDENTIFIED BY 'secret'; GRANT ALL ON shop.* TO 'app'@'%'`); err != nil {
		t.Fatalf("%v: %s", err, out)
	}
	connections := looks(status)
	return server{says: serverSays, seen: func(t *testing.T) map[string]int {
		n := connections(t)
		// An allowed call does not raise these, so they show nothing by rising:
		// they must be 0 at all times.
		if failed != 0 {
			t.Errorf("mariadbd: Aborted_connects is %d, want 0", failed)
		}
		if complaints := lines(t, errorLog, "borted") + lines(t, errorLog, "denied"); complaints > 0 {
			t.Errorf("mariadbd: the error log complains of connections %d times", complaints)
		}
		return map[string]int{"mariadbd: Connections": n, "general log": lines(t, general, "using TCP/IP")}
	}}
}

// startSSH: only the key exchange is asked for, which is all that needs no
// account on the machine.
func startSSH(t *testing.T, pod *lab.Pod) server {
	dir := scratch(t)
	if err := os.MkdirAll("/run/sshd", 0o755); err != nil { // in the test's own /run
		t.Fatal(err)
	}
	key := filepath.Join(dir, "key")
	if out, err := run(t, pod, program(t, "ssh-keygen"), "-q", "-t", "ed25519", "-N", "", "-f", key); err != nil {
		t.Fatalf("ssh-keygen: %v\n%s", err, out)
	}
	public, err := os.ReadFile(key + ".pub")
	if err != nil {
		t.Fatal(err)
	}
	conf := filepath.Join(dir, "sshd.conf")
	put(t, conf, "Port 22\nListenAddress 0.0.0.0\nHostKey "+key+"\nPidFile none\nLogLevel VERBOSE\nUseDNS no\n")
	log := launch(t, pod, dir, func(output string) error {
		if lines(t, output, "Server listening on") == 0 {
			return errors.New("it does not listen yet")
		}
		return nil
	}, "sshd", "-D", "-e", "-f", conf)
	return server{says: strings.Fields(string(public))[1], seen: func(t *testing.T) map[string]int {
		return map[string]int{"sshd: log": lines(t, log, "Connection from")}
	}}
}
