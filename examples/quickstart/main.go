// Command quickstart shows a mesh at work on one machine: it starts the documents
// of this folder in throwaway network namespaces, lets unmodified programs
// talk through them, and checks everything it shows against the audit.
//
// It works as root and, through a user namespace, as an ordinary user. All it
// makes is in namespaces of its own, with its files on a tmpfs there, so that
// nothing is left behind however it ends.
//
//	quickstart [-bin DIR]
//
// KEEP=1 leaves the mesh running at the end, until Ctrl-C. SIGNET_ENVOY names
// the proxy. NO_COLOR is honoured.
package main

import (
	"context"
	"errors"
	"flag"
	"fmt"
	"os"
	"os/signal"
	"path/filepath"
	"strconv"
	"syscall"
	"time"

	"github.com/signet-mesh/signet/internal/lab"
	"github.com/signet-mesh/signet/internal/output"
)

// limit bounds a run that does not wait for Ctrl-C at its end.
const limit = 60 * time.Second

// outerVar hands the process id that the user sees to the process inside the
// namespaces, which has another one there.
const outerVar = "SIGNET_QUICKSTART_PID"

func main() {
	bin := flag.String("bin", "bin", "`directory` of signet, signet-control, signet-agent and signet-proxy")
	flag.Parse()
	if os.Getenv(outerVar) == "" {
		if err := os.Setenv(outerVar, strconv.Itoa(os.Getpid())); err != nil {
			fail(err)
		}
	}
	if _, err := lab.Isolate(); err != nil {
		fail(err)
	}
	ctx, stop := signal.NotifyContext(context.Background(), syscall.SIGINT, syscall.SIGTERM, syscall.SIGHUP)
	defer stop()
	result, err := run(ctx, *bin)
	switch {
	case ctx.Err() != nil && result == "":
		fail(errors.New("interrupted; nothing is left behind"))
	case err != nil:
		fail(err)
	}
	fmt.Println(result)
}

func fail(err error) {
	fmt.Fprintln(os.Stderr, "quickstart: FAILED:", err)
	os.Exit(1)
}

// run returns the last line to print, once everything is stopped.
func run(ctx context.Context, bin string) (result string, err error) {
	bin, err = filepath.Abs(bin)
	if err != nil {
		return "", err
	}
	q := &quickstart{
		bin:    bin,
		envoy:  os.Getenv("SIGNET_ENVOY"),
		screen: &screen{w: os.Stdout, color: output.ColorAuto.Use(os.Stdout, os.Getenv)},
		seen:   map[flow]int{},
	}
	shown, cancel := context.WithTimeoutCause(ctx, limit, fmt.Errorf("it took longer than %s", limit))
	defer cancel()
	defer func() { err = errors.Join(err, q.close()) }()
	if err := q.show(shown); err != nil {
		if cause := context.Cause(shown); cause != nil {
			err = fmt.Errorf("%w (%w)", err, cause)
		}
		return "", q.explain(err)
	}
	result = q.result()
	if os.Getenv("KEEP") != "" && os.Getenv("KEEP") != "0" {
		if err := q.keep(ctx, result); err != nil {
			return "", q.explain(err)
		}
	}
	return result, nil
}
