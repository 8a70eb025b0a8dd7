// Command signet-cni is the CNI plugin that holds a pod's start until the
// agent on the node has captured it. It is chained after the plugins that
// give the pod its interfaces and changes nothing about them: it asks the
// agent and passes the result of those before it on.
//
// `signet-cni install` puts this program and its entry in place and keeps
// them there; `signet-cni remove` takes both away. See package cniconf for
// what each does, and for how a release that is deleted is noticed.
package main

import (
	"context"
	"fmt"
	"os"
	"os/signal"
	"syscall"
)

// version is set when the program is linked.
var version = "dev"

func main() {
	if len(os.Args) < 2 {
		if err := plugin(); err != nil {
			_ = err.Print() // on standard output, for the runtime; where else to say that this failed
			os.Exit(1)
		}
		return
	}
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt, syscall.SIGTERM)
	err := command(ctx, os.Args[1], os.Args[2:])
	stop()
	if err != nil {
		fmt.Fprintln(os.Stderr, "signet-cni:", err)
		os.Exit(1)
	}
}
