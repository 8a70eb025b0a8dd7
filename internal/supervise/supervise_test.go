package supervise

import (
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"os/signal"
	"path/filepath"
	"runtime"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"testing"
	"time"

	"go.uber.org/goleak"
)

// partVar makes the test binary play a part: a child, or a supervisor of
// children that a test can kill.
const partVar = "SUPERVISE_TEST_PART"

func TestMain(m *testing.M) {
	switch os.Getenv(partVar) {
	case "stubborn":
		signal.Ignore(syscall.SIGTERM)
		fmt.Println("pid", os.Getpid())
		time.Sleep(time.Minute)
		os.Exit(0)
	case "supervisor":
		err := Run(context.Background(), slog.New(slog.DiscardHandler), os.Stdout,
			part("a", "stubborn"), part("b", "stubborn"))
		fmt.Println(err)
		os.Exit(1)
	}
	goleak.VerifyTestMain(m)
}

// part is a Process that runs this test binary in a part.
func part(name, what string) Process {
	return Process{Name: name, Path: "/proc/self/exe", Env: append(os.Environ(), partVar+"="+what)}
}

func shell(name, script string, args ...string) Process {
	return Process{Name: name, Path: "/bin/sh", Args: append([]string{"-c", script, "sh"}, args...)}
}

// lines is an io.Writer that a test can wait on.
type lines struct {
	mu  sync.Mutex
	all []string      // guarded by mu
	got chan struct{} // has room for one
}

func newLines() *lines { return &lines{got: make(chan struct{}, 1)} }

func (l *lines) Write(p []byte) (int, error) {
	l.mu.Lock()
	l.all = append(l.all, string(p))
	l.mu.Unlock()
	select {
	case l.got <- struct{}{}:
	default:
	}
	return len(p), nil
}

// wait returns the lines once there are n that begin with the prefix.
func (l *lines) wait(t *testing.T, n int, prefix string) []string {
	t.Helper()
	deadline := time.After(20 * time.Second)
	for {
		l.mu.Lock()
		all := strings.Join(l.all, "") // a write may hold several lines, or part of one
		var found []string
		for line := range strings.Lines(all) {
			if rest, ok := strings.CutPrefix(line, prefix); ok && strings.HasSuffix(rest, "\n") {
				found = append(found, strings.TrimSuffix(rest, "\n"))
			}
		}
		l.mu.Unlock()
		if len(found) >= n {
			return found
		}
		select {
		case <-l.got:
		case <-deadline:
			t.Fatalf("waiting for %d lines with %q: have\n%s", n, prefix, all)
		}
	}
}

// launch runs the processes until stop is called, which fails the test on an
// error. Stopping is part of every test's cleanup.
func launch(t *testing.T, out io.Writer, procs ...Process) (stop func()) {
	t.Helper()
	ctx, cancel := context.WithCancel(context.Background())
	ended := make(chan error, 1)
	log := slog.New(slog.NewTextHandler(t.Output(), nil))
	go func() { ended <- Run(ctx, log, out, procs...) }()
	stop = sync.OnceFunc(func() {
		cancel()
		if err := <-ended; err != nil {
			t.Error(err)
		}
	})
	t.Cleanup(stop)
	return stop
}

func pid(t *testing.T, s string) int {
	t.Helper()
	n, err := strconv.Atoi(s)
	if err != nil {
		t.Fatal(err)
	}
	return n
}

// gone fails the test unless the process ends soon: it is not there at all,
// or, when its parent was killed, is at most a zombie of some other reaper.
func gone(t *testing.T, pid int) {
	t.Helper()
	for end := time.Now().Add(5 * time.Second); time.Now().Before(end); time.Sleep(5 * time.Millisecond) {
		b, err := os.ReadFile(fmt.Sprintf("/proc/%d/stat", pid))
		if err != nil || strings.Contains(string(b), ") Z ") {
			return
		}
	}
	_ = syscall.Kill(pid, syscall.SIGKILL)
	t.Errorf("process %d is still there", pid)
}

// A process that is killed, and one that ends by itself, come back; the
// reason is told, and Before has run before each start with the right count.
func TestRun_restarts(t *testing.T) {
	out := newLines()
	var mu sync.Mutex
	var counts []int
	var ends []string
	p := shell("a", `echo "pid $$"; exec sleep 60`)
	p.Before = func(_ context.Context, starts int) error {
		mu.Lock()
		defer mu.Unlock()
		counts = append(counts, starts)
		return nil
	}
	p.Exited = func(err error) {
		mu.Lock()
		defer mu.Unlock()
		ends = append(ends, err.Error())
	}
	stop := launch(t, out, p, shell("b", `echo "ran"`))
	for i := range 3 {
		p := pid(t, out.wait(t, i+1, "a | pid ")[i])
		if i < 2 {
			if err := syscall.Kill(p, syscall.SIGKILL); err != nil {
				t.Fatal(err)
			}
		}
	}
	out.wait(t, 2, "b | ran") // status 0 is no reason to stay away
	stop()
	gone(t, pid(t, out.wait(t, 3, "a | pid ")[2]))
	if got := fmt.Sprint(counts, ends); got != "[0 1 2] [signal: killed signal: killed]" {
		t.Fatal(got)
	}
}

// An end with status 0 reaches Exited as an error too.
func TestRun_exitedIsNeverNil(t *testing.T) {
	got := make(chan error, 100)
	p := Process{Name: "a", Path: "/bin/true", Exited: func(err error) { got <- err }}
	launch(t, io.Discard, p)
	if err := <-got; err == nil || err.Error() != "exit status 0" {
		t.Fatalf("got %v", err)
	}
}

// A Before that fails is a failed start: the program does not run, the next
// attempt comes by itself, other processes start anyhow, and neither count
// nor Exited see it. The same holds for a program that is not there.
func TestRun_failedStart(t *testing.T) {
	out := newLines()
	marker := filepath.Join(t.TempDir(), "late")
	calls := 0
	p := shell("a", `echo "up"; exec sleep 60`)
	p.Before = func(_ context.Context, starts int) error {
		if calls++; calls < 3 {
			return errors.New("no token yet")
		}
		if starts != 0 {
			return fmt.Errorf("starts is %d", starts)
		}
		return nil
	}
	p.Exited = func(err error) { t.Errorf("Exited(%v)", err) }
	late := Process{Name: "late", Path: marker, Args: []string{"-c", "echo up; exec sleep 60"},
		Exited: func(err error) { t.Errorf("Exited(%v)", err) }}
	launch(t, out, p, late, shell("b", `echo "up"; exec sleep 60`))
	out.wait(t, 1, "b | up")
	out.wait(t, 1, "a | up")
	if err := os.Symlink("/bin/sh", marker); err != nil {
		t.Fatal(err)
	}
	out.wait(t, 1, "late | up")
}

// Each process starts after the one before it and is stopped before it.
func TestRun_order(t *testing.T) {
	out := newLines()
	script := `trap 'echo "stop"; exit 0' TERM; echo "start"; while :; do sleep 0.01; done`
	procs := []Process{shell("a", script), shell("b", script), shell("c", script)}
	var mu sync.Mutex
	var began []string
	for i := range procs {
		procs[i].Before = func(context.Context, int) error {
			time.Sleep(time.Duration(30-10*i) * time.Millisecond) // the first is the slowest
			mu.Lock()
			defer mu.Unlock()
			began = append(began, procs[i].Name)
			return nil
		}
	}
	stop := launch(t, out, procs...)
	for _, p := range procs {
		out.wait(t, 1, p.Name+" | start")
	}
	stop()
	var ended []string
	for _, line := range out.all {
		if name, ok := strings.CutSuffix(line, " | stop\n"); ok {
			ended = append(ended, name)
		}
	}
	if got := fmt.Sprint(began, ended); got != "[a b c] [c b a]" {
		t.Fatal(got)
	}
}

// A process that ignores SIGTERM is killed after its grace, not before, and
// Run does not return while it lives.
func TestRun_stubborn(t *testing.T) {
	out := newLines()
	p := part("a", "stubborn")
	p.Grace = 300 * time.Millisecond
	stop := launch(t, out, p)
	child := pid(t, out.wait(t, 1, "a | pid ")[0])
	began := time.Now()
	stop()
	if took := time.Since(began); took < p.Grace {
		t.Errorf("killed after %v, grace is %v", took, p.Grace)
	}
	if err := syscall.Kill(child, 0); err != syscall.ESRCH {
		t.Errorf("after Run the process is there: %v", err)
	}
}

// Killing the supervisor with SIGKILL kills its children, even those that
// ignore SIGTERM: without Pdeathsig they would be orphans. They have lived on
// a thread that other goroutines must not have taken and ended.
func TestRun_supervisorKilled(t *testing.T) {
	out := newLines()
	cmd := exec.Command("/proc/self/exe")
	cmd.Env = append(os.Environ(), partVar+"=supervisor")
	cmd.Stdout = out
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	a := pid(t, out.wait(t, 1, "a | pid ")[0])
	b := pid(t, out.wait(t, 1, "b | pid ")[0])
	if err := cmd.Process.Kill(); err != nil {
		t.Fatal(err)
	}
	_ = cmd.Wait() // killed
	gone(t, a)
	gone(t, b)
}

// Pdeathsig follows a thread. A child survives while goroutines end locked
// threads all around it: none may end the thread that forked.
func TestRun_threadsEnd(t *testing.T) {
	out := newLines()
	p := shell("a", `echo "pid $$"; exec sleep 60`)
	p.Exited = func(err error) { t.Errorf("Exited(%v)", err) }
	launch(t, out, p)
	out.wait(t, 1, "a | pid ")
	var wg sync.WaitGroup
	for range 50 {
		wg.Go(func() {
			runtime.LockOSThread() // never unlocked: the thread ends with the goroutine
			time.Sleep(time.Millisecond)
		})
	}
	wg.Wait()
	time.Sleep(50 * time.Millisecond)
}

// What a process started itself does not outlive it: neither when it dies
// nor when it is stopped. The grandchild keeps the output open, which must
// not hold up the restart.
func TestRun_groupEnds(t *testing.T) {
	out := newLines()
	stop := launch(t, out, shell("a", `sleep 60 & echo "pid $!"; echo "own $$"; wait`))
	first := pid(t, out.wait(t, 1, "a | pid ")[0])
	if err := syscall.Kill(pid(t, out.wait(t, 1, "a | own ")[0]), syscall.SIGKILL); err != nil {
		t.Fatal(err)
	}
	second := pid(t, out.wait(t, 2, "a | pid ")[1])
	gone(t, first)
	stop()
	gone(t, second)
}

// A supervisor that is told to stop while it waits to restart, or while
// Before runs, returns at once and starts nothing more.
func TestRun_stopWhileDown(t *testing.T) {
	inBefore := make(chan struct{})
	waits := Process{Name: "b", Path: "/bin/true", Before: func(ctx context.Context, _ int) error {
		close(inBefore)
		<-ctx.Done()
		return nil // as if it had succeeded
	}, Exited: func(err error) { t.Errorf("started after the end: %v", err) }}
	never := Process{Name: "c", Path: "/bin/true", Before: func(context.Context, int) error {
		t.Error("prepared after the end")
		return nil
	}}
	stop := launch(t, io.Discard, Process{Name: "a", Path: "/bin/false"}, waits, never)
	<-inBefore
	time.Sleep(300 * time.Millisecond) // a is in a long delay by now
	began := time.Now()
	stop()
	if took := time.Since(began); took > 5*time.Second {
		t.Errorf("took %v", took)
	}
}

// Lines stay whole with two writers, standard error is there too, an
// endless line is cut and an unfinished last one is not lost.
func TestRun_output(t *testing.T) {
	out := newLines()
	long := strings.Repeat("x", maxLine+10)
	file := filepath.Join(t.TempDir(), "long")
	if err := os.WriteFile(file, []byte(long+"\n"), 0o600); err != nil {
		t.Fatal(err)
	}
	launch(t, out,
		shell("a", `echo one; echo two >&2; cat "$1"; printf last; exec sleep 0.1`, file),
		shell("b", `while :; do echo 0123456789; done | head -n 1000; exec sleep 60`))
	out.wait(t, 1000, "b | 0123456789")
	out.wait(t, 1, "a | last")
	got := out.wait(t, 5, "a | ")
	want := []string{"one", "two", long[:maxLine], long[maxLine:], "last"}
	for i, w := range want {
		if got[i] != w {
			t.Fatalf("line %d is %.40q, want %.40q", i, got[i], w)
		}
	}
}

// A broken log neither stops nor kills a process.
func TestRun_brokenOutput(t *testing.T) {
	file := filepath.Join(t.TempDir(), "done")
	p := shell("a", `i=0; while [ $i -lt 20000 ]; do echo 0123456789; i=$((i+1)); done; : >"$1"; exec sleep 60`, file)
	p.Exited = func(err error) { t.Errorf("Exited(%v)", err) }
	launch(t, brokenWriter{}, p)
	for end := time.Now().Add(20 * time.Second); ; time.Sleep(10 * time.Millisecond) {
		if _, err := os.Stat(file); err == nil {
			return
		} else if time.Now().After(end) {
			t.Fatal("the process hangs")
		}
	}
}

type brokenWriter struct{}

func (brokenWriter) Write([]byte) (int, error) { return 0, errors.New("disk full") }

func TestRun_badInput(t *testing.T) {
	ok := shell("a", "exit")
	for _, c := range []struct {
		want  string
		procs []Process
	}{
		{"no process", nil},
		{"process 1: Name is empty", []Process{ok, {Path: "/bin/true"}}},
		{`Name "a" is taken`, []Process{ok, ok}},
		{`"b": Path is empty`, []Process{{Name: "b"}}},
		{`"b": Grace is -1s`, []Process{{Name: "b", Path: "/bin/true", Grace: -time.Second}}},
	} {
		err := Run(t.Context(), slog.New(slog.DiscardHandler), io.Discard, c.procs...)
		if err == nil || !strings.Contains(err.Error(), c.want) {
			t.Errorf("got %v, want %q", err, c.want)
		}
	}
}

func TestNextDelay(t *testing.T) {
	for _, c := range []struct{ before, lived, want time.Duration }{
		{0, 0, 50 * time.Millisecond},
		{50 * time.Millisecond, time.Second, 100 * time.Millisecond},
		{3200 * time.Millisecond, 9999 * time.Millisecond, 5 * time.Second},
		{5 * time.Second, 0, 5 * time.Second},
		{5 * time.Second, 10 * time.Second, 50 * time.Millisecond},
	} {
		if got := nextDelay(c.before, c.lived); got != c.want {
			t.Errorf("nextDelay(%v, %v) = %v, want %v", c.before, c.lived, got, c.want)
		}
	}
}

// A process that says that another start would do harm is started once, and
// everything ends with it. Defends a token that locks itself after a few wrong PINs.
func TestFinal(t *testing.T) {
	starts := filepath.Join(t.TempDir(), "starts")
	final := shell("final", `echo >>"$1"; exit 78`, starts)
	final.Final = 78
	out := newLines()
	err := Run(t.Context(), slog.New(slog.DiscardHandler), out, shell("other", "exec sleep 60"), final)
	if err == nil || !strings.Contains(err.Error(), "final has ended with status 78") {
		t.Errorf("error %v", err)
	}
	if b, err := os.ReadFile(starts); err != nil || string(b) != "\n" {
		t.Errorf("started %d times, %v", len(b), err)
	}
	// Another status is brought back as ever.
	ctx, cancel := context.WithTimeout(t.Context(), 2*time.Second)
	defer cancel()
	other := shell("final", `echo >>"$1"; exit 77`, starts)
	other.Final = 78
	if err := Run(ctx, slog.New(slog.DiscardHandler), out, other); err != nil {
		t.Error(err)
	}
	if b, err := os.ReadFile(starts); err != nil || len(b) < 3 {
		t.Errorf("started %d times, %v", len(b), err)
	}
}
