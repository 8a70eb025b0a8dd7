package audit

import (
	"bufio"
	"context"
	"fmt"
	"io"
	"log/slog"
	"math/rand/v2"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"syscall"
	"testing"
	"time"
)

// childMain is the agent of the crash tests: it tails the spool in the
// directory given until it is killed, or kills itself after a step of a
// rotation. It asks the proxy (the parent) to reopen by making a file.
func childMain() {
	dir, step := os.Getenv("AUDIT_TEST_CHILD"), os.Getenv("AUDIT_TEST_STEP")
	err := func() error {
		log := slog.New(slog.NewTextHandler(os.Stderr, nil))
		s, err := OpenWith(filepath.Join(dir, "audit"), "n1", log, Options{SegmentSize: 256 << 10, MaxSegments: 1000})
		if err != nil {
			return err
		}
		t, err := NewTailer(s, log, TailOptions{
			Path: filepath.Join(dir, "spool.log"), Decode: decodeTest, Poll: time.Millisecond, BatchLines: 100, MaxSize: 64 << 10,
			Reopen: func(context.Context) error { return os.WriteFile(filepath.Join(dir, "reopen"), nil, 0o600) },
		})
		if err != nil {
			return err
		}
		t.step = func(at string) {
			if at == step {
				syscall.Kill(os.Getpid(), syscall.SIGKILL)
				select {}
			}
		}
		go func() {
			for t.Sync(context.Background()) == nil {
				fmt.Println("at end")
				time.Sleep(time.Millisecond)
			}
		}()
		return t.Run(context.Background())
	}()
	fmt.Fprintln(os.Stderr, "child:", err)
	os.Exit(1)
}

// startChild starts an agent on dir. Its standard output has a line each time
// it has read all there is.
func startChild(t *testing.T, dir, step string) (*exec.Cmd, io.Reader) {
	t.Helper()
	self, err := os.Executable()
	if err != nil {
		t.Fatal(err)
	}
	cmd := exec.Command(self)
	cmd.Env = append(os.Environ(), "AUDIT_TEST_CHILD="+dir, "AUDIT_TEST_STEP="+step)
	logs, err := os.OpenFile(filepath.Join(dir, "child.log"), os.O_CREATE|os.O_WRONLY|os.O_APPEND, 0o600)
	if err != nil {
		t.Fatal(err)
	}
	defer logs.Close()
	cmd.Stderr = logs
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	return cmd, out
}

// numberedProxy writes numbered connections to the spool until it is stopped;
// it returns how many.
func numberedProxy(dir string, stop <-chan struct{}, pause time.Duration) (int, error) {
	p := &proxy{path: filepath.Join(dir, "spool.log")}
	if err := p.open(); err != nil {
		return 0, err
	}
	defer func() { p.f.Close() }()
	asked := filepath.Join(dir, "reopen")
	for n := 0; ; {
		select {
		case <-stop:
			// Envoy lives on while the agent catches up.
			for range 3 {
				time.Sleep(10 * time.Millisecond)
				if os.Remove(asked) == nil {
					return n, p.reopen()
				}
			}
			return n, nil
		default:
		}
		if os.Remove(asked) == nil {
			if err := p.reopen(); err != nil {
				return n, err
			}
		}
		var b strings.Builder
		for range rand.IntN(20) {
			id := fmt.Sprint(n)
			n++
			b.WriteString(encodeTest(opened(id, time.Duration(n))))
			if id[len(id)-1] != '5' {
				b.WriteString(encodeTest(ended(id, time.Duration(n+1))))
			}
		}
		// In two writes, so that lines come in pieces.
		cut := rand.IntN(b.Len() + 1)
		for _, part := range []string{b.String()[:cut], b.String()[cut:]} {
			if _, err := p.f.WriteString(part); err != nil {
				return n, err
			}
		}
		time.Sleep(pause)
	}
}

// exactlyOnce checks that the store in dir has the connections 0 to n-1 in
// order, each once, those whose number does not end in 5 ended, without a gap.
func exactlyOnce(t *testing.T, dir string, n int) {
	t.Helper()
	s := open(t, filepath.Join(dir, "audit"), Options{MaxSegments: 1000})
	verified(t, s)
	got := 0
	err := s.Query(t.Context(), Filter{}, func(r Record) error {
		if r.ID != fmt.Sprint(got) || r.Seq != uint64(got+1) || r.End.IsZero() != (got%10 == 5) {
			return fmt.Errorf("record %d is %+v", got, r)
		}
		got++
		return nil
	})
	if err != nil || got != n {
		t.Errorf("%d records, want %d; %v", got, n, err)
	}
	if g := gaps(t, s); len(g) != 0 {
		t.Errorf("gaps: %+v", g)
	}
	if t.Failed() {
		b, _ := os.ReadFile(filepath.Join(dir, "child.log"))
		t.Logf("%s", b)
	}
	s.Close()
}

// drain runs an agent until it has read everything, and kills it.
func drain(t *testing.T, dir string) {
	t.Helper()
	cmd, out := startChild(t, dir, "")
	timeout := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill() })
	lines := bufio.NewScanner(out)
	if !lines.Scan() {
		t.Error("the agent did not get to the end")
	}
	timeout.Stop()
	cmd.Process.Kill()
	cmd.Wait()
}

// An agent that is killed at any time, again and again, while a proxy writes
// and the spool and the segments roll over, loses and repeats nothing.
func TestKill9(t *testing.T) {
	dir := t.TempDir()
	stop := make(chan struct{})
	type result struct {
		n   int
		err error
	}
	done := make(chan result, 1)
	go func() {
		n, err := numberedProxy(dir, stop, 2*time.Millisecond)
		done <- result{n, err}
	}()
	const kills = 40
	for range kills {
		cmd, _ := startChild(t, dir, "")
		time.Sleep(time.Duration(10+rand.IntN(120)) * time.Millisecond)
		if err := cmd.Process.Kill(); err != nil {
			t.Error(err)
		}
		err := cmd.Wait()
		if ws, ok := cmd.ProcessState.Sys().(syscall.WaitStatus); !ok || ws.Signal() != syscall.SIGKILL {
			t.Errorf("the agent ended before it was killed: %v", err)
		}
	}
	close(stop)
	r := <-done
	if r.err != nil {
		t.Fatal(r.err)
	}
	drain(t, dir)
	exactlyOnce(t, dir, r.n)
	segments, _ := filepath.Glob(filepath.Join(dir, "audit", "*.db"))
	logs, _ := os.ReadFile(filepath.Join(dir, "child.log"))
	t.Logf("%d records, %d kills, %d segments, %d rotations", r.n, kills, len(segments),
		strings.Count(string(logs), "spool rotated"))
	if len(segments) < 2 {
		t.Errorf("%d segments: the test did not roll over", len(segments))
	}
}

// The same for a crash right after each step of a rotation.
func TestKillInRotation(t *testing.T) {
	for _, step := range []string{"renamed", "reopened", "drained", "done", "deleted"} {
		t.Run(step, func(t *testing.T) {
			dir := t.TempDir()
			stop := make(chan struct{})
			done := make(chan error, 1)
			var n int
			go func() {
				var err error
				n, err = numberedProxy(dir, stop, time.Millisecond)
				done <- err
			}()
			for range 2 {
				cmd, _ := startChild(t, dir, step)
				timeout := time.AfterFunc(20*time.Second, func() { cmd.Process.Kill(); t.Error("the step was not reached") })
				cmd.Wait()
				timeout.Stop()
			}
			close(stop)
			if err := <-done; err != nil {
				t.Fatal(err)
			}
			drain(t, dir)
			exactlyOnce(t, dir, n)
			left, _ := filepath.Glob(filepath.Join(dir, "spool.log.*"))
			if len(left) > 0 {
				t.Errorf("left: %v", left)
			}
		})
	}
}
