package main

import (
	"bytes"
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"regexp"
	"strings"
	"syscall"
	"testing"
	"time"

	"github.com/google/nftables"
)

// markVar marks every process of a run; they inherit it.
const markVar = "QUICKSTART_TEST_MARK"

// bin holds the programs, where any user can read them.
var bin string

func TestMain(m *testing.M) {
	var err error
	if bin, err = build(); err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
	code := m.Run()
	os.RemoveAll(bin)
	os.Exit(code)
}

func build() (string, error) {
	dir, err := os.MkdirTemp("", "quickstart-bin-")
	if err != nil {
		return "", err
	}
	if err := os.Chmod(dir, 0o755); err != nil {
		return "", err
	}
	cmd := exec.Command("go", "build", "-trimpath", "-buildvcs=false", "-o", dir+"/",
		"./cmd/signet", "./cmd/signet-control", "./cmd/signet-agent", "./cmd/signet-proxy", "./examples/quickstart")
	cmd.Dir = filepath.Join("..", "..")
	cmd.Env = append(os.Environ(), "CGO_ENABLED=0")
	if out, err := cmd.CombinedOutput(); err != nil {
		return "", fmt.Errorf("build: %w\n%s", err, out)
	}
	envoy := os.Getenv("SIGNET_ENVOY")
	if envoy == "" {
		envoy = filepath.Join("..", "..", ".tools", "envoy", "bin", "envoy")
	}
	return dir, copyFile(filepath.Join(dir, "envoy"), envoy)
}

func copyFile(to, from string) error {
	r, err := os.Open(from)
	if err != nil {
		return fmt.Errorf("%w: run `make tools`, or set SIGNET_ENVOY", err)
	}
	defer r.Close()
	w, err := os.OpenFile(to, os.O_CREATE|os.O_WRONLY|os.O_EXCL, 0o755)
	if err != nil {
		return err
	}
	_, err = io.Copy(w, r)
	return errors.Join(err, w.Close())
}

// visit is one quickstart as a user would start it.
type visit struct {
	*exec.Cmd
	mark string
	out  buffer
	dirs []string // must stay empty
	was  map[string]bool
}

// prepared makes a run as uid. Its home, its directory for temporary files
// and its working directory are new.
func prepared(t *testing.T, uid int, env ...string) *visit {
	t.Helper()
	ctx, cancel := context.WithTimeout(t.Context(), 80*time.Second)
	t.Cleanup(cancel)
	r := &visit{mark: fmt.Sprintf("%s-%d", t.Name(), time.Now().UnixNano()), was: traces(t)}
	r.Cmd = exec.CommandContext(ctx, filepath.Join(bin, "quickstart"), "-bin", bin)
	for _, name := range []string{"HOME", "TMPDIR", "PWD"} {
		dir, err := os.MkdirTemp("", "quickstart-")
		if err != nil {
			t.Fatal(err)
		}
		t.Cleanup(func() { os.RemoveAll(dir) })
		if err := os.Chown(dir, uid, uid); err != nil {
			t.Fatal(err)
		}
		r.dirs = append(r.dirs, dir)
		r.Env = append(r.Env, name+"="+dir)
	}
	r.Dir = r.dirs[2]
	// Debian's own Python: another user cannot run one in root's home.
	r.Env = append(r.Env, "PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
		"SIGNET_ENVOY="+filepath.Join(bin, "envoy"), markVar+"="+r.mark)
	r.Env = append(r.Env, env...)
	r.Stdout, r.Stderr = &r.out, &r.out
	r.SysProcAttr = &syscall.SysProcAttr{}
	if uid != 0 {
		r.SysProcAttr.Credential = &syscall.Credential{Uid: uint32(uid), Gid: uint32(uid), NoSetGroups: os.Geteuid() != 0}
	}
	return r
}

var result = regexp.MustCompile(`^quickstart: allowed=(\d+) denied=(\d+) audited=(\d+) rotated=4$`)

// check reads the last line and looks for anything left behind.
func (r *visit) check(t *testing.T, err error) {
	t.Helper()
	out := r.out.String()
	if err != nil {
		t.Fatalf("%v\n%s", err, out)
	}
	m := result.FindStringSubmatch(lastLine(out))
	if m == nil {
		t.Fatalf("the last line is %q", lastLine(out))
	}
	var allowed, denied, audited int
	fmt.Sscan(strings.Join(m[1:], " "), &allowed, &denied, &audited)
	if allowed < 6 || denied < 2 || audited != 2*(allowed+denied) {
		t.Errorf("%s: want 6 or more allowed, 2 or more denied, and each twice in the audit", m[0])
	}
	if strings.Contains(out, "\x1b") {
		t.Error("colour, though the output is no terminal")
	}
	r.gone(t)
}

// gone fails the test when anything of the run is still there.
func (r *visit) gone(t *testing.T) {
	t.Helper()
	var left []string
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(10 * time.Millisecond) {
		if left = marked(t, r.mark); len(left) == 0 {
			break
		}
	}
	if len(left) > 0 {
		t.Errorf("processes left behind: %v", left)
	}
	for _, dir := range r.dirs {
		entries, err := os.ReadDir(dir)
		if err != nil || len(entries) > 0 {
			t.Errorf("files left behind in %s: %v, %v", dir, entries, err)
		}
	}
	for trace := range traces(t) {
		if !r.was[trace] {
			t.Errorf("left behind: %s", trace)
		}
	}
}

// marked lists the processes that have the mark. Namespaces live no longer
// than these, since no mount outside holds them.
func marked(t *testing.T, mark string) (found []string) {
	t.Helper()
	files, err := filepath.Glob("/proc/[0-9]*/environ")
	if err != nil {
		t.Fatal(err)
	}
	for _, file := range files {
		b, err := os.ReadFile(file)
		if err == nil && bytes.Contains(b, []byte(markVar+"="+mark)) {
			comm, _ := os.ReadFile(filepath.Join(filepath.Dir(file), "comm"))
			found = append(found, filepath.Base(filepath.Dir(file))+" "+strings.TrimSpace(string(comm)))
		}
	}
	return found
}

// traces lists what a run that is not isolated would leave on this machine:
// links, tables of rules, mounts and files.
func traces(t *testing.T) map[string]bool {
	t.Helper()
	found := map[string]bool{}
	links, err := net.Interfaces()
	if err != nil {
		t.Fatal(err)
	}
	for _, l := range links {
		found["link "+l.Name] = true
	}
	tables, err := (&nftables.Conn{}).ListTables()
	if err != nil {
		t.Fatal(err)
	}
	for _, table := range tables {
		found["table "+table.Name] = true
	}
	mounts, err := os.ReadFile("/proc/self/mountinfo")
	if err != nil {
		t.Fatal(err)
	}
	for line := range strings.Lines(string(mounts)) {
		if f := strings.Fields(line); strings.HasPrefix(f[4], "/run/") {
			found["mount "+f[4]] = true
		}
	}
	for _, path := range []string{runDir, "/run/quickstart", "/var/lib/signet"} {
		if _, err := os.Lstat(path); err == nil {
			found["file "+path] = true
		}
	}
	for name := range addresses {
		if _, err := os.Lstat("/run/netns/" + name); err == nil {
			found["namespace "+name] = true
		}
	}
	return found
}

// Root sees the whole tour, and every promise of it holds.
func TestQuickstart_root(t *testing.T) {
	r := prepared(t, 0)
	r.check(t, r.Run())
	for _, want := range []string{"3 open orders", "curl: (", "default deny: 1 policy protects shop/orders", "near miss", "allowed by shop/orders-callers", "observed", "both open connections live on"} {
		if !strings.Contains(r.out.String(), want) {
			t.Errorf("the output does not have %q:\n%s", want, r.out.String())
		}
	}
}

// An ordinary user, whose machine has no curl, sees the same.
func TestQuickstart_user(t *testing.T) {
	path, err := os.MkdirTemp("", "quickstart-path-")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { os.RemoveAll(path) })
	if err := os.Chmod(path, 0o755); err != nil {
		t.Fatal(err)
	}
	for _, name := range []string{"python3", "sed"} {
		if err := os.Symlink("/usr/bin/"+name, filepath.Join(path, name)); err != nil {
			t.Fatal(err)
		}
	}
	r := prepared(t, 65534, "PATH="+path)
	r.check(t, r.Run())
	if out := r.out.String(); strings.Contains(out, "curl") || !strings.Contains(out, "3 open orders") {
		t.Errorf("without curl:\n%s", out)
	}
}

// KEEP=1 leaves a mesh that can be used with the very commands it prints,
// and Ctrl-C ends it all.
func TestQuickstart_keep(t *testing.T) {
	for _, uid := range []int{0, 65534} {
		t.Run(fmt.Sprint("uid ", uid), func(t *testing.T) {
			r := prepared(t, uid, "KEEP=1")
			if err := r.Start(); err != nil {
				t.Fatal(err)
			}
			ended := make(chan error, 1)
			go func() { ended <- r.Wait() }()
			r.waitFor(t, ended, "signet-control)\n")
			enter, script := instructions(t, r.out.String())
			got := r.typed(t, enter, script)
			for _, want := range []string{
				"shop/orders   enforce  yes", // status
				"3 open orders", "curl: (",   // batch, web
				"X25519MLKEM768",                 // audit -o wide
				"allowed by shop/orders-callers", // explain, after the edit was undone
				"shop/web", "SERIAL",
			} {
				if !strings.Contains(got, want) {
					t.Errorf("the commands do not say %q:\n%s", want, got)
				}
			}
			if err := r.Process.Signal(syscall.SIGINT); err != nil {
				t.Fatal(err)
			}
			r.check(t, <-ended)
		})
	}
}

// typed runs commands in the shell that the quickstart tells to open, as the
// same user.
func (r *visit) typed(t *testing.T, enter, script string) string {
	t.Helper()
	shell := exec.CommandContext(t.Context(), "bash", "-c", enter)
	shell.Stdin = strings.NewReader(script)
	for _, e := range r.Env {
		if !strings.HasPrefix(e, markVar) {
			shell.Env = append(shell.Env, e)
		}
	}
	shell.Dir = "/"
	shell.SysProcAttr = r.SysProcAttr
	out, err := shell.CombinedOutput()
	if err != nil {
		t.Errorf("%s: %v", enter, err)
	}
	return string(out)
}

// instructions finds the command that opens the shell, and what to type there.
func instructions(t *testing.T, out string) (enter, script string) {
	t.Helper()
	_, tries, _ := strings.Cut(out, "And in that shell:\n")
	for line := range strings.Lines(out) {
		if strings.HasPrefix(line, "nsenter ") {
			enter = strings.TrimSpace(line)
		}
	}
	var commands []string
	for line := range strings.Lines(tries) {
		command := strings.TrimSpace(line)
		if !strings.HasPrefix(command, "#") {
			commands = append(commands, command)
		}
		if strings.HasPrefix(command, "sed ") {
			commands = append(commands, "sleep 2") // to be in force
		}
	}
	if enter == "" || len(commands) < 8 {
		t.Fatalf("no instructions found: %q, %q", enter, commands)
	}
	return enter, strings.Join(commands, "\n") + "\n"
}

// waitFor returns when the output has what.
func (r *visit) waitFor(t *testing.T, ended <-chan error, what string) {
	t.Helper()
	for end := time.Now().Add(60 * time.Second); !strings.Contains(r.out.String(), what); time.Sleep(20 * time.Millisecond) {
		select {
		case err := <-ended:
			t.Fatalf("it ended: %v\n%s", err, r.out.String())
		default:
		}
		if time.Now().After(end) {
			t.Fatalf("no %q in:\n%s", what, r.out.String())
		}
	}
}

// A quickstart that is killed leaves nothing behind either: without the
// namespaces and the tmpfs of its own, processes, links and files would stay.
func TestQuickstart_killed(t *testing.T) {
	r := prepared(t, 0)
	if err := r.Start(); err != nil {
		t.Fatal(err)
	}
	ended := make(chan error, 1)
	go func() { ended <- r.Wait() }()
	r.waitFor(t, ended, "An allowed call")
	if n := len(marked(t, r.mark)); n < 7 {
		t.Fatalf("%d processes have the mark; the test would not see them left behind", n)
	}
	if err := r.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	<-ended
	r.gone(t)
}

// What is missing is said in a line, with the way to get it, and the exit
// code is 1.
func TestQuickstart_missing(t *testing.T) {
	empty := t.TempDir()
	for _, c := range []struct {
		want string
		args []string
		env  string
	}{
		{"run `make build`", []string{"-bin", empty}, ""},
		{"apt-get install python3", nil, "PATH=" + empty},
	} {
		r := prepared(t, 0)
		if c.args != nil {
			r.Args = append(r.Args[:1:1], c.args...)
		}
		if c.env != "" {
			r.Env = append(r.Env, c.env)
		}
		err := r.Run()
		var exit *exec.ExitError
		if !errors.As(err, &exit) || exit.ExitCode() != 1 || !strings.Contains(r.out.String(), "quickstart: FAILED") || !strings.Contains(r.out.String(), c.want) {
			t.Errorf("%v: %s, want %q", err, r.out.String(), c.want)
		}
		r.gone(t)
	}
}
