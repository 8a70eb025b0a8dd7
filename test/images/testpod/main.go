// Command testpod is what runs in the pods of tests on a cluster: a server that
// says which pod it is, and callers that count what they get.
//
//	testpod serve --port N [--echo-port N] [--grpc-port N] [--tls-port N]
//	              [--first-instruction]
//	testpod dial ADDR [--timeout D]
//	testpod load ADDR [--rate N] [--conns N] [--echo ADDR] [--want PREFIX] [--idle D]
//	             [--mark TEXT] [--every D]
//	testpod tls ADDR --id SPIFFE-ID [--every D]
//	testpod identity SOCKET [--timeout D]
//	testpod hold
//
// Everything it prints is lines of JSON. SIGTERM and SIGINT end it.
package main

import (
	"context"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"net"
	"os"
	"os/signal"
	"slices"
	"strconv"
	"strings"
	"sync"
	"syscall"
	"time"
)

// exitFailed is the exit code of a dial that did not get an answer.
const exitFailed = 1

func main() {
	// Before anything else, as a pod's first process may do it: a pod is
	// captured before this, or this gets through.
	early := first(os.Args[1:])
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := run(ctx, os.Args[1:], early)
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "testpod:", err)
		os.Exit(exitFailed)
	}
}

// done is what main did before it read its arguments properly.
type done struct {
	start    time.Time
	conn     net.Conn
	listener net.Listener
	err      error
}

// first dials, or listens, if that is what the arguments ask for.
func first(args []string) (d done) {
	d.start = time.Now()
	switch {
	case len(args) > 1 && args[0] == "dial":
		d.conn, d.err = net.DialTimeout("tcp", args[1], 30*time.Second)
	case len(args) > 0 && args[0] == "serve" && slices.Contains(args, "--first-instruction"):
		d.listener, d.err = net.Listen("tcp", net.JoinHostPort("", valueOf(args, "--port", defaultPort)))
	}
	return d
}

const defaultPort = "8080"

// valueOf finds a flag in arguments that nobody has parsed yet.
func valueOf(args []string, name, otherwise string) string {
	for i, a := range args {
		if v, ok := strings.CutPrefix(a, name+"="); ok {
			return v
		}
		if a == name && i+1 < len(args) {
			return args[i+1]
		}
	}
	return otherwise
}

func run(ctx context.Context, args []string, early done) error {
	if len(args) == 0 {
		return errors.New("say what to do: serve, dial, load, tls, identity or hold")
	}
	switch args[0] {
	case "serve":
		return serve(ctx, args[1:], early)
	case "dial":
		return dial(args[1:], early)
	case "load":
		return load(ctx, args[1:])
	case "tls":
		return callTLS(ctx, args[1:])
	case "identity":
		return askIdentity(ctx, args[1:])
	case "hold":
		<-ctx.Done()
		return nil
	}
	return fmt.Errorf("%q is none of serve, dial, load, tls, identity and hold", args[0])
}

// parse reads flags that stand before, between and after other arguments, and
// returns those.
func parse(f *flag.FlagSet, args []string) ([]string, error) {
	var rest []string
	for {
		if err := f.Parse(args); err != nil {
			return nil, err
		}
		if f.NArg() == 0 {
			return rest, nil
		}
		rest = append(rest, f.Arg(0))
		args = f.Args()[1:]
	}
}

// identity is what /id answers: the pod's name.
func identity() string {
	if name := os.Getenv("POD_NAME"); name != "" {
		return name
	}
	name, err := os.Hostname()
	if err != nil {
		return "unknown"
	}
	return name
}

// printed guards standard output: a line is printed whole.
var printed sync.Mutex

func printLine(v any) {
	line, err := json.Marshal(v)
	if err != nil {
		line = []byte(strconv.Quote(err.Error()))
	}
	printed.Lock()
	defer printed.Unlock()
	_, _ = os.Stdout.Write(append(line, '\n'))
}
