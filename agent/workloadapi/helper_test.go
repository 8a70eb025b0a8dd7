package workloadapi

import (
	"bufio"
	"context"
	"crypto/tls"
	"fmt"
	"io"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/spiffe/go-spiffe/v2/spiffetls/tlsconfig"
	"github.com/spiffe/go-spiffe/v2/workloadapi"
	"go.uber.org/goleak"
	"google.golang.org/grpc/status"
)

// The test binary, copied and started with helperEnv set, is a workload.
const (
	helperEnv = "WORKLOAD_HELPER"
	addrEnv   = "WORKLOAD_ADDR"
)

func TestMain(m *testing.M) {
	if mode := os.Getenv(helperEnv); mode != "" {
		if err := helper(mode, os.Getenv(addrEnv)); err != nil {
			fmt.Println("error:", err)
			os.Exit(1)
		}
		return
	}
	goleak.VerifyTestMain(m)
}

func helper(mode, addr string) error {
	ctx, cancel := context.WithTimeout(context.Background(), time.Minute)
	defer cancel()
	switch mode {
	case "fetch": // prints the identity, or the code of the refusal
		s, err := workloadapi.FetchX509SVID(ctx, workloadapi.WithAddr(addr))
		if err != nil {
			fmt.Println(status.Code(err))
			return nil
		}
		fmt.Println(s.ID)
		_, err = workloadapi.FetchX509Bundles(ctx, workloadapi.WithAddr(addr))
		return err
	case "serve": // echoes over mTLS to sa/web, until its input ends
		src, err := workloadapi.NewX509Source(ctx, workloadapi.WithClientOptions(workloadapi.WithAddr(addr)))
		if err != nil {
			return err
		}
		defer src.Close()
		ln, err := tls.Listen("tcp", "127.0.0.1:0", tlsconfig.MTLSServerConfig(src, src, tlsconfig.AuthorizeID(sa("web"))))
		if err != nil {
			return err
		}
		fmt.Println(ln.Addr())
		go func() {
			_, _ = io.Copy(io.Discard, os.Stdin) // until the test ends
			os.Exit(0)
		}()
		for {
			c, err := ln.Accept()
			if err != nil {
				return err
			}
			go func() {
				defer c.Close()
				_, _ = io.Copy(c, c) // a refused handshake is the client's to report
			}()
		}
	}
	return fmt.Errorf("no mode %q", mode)
}

// program copies the test binary under a name of its own.
func (a *agent) program(name string) string {
	a.t.Helper()
	own, err := os.Executable()
	if err != nil {
		a.t.Fatal(err)
	}
	raw, err := os.ReadFile(own)
	if err != nil {
		a.t.Fatal(err)
	}
	path := filepath.Join(a.dir, name)
	if err := os.WriteFile(path, raw, 0o755); err != nil {
		a.t.Fatal(err)
	}
	return path
}

// run starts argv as a helper and returns its first line.
func (a *agent) run(mode string, argv ...string) string {
	a.t.Helper()
	c := exec.Command(argv[0], argv[1:]...)
	c.Env = append(os.Environ(), helperEnv+"="+mode, addrEnv+"=unix://"+a.socket)
	c.Stderr = os.Stderr
	in, err := c.StdinPipe()
	if err != nil {
		a.t.Fatal(err)
	}
	out, err := c.StdoutPipe()
	if err != nil {
		a.t.Fatal(err)
	}
	if err := c.Start(); err != nil {
		a.t.Fatal(err)
	}
	r := bufio.NewReader(out)
	line, err := r.ReadString('\n')
	a.t.Cleanup(func() {
		in.Close()
		rest, _ := io.ReadAll(r)
		if err := c.Wait(); err != nil {
			a.t.Errorf("%s: %v: %s", argv, err, rest)
		}
	})
	if err != nil {
		a.t.Fatalf("%s: %v", argv, err)
	}
	return strings.TrimSpace(line)
}
