package main

import (
	"bufio"
	"context"
	"encoding/json"
	"net"
	"os"
	"os/exec"
	"path/filepath"
	"syscall"
	"testing"
	"time"

	"google.golang.org/grpc"
	"google.golang.org/grpc/credentials/insecure"
	healthpb "google.golang.org/grpc/health/grpc_health_v1"
)

// program builds testpod once for all tests.
func program(t *testing.T) string {
	t.Helper()
	file := filepath.Join(t.TempDir(), "testpod")
	if out, err := exec.CommandContext(t.Context(), "go", "build", "-o", file, ".").CombinedOutput(); err != nil {
		t.Fatalf("go build: %v\n%s", err, out)
	}
	return file
}

type process struct {
	*exec.Cmd
	lines *bufio.Scanner
}

// start runs testpod; the test's end ends it.
func start(t *testing.T, file string, env []string, args ...string) *process {
	t.Helper()
	cmd := exec.Command(file, args...)
	cmd.Env, cmd.Stderr = append(os.Environ(), env...), os.Stderr
	out, err := cmd.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := cmd.Start(); err != nil {
		t.Fatal(err)
	}
	p := &process{cmd, bufio.NewScanner(out)}
	t.Cleanup(func() {
		if cmd.ProcessState == nil {
			_ = cmd.Process.Kill()
			_ = cmd.Wait()
		}
	})
	return p
}

func (p *process) next(t *testing.T, v any) {
	t.Helper()
	if !p.lines.Scan() {
		t.Fatalf("no more lines: %v", p.lines.Err())
	}
	if err := json.Unmarshal(p.lines.Bytes(), v); err != nil {
		t.Fatalf("%s: %v", p.lines.Text(), err)
	}
}

type serving struct{ Serving, HTTP, Echo, GRPC string }

// ports returns a port that is free, as are the two after it.
func ports(t *testing.T) string {
	t.Helper()
	for range 50 {
		l, err := net.Listen("tcp", "127.0.0.1:0")
		if err != nil {
			t.Fatal(err)
		}
		_, port, _ := net.SplitHostPort(l.Addr().String())
		_ = l.Close()
		free := true
		for at, i := "127.0.0.1:"+port, 0; i < 2 && free; i++ {
			if at, err = nextPort(at); err != nil {
				free = false
				break
			}
			if l, err := net.Listen("tcp", at); err != nil {
				free = false
			} else {
				_ = l.Close()
			}
		}
		if free {
			return port
		}
	}
	t.Fatal("no three free ports")
	return ""
}

// Defends the suite's counts: what works counts as ok, an answer by another pod
// as wrong, and what was cut as failed, never as each other.
func TestServeDialLoad(t *testing.T) {
	file := program(t)
	port := ports(t)
	address := "127.0.0.1:" + port
	server := start(t, file, []string{"POD_NAME=web-1"}, "serve", "--port", port, "--first-instruction")
	var s serving
	server.next(t, &s)
	if s.Serving != "web-1" {
		t.Fatalf("it serves as %q", s.Serving)
	}

	var d dialResult
	start(t, file, nil, "dial", address).next(t, &d)
	if !d.OK || d.ID != "web-1" || d.MS <= 0 {
		t.Errorf("dial: %+v", d)
	}
	conn, err := grpc.NewClient(address[:len(address)-len(port)]+s.GRPC[len("[::]:"):], grpc.WithTransportCredentials(insecure.NewCredentials()))
	if err != nil {
		t.Fatal(err)
	}
	defer conn.Close()
	if r, err := healthpb.NewHealthClient(conn).Check(t.Context(), &healthpb.HealthCheckRequest{}); err != nil || r.Status != healthpb.HealthCheckResponse_SERVING {
		t.Errorf("gRPC health: %v, %v", r, err)
	}

	good := start(t, file, nil, "load", address, "--rate", "50", "--conns", "3", "--want", "web-", "--idle", "20ms")
	wrong := start(t, file, nil, "load", "--rate=20", "--want=db-", address)
	var second counts
	good.next(t, &second)
	good.next(t, &second)
	if second.OK < 30 || second.Failed+second.Wrong+second.StreamFailed+second.StreamWrong != 0 || second.Streams != 3 || second.Echoed < 60 {
		t.Errorf("a second of load: %+v", second)
	}
	wrong.next(t, &second)
	if second.OK != 0 || second.Failed != 0 || second.Wrong < 10 || second.Errors["answer by web-1"] != second.Wrong {
		t.Errorf("a second of wrong answers: %+v", second)
	}

	_ = server.Process.Kill()
	_ = server.Wait()
	good.next(t, &second)
	good.next(t, &second)
	if second.OK != 0 || second.Failed < 30 || second.Streams != 0 || second.StreamFailed == 0 {
		t.Errorf("a second without a server: %+v", second)
	}
	_ = good.Process.Signal(syscall.SIGTERM)
	for !second.Summary {
		second = counts{}
		good.next(t, &second)
	}
	if second.OK < 80 || second.Failed < 30 || second.Wrong != 0 || second.StreamFailed < 3 {
		t.Errorf("the summary: %+v", second)
	}
	if err := good.Wait(); err != nil {
		t.Errorf("load ends with %v", err)
	}

	d = dialResult{}
	refused := start(t, file, nil, "dial", address)
	refused.next(t, &d)
	if d.OK || d.Error == "" {
		t.Errorf("dial to nobody: %+v", d)
	}
	if err := refused.Wait(); err == nil {
		t.Error("dial to nobody ends with 0")
	}
}

// Defends pods of tests from outliving their deletion by half a minute: a
// container's first process ignores signals that it does not handle.
func TestHoldEnds(t *testing.T) {
	p := start(t, program(t), nil, "hold")
	time.Sleep(100 * time.Millisecond)
	_ = p.Process.Signal(syscall.SIGTERM)
	ctx, cancel := context.WithTimeout(t.Context(), 5*time.Second)
	defer cancel()
	ended := make(chan error, 1)
	go func() { ended <- p.Wait() }()
	select {
	case err := <-ended:
		if err != nil {
			t.Errorf("hold ends with %v", err)
		}
	case <-ctx.Done():
		t.Fatal("hold does not end")
	}
}
