// Command signet is the command line of the mesh: it starts a mesh on one
// machine, checks machines and policies, and asks a running mesh what it does
// and why.
package main

import (
	"context"
	"os"
	"os/signal"
	"path/filepath"
	"syscall"
	"time"
)

func main() {
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	a := &app{in: os.Stdin, out: os.Stdout, err: os.Stderr, getenv: os.Getenv, now: time.Now}
	code := a.run(ctx, a.called(filepath.Base(os.Args[0]), os.Args[1:]))
	stop()
	os.Exit(code)
}
